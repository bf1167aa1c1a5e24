"""The demonstration: compare LoRA and QLoRA on one task, train a second adapter, and let both answer on one base."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from twinlora import atomic
from twinlora.config import ChatOptions, CompareOptions, DemoOptions, TrainOptions
from twinlora.data.formats import write_rows
from twinlora.data.sources import read_rows
from twinlora.demo import model as embedded
from twinlora.demo.tasks import SPLITS, TASKS, rows
from twinlora.errors import ConfigError
from twinlora.evaluate.compare import compare
from twinlora.evaluate.metrics import predict
from twinlora.evaluate.opening import open_model
from twinlora.evaluate.report import Report
from twinlora.output import ended_in_order, require_apart
from twinlora.reporter import Reporter
from twinlora.train.loop import train

__all__ = ["Answer", "Story", "tell"]

_FIRST, _SECOND = "support", "legal"
_OWN = ("data", _FIRST, _SECOND)  # what is written, and replaced by the next demo
_MARK = ".demo"  # in a directory that a demo made, from the start
_VALIDATION_ROWS = 48
_SEARCH_ROWS = 64
_SECOND_ROWS = 200  # the second task is the easier one
_SHOWN = 2  # prompts of each task
_MAX_NEW_TOKENS = 48
_RECIPE: dict[str, Any] = {"batch_size": 8, "warmup_steps": 4}
_RATES = [5e-4, 2e-3, 8e-3]


@dataclass(frozen=True)
class Answer:
    """What each way said to one prompt; ways are `base` and the adapters' names."""

    task: str
    prompt: str
    expected: str
    outputs: dict[str, str]


@dataclass(frozen=True)
class Story:
    """What the demonstration found."""

    model: str
    report: Report
    adapters: dict[str, Path]
    answers: list[Answer]
    switch_seconds: float
    seconds: float
    next_commands: list[str]


def tell(options: DemoOptions, reporter: Reporter | None = None) -> Story:
    """Run it all under `options.output`.

    Raises ConfigError for a directory that no demo made, ModelError if the model cannot be fetched, Interrupted after
    SIGINT or SIGTERM.
    """
    _claim(options)
    lost = f"what was found is lost, {options.output} is incomplete; the same command starts anew"
    with ended_in_order(lost):
        return _tell(options, reporter or Reporter())


def _tell(options: DemoOptions, reporter: Reporter) -> Story:
    start = time.perf_counter()
    base = options.model or (embedded.HUB_ID if options.hub else str(embedded.fetch(reporter)))
    data = _write_data(options)
    reporter.note(f"1 of 3: LoRA and QLoRA on {TASKS[_FIRST].title}")
    report = compare(_comparison(options, base, data), reporter)
    lora = report.way("lora")
    reporter.note(f"2 of 3: a second adapter, for {TASKS[_SECOND].title}")
    second = TrainOptions(
        model=base, data=data / _SECOND / "train.jsonl", eval=data / _SECOND / "validation.jsonl", method="lora",
        output=options.output / _SECOND, lr=(lora and lora.learning_rate) or _RATES[1], seed=options.seed,
        overwrite=options.overwrite, **_RECIPE,
    )  # fmt: skip
    train(second, reporter)
    adapters = {_FIRST: options.output / _FIRST / "runs" / "lora" / "adapter", _SECOND: second.output / "adapter"}
    reporter.note("3 of 3: one base, two adapters, the same prompts")
    answers, switch = _answers(base, data, adapters, reporter)
    return Story(
        base,
        report,
        adapters,
        answers,
        switch,
        time.perf_counter() - start,
        _next_commands(options, base, data, adapters),
    )


def _claim(options: DemoOptions) -> None:
    output = options.output
    if options.model:
        require_apart(output, [Path(options.model)], _OWN)
    if not (output / _MARK).is_file():
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise ConfigError(
                f"output {output}: exists and was not made by a demo (it has no {_MARK}), so that nothing in it is "
                "replaced; give another --output"
            )
        atomic.write_text(output / _MARK, "")
    elif not options.overwrite and any((output / name).exists() for name in _OWN):
        raise ConfigError(f"output {output}: holds an earlier demo; leave out --no-overwrite, or give another --output")


def _write_data(options: DemoOptions) -> Path:
    data = options.output / "data"
    train_rows = {_FIRST: options.train_rows, _SECOND: _SECOND_ROWS}
    for task in TASKS:
        counts = (train_rows.get(task, options.train_rows), _VALIDATION_ROWS, options.test_rows)
        for split, count in zip(SPLITS, counts, strict=True):
            write_rows(data / task / f"{split}.jsonl", rows(task, split, count, options.seed))
    return data


def _comparison(options: DemoOptions, base: str, data: Path) -> CompareOptions:
    return CompareOptions(
        model=base, data=data / _FIRST / "train.jsonl", validation=data / _FIRST / "validation.jsonl",
        eval=data / _FIRST / "test.jsonl", output=options.output / _FIRST, lr_grid=_RATES, seed=options.seed,
        search_rows=_SEARCH_ROWS, title=f"LoRA or QLoRA for {TASKS[_FIRST].title}?", max_new_tokens=_MAX_NEW_TOKENS,
        metric=["exact-match", "json-fields", "json-valid"], overwrite=options.overwrite,
        **_RECIPE,
    )  # fmt: skip


def _answers(base: str, data: Path, adapters: dict[str, Path], reporter: Reporter) -> tuple[list[Answer], float]:
    """Held-out prompts of both tasks answered by the base and by each adapter; and the seconds that a switch takes."""
    opened = open_model(ChatOptions(model=base), adapters, precision="16bit", reporter=reporter)
    asked = [(task, row) for task in adapters for row in read_rows(data / task / "test.jsonl", _SHOWN)]
    answers = [Answer(task, row.question, row.answer, {}) for task, row in asked]
    switching = 0.0
    for name in (None, *adapters):
        start = time.perf_counter()
        opened.bank.use(name)
        switching += time.perf_counter() - start
        way = name or "base"
        said = predict(
            opened.model,
            opened.tokenizer,
            [row for _, row in asked],
            batch_size=len(asked),
            max_new_tokens=_MAX_NEW_TOKENS,
            reporter=reporter,
            stage=f"{way} answering",
        )
        answers = [replace(a, outputs=a.outputs | {way: p.output}) for a, p in zip(answers, said, strict=True)]
    return answers, switching / (1 + len(adapters))


def _next_commands(options: DemoOptions, base: str, data: Path, adapters: dict[str, Path]) -> list[str]:
    third = next(task for task in TASKS if task not in adapters)
    named = [part for name, path in adapters.items() for part in ("--adapter", f"{name}={path}")]
    test, train_rows, held_out = (
        data / _SECOND / "test.jsonl",
        data / third / "train.jsonl",
        data / third / "validation.jsonl",
    )
    commands: list[list[str | Path]] = [
        ["chat", "--model", base, *named],
        ["eval", "--model", base, "--adapter", adapters[_SECOND], "--data", test],
        ["train", "--model", base, "--method", "qlora", "--data", train_rows, "--eval", held_out, "--lr", "2e-3",
         "--batch-size", "8", "--output", options.output / third],
    ]  # fmt: skip
    return [shlex.join(["twinlora", *map(str, command)]) for command in commands]
