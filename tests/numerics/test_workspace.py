"""What ops are said to allocate inside, against what they do allocate: torch's own trace, and malloc's statistics."""

import json
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from twinlora.numerics import attention, cpu, ops
from twinlora.numerics.formats import NF4Format
from twinlora.numerics.workspace import reference_bytes, workspace


def traced(op, arguments):
    """Peak of torch's allocations during the op, beyond those that are left after it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        out = getattr(torch.ops.twinlora, op)(*arguments)
    events = sorted(
        (e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    )
    level = peak = 0
    for event in events:
        level += event.nbytes()
        peak = max(peak, level)
    made = [out] if isinstance(out, torch.Tensor) else list(out or ())
    return peak - sum(t.untyped_storage().nbytes() for t in made)


def cases(dtype):
    """Arguments of every op that could take memory, large enough that tables do not matter."""
    q = ops.quantize(torch.randn(256, 512), NF4Format(64, 256))
    x, dy = torch.randn(300, 512).to(dtype), torch.randn(300, 256).to(dtype)
    heads = torch.randn(400, 6, 32).to(dtype), torch.randn(400, 2, 32).to(dtype), torch.randn(400, 2, 32).to(dtype)
    seen = ([0, 300, 400], 0.2, 0)
    out, lse = torch.ops.twinlora.attention(*heads, None, None, *seen)
    norm, rstd = torch.randn(512).to(dtype), torch.rand(300)
    factors = [torch.randn(8, 512), torch.randn(4, 512)], [torch.randn(256, 8), torch.randn(256, 4)]
    return {
        "nf4_quantize": (torch.randn(512, 600).to(dtype), 64),
        "nf4_dequantize": (*q.arguments, dtype),
        "nf4_linear_with": (x, torch.randn(8, 512).to(dtype), *q.arguments),
        "nf4_linear_add_": (dy.clone(), x, *q.arguments),
        "nf4_linear_transposed_add_": (x.clone(), dy, *q.arguments),
        "grouped_lora_": (dy.clone(), x, *factors, [1.0, 2.0], [0, 100, 300]),
        "attention": (*heads, None, None, *seen),
        "attention_backward": (torch.randn_like(out), *heads, None, None, out, lse, *seen),
        "rms_norm": (x, norm, 1e-6, 0.0, False),
        "rms_norm_backward": (x, x.clone(), norm, rstd, 0.0),
        "swiglu": (x, x.clone()),
        "swiglu_backward": (x, x.clone(), x.clone()),
        "cross_entropy_": (x.clone(), torch.randint(0, 512, (300,))),
    }


# Not in bfloat16 where a product is inside: oneDNN takes a copy of the weight, which is not counted.
PRODUCTS = ("nf4_linear_with", "nf4_linear_add_", "nf4_linear_transposed_add_", "grouped_lora_")
OPS = [(op, dtype) for op in cases(torch.float32) for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("op,dtype", [(op, dtype) for op, dtype in OPS if dtype == torch.float32 or op not in PRODUCTS])
def test_allocations_of_torch(op, dtype):
    arguments = cases(dtype)[op]
    claimed = workspace(op, *arguments).total
    if cpu.paths() and cpu.takes(op, *arguments) and op.startswith("attention"):
        claimed = 0  # its buffers are the kernel's, see below
    traced(op, arguments)  # tables
    found = traced(op, arguments)
    assert claimed == pytest.approx(found, rel=0.02, abs=20_000)


@pytest.mark.parametrize("op", ["rms_norm", "attention", "nf4_linear_add_"])
def test_fake_tensors_will_do(op):
    real = workspace(op, *cases(torch.float32)[op]).total
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in cases_outside(op)]
        assert workspace(op, *fake).total == real > 0


def cases_outside(op):
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        return cases(torch.float32)[op]


def test_views_and_what_is_given_are_not_counted():
    def function(x):
        y = x.view(-1).add_(1)  # nothing
        z = y * 2  # 400 bytes, given back at once
        del z
        return (y + 1)[:50] * 3  # 400 inside; 200 are the output

    assert reference_bytes(function, (torch.zeros(10, 10),)) == 400


# A process for each case, forked before anything was kept.
KERNELS = """
import ctypes, json, os, sys, torch
from twinlora.numerics import cpu, ops
from twinlora.numerics.workspace import workspace

class Info(ctypes.Structure):
    _fields_ = [(n, ctypes.c_size_t) for n in "arena ordblks smblks hblks held usm fsm used free keep".split()]

def in_use():
    info = libc.mallinfo2()
    return info.used + info.held

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
torch.set_num_threads(1)
q = ops.quantize(torch.randn(512, 2048))
small = ops.quantize(torch.randn(16, 64))
def bf(*shape): return torch.randn(shape).bfloat16()
def heads(t): return bf(t, 6, 64), bf(t, 2, 64), bf(t, 2, 64)
def step(t):
    return *heads(2), None, None, bf(3, 2, t + 9, 64), bf(3, 2, t + 9, 64), [0, 2], [t, 3], 0.1, 0
def back(t):
    return bf(t, 6, 64), *heads(t), None, None, bf(t, 6, 64), torch.zeros(t, 6), [0, t], 0.1, 0
calls = {
    "nf4_linear few": lambda: ("nf4_linear", (bf(2, 64), *small.arguments), (bf(12, 2048), *q.arguments)),
    "nf4_linear decoded": lambda: ("nf4_linear", (bf(17, 64), *small.arguments), (bf(40, 2048), *q.arguments)),
    "nf4_linear buffer": lambda: ("nf4_linear", (bf(65, 64), *small.arguments), (bf(90, 2048), *q.arguments)),
    "dense_linears": lambda: ("dense_linears", (bf(1, 64), [bf(8, 64)]), (bf(12, 4096), [bf(64, 4096), bf(8, 4096)])),
    "attention_backward": lambda: ("attention_backward", back(32), back(900)),
    "attention": lambda: ("attention", (*heads(32), None, None, [0, 32], 0.1, 0), (*heads(900), None, None, [0, 900], 0.1, 0)),
    "attention_step": lambda: ("attention_step", step(8), step(30000)),
}
for case in sys.argv[1:]:
    if os.fork():
        assert os.wait()[1] == 0, case
        continue
    op, tiny, large = calls[case]()
    run = getattr(torch.ops.twinlora, op)
    first, second = workspace(op, *tiny).kept, workspace(op, *large).kept
    claimed = sum(max(0, size - first.get(name, 0)) for name, size in second.items())
    run(*tiny), run(*tiny)
    before = in_use()
    run(*large)
    print(json.dumps([case, claimed, in_use() - before]), flush=True)
    os._exit(0)
"""
KEEPING = [
    "nf4_linear few", "nf4_linear decoded", "nf4_linear buffer", "dense_linears", "attention", "attention_backward",
    "attention_step",
]  # fmt: skip


@pytest.fixture(scope="module")
def kept():
    done = subprocess.run([sys.executable, "-c", KERNELS, *KEEPING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {case: (claimed, found) for case, claimed, found in map(json.loads, done.stdout.splitlines())}


@pytest.mark.skipif("avx512-bf16" not in cpu.paths(), reason="these buffers are those of AVX512-BF16 and AMX")
@pytest.mark.skipif(sys.platform != "linux", reason="malloc's statistics are glibc's")
@pytest.mark.parametrize("case", KEEPING)
def test_what_the_kernels_keep(kept, case):
    claimed, found = kept[case]
    assert claimed > 40_000
    onednn = 0.3 * claimed if case == "nf4_linear buffer" else 0  # what it keeps of its own
    assert claimed - 2_000 <= found <= claimed + 2_000 + onednn


def test_the_gpu_is_another_target():
    q, x = ops.quantize(torch.randn(128, 256)), torch.randn(100, 256).bfloat16()
    assert workspace("nf4_linear", x, *q.arguments, target="cuda").total == 128 * 256 * 2
    assert workspace("swiglu", x, x, target="cuda").total == 0
    heads = torch.randn(8, 2, 32)
    wide = (heads, heads, heads, None, None, [0, 8], 0.1, 0)  # float32: the flash kernels do not take it
    assert workspace("attention", *wide, target="cuda").total == reference_bytes(attention.attention, wide) > 0
