"""llama.cpp as a runtime: a server in a process of its own (through xllamacpp), asked over HTTP on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from transformers import PreTrainedTokenizerBase

from twinlora import machine
from twinlora.data.formats import Row
from twinlora.errors import BackendError
from twinlora.export.probes import Answer, Probe

__all__ = ["LlamaCpp"]

_SECONDS = 600
LISTED = 1024  # likeliest tokens that are asked for; the others are known by their sum


class LlamaCpp:
    """A GGUF file, and perhaps a GGUF LoRA on it, running in llama.cpp. Raises BackendError if it does not load."""

    name = "llama.cpp"

    def __init__(self, model: Path, *, lora: Path | None = None, context: int = 4096) -> None:
        settings = {"model": str(model), "lora": str(lora) if lora else None, "context": context}
        settings["threads"] = torch.get_num_threads()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "twinlora.export.llama_server", json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        self._address = self._process.stdout.readline().strip()
        if not self._address.startswith("http"):
            self.close()
            raise BackendError(f"llama.cpp did not load {model.name}:\n{self._complaint()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._log.close()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _complaint(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return "\n".join(f"  {line}" for line in [line for line in lines if line.strip()][:8]) or "  (it said nothing)"

    def _ask(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self._address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise BackendError(f"llama.cpp refused {path}: {error.read().decode(errors='replace')[:300]}") from None
        except OSError as error:
            raise BackendError(f"llama.cpp stopped ({error}):\n{self._complaint()}") from None

    def answers(
        self, probes: Sequence[Probe], tokenizer: PreTrainedTokenizerBase, listed: int = LISTED
    ) -> list[Answer]:
        """The distribution at every position of every probe: its `listed` likeliest tokens, best first.

        The server keeps back what is no whole character, and its figures with it: it is made to say a letter. The
        figures are those before that.
        """
        letter = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
        found = []
        for probe in probes:
            for position in probe.positions:
                body = {"prompt": probe.ids[:position], "n_predict": 1, "n_probs": listed, "temperature": 0.0}
                reply = self._ask("/completion", body | {"cache_prompt": True, "logit_bias": [[letter, 1e4]]})
                top = reply["completion_probabilities"][0]["top_logprobs"]
                ids = torch.tensor([entry["id"] for entry in top])
                log_probs = torch.tensor([max(entry["logprob"], -1e4) for entry in top], dtype=torch.float64)
                found.append(Answer(ids, log_probs))
        return found

    def prompt(self, row: Row) -> tuple[str, list[int]]:
        """What the runtime gives the model for a row: text and tokens."""
        if row.messages:
            body: dict[str, Any] = {"messages": list(row.messages[:-1])}
            if row.tools:
                body["tools"] = list(row.tools)
            text: str = self._ask("/apply-template", body)["prompt"]
        else:
            text = row.prompt
        return text, self.tokens(text)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, with what the runtime puts before it."""
        body = {"content": text, "add_special": True, "parse_special": True}
        ids: list[int] = self._ask("/tokenize", body)["tokens"]
        return ids

    def stops(self, token: int, ids: list[int]) -> bool:
        """Whether an answer ends when the model says `token` after the prompt `ids`."""
        body = {"prompt": ids, "n_predict": 2, "logit_bias": [[token, 1e4]], "temperature": 0.0}
        stopped: bool = self._ask("/completion", body)["stop_type"] == "eos"
        return stopped

    def complete(self, ids: list[int], new: int) -> str:
        """The greedy answer of at most `new` tokens to a prompt."""
        text: str = self._ask("/completion", {"prompt": ids, "n_predict": new, "temperature": 0.0})["content"]
        return text

    def rates(self, ids: list[int], new: int) -> tuple[float, float]:
        """Tokens per second reading a prompt, and writing `new` tokens behind it."""
        best = [0.0, 0.0]
        for _ in range(3):
            body = {"prompt": ids, "n_predict": new, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
            timings = self._ask("/completion", body)["timings"]
            best = [max(best[0], timings["prompt_per_second"]), max(best[1], timings["predicted_per_second"])]
        return best[0], best[1]

    @property
    def peak_rss_bytes(self) -> int:
        """Largest resident set of its process."""
        return machine.peak_rss_bytes(self._process.pid)
