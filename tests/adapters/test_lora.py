"""The adapter that rides in the base's products (GPUs) against the one beside them (CPUs), and both against float64."""

import pytest
import torch
from torch import nn

from twinlora.adapters.lora import LoraLinear
from twinlora.adapters.targets import LayerConfig
from twinlora.model.linear import QuantLinear, as_frozen, project
from twinlora.numerics import ops
from twinlora.numerics.formats import NF4Format

K = 128


def layers(kind: str, outs: tuple[int, ...], *, bias: bool, dora: bool = False) -> list[LoraLinear]:
    made = []
    for i, n in enumerate(outs):
        linear = nn.Linear(K, n, bias=bias).requires_grad_(False)
        base = QuantLinear.from_dense(linear, linear.weight, NF4Format(), "w") if kind == "nf4" else as_frozen(linear)
        layer = LoraLinear(base, LayerConfig(rank=4 + 4 * i, scale=0.5 + i, dropout=0.0, dora=dora))
        nn.init.normal_(layer.lora_B, std=0.1)
        made.append(layer)
    return made


def run(made, x, dys, rides, monkeypatch):
    monkeypatch.setattr(ops, "adds_products", lambda device: rides)
    x = x.clone().requires_grad_(True)
    ys = project(x, *made)
    parameters = [p for layer in made for p in layer.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(ys, [x, *parameters], dys)
    return [y.detach() for y in ys], gradients


@pytest.mark.parametrize("kind", ["nf4", "dense"])
@pytest.mark.parametrize("outs", [(128,), (256,), (96, 32, 64), (200, 200)])
@pytest.mark.parametrize("bias", [False, True])
def test_riding_computes_the_same(kind, outs, bias, monkeypatch):
    made = layers(kind, outs, bias=bias)
    x, dys = torch.randn(2, 5, K), [torch.randn(2, 5, n) for n in outs]
    plain, riding = (run(made, x, dys, rides, monkeypatch) for rides in (False, True))
    for a, b in zip((*plain[0], *plain[1]), (*riding[0], *riding[1]), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "dense"])
def test_riding_in_16_bit_is_no_less_exact(kind, monkeypatch):
    made = layers(kind, (128, 64, 64), bias=False)
    x, dys = torch.randn(3, 40, K).bfloat16(), [torch.randn(3, 40, n).bfloat16() for n in (128, 64, 64)]
    weights = [layer.base.dense_weight(torch.float32).double() for layer in made]
    added = [layer.scale * (layer.lora_B @ layer.lora_A).double() for layer in made]
    exact = [x.double() @ (w + d).T for w, d in zip(weights, added, strict=True)]
    exact.append(sum(dy.double() @ (w + d) for dy, w, d in zip(dys, weights, added, strict=True)))
    plain, riding = (run(made, x, dys, rides, monkeypatch) for rides in (False, True))
    for truth, a, b in zip(exact, (*plain[0], plain[1][0]), (*riding[0], riding[1][0]), strict=True):
        assert (b.double() - truth).norm() <= 1.05 * (a.double() - truth).norm()


@pytest.mark.parametrize("change", ["dropout", "dora", "frozen input"])
def test_riding_with(change, monkeypatch):
    made = layers("nf4", (128, 64), bias=False, dora=change == "dora")
    for layer in made:
        layer.dropout = 0.3 if change == "dropout" else 0.0
        layer.train()
    x, dys, found = torch.randn(6, K), [torch.randn(6, 128), torch.randn(6, 64)], []
    for rides in (False, True):
        monkeypatch.setattr(ops, "adds_products", lambda device, rides=rides: rides)
        torch.manual_seed(3)
        given = x.clone().requires_grad_(change != "frozen input")
        ys = project(given, *made)
        wanted = [given] * given.requires_grad + [layer.lora_A for layer in made] + [layer.lora_B for layer in made]
        found.append((*ys, *torch.autograd.grad(ys, wanted, dys)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_is_kept_for_the_backward_pass_does_not_hold_the_output(monkeypatch):
    monkeypatch.setattr(ops, "adds_products", lambda device: True)
    (layer,), kept = layers("nf4", (128,), bias=False), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(torch.randn(50, K, requires_grad=True))
    assert y.shape == (50, 128)
    assert all(t.untyped_storage().data_ptr() != y.untyped_storage().data_ptr() for t in kept)


def test_a_model_trains_alike(tiny, monkeypatch):
    """A few updates of the tiny llama with our blocks, riding and not."""
    from twinlora.adapters.lora import attach, trainable_parameters
    from twinlora.adapters.targets import LoraConfig
    from twinlora.model.load import load_model, resolve
    from twinlora.model.swap import replace_blocks

    losses = []
    for rides in (False, True):
        monkeypatch.setattr(ops, "adds_products", lambda device, rides=rides: rides)
        model = load_model(resolve(str(tiny)), quantize=NF4Format(), dtype=torch.float32, device=torch.device("cpu"))
        attach(model, LoraConfig(rank=4, alpha=8))
        replace_blocks(model, lambda line: None)
        optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2)
        ids = torch.arange(40).view(2, 20)
        for _ in range(4):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        del model
    assert losses[3] < losses[0]
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-4)
