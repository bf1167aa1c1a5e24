"""What a training process takes beside the step: measured in a process of its own, once for each set of versions.

On a CPU that is the interpreter with all libraries, and the products that oneDNN compiles: it keeps one for every shape
of a 16-bit product that it has met. On a GPU it is the driver's context, which a GPU alone can tell.
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from twinlora import atomic, machine
from twinlora.errors import BackendError
from twinlora.model.fingerprint import cache_directory

__all__ = ["Overhead", "context_bytes", "overhead"]


@dataclass(frozen=True)
class Overhead:
    """Bytes of resident memory: of the `process`, and of each compiled `product` (0 where glibc cannot tell)."""

    process: int
    product: int

    def total(self, products: int) -> int:
        """With so many shapes of products (`Simulated.products`)."""
        return self.process + self.product * products


class _Heap(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    )  # fmt: skip


def overhead() -> Overhead:
    """Of this machine's CPU; measured on first use, which takes as long as `twinlora` takes to start. Raises
    BackendError."""
    versions = machine.describe()
    key = " ".join(str(versions[name]) for name in ("cpu", "python", "torch", "transformers", "twinlora"))
    file = cache_directory() / "overhead.json"
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        return Overhead(**known[key])
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    done = subprocess.run([sys.executable, "-m", __name__], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"the memory of an empty process could not be measured:\n{done.stderr[-2000:]}")
    found = Overhead(**json.loads(done.stdout.splitlines()[-1]))
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_json(file, known | {key: asdict(found)})
    return found


def context_bytes(device: torch.device) -> int:
    """What a CUDA process takes of a GPU beside torch's own allocations: measured on `device`, in this process."""
    torch.zeros(1, device=device) @ torch.zeros(1, 1, device=device)  # the context, and the library's handle
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    return int(others)


def _in_use() -> int:
    """Bytes that glibc has handed out to this thread and by mappings."""
    c = ctypes.CDLL(None)
    c.mallinfo2.restype = _Heap
    info = c.mallinfo2()
    return int(info.uordblks + info.hblkhd)


def _resident() -> int:
    found = re.search(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _product_bytes() -> int:
    """What each further shape of a bfloat16 product adds to the heap."""
    if platform.libc_ver()[0] != "glibc":
        return 0
    x, w = torch.ones(512, 576).bfloat16(), torch.ones(1536, 576).bfloat16()
    torch.mm(x[:64], w[:64].T)
    gc.collect()
    before, shapes = _in_use(), range(128, 513, 64)
    for rows in shapes:
        torch.mm(x[:rows], w[:rows].T)
    return max(0, (_in_use() - before) // len(shapes))


def _measure() -> Overhead:
    """A process with everything imported, after a step of a tiny model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from twinlora.adapters.lora import attach, trainable_parameters
    from twinlora.adapters.targets import LoraConfig
    from twinlora.config import OptimizerOptions
    from twinlora.data.packing import make_batch
    from twinlora.data.template import Example
    from twinlora.model import swap
    from twinlora.model.load import load_model, resolve
    from twinlora.train import loop  # noqa: F401  # what a run imports
    from twinlora.train.optim import MasterAdamW
    from twinlora.train.step import train_step

    small = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, vocab_size=320
    )
    with tempfile.TemporaryDirectory() as directory:
        LlamaForCausalLM(small).bfloat16().save_pretrained(directory)
        model = load_model(resolve(directory))
    attach(model, LoraConfig(rank=4))
    swap.replace_blocks(model.train())
    optimizer = MasterAdamW(trainable_parameters(model), OptimizerOptions())
    batch = make_batch([Example([5] * 64, [False] + [True] * 63, "")], 64, packed=True, pad_id=0)
    train_step(model, batch, optimizer, lr=1e-4, max_grad_norm=1.0, plain_head=True)
    gc.collect()
    process = _resident()
    return Overhead(process, _product_bytes())


if __name__ == "__main__":
    print(json.dumps(asdict(_measure())))
