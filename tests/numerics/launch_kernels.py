"""Call every op of the GPU backend on CPU tensors as if a GPU were there: all is done but the kernel itself.

Triton binds the arguments, specialises the kernel on them and compiles it for the GPU of the capability given on the
command line; then the launch is left out. Prints how many there would have been.
"""

import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from twinlora.numerics import ops, triton
from twinlora.numerics.formats import Int8Format, NF3Format

_run, _launches = JITFunction.run, []


class _Device:
    """What Triton asks of a driver before a launch."""

    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def _compile_only(self, *args, grid, warmup, **options):
    _launches.append(self.__name__)
    if self.__name__ in ("quantize", "quantize_scales", "dequantize", "multiply_rows"):
        assert options["enable_fp_fusion"] is False, f"{self.__name__} would not have the reference's bits"
    return _run(self, *args, grid=grid, warmup=True, **options)


def main() -> None:
    driver.set_active(_Device())
    JITFunction.run = _compile_only
    q = ops.quantize(torch.randn(256, 512))
    dy = torch.randn(100, 256).bfloat16()
    factors = [torch.randn(8, 512).bfloat16()], [torch.randn(256, 8).bfloat16()]
    for rows in (1, 100):  # few, and many; a 1 becomes a constant of the kernel
        x = torch.randn(rows, 512).bfloat16()
        _call("nf4_linear", x, *q.arguments)
        _call("nf4_linear_add_", dy[:rows].clone(), x, *q.arguments)
        _call("nf4_linear_with", x, factors[0][0], *q.arguments)
    _call("nf4_linears", x, q.tensors * 2, [256, 256], 64, 256)
    _call("nf4_linear_transposed", dy, *q.arguments)
    _call("nf4_linear_transposed_add_", x, dy, *q.arguments)
    _call("nf4_dequantize", *ops.quantize(torch.randn(3, 33)).arguments, torch.float32)
    for form in (Int8Format(64), NF3Format(64, 256)):
        other = ops.quantize(torch.randn(256, 512), form).arguments
        _call("blockwise_dequantize", *other, torch.float32)
        _call("blockwise_linear", x, *other)
        _call("blockwise_linear_transposed", dy, *other)
    _call("nf4_quantize", torch.randn(3, 33), 64)
    _call("scales_quantize", torch.rand(1), 256)
    _call("grouped_lora_", dy[:1], x[:1], *factors, [1.0], [0, 1])
    print(len(_launches), " ".join(sorted(set(_launches))))


def _call(op: str, *arguments: object) -> None:
    triton.implementation(op)(*arguments)


if __name__ == "__main__":
    main()
