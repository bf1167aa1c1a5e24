"""Processes of their own that need not import torch: forked from a server that has imported it and done nothing else."""

import multiprocessing
import os
import sys
from pathlib import Path

from twinlora.cli.main import main

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["tests.processes", "twinlora.cli.train", "twinlora.train.loop", "twinlora.evaluate.worker"]
)


def _work(arguments: list[str], environment: dict[str, str], log: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with Path(log).open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    sys.exit(main(arguments))


class Program:
    """`twinlora ARGUMENTS` in the background; what it prints goes to `log`."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self._log = log
        self.process = FORKED.Process(target=_work, args=(arguments, dict(os.environ), str(log)))
        self.process.start()

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def end(self) -> tuple[int, str]:
        """Its exit status, once it has ended, and what it printed."""
        self.process.join(120)
        assert self.process.exitcode is not None, "it does not end"
        return self.process.exitcode, self._log.read_text()
