"""Tries every place where a small training run can die or find the disk full. `python -m tests.train.faults DIR` does it
for the model and data in DIR and prints a JSON line for each; benchmarks/faults.py prints them as a table.

One process, with faults.c preloaded, trains once to have everything imported, then forks a child for each run.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from twinlora.cli import main as cli
from twinlora.train import checkpoint

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
COUNT, DIE, TEAR, FULL = 9, 1, 2, 3  # modes of fault_arm; COUNT only lists the operations
OPTIONS = [
    "--method",
    "lora",
    "--rank",
    "2",
    "--target",
    "q_proj",
    "--dropout",
    "0.1",
    "--dtype",
    "float32",
    "--batch-size",
    "2",
    "--warmup-steps",
    "1",
    "--lr",
    "0.01",
    "--eval-every",
    "2",
    "--checkpoint-every",
    "2",
    "--keep-checkpoints",
    "1",
    "--packing",
    "off",
    "--no-fused",
]


def start(directory: Path, faults: list[str], every: int = 1) -> subprocess.Popen:
    """The process that tries `faults` (die, tear, power, full) at each `every`-th operation."""
    library = directory / "faults.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "faults.c")], check=True)
    environment = os.environ | {
        "LD_PRELOAD": str(library),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'src'}",
        "XDG_CACHE_HOME": str(directory / "disk" / "cache"),
    }
    command = [sys.executable, "-m", "tests.train.faults", str(directory), str(every), *faults]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


class Laboratory:
    """Runs in DIR/disk, which is emptied before each."""

    def __init__(self, directory: Path) -> None:
        self.disk, self.log, self.said = directory / "disk", directory / "operations", directory / "stderr"
        self.run = self.disk / "run"
        data = str(directory / "train.jsonl")
        self.command = ["train", "--model", str(directory), "--data", data, "--eval", data, "--output", str(self.run)]
        self.command += OPTIONS
        self.arm = ctypes.CDLL(None).fault_arm
        self.clear()
        with contextlib.redirect_stdout(sys.stderr):
            assert cli.main(self.command) == 0
        self.clear()
        assert self.child(COUNT, 0) == 0, self.said.read_text()
        self.operations = [line for line in self.logged() if line[1] != "synced"]
        self.adapter, self.metrics = self.weights(), self.losses()

    def clear(self) -> None:
        shutil.rmtree(self.disk, ignore_errors=True)
        self.disk.mkdir()

    def child(self, mode: int, number: int, *extra: str) -> int:
        """Train in a fork with a fault; its exit status."""
        self.log.write_text("")
        pid = os.fork()
        if pid == 0:
            with self.said.open("w") as said, self.log.open("a") as log:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                self.arm(mode, number, log.fileno(), str(self.disk).encode())
                status = 70  # an exception that nobody expected
                try:
                    status = cli.main([*self.command, *extra])
                finally:
                    sys.stderr.flush()
                    os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def logged(self) -> list[list[str]]:
        return [line.split("\t") for line in self.log.read_text().splitlines()]

    def lose_power(self) -> None:
        """Of what was not synced only half is on disk, and some bytes are wrong."""
        safe = {int(line[4]): int(line[3]) for line in self.logged() if line[1] == "synced"}
        for path in self.disk.rglob("*"):
            if path.is_file():
                size, kept = path.stat().st_size, safe.get(path.stat().st_ino, 0)
                if size > kept:
                    with path.open("r+b") as file:
                        file.truncate(kept + (size - kept) // 2)
                        file.seek(kept)
                        file.write(b"\0\xff"[: (size - kept) // 2])

    def weights(self) -> bytes | None:
        path = self.run / "adapter" / "adapter_model.safetensors"
        return path.read_bytes() if path.exists() else None

    def losses(self) -> list[dict]:
        lines = (self.run / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    def half_written(self) -> list[str]:
        """What lies under its final name without being whole."""
        wrong = []
        if (self.run / "adapter").exists():
            names = sorted(path.name for path in (self.run / "adapter").iterdir())
            if self.weights() != self.adapter or len(names) != 3:
                wrong.append(f"adapter: {names}")
        if (self.run / "run.json").exists():
            json.loads((self.run / "run.json").read_text())
        wrong += checkpoint.newest(self.run)[1]
        return wrong

    def resumed(self) -> list[str]:
        """What is not as after an undisturbed run, once the run is resumed."""
        wrong = [] if self.child(0, 0, "--resume") == 0 else [f"resume failed: {self.said.read_text()[-300:]}"]
        if self.weights() != self.adapter:
            wrong.append("another adapter")
        if not wrong and self.losses() != self.metrics:
            wrong.append("other metrics")
        left = [str(path.relative_to(self.run)) for path in self.run.rglob(".*") if path.name != ".lock"]
        return wrong + [f"left behind: {name}" for name in left]

    def fault(self, kind: str, number: int) -> dict:
        """Let `kind` happen at operation `number`, look, resume, look again."""
        self.clear()
        status = self.child({"die": DIE, "power": DIE, "tear": TEAR, "full": FULL}[kind], number)
        said = self.said.read_text()
        if kind == "power":
            self.lose_power()
        wrong = self.half_written()
        if kind == "full":
            errors = [line for line in said.splitlines() if line.startswith("error: ")]
            clear = len(errors) == 1 and "No space left" in errors[0] and status in (1, 2) and "Traceback" not in said
            if not clear and not (status == 0 and "not kept" in said):
                wrong.append(f"status {status}: {said[-300:]}")
        elif status != 137:
            wrong.append(f"lived on with status {status}: {said[-300:]}")
        wrong += self.resumed()
        _, operation, path, *_ = self.operations[number - 1]
        path = re.sub(r"\.([a-z.-]+\d*)\.[^./]{8}\.", r".\1.*.", path)
        return {"fault": kind, "number": number, "operation": operation, "path": path, "wrong": wrong}

    def all(self, faults: list[str], every: int) -> Iterator[dict]:
        for kind in faults:
            for number in range(1, len(self.operations) + 1, every):
                operation = self.operations[number - 1][1]
                if kind != "tear" or operation == "write":
                    yield self.fault(kind, number)


def main() -> None:
    laboratory = Laboratory(Path(sys.argv[1]))
    for outcome in laboratory.all(sys.argv[3:], int(sys.argv[2])):
        sys.stdout.write(json.dumps(outcome) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
