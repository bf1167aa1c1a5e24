"""`twinlora merge` and `twinlora export` as they are typed."""

import json

import pytest

from twinlora.cli.main import main

pytest.importorskip("xllamacpp")


def test_merge_prints_the_candidates_and_the_gate(qlora, tmp_path, capsys):
    assert main(["merge", str(qlora), "--output", str(tmp_path / "m")]) == 0
    shown = capsys.readouterr().out
    for part in ("folded into", "dequantised", "kept", "KL, nats", "top-1 agreement", f"written: {tmp_path / 'm'}"):
        assert part in shown


def test_export_prints_json_and_the_edge_report(lora, tmp_path, capsys):
    command = ["export", str(lora), "--to", "gguf", "--quant", "Q8_0", "--output", str(tmp_path / "m"), "--edge"]
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["quant"] == "q8_0"
    assert record["parity"]["stop_tokens"] == "same"
    assert main([*command, "--overwrite"]) == 0
    shown = capsys.readouterr().out
    for part in ("llama.cpp, ", "in llama.cpp here", "peak memory", "estimate for a phone"):
        assert part in shown


def test_a_failed_gate_is_one_message_and_status_1(lora, tmp_path, capsys):
    command = [
        "export",
        str(lora),
        "--to",
        "gguf",
        "--quant",
        "q4_0",
        "--output",
        str(tmp_path / "m"),
        "--max-kl",
        "1e-9",
    ]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "in llama.cpp it does not answer as the trained model does, and was deleted" in error
    assert "first at" in error
    assert not (tmp_path / "m").exists()


def test_wrong_options_are_status_2(lora, tmp_path, capsys):
    out = ["--output", str(tmp_path / "m")]
    assert main(["export", str(tmp_path), "--to", "gguf", *out]) == 2
    assert "no adapter_config.json" in capsys.readouterr().err
    assert main(["export", str(lora), "--to", "peft", "--edge", *out]) == 2
    assert "edge measures GGUF files in llama.cpp: it needs to gguf" in capsys.readouterr().err
    assert main(["export", str(lora), "--to", "gguf-lora", "--quant", "q4_k_m", *out]) == 2
    assert "quant q4_k_m: the base for comparing is one of f16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--to", "gguf", "--quant", "q4km"], "'q4km' is not known, did you mean q4_k_m?; expected one of f16"),
        (["--to", "merged", "--quant", "q4_0"], "quant is of GGUF files: it needs to gguf or gguf-lora"),
        (["--to", "gguf", "--weights", "float16"], "weights is of 16-bit and bnb checkpoints: it needs to merged or"),
        (["--to", "gguf", "--block-size", "32"], "block_size: of 4-bit checkpoints alone, they need to bnb"),
        (["--to", "peft", "--no-gate", "--max-kl", "1"], "max_kl is the gate's limit, and no-gate has none"),
        (["--to", "gguf", "--max-kl", "inf"], "max_kl"),
        (["--to", "bnb", "--block-size", "63"], "block"),
    ],
    ids=str,
)
def test_options_that_would_do_nothing_are_refused(given, said, lora, tmp_path, capsys):
    assert main(["export", str(lora), *given, "--output", str(tmp_path / "m")]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_paths_are_shown_as_they_are(lora, tmp_path, capsys):
    """Brackets and colons mean something to rich."""
    out = tmp_path / "[red]合并:cat:"
    assert main(["merge", str(lora), "--output", str(out), "--rows", "2"]) == 0
    assert f"written: {out}" in capsys.readouterr().out
    rows = json.loads((lora / "run.json").read_text())["options"]["data"][0]
    new = tmp_path / "[red]small:cat:"
    command = ["adapter", "compress", str(lora), "--rank", "1", "--output", str(new), "--data", rows, "--rows", "2"]
    assert main(command) == 0
    assert capsys.readouterr().out.count(str(new)) == 2
