"""Single ops: ours beside torch's, bitsandbytes' and liger's, in turn, as seconds and as shares of the device's rates."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_checks import Cell, rotation
from gpu_measure import Setting, limits, peak, reset_peak, seconds
from gpu_models import nf4
from torch.nn import functional as F

from twinlora.numerics import ops
from twinlora.numerics.loss import linear_cross_entropy

BYTES = 2 + 4.127 / 8  # moved for each weight: 16 bit written, NF4 with its scales read
WEIGHTS = {"8B q": (4096, 4096), "8B gate": (14336, 4096), "8B down": (4096, 14336),
           "70B q": (8192, 8192), "70B gate": (28672, 8192)}  # fmt: skip
ROWS = (512, 1024, 2048, 4096, 8192, 16384)
twin = torch.ops.twinlora


def has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def rates(setting: Setting) -> Iterator[Cell]:
    yield "rates", lambda: limits(setting)


def kernels(setting: Setting) -> Iterator[Cell]:
    """Dequantise; product and input gradient of one weight for many and for few rows."""
    for name, shape in setting.pick(WEIGHTS, {"8B q": (128, 64)}).items():
        yield f"dequantize {name}", lambda shape=shape: dequantize(setting, shape)
        for rows in setting.pick((1, 4, 16, *ROWS), (1, 70)):
            yield f"linear {name}, {rows} rows", lambda shape=shape, rows=rows: linear(setting, shape, rows)


def dequantize(setting: Setting, shape: tuple[int, int]) -> dict[str, Any]:
    dense = torch.randn(shape, device=setting.device).bfloat16()
    weight, target = nf4(dense), torch.empty_like(dense)
    ways: dict[str, Callable[[int], object]] = {
        "copy": lambda _: target.copy_(dense),
        "twinlora": lambda _: weight.dequantize(),
    }
    if has("bitsandbytes"):
        from bitsandbytes import functional

        theirs = functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
        ways["bitsandbytes"] = lambda _: functional.dequantize_4bit(*theirs)
    took = seconds(ways, setting)
    copied = 2 * dense.nbytes / took["copy"]
    return {"seconds": took, "share_of_copy": dense.numel() * BYTES / took["twinlora"] / copied}


def linear(setting: Setting, shape: tuple[int, int], rows: int) -> dict[str, Any]:
    """x @ W.T, and dy @ W where there are more rows than in decoding."""
    dense = torch.randn(shape, device=setting.device).bfloat16()
    weight = nf4(dense)
    x, dy = (torch.randn(rows, n, device=setting.device).bfloat16() for n in reversed(shape))
    both = rows > 16
    ways: dict[str, Callable[[int], object]] = {
        "torch": lambda _: (x @ dense.T, dy @ dense if both else None),
        "twinlora": lambda _: (ops.linear(x, weight), ops.linear_transposed(dy, weight) if both else None),
    }
    if has("bitsandbytes"):
        import bitsandbytes as bnb
        from bitsandbytes import functional

        theirs, state = functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
        rows_with_gradient = x.clone().requires_grad_(both)

        def peer(_: int) -> None:
            y = bnb.matmul_4bit(rows_with_gradient, theirs.t(), quant_state=state)
            if both:
                torch.autograd.grad(y, rows_with_gradient, dy)

        ways["bitsandbytes"] = peer
    took = seconds(ways, setting)
    flops = 2 * rows * shape[0] * shape[1] * (2 if both else 1)
    return {"seconds": took, "flops": flops, "over_torch": took["twinlora"] / took["torch"]}


def blocks(setting: Setting) -> Iterator[Cell]:
    """What lies between the products, at the 8B shape."""
    for tokens in setting.pick((2048, 16384), (64,)):
        yield f"attention, {tokens} tokens", lambda tokens=tokens: attend(setting, tokens)
        yield f"norm, {tokens} tokens", lambda tokens=tokens: norm(setting, tokens)
        yield f"swiglu, {tokens} tokens", lambda tokens=tokens: swiglu(setting, tokens)


def attend(setting: Setting, tokens: int) -> dict[str, Any]:
    """Forward and backward, rotation included for ours alone; SDPA sees every row alone, as it must."""
    length = min(2048, tokens)
    heads, kv, size = setting.pick((32, 8, 128), (4, 2, 16))
    q, k, v = (torch.randn(tokens, h, size, device=setting.device).bfloat16().requires_grad_() for h in (heads, kv, kv))
    turn = tuple(t.to(setting.device) for t in rotation(tokens, size, torch.bfloat16))
    dout, starts = torch.randn_like(q), list(range(0, tokens + 1, length))

    def ours(_: int) -> None:
        torch.autograd.grad(ops.attention(q, k, v, starts, size**-0.5, None, turn), (q, k, v), dout)

    def sdpa(_: int) -> None:
        by_row = (t.view(-1, length, t.shape[1], size).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(*by_row, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out.transpose(1, 2).reshape(dout.shape), (q, k, v), dout)

    return {"seconds": seconds({"twinlora": ours, "torch SDPA": sdpa}, setting)}


def norm(setting: Setting, tokens: int) -> dict[str, Any]:
    width = setting.pick(4096, 64)
    x, dy = (torch.randn(tokens, width, device=setting.device).bfloat16() for _ in range(2))
    w = torch.randn(width, device=setting.device).bfloat16()

    def ours(_: int) -> None:
        twin.rms_norm_backward(dy, x, w, twin.rms_norm(x, w, 1e-5, 0.0, False)[1], 0.0)

    ways: dict[str, Callable[[int], object]] = {"twinlora": ours}
    if has("liger_kernel") and setting.device.type == "cuda":
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        rows = x.clone().requires_grad_()
        ways["liger"] = lambda _: torch.autograd.grad(
            LigerRMSNormFunction.apply(rows, w, 1e-5, 0.0, "llama", False), rows, dy
        )
    return {"seconds": seconds(ways, setting), "bytes": 5 * x.nbytes}


def swiglu(setting: Setting, tokens: int) -> dict[str, Any]:
    gate, up, dy = (torch.randn(tokens, setting.pick(14336, 64), device=setting.device).bfloat16() for _ in range(3))

    def ours(_: int) -> None:
        twin.swiglu(gate, up)
        twin.swiglu_backward(dy, gate, up)

    ways: dict[str, Callable[[int], object]] = {"twinlora": ours}
    if has("liger_kernel") and setting.device.type == "cuda":
        from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward

        a, b = gate.clone(), up.clone()  # its gradients overwrite them
        ways["liger"] = lambda _: (swiglu_forward(a, b), swiglu_backward(a, b, dy))
    return {"seconds": seconds(ways, setting), "bytes": 8 * gate.nbytes}


def head(setting: Setting) -> Iterator[Cell]:
    """Loss and its gradient from hidden rows, at the 8B shape."""
    for rows in setting.pick((2048, 4096, 16384), (32,)):
        yield f"loss head, {rows} rows", lambda rows=rows: loss_head(setting, rows)


def loss_head(setting: Setting, rows: int) -> dict[str, Any]:
    hidden, vocabulary = setting.pick((4096, 128256), (64, 300))
    weight = (0.02 * torch.randn(vocabulary, hidden, device=setting.device)).bfloat16()
    x = torch.randn(rows, hidden, device=setting.device).bfloat16().requires_grad_()
    labels = torch.randint(0, vocabulary, (rows,), device=setting.device)
    losses: dict[str, Callable[[], torch.Tensor]] = {
        "twinlora": lambda: linear_cross_entropy(x, weight, labels),
        "torch": lambda: F.cross_entropy((x @ weight.T).float(), labels, reduction="sum"),
    }
    if has("liger_kernel") and setting.device.type == "cuda":
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused

        losses["liger"] = lambda: fused(x, weight, labels, reduction="sum")
    took, peaks = {}, {}
    for name, loss in losses.items():
        reset_peak(setting.device)
        took |= seconds({name: lambda _, loss=loss: torch.autograd.grad(loss(), x)}, setting)
        peaks[name] = peak(setting.device)
    return {"seconds": took, "peak_bytes": peaks, "flops": 4 * rows * hidden * vocabulary}


def adapters(setting: Setting) -> Iterator[Cell]:
    """Many adapters in one batch: one grouped call beside a loop over them, on a 4096 x 4096 layer."""
    for rows in setting.pick((64, 512), (8,)):
        for count in (1, 8, 32):
            if count <= rows:
                yield f"{count} adapters, {rows} rows", lambda rows=rows, count=count: grouped(setting, rows, count)


def grouped(setting: Setting, rows: int, count: int) -> dict[str, Any]:
    if not hasattr(twin, "grouped_lora_"):
        return {"absent": "the op grouped_lora_ is not in this version"}
    size, rank = setting.pick((4096, 16), (64, 4))
    x, y = (torch.randn(rows, size, device=setting.device).bfloat16() for _ in range(2))
    a = [torch.randn(rank, size, device=setting.device).bfloat16() for _ in range(count)]
    b = [torch.randn(size, rank, device=setting.device).bfloat16() for _ in range(count)]
    starts, scales = [i * rows // count for i in range(count + 1)], [2.0] * count

    def loop(_: int) -> None:
        for i in range(count):
            part = slice(starts[i], starts[i + 1])
            y[part].addmm_(x[part] @ a[i].T, b[i].T, alpha=2.0)

    ways = {"twinlora": lambda _: twin.grouped_lora_(y, x, a, b, scales, starts), "a loop": loop}
    return {"seconds": seconds(ways, setting)}
