import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import write_jsonl
from twinlora.cli.main import main, parse_options
from twinlora.errors import ConfigError

REQUIRED = ["--model", "m", "--data", "d.jsonl", "--method", "lora", "--output", "o"]
COMPARE = ["--model", "m", "--data", "d", "--eval", "e", "--output", "o"]


def test_flags_override_the_recipe_which_overrides_defaults(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: m\ndata: d.jsonl\nmethod: qlora\noutput: o\nlr: 1e-3\nbatch-size: 4\neval: e.jsonl\n")
    options = parse_options("train", ["--config", str(recipe), "--lr", "0.5", "--method=lora"])
    assert (options.method, options.lr, options.batch_size, options.rank) == ("lora", 0.5, 4, 16)
    assert (options.data, options.eval) == (["d.jsonl"], ["e.jsonl"])


@pytest.mark.parametrize(
    "given",
    [["--target", "a,b"], ["--target", "a", "b"], ["--target", "a", "--target", "b"], ["--target=a", "--target=b"]],
)
def test_lists_in_every_way_people_write_them(given):
    assert parse_options("train", [*REQUIRED, *given, "--rank", "2"]).target == ["a", "b"]


def test_a_path_with_a_comma_is_one_path(tmp_path):
    rows = tmp_path / "a,b.jsonl"
    rows.touch()
    given = parse_options("train", [*REQUIRED, "--eval", str(rows), f"{rows}x,other.jsonl"])
    assert given.eval == [str(rows), f"{tmp_path}/a", "b.jsonlx", "other.jsonl"]


@pytest.mark.parametrize(
    "given, expected",
    [
        ([], "auto"),
        (["--gradient-checkpointing"], "on"),
        (["--gradient-checkpointing", "--rank", "2"], "on"),
        (["--gradient-checkpointing", "off"], "off"),
        (["--gradient-checkpointing=auto"], "auto"),
        (["--no-gradient-checkpointing"], "off"),
    ],
)
def test_a_switch_alone_is_on(given, expected):
    assert parse_options("train", [*REQUIRED, *given]).gradient_checkpointing == expected


@pytest.mark.parametrize("text, expected", [("true", "on"), ("off", "off"), ("no", "off"), ("auto", "auto")])
def test_recipes_may_say_true_and_false(tmp_path, text, expected):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"gradient_checkpointing: {text}\ndense-copies: off\noffload: [optimizer]\n")
    options = parse_options("train", ["--config", str(recipe), *REQUIRED])
    assert options.gradient_checkpointing == expected
    assert options.offload == ["optimizer"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("lr: fast", r"lr: Input should be a valid number.*\(got 'fast'\)"),
        ("speed: 1", "unknown option.s. speed; known: .*batch_size"),
        ("[1, 2]", "expected `option: value` lines, found list"),
        ("lr: [", "not readable as YAML"),
        ("rank: 0", "rank: .*greater than or equal to 1"),
        ("gradient_checkpointing: maybe", "gradient_checkpointing: .*'auto', 'on' or 'off'"),
        ("dense_copies: much", "dense_copies: .*expected a number with a unit"),
    ],
)
def test_wrong_recipes(tmp_path, text, message):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=rf"(?s)r\.yaml.*{message}"):
        parse_options("train", ["--config", str(recipe), *REQUIRED])
    with pytest.raises(ConfigError, match="no such file"):
        parse_options("train", ["--config", str(tmp_path / "none.yaml"), *REQUIRED])
    with pytest.raises(ConfigError, match="expected the path"):
        parse_options("train", [*REQUIRED, "--config"])


@pytest.mark.parametrize(
    "arguments, status, shown",
    [
        ([], 2, "usage: twinlora VERB"),
        (["--help"], 0, "compare"),
        (["--version"], 0, "twinlora 0."),
        (["trian"], 2, "did you mean train?"),
        (["train", *REQUIRED], 2, "model m: no such directory or file"),
        (["train", *REQUIRED, "--lr", "-1"], 2, "lr: Input should be greater than 0"),
        (["train", *REQUIRED, "--resume", "--overwrite"], 2, "exclude each other"),
        (["train", *REQUIRED, "--columns", "prompt=a,prompt=b"], 2, "a field is named twice"),
        (["train", *REQUIRED, "--rank-pattern", "q_proj=0.5"], 2, "ranks are whole numbers"),
        (["compare", *COMPARE, "--init", "loftq"], 2, "with it compare qlora alone"),
        (["compare", *COMPARE, "--lr", "5e-4"], 2, "give --lr-grid 0.0005 instead"),
        (["train", *REQUIRED, "--dense-copies", "4GiB"], 2, "dense_copies are of weights in 4 bit"),
        (
            ["train", *REQUIRED, "--block-size", "128"],
            2,
            "block_size: of quantised weights, which method lora has none",
        ),
        (["chat", "--model", "x", "--no-double-quant"], 2, "double_quant: of quantised weights, which precision 16bit"),
        (["chat", "--model", "m", "--adapter", "dir"], 2, "expected NAME=DIR"),
    ],
)
def test_statuses_and_messages(arguments, status, shown, capsys):
    assert main(arguments) == status
    captured = capsys.readouterr()
    assert shown in captured.out + captured.err
    assert "Traceback" not in captured.err


FULL = [*REQUIRED[:4], "--method", "full", "--output", "o"]
PLAN = ["plan", "llama-7b"]


@pytest.mark.parametrize(
    "arguments, shown",
    [
        (["train", *REQUIRED, "--goal", "speed"], "goal is what plan auto chooses for"),
        (["train", *REQUIRED, "--eval-every", "3"], "eval_every counts steps between evaluations: it needs eval"),
        (["train", *FULL, "--rank", "4"], "rank: of adapters, which method full has none of"),
        (["train", *FULL, "--dora", "--lora-plus-ratio", "16"], "dora and lora_plus_ratio: of adapters"),
        (["train", *FULL, "--modules-to-save", "norm"], "modules_to_save: of adapters"),
        (
            [*PLAN, "--data", "d.jsonl", "--length", "9", "--rows", "3"],
            "length and rows: of the rows of a plan without",
        ),
        ([*PLAN, "--score"], "score shows past runs alone"),
        (["plan", "--calibrate", "--score"], "score shows past runs alone"),
        (
            ["plan", "--data", "d.jsonl", "llama-65b"],
            "'llama-65b' is it and not data, it stands first: twinlora plan llama-65b",
        ),
        (["demo", "--hub", "--model", "m"], "hub and model name two base models"),
    ],
)
def test_what_would_have_no_effect_is_refused(arguments, shown, capsys):
    assert main(arguments) == 2
    assert shown in capsys.readouterr().err


def test_one_value_ends_config(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("rank: 4\n")
    for given in (["--config", str(recipe)], [f"--config={recipe}"]):
        assert parse_options("plan", [*given, "llama-65b"]).model == "llama-65b"
    with pytest.raises(ConfigError, match="expected the path of one YAML recipe"):
        parse_options("plan", ["--config", str(recipe), "--config", str(recipe), "llama-65b"])
    recipe.write_text("max-length: 9\n")
    options = parse_options("data check", ["--model", "m", "--config", str(recipe), "a.jsonl", "b.jsonl"])
    assert (options.max_length, options.data) == (9, ["a.jsonl", "b.jsonl"])
    recipe.write_text("to: peft\noutput: o\n")
    assert parse_options("export", ["--config", str(recipe), "runs/mine"]).run == Path("runs/mine")


def test_a_pattern_is_not_cut_within_its_brackets():
    options = parse_options(
        "train", [*REQUIRED, "--target", r"layers\.\d{1,2}\.up_proj,[kq]_proj,x\[1,[a,b]+", "--exclude", "a,b"]
    )
    assert options.target == [r"layers\.\d{1,2}\.up_proj", "[kq]_proj", r"x\[1", "[a,b]+"]
    assert options.exclude == ["a", "b"]


def test_recipes_by_the_names_of_flags_and_with_off(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("packing: off\nplan: off\njson: true\nfor: vllm\n")
    options = parse_options("train", ["--config", str(recipe), *REQUIRED])
    assert (options.packing, options.plan, options.json_output, options.program) == ("off", "off", True, "vllm")


@pytest.mark.parametrize(
    "text, name",
    [("batch-size: 4\nbatch_size: 8\n", "batch_size"), ("rank: 4\nrank: 4\n", "rank"),
     ("json: true\njson_output: false\n", "json_output")],
)  # fmt: skip
def test_an_option_that_a_recipe_gives_twice_is_refused(tmp_path, text, name):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=rf"r\.yaml: {name}: given more than once; keep one"):
        parse_options("train", ["--config", str(recipe), *REQUIRED])


def test_what_was_not_given_is_not_set(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("warmup-steps: 10\n")
    given = ["--config", str(recipe), *REQUIRED, "--rank=16", "--no-rslora", "--lr", "1"]
    known = {"model", "data", "method", "output", "warmup_steps", "rank", "rslora", "lr"}
    assert parse_options("train", given).model_fields_set == known


def test_a_terminal_without_these_characters(monkeypatch):
    from twinlora.cli.console import out, print_json

    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    assert main(["--help"]) == 0
    out.print("› ✓")
    print_json({"said": "你好"})
    text = raw.getvalue().decode("ascii")
    assert "? ?\n" in text
    assert json.loads(text[text.index("? ?") + 4 :]) == {"said": "你好"}


def test_unknown_flag_is_an_error_that_helps(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", *REQUIRED, "--leaning-rate", "1"])
    assert stop.value.code == 2
    assert "leaning-rate" in capsys.readouterr().err


def test_train_then_eval_then_inspect_json(tiny, data_file, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["train", "--model", str(tiny), "--data", str(data_file), "--eval", str(data_file), "--method", "qlora"]
    assert main([*arguments, "--output", str(run), "--batch-size", "8", "--json"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    promised = "steps loss eval_loss tokens tokens_per_second seconds peak_rss_bytes peak_device_bytes trainable_parameters adapter backend"
    assert set(promised.split()) <= set(record)
    assert "training 3/3" in captured.err
    assert (
        main(
            [
                "eval",
                "--model",
                str(tiny),
                "--adapter",
                str(run),
                "--data",
                str(data_file),
                "--metric",
                "loss",
                "--json",
            ]
        )
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"rows", "loss", "loss_interval", "perplexity", "perplexity_interval", "seconds"}
    assert result["loss"] == pytest.approx(record["eval_loss"], abs=0.02), "the NF4 base of the passport is used"
    said = tmp_path / "said.jsonl"
    arguments = ["eval", "--model", str(tiny), "--data", str(data_file), "--rows", "3", "--max-new-tokens", "2"]
    assert main([*arguments, "--output", str(said)]) == 0
    assert "0.0% to 56.1%  (0 of 3)" in capsys.readouterr().out
    lines = [json.loads(line) for line in said.read_text().splitlines()]
    assert [set(line) for line in lines] == [{"prompt", "expected", "output", "loss", "scores"}] * 3
    assert [line["scores"] for line in lines] == [{"exact-match": 0.0}] * 3
    assert main([*arguments, "--adapter", str(tmp_path)]) == 2
    assert "adapter_config.json" in capsys.readouterr().err


def test_adapter_of_another_base_is_refused(tiny, data_file, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["--data", str(data_file), "--batch-size", "8"]
    assert main(["train", "--model", str(tiny), "--method", "lora", "--output", str(run), *arguments]) == 0
    other = tmp_path / "other"
    subprocess.run(["cp", "-r", str(tiny), str(other)], check=True)
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    weights["model.embed_tokens.weight"][0, 0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert main(["eval", "--model", str(other), "--adapter", str(run), "--data", str(data_file)]) == 2
    message = capsys.readouterr().err
    assert str(tiny) in message
    assert str(other) in message


def test_help_needs_no_torch():
    code = "import sys; from twinlora.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    environment = {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "PATH": ""}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode == 0


def test_chat_of_a_pipe_is_one_document_with_json(tiny, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/adapters\nagain\n"))
    assert main(["chat", "--model", str(tiny), "--max-new-tokens", "4", "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert [(said["adapter"], said["question"]) for said in document["answers"]] == [(None, "hello"), (None, "again")]
    assert "none loaded" in captured.err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_prompt_of_a_chat_is_no_part_of_its_document(tiny, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", Terminal("hello\n"))
    assert main(["chat", "--model", str(tiny), "--max-new-tokens", "2", "--json"]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["answers"]) == 1
    assert captured.err.count("› ") == 2


def test_chat_switches_adapters(tiny, tmp_path, monkeypatch, capsys):
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": f"p{i}", "completion": "yes"} for i in range(160)])
    lora = ["--method", "lora", "--lr", "1e-2", "--batch-size", "8"]
    assert main(["train", "--model", str(tiny), "--data", str(data), "--output", str(tmp_path / "a"), *lora]) == 0
    capsys.readouterr()
    lines = iter(["hello", "/base", "hello", "/adapter mine", "hello", "/adapter none", "/adapters", "/what", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    arguments = ["chat", "--model", str(tiny), "--adapter", f"mine={tmp_path / 'a'}", "--max-new-tokens", "6"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    first, rest = captured.out.split("the base model answers\n")
    second, rest = rest.split("mine answers\n")
    third, names, hint, *_ = rest.split("\n")
    assert first.strip() == third != second.strip(), "the adapter, the base otherwise, the adapter again"
    assert names == "mine"
    assert "no adapter 'none'; loaded: mine" in captured.err
    assert hint.startswith("/adapter NAME")
    assert main([*arguments, "--adapter", f"mine={tmp_path / 'a'}"]) == 2
