"""Compiles the Triton kernels of the blocks for a GPU that need not be here; prints what came out as JSON.

Run apart from the tests, whose process asks Triton for its interpreter. Shapes are those of a llama-8B layer.
"""

import json
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from twinlora.numerics.triton import blocks

HALF, FULL, LONG = "*bf16", "*fp32", "*i64"
KERNELS = {
    blocks._rotate_kernel: (
        {"x": HALF, "y": HALF, "cos": HALF, "sin": HALF},
        {"half": 64, "HEADS": 32, "HALF": 64, "BACK": True},
    ),
    blocks._norm_kernel: (
        {"x": HALF, "w": HALF, "y": HALF, "rstd": FULL, "eps": "fp32", "offset": "fp32"},
        {"width": 4096, "WIDE": False, "ROWS": 1, "WIDTH": 4096},
    ),
    blocks._norm_backward_kernel: (
        {"dy": HALF, "x": HALF, "w": HALF, "rstd": FULL, "dx": HALF, "offset": "fp32"},
        {"width": 4096, "ROWS": 1, "WIDTH": 4096},
    ),
    blocks._swiglu_kernel: ({"gate": HALF, "up": HALF, "y": HALF}, {"WIDTH": 2048}),
    blocks._swiglu_backward_kernel: (
        {"dy": HALF, "gate": HALF, "up": HALF, "d_gate": HALF, "d_up": HALF},
        {"WIDTH": 2048},
    ),
    blocks._cross_entropy_kernel: ({"logits": HALF, "labels": LONG, "losses": FULL}, {"WIDTH": 4096}),
    blocks._decode_kernel: (
        {"q": HALF, "keys": HALF, "values": HALF, "rows": LONG, "lengths": LONG, "sums": FULL, "tops": FULL,
         "totals": FULL, "scale": "fp32"},
        {"group": 4, "size": 128, "GROUP": 16, "SIZE": 128, "KEYS": 64, "SPLIT": 512, "EXACT": False},
    ),
}  # fmt: skip


def variants():
    """Name, kernel, types, constants; decoding also with the largest heads and in float32, which take the most room."""
    for kernel, (types, constants) in KERNELS.items():
        yield kernel.__name__, kernel, types, constants
    types, constants = KERNELS[blocks._decode_kernel]
    for size, kind, itemsize in ((256, HALF, 2), (128, FULL, 4), (256, FULL, 4)):
        changed = constants | {"size": size, "SIZE": size, "KEYS": blocks.keys_at_once(size, itemsize)}
        given = {name: kind if was == HALF else was for name, was in types.items()}
        yield f"_decode_kernel {size} {kind}", blocks._decode_kernel, given, changed


def compiled(kernel, types, constants, capability):
    """All that is neither typed nor constant is an integer that 16 divides, as strides and widths are."""
    kinds = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    whole = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds.values()) if kind[0] in "*i"}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=whole)
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    ptx = found.asm["ptx"]
    return {
        "wide": sum(".global" in line and ".v4.b32" in line and "ld" in line for line in ptx.splitlines()),
        "tensor_cores": ptx.count("mma"),
        "spills": ptx.count(".local"),
        "shared": found.metadata.shared,
        "cubin": len(found.asm["cubin"]),
    }


if __name__ == "__main__":
    out = {name: compiled(kernel, types, constants, int(sys.argv[1])) for name, kernel, types, constants in variants()}
    print(json.dumps(out))
