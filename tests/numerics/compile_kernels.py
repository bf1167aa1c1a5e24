"""Compile every kernel for a GPU that need not be there: `python compile_kernels.py 90` prints what came out as JSON
(with 0, the kernels' names alone).

The shapes are those of a 4096 × 4096 weight in bfloat16, block 64, double quantisation.
"""

import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from twinlora.numerics.triton import kernels

NF4 = {"packed": "*u8", "scales": "*u8", "nested_scales": "*fp32", "nested_offset": "*fp32"}
NF4 |= {"levels": "*fp32", "dynamic_map": "*fp32"}
EXACT = {"enable_fp_fusion": False}

# kernel: types of the arguments, constants, options of the launch
KERNELS = {
    "dequantize": (
        NF4
        | {"out": "*bf16"}
        | dict.fromkeys(("first", "width", "stride", "byte_count", "count"), "i32")
        | {"rows": "i1"},
        {
            "BLOCK_WORDS": 8,
            "nested_shift": 8,
            "NESTED": True,
            "RAGGED": False,
            "WHOLE": True,
            "BITS": 4,
            "R": 1,
            "W": 1024,
        },
        EXACT,
    ),
    "quantize": (
        {"x": "*bf16", "packed": "*u8", "scales": "*fp32", "borders": "*fp32", "count": "i32"},
        {"BLOCK": 64, "B": 64},
        EXACT,
    ),
    "quantize_scales": (
        {"scales": "*fp32", "offset": "*fp32", "codes": "*u8", "nested": "*fp32", "borders": "*fp32", "count": "i32"},
        {"BLOCK": 256, "B": 16},
        EXACT,
    ),
    "multiply_rows": (
        NF4
        | {"x": "*bf16", "y": "*fp32"}
        | dict.fromkeys(("rows", "n", "k", "span", "y_stride", "part_stride"), "i32"),
        {
            "block_shift": 6,
            "nested_shift": 8,
            "NESTED": True,
            "ADD": False,
            "WIDE": False,
            "BM": 16,
            "BN": 64,
            "BK": 64,
        },
        EXACT,
    ),
    "sum_parts": (
        {"parts": "*fp32", "y": "*bf16", "count": "i32", "width": "i32", "y_stride": "i32"},
        {"PARTS": 4, "ADD": True, "B": 1024},
        {},
    ),
    "lora_shrink": (
        {"table": "*i64", "x": "*bf16", "parts": "*fp32", "count": "i32", "k": "i32", "span": "i32"},
        {"ALIGNED": True, "WIDE": False, "BM": 16, "BR": 16, "BK": 128},
        {},
    ),
    "lora_expand": (
        {"table": "*i64", "parts": "*fp32", "y": "*bf16", "count": "i32", "n": "i32", "y_stride": "i32"},
        {"PARTS": 4, "ALIGNED": True, "TRANSPOSED": False, "WIDE": False, "BM": 16, "BR": 16, "BN": 128},
        {},
    ),
}


for bits in (3, 8):
    types, constants, options = KERNELS["dequantize"]
    KERNELS[f"dequantize {bits}"] = (types, constants | {"BITS": bits}, options)


def compile_for(name: str, capability: int) -> dict[str, int]:
    types, constants, options = KERNELS[name]
    kernel = getattr(kernels, name.partition(" ")[0])
    signature = {n: "constexpr" if n in constants else types[n].replace("i1", "i32") for n in kernel.arg_names}
    values = {(i,): constants[n] for i, n in enumerate(kernel.arg_names) if n in constants}
    # As at a launch: addresses and sizes that are multiples of 16. "i1" stands for a size that is not.
    sizes = [n for n in kernel.arg_names if n not in constants and types[n] != "i1"]
    divisible = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in sizes}
    source = ASTSource(kernel, signature, values, divisible)
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert done.asm["cubin"]
    ptx = done.asm["ptx"]
    return {
        "16-byte": len(re.findall(r"(?:ld|st)\.global\.v4\.b32|cp\.async\.cg", ptx)),
        "fma": len(re.findall(r"\bfma\.rn\.(?:ftz\.)?f32", ptx)),
        "tensor cores": len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)", ptx)),
        "spilled": len(re.findall(r"\b(?:ld|st)\.local", ptx)),
    }


if __name__ == "__main__":
    capability = int(sys.argv[1])
    print(json.dumps({name: capability and compile_for(name, capability) for name in KERNELS}))
