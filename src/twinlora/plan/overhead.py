"""What a training process takes beside the step: measured in a process of its own, once for each set of versions.

On a CPU that is the interpreter with all libraries, and the products that oneDNN compiles: it keeps one for every shape
of a 16-bit product that it has met.
"""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys
from dataclasses import asdict, dataclass

import torch

from twinlora import atomic, machine
from twinlora.errors import BackendError
from twinlora.model.fingerprint import cache_directory

__all__ = ["Overhead", "overhead"]

_MOST_PRODUCTS = 1024  # that oneDNN keeps


@dataclass(frozen=True)
class Overhead:
    """Bytes of resident memory: of a process with its `libraries`, and of each compiled `product` (0 where glibc cannot
    tell)."""

    libraries: int
    product: int

    def compiled(self, products: int, sizes: int = 1) -> int:
        """Of steps with so many shapes of products (`Simulated.products`) for each of `sizes` numbers of rows. What is
        tried on a model before it trains (its blocks, packing, the head) is about one more."""
        return self.product * min(_MOST_PRODUCTS, products * (sizes + 1))

    def total(self, products: int, sizes: int = 1) -> int:
        """All of it."""
        return self.libraries + self.compiled(products, sizes)


def overhead() -> Overhead:
    """Of this machine's CPU; measured on first use, which takes as long as `twinlora` takes to start. Raises
    BackendError."""
    versions = machine.describe()
    key = " ".join(str(versions[name]) for name in ("cpu", "python", "torch", "transformers", "twinlora"))
    file = cache_directory() / "overhead.json"
    known: dict[str, dict[str, int]] = {}
    with contextlib.suppress(OSError, ValueError, TypeError):  # not there yet, or not ours
        known = dict(json.loads(file.read_text(encoding="utf-8")))
        if key in known:
            return Overhead(**known[key])
    done = subprocess.run([sys.executable, "-m", __name__], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"the memory of an empty process could not be measured:\n{done.stderr[-2000:]}")
    found = Overhead(**json.loads(done.stdout.splitlines()[-1]))
    atomic.write_json(file, known | {key: asdict(found)})
    return found


def _product_bytes() -> int:
    """What each further shape of a bfloat16 product adds to the heap."""
    x, w = torch.ones(512, 576).bfloat16(), torch.ones(1536, 576).bfloat16()
    torch.mm(x[:64], w[:64].T)
    gc.collect()
    before, shapes = machine.heap_bytes(), range(128, 513, 64)
    for rows in shapes:
        torch.mm(x[:rows], w[:rows].T)
    return max(0, (machine.heap_bytes() - before) // len(shapes))


def _measure() -> Overhead:
    """A process with everything imported, after a step of a tiny model, less what that has on the heap."""
    from twinlora.plan.probe import TINY, steps
    from twinlora.train import loop  # noqa: F401  # what a run imports

    before = machine.heap_bytes()
    step = list(steps(TINY, torch.device("cpu"), torch.bfloat16))
    gc.collect()
    libraries = machine.rss_bytes() - (machine.heap_bytes() - before)
    del step  # not before its memory was seen
    return Overhead(libraries, _product_bytes())


if __name__ == "__main__":
    print(json.dumps(asdict(_measure())))
