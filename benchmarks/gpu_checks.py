"""Is it right on this device? Every op against float64 on the CPU, and training steps against the CPU's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_measure import Setting, relative
from gpu_models import batch, ours, shape

from twinlora.numerics import attention, elementwise, ops, reference

Cell = tuple[str, Callable[[], dict[str, Any]]]
twin = torch.ops.twinlora
# A result may err this many times as much as the plain reference in the same type, on the CPU.
SLACK = 1.25
STEPS = 5


def sections(setting: Setting) -> Iterator[Cell]:
    for dtype in (torch.float32, torch.bfloat16):
        for name, check in CHECKS.items():
            kind = str(dtype).removeprefix("torch.")
            yield f"{name}, {kind}", lambda check=check, dtype=dtype: check(setting, dtype)
    for method in ("lora", "qlora"):
        yield f"{STEPS} steps, {method}", lambda method=method: steps(setting, method)


def judged(found: Any, naive: Any, truth: Any) -> dict[str, Any]:
    """Errors of the device's results and of the reference's, both relative to float64."""
    pairs = [(relative(a, c), relative(b, c)) for a, b, c in zip(found, naive, truth, strict=True)]
    return {
        "passed": all(a <= SLACK * b + 1e-6 for a, b in pairs),
        "relative_error": max(a for a, _ in pairs),
        "of_reference": max(b for _, b in pairs),
    }


def three(call: Callable[..., Any], plain: Callable[..., Any], tensors: list[Any], setting: Setting) -> dict[str, Any]:
    """`call` on the device, `plain` on the CPU in the same type and in float64."""

    def cast(move: Callable[[torch.Tensor], torch.Tensor]) -> list[Any]:
        return [move(t) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors]

    device = [t.to(setting.device, copy=True) if isinstance(t, torch.Tensor) else t for t in tensors]
    runs = [call(*device), plain(*cast(torch.clone)), plain(*cast(torch.Tensor.double))]
    return judged(*(run if isinstance(run, (tuple, list)) else (run,) for run in runs))


def norm(setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    x, dy, w = torch.randn(300, 4096).to(dtype), torch.randn(300, 4096).to(dtype), torch.randn(4096).to(dtype)

    def run(module: Any, x: Any, dy: Any, w: Any) -> list[Any]:
        y, rstd = module.rms_norm(x, w, 1e-5, 0.0, False)
        return [y, module.rms_norm_backward(dy, x, w, rstd, 0.0)]

    return three(lambda *t: run(twin, *t), lambda *t: run(elementwise, *t), [x, dy, w], setting)


def swiglu(setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    tensors = list((4 * torch.randn(3, 300, 5000)).to(dtype))

    def run(module: Any, dy: Any, gate: Any, up: Any) -> list[Any]:
        return [module.swiglu(gate, up), *module.swiglu_backward(dy, gate, up)]

    return three(lambda *t: run(twin, *t), lambda *t: run(elementwise, *t), tensors, setting)


def loss(setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    logits, labels = (4 * torch.randn(100, 50001)).to(dtype), torch.randint(0, 50001, (100,))

    def run(module: Any, logits: Any, labels: Any) -> list[Any]:
        return [module.cross_entropy_(logits, labels), logits]

    return three(lambda *t: run(twin, *t), lambda *t: run(elementwise, *t), [logits, labels], setting)


def rotation(tokens: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(tokens, size // 2).repeat(1, 2) * 6
    return angle.cos().to(dtype), angle.sin().to(dtype)


def packed_attention(setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    """Grouped heads, rotated, sequences of one token up to several blocks, without and with a window."""
    starts, results = [0, 1, 300, 333, 900], []
    for size, window in ((128, 0), (64, 100), (256, 0), (48, 0)):
        heads = [torch.randn(900, count, size).to(dtype) for count in (8, 8, 2, 2)]

        def run(module: Any, dout: Any, *inputs: Any, size: int = size, window: int = window) -> list[Any]:
            out, lse = module.attention(*inputs, starts, size**-0.5, window)
            return [
                out, lse, *module.attention_backward(dout, *inputs, out, lse, starts, size**-0.5, window)
            ]  # fmt: skip

        tensors = [*heads, *rotation(900, size, dtype)]
        results.append(
            three(lambda *t, run=run: run(twin, *t), lambda *t, run=run: run(attention, *t), tensors, setting)
        )
    return {
        "passed": all(r["passed"] for r in results),
        **{key: max(r[key] for r in results) for key in ("relative_error", "of_reference")},
    }


def decoding(setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    size, rows, lengths = 128, [4, 0, 2], [3000, 0, 33]
    tensors = [torch.randn(3, h, size).to(dtype) for h in (8, 2, 2)]
    tensors += [*rotation(3, size, dtype), *torch.randn(2, 5, 2, 3100, size).to(dtype)]

    def run(module: Any, *t: Any) -> list[Any]:
        return [module.attention_step(*t, rows, lengths, size**-0.5, 0), *t[5:]]

    return three(lambda *t: run(twin, *t), lambda *t: run(attention, *t), tensors, setting)


def nf4(setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    """Quantised and decoded bits must be the reference's; products as exact as those of the decoded weight."""
    weight, outcomes = torch.randn(512, 1024).to(dtype), []
    here, there = ops.quantize(weight), ops.quantize(weight.to(setting.device))
    same = all(torch.equal(a, b.cpu()) for a, b in zip(here.tensors, there.tensors, strict=True))
    decoded = reference.nf4_dequantize(*here.arguments, dtype)
    same = same and torch.equal(decoded, there.dequantize(dtype).cpu())
    exact = reference.nf4_dequantize(*here.arguments, torch.float32).double()
    for rows in (1, 7, 600):
        x, dy = torch.randn(rows, 1024).to(dtype), torch.randn(rows, 512).to(dtype)
        found = [ops.linear(x.to(setting.device), there), ops.linear_transposed(dy.to(setting.device), there)]
        truth = [x.double() @ exact.T, dy.double() @ exact]
        outcomes.append(judged(found, [x @ decoded.T, dy @ decoded], truth))
    return {
        "passed": same and all(o["passed"] for o in outcomes),
        "bits_equal": same,
        **{key: max(o[key] for o in outcomes) for key in ("relative_error", "of_reference")},
    }


CHECKS = {
    "norm": norm, "swiglu": swiglu, "loss": loss, "attention": packed_attention, "decoding step": decoding, "nf4": nf4,
}  # fmt: skip


def steps(setting: Setting, method: str) -> dict[str, Any]:
    """Losses of a small model's first steps here and on the CPU, from the same weights, in bfloat16 on both."""
    config = shape("tiny")
    config.hidden_size, config.intermediate_size, config.head_dim = 256, 512, 64
    curves = []
    for device in (torch.device("cpu"), setting.device):
        made = ours(config, method, torch.device("cpu"))
        if device.type != "cpu":
            made = moved(made, device)
        part = batch(config, 4, 128, device)
        curves.append([float(made.step(part)) for _ in range(STEPS)])
    apart = max(abs(a - b) for a, b in zip(*curves, strict=True))
    return {"passed": apart < 0.02, "losses": curves[1], "cpu_losses": curves[0], "largest_difference": apart}


def moved(made: Any, device: torch.device) -> Any:
    """The same weights on another device, under an optimiser of its own."""
    from twinlora.adapters.lora import trainable_parameters
    from twinlora.config import OptimizerOptions
    from twinlora.train.optim import MasterAdamW

    made.model.to(device)
    made.optimizer = MasterAdamW(trainable_parameters(made.model), OptimizerOptions(lr=1e-4))
    return made
