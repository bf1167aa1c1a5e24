"""Sensitivity against measured divergence on a tiny model, its rows, its cache."""

import pytest
import torch

from tests.conftest import chat, write_jsonl
from twinlora.data.examples import encode_rows
from twinlora.data.sources import read_rows
from twinlora.model.fingerprint import fingerprint
from twinlora.model.linear import QuantLinear
from twinlora.model.load import load_model, resolve
from twinlora.numerics import ops
from twinlora.numerics.formats import DENSE, Int8Format, NF3Format, NF4Format
from twinlora.plan import sensitivity

FORMATS = [NF3Format(), NF4Format(), Int8Format()]


@pytest.fixture
def rows(tokenizer, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", [chat(f"say {'ab' * (i % 5)} {i}", f"word {i}") for i in range(40)])
    return sensitivity.calibration_rows(encode_rows(tokenizer, read_rows(data), 512))


@pytest.fixture
def measure(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = resolve(str(tiny))
    notes = []

    def run(rows, formats=FORMATS):
        kept = {"fingerprint": fingerprint(source), "dtype": torch.float32, "device": torch.device("cpu")}
        return sensitivity.measure(source, rows, formats, note=notes.append, **kept)

    run.notes = notes
    return run


@torch.no_grad()
def divergence(model, base, rows):
    """KL(base || model) of the next-token distributions, nats per token."""
    total = 0.0
    for row in rows:
        ids = torch.tensor([row])
        wanted, found = (m(ids).logits[0].log_softmax(-1) for m in (base, model))
        total += (wanted.exp() * (wanted - found)).sum().item()
    return total / sum(map(len, rows))


def test_rises_are_those_that_are_measured(tiny, rows, measure):
    found = measure(rows)
    base, model = (load_model(resolve(str(tiny)), dtype=torch.float32) for _ in range(2))
    names = list(found.rises)
    assert len(names) == 14
    ratios = []
    for name in names:
        layer = model.get_submodule(name)
        kept = layer.weight.detach().clone()
        for fmt in (NF3Format(), NF4Format()):
            layer.weight.data = ops.quantize(kept, fmt).dequantize(torch.float32)
            ratios.append(found.rises[name][fmt.name] / divergence(model, base, rows))
        layer.weight.data = kept
    logs = torch.tensor(ratios).log()
    assert logs.mean().abs() < 0.4, "right on average"
    assert logs.std() < 0.6, "and layer by layer"


def test_layers_and_formats_are_all_there(tiny, rows, measure):
    found = measure(rows)
    assert found.tokens == sum(map(len, rows))
    for name, rises in found.rises.items():
        assert list(rises) == [DENSE, "nf3-64-dq256", "nf4-64-dq256", "int8-64"], name
        assert 0 == rises[DENSE] < rises["int8-64"] < rises["nf4-64-dq256"] < rises["nf3-64-dq256"]
    model = load_model(resolve(str(tiny)), quantize=NF3Format(), dtype=torch.float32)
    sizes = found.sizes(torch.float32)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            assert sizes[name]["nf3-64-dq256"] == layer.stored_bytes
            assert sizes[name][DENSE] == 4 * layer.in_features * layer.out_features
    quantised = sum(sizes[name]["nf3-64-dq256"] for name in sizes)
    assert found.other_bytes == sum(p.nbytes for p in model.parameters()) - quantised


def test_measured_once_for_a_base_its_rows_and_formats(rows, measure, monkeypatch):
    first = measure(rows)
    loads = []
    original = sensitivity.load_model
    monkeypatch.setattr(sensitivity, "load_model", lambda *a, **k: loads.append(a) or original(*a, **k))
    assert measure(rows) == first
    assert not loads
    measure(rows[1:])
    measure(rows, FORMATS[:2])
    assert len(loads) == 4, "other rows or formats are measured anew, with two loads each"
    assert not measure.notes


def test_weights_that_are_stored_transposed(tmp_path, monkeypatch):
    """GPT-2 keeps [in, out]: the rise must be that of the layer as it multiplies."""
    from transformers import GPT2Config, GPT2LMHeadModel

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = GPT2Config(vocab_size=99, n_embd=64, n_layer=1, n_head=4, n_positions=64, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    source, rows = resolve(str(tmp_path / "gpt2")), [[i, 7, 2 * i, 50, 3] for i in range(12)]
    kept = {"fingerprint": "f", "dtype": torch.float32, "device": torch.device("cpu")}
    found = sensitivity.measure(source, rows, [NF3Format()], note=print, **kept)
    base = load_model(source, dtype=torch.float32)
    for name, rises in found.rises.items():
        layers = dict.fromkeys(found.rises, DENSE) | {name: "nf3-64-dq256"}
        measured = divergence(load_model(source, quantize=layers, dtype=torch.float32), base, rows)
        assert 0.4 < rises["nf3-64-dq256"] / measured < 2.5, name


def test_a_layer_that_no_row_reached_counts_as_the_mean():
    fisher = {
        "seen": (torch.tensor([2.0, 4.0]), torch.tensor([3.0, 3.0, 0.0])),
        "not": (torch.zeros(4), torch.zeros(2)),
    }
    assert sensitivity._fill_unseen(fisher, {"seen": 6, "not": 8}) == 1
    by_row, by_column = fisher["not"]
    torch.testing.assert_close(torch.outer(by_row, by_column) / by_row.sum(), torch.ones(4, 2))  # 6 / 6 each


def test_calibration_rows_are_spread_and_cut():
    class Row:
        def __init__(self, ids):
            self.ids = ids

    few = [Row([1, 2]), Row([3]), Row([4] * 999)]
    assert sensitivity.calibration_rows(few) == [[1, 2], [4] * 256]
    many = sensitivity.calibration_rows([Row([i, i]) for i in range(320)])
    assert [row[0] for row in many] == list(range(0, 320, 10))
