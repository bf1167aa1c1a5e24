"""Rows of one batch with adapters of their own, against each adapter alone."""

import threading

import pytest
import torch

from tests.processes import FORKED
from twinlora import machine
from twinlora.adapters import files
from twinlora.adapters.bank import AdapterBank, BankLinear, blend
from twinlora.adapters.lora import attach, lora_layers
from twinlora.adapters.targets import LayerConfig, LoraConfig
from twinlora.errors import AdapterError
from twinlora.model import swap
from twinlora.model.attention import NO_MASK_SHAPE, Layout
from twinlora.model.load import load_model, resolve
from twinlora.numerics import lora
from twinlora.numerics.formats import NF4Format

LENGTHS = [3, 1, 7, 4, 2]
_WIDE = [f"wide{i}" for i in range(16)]


def saved(tiny, directory, seed, config=None, per_layer=None):
    model = load_model(resolve(str(tiny)), dtype=torch.float32)
    attach(model, config or LoraConfig(), seed=seed, per_layer=per_layer)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    files.save_adapter(model, directory, "b")
    return files.read_adapter(directory)


@pytest.fixture
def read(tiny, tmp_path):
    head = {name: LayerConfig(3, 2.5) for name in ("lm_head", "model.layers.1.self_attn.q_proj")}
    return {
        "all": saved(tiny, tmp_path / "all", 0, LoraConfig(rank=4)),
        "few": saved(tiny, tmp_path / "few", 1, LoraConfig(rank=2, alpha=9, target=("k_proj", "up_proj"))),
        "dora": saved(tiny, tmp_path / "dora", 2, LoraConfig(rank=3, dora=True)),
        "head": saved(tiny, tmp_path / "head", 3, per_layer=head),
    }


def logits(model, rows):
    layout = Layout(LENGTHS)
    ids = torch.arange(layout.tokens) * 7 % 250
    with torch.no_grad():
        return model(
            input_ids=ids[None],
            position_ids=layout.positions(),
            attention_mask=torch.empty(NO_MASK_SHAPE),
            layout=layout,
            use_cache=False,
            logits_to_keep=rows,
        ).logits[0]


@pytest.mark.parametrize("quantize", [None, NF4Format()])
@pytest.mark.parametrize("dtype, few", [(torch.float32, 16), (torch.bfloat16, 16), (torch.bfloat16, 3)])
def test_every_row_gets_its_own_adapter(tiny, read, monkeypatch, quantize, dtype, few):
    monkeypatch.setattr(lora, "FEW_ROWS", few)  # more rows of an adapter go through another op
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    model = load_model(resolve(str(tiny)), dtype=dtype, quantize=quantize).eval()
    bank = AdapterBank(model)
    swap.replace_blocks(model)
    for name, adapter in read.items():
        bank.add(name, adapter)
    last = torch.tensor(LENGTHS).cumsum(0) - 1
    keys = ["dora", "all", None, "few", "head"]
    expected = []
    for row, key in enumerate(keys):
        bank.use(key)
        expected.append(logits(model, last)[row])
    bank.use(None)
    starts = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    for _ in range(2):  # plans are kept
        with bank.rows(keys, starts, range(6)):
            found = logits(model, last)
        torch.testing.assert_close(found, torch.stack(expected), **close)
    assert bank.routing is None
    with bank.rows([*keys[1:], keys[0]], starts, range(6)):
        assert not torch.allclose(logits(model, last), torch.stack(expected), **close), "other rows, other adapters"
    with bank.rows([None], [0, starts[-1]], [0, 5]):
        assert torch.equal(logits(model, last)[2], expected[2])


def test_what_is_removed_is_gone(tiny, read):
    model = load_model(resolve(str(tiny)), dtype=torch.float32)
    bank = AdapterBank(model)
    base = model(torch.arange(9)[None]).logits
    bank.add("all", read["all"])
    bank.remove("all")
    assert bank.names == []
    assert all(not m.adapters for m in model.modules() if isinstance(m, BankLinear))
    assert torch.equal(model(torch.arange(9)[None]).logits, base)
    with pytest.raises(AssertionError, match="not resident"), bank.rows(["all"], [0, 1], [0, 1]):
        pass


def test_resident_adapters_share_nothing_with_their_files(tiny, read, tmp_path):
    model = load_model(resolve(str(tiny)), dtype=torch.float32)
    bank = AdapterBank(model)
    bank.add("all", read["all"])
    bank.use("all")
    before = model(torch.arange(9)[None]).logits
    path = tmp_path / "all" / files.WEIGHTS
    path.write_bytes(b"\0" * path.stat().st_size)  # in place: a mapped tensor would change
    assert torch.equal(model(torch.arange(9)[None]).logits, before)


def _load_at_once(connection, directory):
    """In a process of its own: eight threads load an adapter and forget it; by how much the process has grown."""
    machine.keep_freed_memory()
    layers = {name: torch.nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16) for name in _WIDE}
    model = torch.nn.ModuleDict(layers)
    bank, together = AdapterBank(model), threading.Barrier(8, timeout=60)

    def load():
        together.wait()
        bank.prepare(files.read_adapter(directory))
        together.wait()

    before = machine.rss_bytes()
    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    connection.send(machine.rss_bytes() - before)


def test_adapters_that_come_and_go_leave_no_memory_behind(tmp_path):
    factors = {name: (torch.ones(64, 1024), torch.ones(1024, 64)) for name in _WIDE}
    files.save_factors(tmp_path / "wide", factors, _WIDE, "b", None)
    ours, theirs = FORKED.Pipe()
    process = FORKED.Process(target=_load_at_once, args=(theirs, tmp_path / "wide"))
    process.start()
    theirs.close()
    assert ours.poll(120)
    assert ours.recv() < 40 << 20  # eight times what one takes while it is loaded: 96 MiB
    process.join()


def test_blends(tiny, read):
    model = load_model(resolve(str(tiny)), dtype=torch.float32)
    bank = AdapterBank(model)
    parts = [(bank.prepare(read[name]), weight) for name, weight in (("all", 0.5), ("few", -0.25))]
    mixed = blend(parts).layers["model.layers.0.self_attn.k_proj"]
    a, b = (part.layers["model.layers.0.self_attn.k_proj"] for part, _ in parts)
    expected = 0.5 * a.scale * (a.b @ a.a) - 0.25 * b.scale * (b.b @ b.a)
    torch.testing.assert_close(mixed.scale * (mixed.b @ mixed.a), expected)
    with pytest.raises(AdapterError, match="DoRA"):
        blend([(bank.prepare(read["dora"]), 1.0)])


def test_whole_modules_are_refused(tiny, tmp_path):
    model = load_model(resolve(str(tiny)), dtype=torch.float32)
    attach(model, LoraConfig(rank=2, modules_to_save=("lm_head",)))
    files.save_adapter(model, tmp_path / "whole", "b")
    bank = AdapterBank(load_model(resolve(str(tiny)), dtype=torch.float32))
    with pytest.raises(AdapterError, match="whole modules"):
        bank.add("whole", files.read_adapter(tmp_path / "whole"))
