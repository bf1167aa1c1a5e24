"""How a run uses memory, and what it gives up, in this order, when memory runs out: copies of weights, kept
activations, the size of its micro-batches. A step's batch and its loss stay what they are.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from twinlora import machine
from twinlora.config import TrainOptions, parse_size
from twinlora.data.template import Example
from twinlora.errors import OutOfMemory
from twinlora.model.copies import copy_layers, drop_copies
from twinlora.model.recompute import recompute_activations
from twinlora.train.notes import Notes
from twinlora.train.offload import HostActivations

__all__ = ["Memory"]

T = TypeVar("T")
_MARGIN = 0.05  # of the device's memory that copies leave alone
# A lack of memory for which torch has no class: on the CPU, in cuBLAS, in the driver (pinned memory, too).
_MESSAGES = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


def ran_out(error: BaseException) -> str | None:
    """The first line of `error` if it is a lack of memory."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if not known and not any(message in str(error) for message in _MESSAGES):
        return None
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def size_of(part: list[Example], *, packed: bool) -> int:
    """Tokens of a micro-batch, fill included."""
    lengths = [len(example.ids) for example in part]
    return sum(lengths) if packed else max(lengths) * len(lengths)


class Memory:
    """The policies of one run. Its state is saved with every checkpoint: a resumed run continues alike."""

    def __init__(
        self,
        options: TrainOptions,
        model: PreTrainedModel,
        *,
        packed: bool,
        device: torch.device,
        notes: Notes,
        blame: Callable[[Memory], str | None] = lambda _: None,
    ) -> None:
        """`blame` says which cause took more than was predicted."""
        self._blame = blame
        self.options, self.model, self.packed, self.device, self.notes = options, model, packed, device, notes
        self.micro_batch_tokens = options.micro_batch_tokens
        self.checkpointing = options.gradient_checkpointing == "on"
        self.copies: dict[str, Any] | None = None
        self.retries = 0
        self._host = HostActivations(model) if "activations" in options.offload else None
        if self.checkpointing:
            recompute_activations(model, True)
        if options.offload and device.type == "cpu":
            notes.add(f"offload {', '.join(options.offload)}: frees nothing, since this run is on the CPU itself")

    def saving(self) -> contextlib.AbstractContextManager[Any]:
        """What a forward pass that will be differentiated runs under."""
        return self._host or contextlib.nullcontext()

    def state(self) -> dict[str, Any]:
        """As JSON; what `load` takes."""
        return {"micro_batch_tokens": self.micro_batch_tokens, "checkpointing": self.checkpointing}

    def load(self, state: dict[str, Any]) -> None:
        """Continue as a checkpoint says, unless the options have come to ask for recomputation."""
        if state["micro_batch_tokens"] != self.micro_batch_tokens:
            self.micro_batch_tokens = state["micro_batch_tokens"]
            self.notes.add(f"resume: micro-batches of at most {self.micro_batch_tokens} tokens, as before")
        if state["checkpointing"] and self.options.gradient_checkpointing == "auto":
            self._recompute("resume: activations are recomputed, as before")

    @property
    def untouched(self) -> bool:
        """Whether the run took what its options alone say: nothing was given up, now or before it was resumed, moved to
        the host or copied."""
        given = {
            "micro_batch_tokens": self.options.micro_batch_tokens,
            "checkpointing": self.options.gradient_checkpointing == "on",
        }
        return self.state() == given and not (self.retries or self.options.offload or self.copies)

    def record(self) -> dict[str, Any]:
        """For run.json."""
        moved = self._host.moved_bytes if self._host else 0
        return self.state() | {"retries": self.retries, "offloaded_bytes": moved, "dense_copies": self.copies}

    def attempt(
        self,
        run: Callable[[], T],
        part: Callable[[], list[Example]],
        undo: Callable[[], None] = lambda: None,
        safe: Callable[[], bool] = lambda: True,
        differentiated: bool = True,
    ) -> T:
        """`run()`, again with less after each lack of memory, `undo()` in between.

        `part` is its largest micro-batch; where it is not `differentiated`, no activations are kept. Raises OutOfMemory
        if nothing is left to give up, or if it is not `safe` to run again.
        """
        while True:
            try:
                return run()
            except (MemoryError, RuntimeError) as error:
                reason = ran_out(error)
                if reason is None:
                    raise
            # Only here is the error gone, and with its frames the tensors that they held.
            undo()
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._give_way(part(), reason, safe=safe(), differentiated=differentiated)

    def _give_way(self, part: list[Example], reason: str, *, safe: bool, differentiated: bool) -> None:
        size = size_of(part, packed=self.packed)
        if self.options.on_oom == "stop" or not safe:
            raise OutOfMemory(self._explain(part, reason))
        self.retries += 1
        if self.retries == 1 and (blamed := self._blame(self)):
            self.notes.add(f"out of memory: {blamed}")
        what = f"out of memory at {size} tokens ({reason}): "
        if self.copies is not None:
            self.copies = None
            drop_copies(self.model)
            self.notes.add(what + "the 16-bit copies of weights are given up")
        elif differentiated and self._may_recompute:
            self._recompute(what + "activations are recomputed from now on")
        elif len(part) > 1:
            self.micro_batch_tokens = max(1, min(self.micro_batch_tokens, size) // 2)
            self.notes.add(
                f"{what}micro-batches of at most {self.micro_batch_tokens} tokens from now on; the batch stays the same"
            )
        else:
            raise OutOfMemory(self._explain(part, reason))

    @property
    def _may_recompute(self) -> bool:
        auto = self.options.gradient_checkpointing == "auto"
        return auto and not self.checkpointing and bool(self.model.supports_gradient_checkpointing)

    def _recompute(self, note: str) -> None:
        self.checkpointing = True
        recompute_activations(self.model, True)
        self.notes.add(note)

    def _explain(self, part: list[Example], reason: str) -> str:
        longest = max(part, key=lambda example: len(example.ids))
        if len(part) > 1:
            advice = [f"--micro-batch-tokens (now {self.micro_batch_tokens})"]
        else:  # one row is never split
            advice = [f"--max-length (now {self.options.max_length}) and leave out longer rows"]
        if not self.checkpointing:
            advice.append("or add --gradient-checkpointing")
        if "activations" not in self.options.offload and self.device.type == "cuda":
            advice.append("or add --offload optimizer,activations")
        if self.options.method == "lora":
            advice.append("or choose --method qlora")
        blamed = self._blame(self)
        return (
            f"out of memory; the largest micro-batch has {size_of(part, packed=self.packed)} tokens in {len(part)} "
            f"row(s), the longest of {len(longest.ids)} tokens ({longest.where})\n  {reason}\nlower {', '.join(advice)}"
            + (f"\n  {blamed}" if blamed else "")
        )

    def make_copies(self, dtype: torch.dtype) -> None:
        """As `dense_copies` asks. To be called when the peak of a step is known, so that `auto` leaves room for it."""
        given = self.options.dense_copies
        if given == "off":
            return
        spare = machine.spare_bytes(self.device, margin=_MARGIN)
        budget = spare if given == "auto" else parse_size(given)
        made = copy_layers(self.model, budget, dtype)
        decodings = 3 if self.checkpointing else 2
        self.copies = vars(made) | {"spare_bytes": spare}
        self.notes.add(
            f"dense_copies {given}: {made.copied} of {made.layers} quantised layers have a 16-bit copy, "
            f"{made.nbytes / 2**30:.2f} GiB of {spare / 2**30:.2f} GiB that a step leaves; {100 * made.share:.0f} % of "
            f"the {decodings} decodings of each weight in a micro-batch are saved"
        )

    def release(self) -> None:
        """Take away what only training needs."""
        drop_copies(self.model)
        if self.checkpointing:
            recompute_activations(self.model, False)
