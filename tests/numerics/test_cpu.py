"""The compiled backend against the reference: the same bits on every path, with one thread and with two."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import printed
from twinlora.errors import BackendError
from twinlora.numerics import cpu, ops, reference
from twinlora.numerics.formats import Int8Format, NF3Format, NF4Format
from twinlora.numerics.nf4 import BLOCK_SIZES

SOURCES = Path(cpu.__file__).parent / "csrc"
pytestmark = pytest.mark.skipif(not cpu.paths(), reason="twinlora was installed without a C++ compiler")
TYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(64, 64), (7, 96), (1, 1), (3, 33), (130, 257), (5, 4097), (256, 1536), (1, 31)]


@pytest.fixture(params=cpu.paths())
def path(request):
    best = cpu.path()
    cpu.use_path(request.param)
    yield request.param
    cpu.use_path(best)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def weight(shape, dtype):
    """Values of very different sizes, a block of zeros, denormals, and values on the decision borders."""
    w = torch.randn(shape) * torch.rand(shape).mul(8).exp()
    flat = w.view(-1)
    flat[: min(64, flat.numel() // 3)] = 0
    if flat.numel() > 1000:
        flat[128:256] *= 1e-40
        flat[300] = 1e30 if dtype != torch.float16 else 6e4
        flat[512:527] = reference._constants(torch.device("cpu"))[1]
        flat[527] = 1.0
    return w.to(dtype)


def test_kernels_of_other_sources_are_refused(tmp_path):
    """An extension that is out of date would be called with arguments that it does not know."""
    cpu._require_current(cpu._native, SOURCES)
    cpu._require_current(cpu._native, tmp_path)  # a wheel brings no sources
    for file in SOURCES.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "lora.hpp").write_text("// another interface\n")
    with pytest.raises(BackendError, match=r"_cpu.*were built from other sources.*pip install --editable"):
        cpu._require_current(cpu._native, tmp_path)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [32, 64, 4096])
def test_same_bits_as_the_reference(path, threads, shape, block, dtype):
    w = weight(shape, dtype)
    packed, scales = cpu.nf4_quantize(w, block)
    expected = reference.nf4_quantize(w, block)
    assert torch.equal(packed, expected[0])
    assert torch.equal(scales, expected[1])
    nested = cpu.scales_quantize(scales, 256)
    for found, wanted in zip(nested, reference.scales_quantize(scales, 256), strict=True):
        assert torch.equal(found, wanted)
    for quant in ((scales, None, None, list(shape), block, 0), (*nested, list(shape), block, 256)):
        for out in TYPES:
            found, wanted = cpu.nf4_dequantize(packed, *quant, out), reference.nf4_dequantize(packed, *quant, out)
            assert found.dtype == out
            assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_every_block_size_with_every_nested_one(path, block):
    w = weight((48, 512), torch.bfloat16)
    for nested in (0, 32, 256):
        packed = ops.quantize(w, NF4Format(block, nested))
        assert torch.equal(packed.dequantize(), reference.nf4_dequantize(*packed.arguments, torch.bfloat16))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fmt", [NF3Format(), NF3Format(4096, 0), NF3Format(32), Int8Format(), Int8Format(32, 256)])
def test_other_formats_have_the_bits_of_the_reference(path, threads, shape, fmt):
    for dtype in TYPES:
        quantized = ops.quantize(weight(shape, dtype), fmt)
        for out in TYPES:
            found, wanted = quantized.dequantize(out), reference.blockwise_dequantize(*quantized.arguments, out)
            assert found.dtype == out
            assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


def test_not_finite_shows(path):
    for bad in (float("nan"), float("inf"), -float("inf")):
        w = torch.ones(4, 64)
        w[2, 17] = bad
        with pytest.raises(ValueError, match=r"layer\.weight: 1 of 256 values are NaN or Inf"):
            ops.quantize(w, name="layer.weight")


@pytest.mark.parametrize("rows", [*range(1, 9), 12, 15, 16, 17, 18, 31, 63, 64, 65, 100])
@pytest.mark.parametrize("shape", [(96, 64), (33, 576), (576, 1536), (1, 128)])
def test_products_are_as_exact_as_a_bf16_product(path, threads, rows, shape):
    q = ops.quantize(torch.randn(shape))
    x, dy = torch.randn(rows, shape[1]).bfloat16(), torch.randn(rows, shape[0]).bfloat16()
    w, exact = q.dequantize(), q.dequantize(torch.float32).double()
    for found, a, b, truth in (
        (ops.linear(x, q), x, w.T, x.double() @ exact.T),
        (ops.linear_transposed(dy, q), dy, w, dy.double() @ exact),
    ):
        assert found.dtype == torch.bfloat16
        naive = ((a @ b).double() - truth).norm()
        assert (found.double() - truth).norm() <= 1.1 * naive


@pytest.mark.parametrize("rows", [2, 3, 20, 40])
@pytest.mark.parametrize("fmt", [NF4Format(512), NF4Format(4096, 0)])
def test_few_rows_times_large_blocks(path, threads, rows, fmt):
    q, x = ops.quantize(torch.randn(40, 4096), fmt), torch.randn(rows, 4096).bfloat16()
    truth = x.double() @ q.dequantize(torch.float32).double().T
    naive = ((x @ q.dequantize().T).double() - truth).norm()
    assert (ops.linear(x, q).double() - truth).norm() <= 1.1 * naive


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 12, 13, 128])
@pytest.mark.parametrize("shape", [(96, 64), (33, 576), (3, 4096), (1, 64), (5, 40)])
def test_few_rows_times_a_dense_weight(path, threads, rows, shape):
    x, w = torch.randn(rows, shape[1]).bfloat16(), torch.randn(shape).bfloat16()
    truth = x.double() @ w.double().T
    error = (cpu.dense_linears(x, [w])[0].double() - truth).norm()
    assert error <= 1.1 * ((x @ w.T).double() - truth).norm() + 1e-9


@pytest.mark.parametrize("shape", [(576, 96), (640, 200), (1000, 64)])
def test_each_thread_multiplies_with_columns_of_its_own(monkeypatch, threads, shape):
    """What oneDNN would give to one of two threads, by torch's C interface: weights as they lie and turned around."""
    monkeypatch.setattr(cpu, "path", lambda: "amx-bf16")
    asked = []
    native = cpu.extension()
    counted = type("Counted", (), {"__getattr__": lambda _, name: asked.append(name) or getattr(native, name)})()
    monkeypatch.setattr(cpu, "extension", lambda: counted)
    w, x = torch.randn(shape).bfloat16(), torch.randn(3, 100, shape[1]).bfloat16()
    for matrix, y in ((w.T, cpu.dense_linears(x, [w])[0]), (w.T, cpu._product(x, w.T.contiguous()))):
        truth = x.double() @ matrix.double()
        assert (y.double() - truth).norm() <= 1.1 * ((x @ matrix).double() - truth).norm()
    q, dy = ops.quantize(torch.randn(shape[::-1])), torch.randn(300, shape[1]).bfloat16()
    assert torch.equal(ops.linear_transposed(dy, q), cpu._product(dy, q.dequantize()))
    assert asked.count("multiply_columns") == (4 if threads == 2 else 0)


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_dense_weights_together_are_weights_alone(path, threads, rows):
    x, weights = torch.randn(2, rows, 192).bfloat16(), [torch.randn(n, 192).bfloat16() for n in (130, 7, 64)]
    for found, weight in zip(ops.dense_linears(x, weights), weights, strict=True):
        assert torch.equal(found, ops.dense_linears(x, [weight])[0])


@pytest.mark.parametrize("rows", [1, 3, 40, 100])
@pytest.mark.parametrize("nested", [0, 256])
def test_weights_together_are_weights_alone(path, threads, rows, nested):
    weights = [ops.quantize(torch.randn(n, 192), NF4Format(64, nested)) for n in (130, 7, 64)]
    x = torch.randn(2, rows, 192).bfloat16()
    for found, weight in zip(ops.linears(x, weights), weights, strict=True):
        assert torch.equal(found, ops.linear(x, weight))


def test_products_do_not_depend_on_the_number_of_threads(path):
    q, before = ops.quantize(torch.randn(300, 576)), torch.get_num_threads()
    x = torch.randn(9, 576).bfloat16()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(ops.linear(x, q))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_odd_rows_and_other_types_go_through_the_gemm(path):
    q = ops.quantize(torch.randn(8, 72))  # blocks straddle rows
    x = torch.randn(2, 72)
    torch.testing.assert_close(ops.linear(x, q), x @ q.dequantize(torch.float32).T)
    torch.testing.assert_close(ops.linear(x.bfloat16(), q), x.bfloat16() @ q.dequantize().T)


def test_the_threads_are_those_of_torch():
    code = (
        "import torch; from twinlora.numerics import cpu, ops\n"
        "q = ops.quantize(torch.randn(512, 512)); q.dequantize()\n"
        "import re; maps = open('/proc/self/maps').read()\n"
        "print(cpu.runtime(), len(set(re.findall(r'\\S*/lib(?:gomp|omp|iomp5)\\S*', maps))))"
    )
    name, count = printed(code).split()
    assert name
    assert count == "1", "a second OpenMP runtime was loaded"


def test_unknown_path():
    with pytest.raises(ValueError, match="no path mmx"):
        cpu.use_path("mmx")
