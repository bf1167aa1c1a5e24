"""The GPU backend without a GPU: every kernel in Triton's interpreter against the reference, and compiled for real.

The interpreter rounds to bfloat16 by cutting off and multiplies in float32; float32 and float16 results are exact.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

from tests.conftest import printed
from twinlora.numerics import ops, reference, triton
from twinlora.numerics.formats import Int8Format, NF3Format, NF4Format
from twinlora.numerics.nf4 import BLOCK_SIZES, codebook, midpoints
from twinlora.numerics.triton import shapes, workspace_bytes

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on 1 / 0 and what is beyond float16
pytest.importorskip("triton", reason="triton is not installed: pip install 'twinlora[gpu]'")
if torch.cuda.is_available():
    pytest.skip("with a GPU the kernels are tested on it, in tests/gpu", allow_module_level=True)

from twinlora.numerics.triton import codes, products  # noqa: E402

SHAPES = [(64, 64), (7, 96), (1, 1), (3, 33), (5, 257), (2, 4097), (1, 31)]


def run(name, *arguments):
    return triton.implementation(name)(*arguments)


def ulps(a, b):
    """Distance in units of the last place of 16-bit values of one sign."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    return (a.view(torch.int16).int() - b.view(torch.int16).int()).abs().max().item()


def same(found, wanted):
    assert found.dtype == wanted.dtype
    return ulps(found, wanted) <= 1 if wanted.dtype == torch.bfloat16 else torch.equal(found, wanted)


def weight(shape, dtype=torch.float32):
    """Values of very different sizes, a block of zeros, denormals, and values on the decision borders."""
    w = torch.randn(shape) * torch.rand(shape).mul(8).exp()
    flat = w.view(-1)
    flat[: min(64, flat.numel() // 3)] = 0
    if flat.numel() > 1000:
        if dtype != torch.bfloat16:  # which the interpreter reads wrongly
            flat[128:256] *= 1e-40
        flat[300] = 1e30 if dtype != torch.float16 else 6e4
        flat[512:527] = reference._constants(torch.device("cpu"))[1]
        flat[527] = 1.0
    return w.to(dtype)


@pytest.fixture(autouse=True)
def _fresh_buffer():
    products._buffers.clear()


@pytest.fixture
def small_panels(monkeypatch):
    """Weights of a few hundred rows are cut as large ones are."""
    monkeypatch.setattr(shapes, "_PANEL_BYTES", 0)
    monkeypatch.setattr(shapes, "_LARGEST_PANEL_BYTES", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [32, 64, 4096])
def test_quantising_gives_the_reference_bits(shape, block, dtype):
    w = weight(shape, dtype)
    packed, scales = run("nf4_quantize", w, block)
    expected = reference.nf4_quantize(w, block)
    assert torch.equal(packed, expected[0])
    assert torch.equal(scales, expected[1])
    for nested in (32, 256):
        for a, b in zip(run("scales_quantize", scales, nested), reference.scales_quantize(scales, nested), strict=True):
            assert torch.equal(a, b)


def test_the_lower_code_on_every_border():
    levels = codebook()
    borders = midpoints(levels)
    values = torch.cat([levels, borders, torch.nextafter(borders, torch.tensor(2.0)), torch.zeros(18)])
    packed, _ = run("nf4_quantize", values, 64)
    found = torch.stack([packed >> 4, packed & 15], 1).view(-1)
    assert found.tolist() == [*range(16), *range(15), *range(1, 16), *[7] * 18]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_shows_in_its_block(bad):
    w = torch.ones(4, 64)
    w[2, 17] = bad
    assert torch.isfinite(run("nf4_quantize", w, 64)[1]).tolist() == [True, True, False, True]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nested", [0, 256])
def test_dequantising_ragged_shapes(shape, nested):
    q = ops.quantize(weight(shape), NF4Format(64, nested))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found, wanted = (
            f(*q.arguments, dtype) for f in (triton.implementation("nf4_dequantize"), reference.nf4_dequantize)
        )
        assert same(found.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_dequantising_every_block_size_with_every_nested_one(block):
    w = weight((24, 512), torch.bfloat16)
    for nested in (0, 32, 256, 4096):
        q = ops.quantize(w, NF4Format(block, nested))
        for dtype in (torch.float32, torch.bfloat16):
            assert same(run("nf4_dequantize", *q.arguments, dtype), reference.nf4_dequantize(*q.arguments, dtype))


@pytest.mark.parametrize("block", [32, 64, 4096])
def test_dequantising_a_part_into_a_buffer(block):
    q = ops.quantize(torch.randn(24, 256), NF4Format(block, 32))
    w = q.dequantize(torch.float32)
    taken = codes.weight_of(*q.arguments)
    buffer = torch.full((25, 96), 9.0)
    codes.decode(taken, buffer[:24], first=64 // 8, rows=24, width=96 // 8, stride=256 // 8)
    assert torch.equal(buffer[:24], w[:, 64:160])
    assert buffer[24].eq(9).all()
    flat = torch.full((8 * 256 + 1,), 9.0)
    codes.decode(taken, flat[:-1], first=16 * 256 // 8, rows=1, width=256, stride=256)
    assert torch.equal(flat[:-1].view(8, 256), w[16:])
    assert flat[-1] == 9


def test_codes_at_an_odd_address():
    q = ops.quantize(torch.randn(4, 64), NF4Format(64, 0))
    moved = torch.zeros(q.packed.numel() + 1, dtype=torch.uint8)[1:].copy_(q.packed)
    found = run("nf4_dequantize", moved, *q.arguments[1:], torch.float32)
    assert torch.equal(found, q.dequantize(torch.float32))


def product(name, x, q, *more):
    """Found and true, for x in its own type."""
    w = q.dequantize(torch.float32)
    return run(name, x, *more, *q.arguments), x.double() @ (
        w.double().T if name != "nf4_linear_transposed" else w.double()
    )


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 64])
@pytest.mark.parametrize("shape,block", [((70, 256), 64), ((65, 96), 32), ((130, 512), 512)])
@pytest.mark.parametrize("processors", [1, 132])
def test_few_rows(rows, shape, block, processors, monkeypatch):
    monkeypatch.setattr(shapes, "multiprocessors", lambda device: processors)
    q, x = ops.quantize(torch.randn(shape), NF4Format(block, 256)), torch.randn(rows, shape[1])
    assert shapes.has_few_rows(x, shape[1], block)
    found, truth = product("nf4_linear", x, q)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-4)
    assert sum(b.numel() for b in products._buffers.values()) == workspace_bytes("nf4_linear", x, *q.arguments)
    y = torch.randn(rows, shape[0])
    added = y.clone()
    run("nf4_linear_add_", added, x, *q.arguments)
    torch.testing.assert_close(added, y + found, rtol=1e-5, atol=1e-4)
    extra = torch.randn(5, shape[1])
    both = run("nf4_linear_with", x, extra, *q.arguments)
    assert torch.equal(both[:, : shape[0]], found)
    torch.testing.assert_close(both[:, shape[0] :], x @ extra.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [4, 100])
def test_products_in_16_bit(dtype, rows):
    q, x = ops.quantize(torch.randn(48, 128) / 11), torch.randn(rows, 128).to(dtype)
    found, truth = product("nf4_linear", x, q)
    assert found.dtype == dtype
    naive = (reference.nf4_linear(x, *q.arguments).double() - truth).norm()
    assert (found.double() - truth).norm() <= (4 if dtype == torch.bfloat16 else 1.1) * naive


@pytest.mark.parametrize("shape", [(300, 64), (300, 33), (64, 320), (130, 36), (257, 320)])
@pytest.mark.parametrize("block", [64, 4096])
def test_many_rows_in_panels(shape, block, small_panels):
    n, k = shape
    q, x, dy = ops.quantize(torch.randn(shape), NF4Format(block, 32)), torch.randn(70, k), torch.randn(70, n)
    for name, given, out in (("nf4_linear", x, n), ("nf4_linear_transposed", dy, k)):
        products._buffers.clear()
        found, truth = product(name, given, q)
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-4)
        (buffer,) = products._buffers.values()
        assert buffer.numel() == workspace_bytes(name, given, *q.arguments)
        onto = torch.randn(70, out)
        adds = name + "_add_"
        expected = onto + found
        run(adds, onto, given, *q.arguments)
        torch.testing.assert_close(onto, expected, rtol=1e-5, atol=1e-4)
        assert workspace_bytes(adds, onto, given, *q.arguments) == buffer.numel()
    extra = torch.randn(5, k)
    both = run("nf4_linear_with", x, extra, *q.arguments)
    expected = torch.cat([x @ q.dequantize(torch.float32).T, x @ extra.T], 1)
    torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-4)
    (buffer,) = products._buffers.values()
    assert buffer.numel() >= workspace_bytes("nf4_linear_with", x, extra, *q.arguments) > 0


OTHERS = [Int8Format(64), Int8Format(32), NF3Format(64, 0), NF3Format(64, 256), NF3Format(4096, 32)]


@pytest.mark.parametrize("form", OTHERS, ids=lambda form: form.name)
@pytest.mark.parametrize("shape", [*SHAPES, (24, 512)])
def test_other_formats_have_the_reference_bits(form, shape):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        q = ops.quantize(weight(shape, dtype), form)
        found, wanted = (
            f(*q.arguments, dtype)
            for f in (triton.implementation("blockwise_dequantize"), reference.blockwise_dequantize)
        )
        assert same(found.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("form", [Int8Format(64), NF3Format(64, 256)], ids=lambda form: form.name)
@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("shape", [(300, 64), (300, 33), (64, 320), (257, 320)])
def test_products_of_other_formats(form, rows, shape, small_panels):
    n, k = shape
    q, x, dy = ops.quantize(torch.randn(shape), form), torch.randn(rows, k), torch.randn(rows, n)
    for name, given in (("blockwise_linear", x), ("blockwise_linear_transposed", dy)):
        products._buffers.clear()
        w = q.dequantize(torch.float32).double()
        truth = given.double() @ (w.T if given is x else w)
        torch.testing.assert_close(run(name, given, *q.arguments).double(), truth, rtol=1e-5, atol=1e-4)
        (buffer,) = products._buffers.values()
        assert buffer.numel() == workspace_bytes(name, given, *q.arguments)


def test_panels_are_cut(small_panels):
    assert shapes.panel(300, 64, 70, 4, torch.device("cpu")) == 128
    assert shapes.transposed_panel([64, 320], 70, 4, torch.device("cpu")) == 128
    assert shapes.transposed_panel([64, 36], 70, 4, torch.device("cpu")) == 36


@pytest.mark.parametrize("rows", [512, 2048, 16384])
@pytest.mark.parametrize("n,k", [(4096, 4096), (14336, 4096), (28672, 8192), (8192, 28672), (1024, 4096)])
def test_panels_stay_within_their_bounds(n, k, rows):
    length = shapes.panel(n, k, rows, 2, torch.device("cpu"))
    assert length == n or length % 128 == 0
    assert length * k * 2 <= (96 << 20) + 128 * k * 2
    assert length == n or -(-rows // 128) * (length / 256) >= 0.75 * 132 or length * k * 2 > 64 << 20


def test_weights_together_are_weights_alone():
    weights = [ops.quantize(torch.randn(n, 128)) for n in (40, 7, 64)]
    for rows in (2, 70):
        x = torch.randn(rows, 128)
        tensors = [tensor for q in weights for tensor in q.tensors]
        arguments = (x, tensors, [40, 7, 64], 64, 256)
        for found, q in zip(run("nf4_linears", *arguments), weights, strict=True):
            assert torch.equal(found, run("nf4_linear", x, *q.arguments))
        assert workspace_bytes("nf4_linears", *arguments) == max(
            workspace_bytes("nf4_linear", x, *q.arguments) for q in weights
        )


ADAPTERS = {
    "decode, empty groups, rows without one": ((4, 16, 33), [1, 2, 2, 9]),
    "one adapter with many rows": ((8, 8), [0, 3, 100]),
    "large rank": ((100, 2), [0, 5, 6]),
    "one": ((16,), [0, 1]),
}


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("k,n", [(192, 200), (130, 64)])
@pytest.mark.parametrize("processors", [1, 132])
def test_grouped_lora(case, k, n, processors, monkeypatch):
    monkeypatch.setattr(shapes, "multiprocessors", lambda device: processors)
    ranks, starts = ADAPTERS[case]
    x, y = torch.randn(starts[-1] + 2, k), torch.randn(starts[-1] + 2, n + 7)[:, :n]  # rows of y lie apart
    a, b = [torch.randn(r, k) for r in ranks], [torch.randn(n, r) for r in ranks]
    arguments = (x, a, b, [0.5 + i for i in range(len(ranks))], starts)
    expected = y.clone()
    reference.grouped_lora_(expected, *arguments)
    run("grouped_lora_", y, *arguments)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)
    (buffer,) = products._buffers.values()
    assert buffer.numel() == workspace_bytes("grouped_lora_", y, *arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_lora_reads_factors_as_they_lie(dtype):
    x, y = torch.randn(5, 64).to(dtype), torch.randn(5, 96).to(dtype)
    a, b = [torch.randn(r, 64) / 8 for r in (8, 16)], [torch.randn(r, 96).T for r in (8, 16)]
    rest = ([1.0, 0.5], [0, 2, 5])
    found, truth = y.clone(), y.double()
    reference.grouped_lora_(truth, x.double(), a, b, *rest)
    run("grouped_lora_", found, x, [f.to(dtype) for f in a], [f.to(dtype) for f in b], *rest)
    naive = y.clone()
    reference.grouped_lora_(naive, x, a, b, *rest)
    assert (found.double() - truth).norm() <= 3 * (naive.double() - truth).norm() + 1e-4


def test_grouped_lora_of_no_rows():
    y = torch.randn(3, 8)
    before = y.clone()
    run("grouped_lora_", y, torch.randn(3, 16), [torch.randn(4, 16)], [torch.randn(8, 4)], [1.0], [0, 0])
    run("grouped_lora_", y, torch.randn(3, 16), [], [], [], [0])
    assert torch.equal(y, before)


def test_opcheck_of_the_ops_that_write():
    q, library = ops.quantize(torch.randn(8, 64)), torch.ops.twinlora
    x, y = torch.randn(3, 64), torch.randn(3, 8)
    opcheck(library.nf4_linear_with.default, (x, torch.randn(2, 64), *q.arguments))
    opcheck(library.nf4_linear_add_.default, (y, x, *q.arguments))
    opcheck(library.nf4_linear_transposed_add_.default, (x, y, *q.arguments))
    factors = [torch.randn(4, 64), torch.randn(2, 64)], [torch.randn(8, 4), torch.randn(8, 2)]
    opcheck(library.grouped_lora_.default, (y, x, *factors, [1.0, 2.0], [0, 1, 3]))


def test_every_op_is_registered_and_none_imports_triton():
    code = (
        "import sys\nfrom twinlora.numerics import ops, triton\nimport torch\n"
        "assert 'triton' not in sys.modules\n"
        "print(all(torch._C._dispatch_has_kernel_for_dispatch_key('twinlora::' + n, 'CUDA') for n in triton.OPS))"
    )
    assert printed(code) == "True"
    assert ops.backend("cuda") == "cuda (triton)"


def compiled(script, capability, cache):
    """What a script prints that compiles for a GPU: in a process of its own, without the interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, Path(__file__).with_name(script), str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_kernel_compiles_for_hopper(tmp_path):
    """Down to machine code, by the compiler that Triton brings, which needs no GPU."""
    found = json.loads(compiled("compile_kernels.py", 90, tmp_path))
    for kernel in ("dequantize", "multiply_rows", "lora_shrink", "lora_expand"):
        assert found[kernel]["16-byte"] >= 2, kernel  # loads of codes or factors, and stores
        assert found[kernel]["spilled"] == 0, kernel
    for kernel in ("dequantize", "dequantize 3", "dequantize 8", "quantize", "quantize_scales"):
        assert found[kernel]["spilled"] == 0, kernel
        assert found[kernel]["fma"] == 0, f"{kernel}: a fused multiply-add rounds once where the reference rounds twice"
    for kernel in ("multiply_rows", "lora_shrink", "lora_expand"):
        assert found[kernel]["tensor cores"] > 0, kernel


def test_every_launch_binds_and_compiles_for_ampere(tmp_path):
    count, *names = compiled("launch_kernels.py", 80, tmp_path).split()
    kernels = json.loads(compiled("compile_kernels.py", 0, tmp_path))
    assert int(count) >= 15
    assert set(names) == {kernel.partition(" ")[0] for kernel in kernels}
