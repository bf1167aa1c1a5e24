"""The step: parts of a batch add up, and recomputing activations changes memory alone."""

import ctypes
import dataclasses
import platform

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.conftest import chat, tiny_config, write_jsonl
from tests.train.test_loop import options
from twinlora import machine
from twinlora.errors import ConfigError
from twinlora.model.recompute import recompute_activations
from twinlora.reporter import Reporter
from twinlora.train.inputs import read_inputs
from twinlora.train.loop import train
from twinlora.train.notes import Notes
from twinlora.train.prepare import prepare


def _prepared(given):
    inputs = read_inputs(given, Notes(Reporter()))
    torch.manual_seed(0)
    made = prepare(given, inputs, torch.float32, torch.device("cpu"), Notes(Reporter()))
    recompute_activations(made.model, given.gradient_checkpointing == "on")
    with torch.no_grad():  # B is 0 at the start, and then A has no gradient
        for name, parameter in made.model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return inputs, made


class _NoUpdate:
    """An optimiser that only adds up gradients."""

    def backward(self, loss):
        loss.backward()

    def step(self, lr, max_grad_norm):
        return torch.zeros(())


def _step(made, batch):
    from twinlora.train.step import train_step

    return train_step(made.model, batch, _NoUpdate(), lr=0.0, max_grad_norm=1.0, plain_head=made.plain_head)


def _gradients(made):
    out = {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}
    made.model.zero_grad(set_to_none=True)
    return out


def test_two_halves_with_the_count_of_the_whole_sum_to_its_gradient(tiny, data_file, tmp_path):
    from twinlora.data.packing import make_batch

    inputs, made = _prepared(options(tiny, data_file, tmp_path / "r"))
    chosen = [*inputs.examples[:5], *inputs.examples[17:20]]
    whole = make_batch(chosen, 400, packed=True)
    halves = [make_batch(part, 400, packed=True) for part in (chosen[:3], chosen[3:])]
    assert [half.trained_tokens for half in halves] != [whole.trained_tokens / 2] * 2
    loss = _step(made, whole).loss
    expected = _gradients(made)
    given = [dataclasses.replace(half, trained_tokens=whole.trained_tokens) for half in halves]
    losses = [_step(made, half).loss for half in given]
    found = _gradients(made)
    torch.testing.assert_close(sum(losses), loss)
    assert expected
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc to give memory back")
def test_gradient_checkpointing_changes_memory_alone(tokenizer, tmp_path):
    """With our own blocks: the same gradients bit for bit, from a smaller peak."""
    from twinlora.data.packing import make_batch

    rows = write_jsonl(tmp_path / "long.jsonl", [chat("a" * 10, "b" * 10)] * 80)
    deep = tmp_path / "deep"
    LlamaForCausalLM(tiny_config(num_hidden_layers=20)).to(torch.bfloat16).save_pretrained(deep)
    tokenizer.save_pretrained(deep)
    gradients, peaks = [], []
    for recompute in (True, False):
        given = options(deep, rows, tmp_path / "r", gradient_checkpointing=recompute)
        inputs, made = _prepared(given)
        assert made.replaced
        batch = make_batch(inputs.examples, 8192, packed=True)
        _step(made, make_batch(inputs.examples[:1], 8192, packed=True))
        made.model.zero_grad(set_to_none=True)
        ctypes.CDLL(None).malloc_trim(0)  # what is free but kept would not be seen to be used
        machine.reset_peaks(torch.device("cpu"))
        before = machine.peak_rss_bytes()
        _step(made, batch)
        peaks.append(machine.peak_rss_bytes() - before)
        gradients.append(_gradients(made))
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert peaks[0] < 0.5 * peaks[1], peaks


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_layers_without_an_adapter_are_recomputed_too(tiny, data_file, tmp_path, method):
    """Their input gradients come from their weights alone, which the backward pass may ask for once."""
    from twinlora.data.packing import make_batch

    gradients = []
    for recompute in ("on", "off"):
        given = options(
            tiny, data_file, tmp_path / "r", method=method, target=["q_proj"], gradient_checkpointing=recompute
        )
        inputs, made = _prepared(given)
        _step(made, make_batch(inputs.examples, 4096, packed=True))
        gradients.append(_gradients(made))
    assert gradients[0]
    assert all(torch.equal(found, gradients[1][name]) for name, found in gradients[0].items())


def test_recomputed_layers_keep_nothing_of_their_mlp(tiny, data_file, tmp_path):
    """Gate and up are the widest activations: between forward and backward pass none of them may live."""
    import gc

    from twinlora.data.packing import make_batch
    from twinlora.model.forward import loss_sum

    alive = []
    for recompute in (True, False):
        inputs, made = _prepared(options(tiny, data_file, tmp_path / "r", gradient_checkpointing=recompute))
        batch = make_batch(inputs.examples, 4096, packed=True)
        loss = loss_sum(made.model, batch.micro_batches[0], plain_head=made.plain_head)
        wide = (batch.micro_batches[0].input_ids.numel(), 128)
        alive.append(sum(torch.is_tensor(x) and tuple(x.shape[-2:]) == wide for x in gc.get_objects()))
        loss.backward()
    assert alive[0] == 0 < alive[1]


def test_several_processes_are_refused(tiny, data_file, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE=2: training in several processes is not supported"):
        train(options(tiny, data_file, tmp_path / "r"))
    assert not (tmp_path / "r").exists()
