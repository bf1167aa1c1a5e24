"""From a run to every kind of artefact; and what must not pass the gate."""

import json
import re
import shutil

import pytest
import torch
from gguf import GGUFWriter
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.export.conftest import run
from twinlora.adapters import passport
from twinlora.adapters.files import load_adapter, read_adapter
from twinlora.adapters.merge import Merged
from twinlora.config import EvalOptions, ExportOptions, MergeOptions
from twinlora.errors import AdapterError, BackendError, ConfigError, DataError, ModelError, ParityError
from twinlora.evaluate.evaluate import evaluate
from twinlora.export import families, gguf_lora, ship
from twinlora.export import gguf as gguf_files
from twinlora.export.llama_cpp import LlamaCpp
from twinlora.export.subject import Subject
from twinlora.model.load import load_model, resolve
from twinlora.reporter import Reporter

pytest.importorskip("xllamacpp")
IDS = torch.arange(3, 40)[None]


def export(adapter, out, to, **options):
    return ship.export(ExportOptions(run=adapter, output=out, to=to, rows=6, **options))


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def peft_logits(base, adapter):
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(stock, read_adapter(adapter).directory))


def near(a, b, limit):
    return (a - b).norm() < limit * b.norm()


def test_a_merged_checkpoint_is_pefts_model(lora, base, tmp_path):
    record = ship.merge(MergeOptions(run=lora, output=tmp_path / "m", rows=6))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    expected = peft_logits(base, lora)
    assert near(logits(merged), expected, 0.02)
    assert not near(logits(AutoModelForCausalLM.from_pretrained(base)), expected, 0.2)  # the adapter does something
    assert record["parity"]["runtime"] == "transformers"
    assert json.loads((tmp_path / "m" / "parity.json").read_text())["parity"]["problems"] == []
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    ours = evaluate(EvalOptions(model=str(base), adapter=lora, data=_rows(lora), metric=["loss"]))
    theirs = evaluate(EvalOptions(model=str(tmp_path / "m"), data=_rows(lora), metric=["loss"]))
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=0.02)


def test_small_updates_vanish_in_bfloat16_and_are_kept_in_float16(base, rows, tmp_path):
    """Three small steps: what they add is below the last place of many weights."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "base")
    trained = run(tmp_path / "base", rows, tmp_path / "run", method="lora", lr=5e-4)
    kls = {}
    for weights in ("bfloat16", "float16", "float32"):
        options = MergeOptions(run=trained, output=tmp_path / weights, rows=6, weights=weights, max_kl=1.0)
        record = ship.merge(options)
        kls[weights] = record["parity"]["kl_mean"]
        assert record["dtype"] == weights
    assert kls["float32"] <= kls["float16"] < 0.1 * kls["bfloat16"]


def _rows(run_directory):
    return json.loads((run_directory / "run.json").read_text())["options"]["data"]


@pytest.mark.parametrize(
    "options",
    [
        {"dora": True},
        {"init": "pissa"},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "norm"]},
    ],
    ids=str,
)
def test_variants_are_folded_as_peft_computes_them(options, base, rows, tmp_path):
    trained = run(base, rows, tmp_path / "run", method="lora", **options)
    ship.merge(MergeOptions(run=trained, output=tmp_path / "m", rows=6))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert near(logits(merged), peft_logits(base, trained), 0.02)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_tied_head_that_was_trained_is_untied(module, tiny, rows, tmp_path):
    trained = run(tiny, rows, tmp_path / "run", method="lora", modules_to_save=[module])
    ship.merge(MergeOptions(run=trained, output=tmp_path / "m", rows=6))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert not merged.config.tie_word_embeddings
    assert "lm_head.weight" in load_file(tmp_path / "m" / "model.safetensors")
    assert near(logits(merged), peft_logits(tiny, trained), 0.02)


def test_both_bases_of_a_quantised_run_are_measured(qlora, tmp_path):
    record = ship.merge(MergeOptions(run=qlora, output=tmp_path / "m", rows=24))
    choice = record["choice"]
    assert set(choice["candidates"]) == {"16bit", "dequantised"}
    assert 0 < choice["candidates"]["dequantised"]["kl"] < choice["candidates"]["16bit"]["kl"]
    assert choice["candidates"]["dequantised"]["loss"] == pytest.approx(choice["trained_loss"], rel=0.02)
    assert record["base"] == choice["base"]
    assert list((tmp_path).iterdir()) == [tmp_path / "m"]  # the candidates are gone


def test_the_lower_loss_decides_where_it_is_clear_else_the_nearer_one():
    from twinlora.export.choose import Candidate, _decide

    found = {"16bit": Candidate(0.2, 1.0), "dequantised": Candidate(0.01, 1.1)}
    assert _decide(found, (-0.1, -0.2, -0.05))[0] == "16bit"
    assert _decide(found, (0.1, 0.05, 0.2))[0] == "dequantised"
    assert _decide(found, (-0.1, -0.2, 0.1))[0] == "dequantised"


def test_both_bases_of_a_hybrid_run_are_measured(hybrid, base, tmp_path):
    """The dequantised one is each layer's own format, and what it was trained on."""
    record = ship.merge(MergeOptions(run=hybrid, output=tmp_path / "m", rows=24))
    candidates = record["choice"]["candidates"]
    assert 0 < candidates["dequantised"]["kl"] < 0.01 < candidates["16bit"]["kl"]
    assert candidates["dequantised"]["loss"] == pytest.approx(record["choice"]["trained_loss"], rel=0.02)
    ship.merge(MergeOptions(run=hybrid, output=tmp_path / "d", rows=6, base="dequantised"))
    layers = passport.read(read_adapter(hybrid).directory).layer_precision
    trained = load_model(resolve(str(base)), quantize=layers, dtype=torch.float32)
    load_adapter(trained, read_adapter(hybrid))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "d", dtype=torch.float32))
    assert near(merged, logits(trained), 0.02)
    assert not near(merged, peft_logits(base, hybrid), 0.02)


@pytest.mark.parametrize("to", ["gguf", "gguf-lora", "peft"])
def test_a_hybrid_run_is_exported(to, hybrid, tmp_path):
    record = export(hybrid, tmp_path / "out", to, base="dequantised")
    assert record["base"] == "dequantised"
    assert record["parity"]["kl_mean"] < 1e-3


def test_layers_of_unknown_formats_are_refused(hybrid, tmp_path):
    """A passport of several formats that does not say which layer has which."""
    shutil.copytree(read_adapter(hybrid).directory, tmp_path / "a")
    paper = passport.read(tmp_path / "a")
    (tmp_path / "a" / passport.FILE).write_text(paper.model_copy(update={"layer_precision": None}).model_dump_json())
    with pytest.raises(AdapterError, match=r"trained on nf3-64-dq256 and .*does not say which layer had which"):
        export(tmp_path / "a", tmp_path / "out", "merged", data=_rows(hybrid))


@pytest.mark.parametrize("kind", ["16bit", "dequantised"])
def test_a_quantised_run_merges_into_the_base_that_is_asked_for(kind, qlora, base, tmp_path):
    record = ship.merge(MergeOptions(run=qlora, output=tmp_path / "m", rows=6, base=kind))
    assert (record["base"], record["choice"]) == (kind, None)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32))
    assert near(merged, peft_logits(base, qlora), 0.02) == (kind == "16bit")


@pytest.mark.parametrize(
    ("to", "quant"),
    [("gguf", "f16"), ("gguf", "bf16"), ("gguf", "q8_0"), ("gguf-lora", "f16"), ("peft", "f16")],
)
def test_every_kind_passes_the_gate(to, quant, lora, tmp_path):
    record = export(lora, tmp_path / "out", to, quant=quant)
    assert record["parity"]["kl_mean"] < record["parity"]["limits"]["kl"]
    assert (tmp_path / "out" / "parity.json").is_file()


@pytest.mark.parametrize(("to", "quant"), [("bnb", "f16"), ("gguf", "q4_0"), ("gguf", "iq4_nl")])
def test_four_bits_of_a_random_model_need_a_wider_limit(to, quant, lora, tmp_path):
    """Its weights are all noise, so that rounding them changes much; the gate says so, or is told what to allow."""
    record = export(lora, tmp_path / "out", to, quant=quant, max_kl=5.0)
    assert 0.001 < record["parity"]["kl_mean"] < 5.0


def test_a_k_quant_is_made_by_llama_quantize(lora, tmp_path):
    try:
        gguf_files.find_llama_quantize()
    except BackendError as error:
        pytest.skip(str(error))
    record = export(lora, tmp_path / "out", "gguf", quant="q5_1", max_kl=5.0)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.suffix == ".gguf"] == ["run-q5_1.gguf"]
    assert 1e-4 < record["parity"]["kl_mean"] < 5.0


def test_a_quantised_run_goes_to_llama_cpp_on_either_base(qlora, tmp_path):
    for base in ("16bit", "dequantised"):
        for to in ("gguf", "gguf-lora"):
            record = export(qlora, tmp_path / f"{base}-{to}", to, base=base)
            assert record["parity"]["kl_mean"] < 1e-3


def trapped(adapter, out, to, **options) -> str:
    with pytest.raises(ParityError) as error:
        export(adapter, out, to, **options)
    assert not out.exists(), "the artefact must be deleted"
    assert list(out.parent.glob(".*")) == []
    return str(error.value)


@pytest.mark.parametrize("to", ["gguf", "gguf-lora"])
def test_unpermuted_rows_do_not_pass(to, lora, tmp_path, monkeypatch):
    arranged, right = families.arranged, families.pair_rows
    if to == "gguf":
        monkeypatch.setattr(families, "pair_rows", lambda weight, heads: weight)
    else:  # the base that it is compared on is right, only the adapter's B is not

        def wrong(weight, name, family, config):
            is_b = weight.dim() == 2 and weight.shape[1] in (4, 8)
            return weight if is_b else arranged(weight, name, family, config)

        monkeypatch.setattr(families, "arranged", wrong)
    assert right(torch.arange(8.0)[:, None], 1).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    message = trapped(lora, tmp_path / "out", to)
    assert "kl" in message
    assert re.search(r"self_attn.[kq]_proj", message.splitlines()[1])
    assert "is off by" in message


def test_a_wrong_template_does_not_pass(lora, tmp_path, monkeypatch):
    def wrong(self, template):
        self.add_string("tokenizer.chat_template", template.replace("assistant", "bot"))

    monkeypatch.setattr(GGUFWriter, "add_chat_template", wrong)
    message = trapped(lora, tmp_path / "out", "gguf")
    assert "template: " in message
    assert "'bot" in message
    assert "expected 'assistant" in message


def test_a_missing_stop_token_does_not_pass(lora, tmp_path, monkeypatch):
    monkeypatch.setattr(GGUFWriter, "add_eos_token_id", lambda self, token: None)
    message = trapped(lora, tmp_path / "out", "gguf")
    assert "stop tokens: answers do not end at <|done|>" in message


@pytest.mark.parametrize("to", ["gguf", "gguf-lora", "merged"])
def test_a_swapped_adapter_does_not_pass(to, lora, other, tmp_path, monkeypatch):
    if to == "gguf-lora":
        write = gguf_lora.write_gguf_lora
        monkeypatch.setattr(ship, "write_gguf_lora", lambda adapter, *rest: write(read_adapter(other), *rest))
    else:
        swapped = read_adapter(other)
        monkeypatch.setattr(Subject, "merged", lambda self, fmt: Merged(self.checkpoint, swapped, fmt))
    message = trapped(lora, tmp_path / "out", to)
    assert "first at" in message
    assert "trained" in message


def test_an_adapter_that_llama_cpp_cannot_add_is_refused(base, rows, tmp_path):
    trained = run(base, rows, tmp_path / "run", method="lora", dora=True, modules_to_save=["lm_head"])
    with pytest.raises(AdapterError, match=r"no DoRA and no modules_to_save \(lm_head\).*\ntwinlora export|fold it in"):
        export(trained, tmp_path / "out", "gguf-lora")


def test_what_cannot_be_written_is_refused_before_anything_is_measured(qlora, tmp_path, monkeypatch):
    monkeypatch.setattr(ship, "choose_base", None)  # it would take long
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gguf_files, "_PACKAGE", "no_such_package")
    with pytest.raises(BackendError, match="llama-quantize, which is not on PATH"):
        export(qlora, tmp_path / "out", "gguf", quant="q4_k_m")
    monkeypatch.delitem(families.FAMILIES, "llama")
    with pytest.raises(ModelError, match="llama models are not supported"):
        export(qlora, tmp_path / "out", "gguf")


def test_all_weights_of_a_full_run_are_exported(base, rows, tmp_path):
    trained = run(base, rows, tmp_path / "run", method="full", lr=1e-3)
    record = export(trained, tmp_path / "out", "gguf", data=[str(rows)])
    assert record["parity"]["kl_mean"] < 1e-3
    with pytest.raises(AdapterError, match="all weights were trained, there is no adapter"):
        export(trained, tmp_path / "peft", "peft", data=[str(rows)])


def test_an_output_is_not_replaced_unasked(lora, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists; give --overwrite"):
        export(lora, tmp_path / "out", "peft")


def test_without_rows_there_is_no_gate(lora, base, tmp_path):
    adapter = read_adapter(lora).directory
    lone = tmp_path / "lone"
    lone.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "twinlora.json"):
        (lone / name).write_bytes((adapter / name).read_bytes())
    with pytest.raises(DataError, match="no rows to compare on are known; give some with --data"):
        export(lone, tmp_path / "out", "merged")
    notes = []
    reporter = Reporter()
    reporter.note = notes.append
    record = ship.export(ExportOptions(run=lone, output=tmp_path / "out", to="merged", gate=False), reporter)
    assert record["parity"] is None
    assert "NOT compared with the trained model (--no-gate)" in notes
    assert not (tmp_path / "out" / "parity.json").exists()


def test_the_edge_report_measures_both_files(lora, tmp_path):
    edge = export(lora, tmp_path / "out", "gguf", quant="q8_0", edge=True)["edge"]
    assert edge["measured"]["q8_0"]["file_bytes"] < edge["measured"]["f16"]["file_bytes"]
    assert all(cost["new_tokens_per_second"] > 0 and cost["peak_rss_bytes"] > 0 for cost in edge["measured"].values())
    assert len(edge["phones"]) == 2
    assert sorted(p.suffix for p in (tmp_path / "out").iterdir()) == [".gguf", ".json"]


def test_a_gguf_lora_is_pefts_model_in_llama_cpp(lora, base, tmp_path):
    """Swapped on and off by the server, over a GGUF of the bare base."""
    export(lora, tmp_path / "out", "gguf-lora")
    from twinlora.export.gguf import write_gguf
    from twinlora.export.probes import Probe
    from twinlora.model.checkpoint import Checkpoint
    from twinlora.model.load import resolve

    tokenizer = AutoTokenizer.from_pretrained(base)
    bare = Merged(Checkpoint(resolve(str(base))), None)
    write_gguf(bare, tmp_path / "base.gguf", tokenizer, quant="f16", name="b", stop={tokenizer.eos_token_id})
    expected = torch.log_softmax(peft_logits(base, lora)[0], dim=-1)
    probe = Probe(IDS[0].tolist(), [5, 20], "r")
    with LlamaCpp(tmp_path / "base.gguf", lora=next((tmp_path / "out").glob("*.gguf")), context=256) as running:
        for answer, position in zip(running.answers([probe], tokenizer), probe.positions, strict=True):
            assert (expected[position - 1][answer.ids] - answer.log_probs).abs().max() < 0.03
