"""`compare(options)`: several methods on the same data, tuned alike, measured alike, and a verdict from the figures.

Each method's search and each final run has a process of its own, so that no run inherits another's memory. All share
the seed, hence the initial adapter and the order of rows. The learning rate of each is chosen on validation rows, which
neither training nor the test rows contain.
"""

from __future__ import annotations

import datetime
import itertools
import random
import shlex
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from twinlora import atomic, machine
from twinlora.config import CompareOptions, unused_by
from twinlora.data import sources
from twinlora.data.examples import encode_rows
from twinlora.data.formats import Row, write_rows
from twinlora.errors import BackendError, ConfigError, DataError, Interrupted, OutOfMemory, TrainingDiverged
from twinlora.evaluate import html, worker
from twinlora.evaluate.general import read_texts
from twinlora.evaluate.metrics import Prediction
from twinlora.evaluate.report import BASE, Difference, General, MethodResult, Report, Sample, SearchPoint, save
from twinlora.evaluate.scores import require, title_of
from twinlora.evaluate.stats import paired_interval, ratio_interval
from twinlora.evaluate.verdict import judge
from twinlora.model.fingerprint import fingerprint
from twinlora.model.load import Source, load_tokenizer, pick_device, pick_dtype, resolve
from twinlora.output import ended_in_order, require_apart, require_ours
from twinlora.reporter import Reporter
from twinlora.train.compatible import require_trainable

__all__ = ["compare"]

_OWN = ("data", "search", "runs", "report.json", "report.html")
# Only a directory with one of these is a comparison: others have a data/, too. The first is there from the start.
_MARKS = (".comparison", "report.json")
_SAMPLES = 6
_SEARCH_SHARE = 4  # a search run sees a quarter of the rows unless told otherwise
_FAILURES = (TrainingDiverged, OutOfMemory, BackendError)  # of one method

T = TypeVar("T")


def compare(options: CompareOptions, reporter: Reporter | None = None) -> Report:
    """Run the comparison and write report.json and report.html.

    Raises InputError before anything is written; Interrupted after SIGINT or SIGTERM, with nothing left running.
    """
    reporter = reporter or Reporter()
    source = resolve(options.model)
    tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code)
    device = pick_device(options.device)
    dtype, reason = pick_dtype(options.dtype, device)  # once: every process must compute in the same type
    if reason:
        reporter.note(reason)
    options = options.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    train, validation, test = _split(options, reporter)
    require(options.metric, test)
    read_texts(options.general)
    for rows in (train, validation, test):
        encode_rows(tokenizer, rows, options.max_length, overlong=options.overlong,
                    allow_untrained=options.allow_untrained)  # fmt: skip
    identity = fingerprint(source)
    for method in options.methods:
        require_trainable(worker.train_options(_of_method(options, method), method), source, identity)
    _claim(options, source)
    lost = f"what was measured is lost, {options.output} has no report; the same command with --overwrite starts anew"
    with ended_in_order(lost):
        return _measured(options, _write(options, train, validation, test), identity, device, reporter)


def _measured(
    options: CompareOptions, splits: worker.Splits, identity: str, device: torch.device, reporter: Reporter
) -> Report:
    """What each way comes to, every figure from a process of its own, and the verdict."""
    results: list[MethodResult] = []
    diverged: list[str] = []
    failed: dict[str, str] = {}
    predictions: dict[str, list[Prediction]] = {}
    base, predictions[BASE] = _in_process(BASE, worker.measure_base, options, splits.test)
    results.append(base.result)
    reporter.note(_in_short(base.result, options))
    if "hybrid" in options.methods:
        _in_process("hybrid", worker.choose_layers, options, splits)
    quantised = [method for method in options.methods if method in ("qlora", "hybrid")]
    before: dict[str, General] = {
        method: _in_process(f"{method} base", worker.measure_quantised, options, method) for method in quantised
    }
    for method in options.methods:
        chosen = _of_method(options, method)
        try:
            points = _in_process(f"{method} search", worker.search, chosen, method, splits.search, splits.validation)
        except _FAILURES as error:  # what the other methods found is not lost with it
            failed[method] = str(error)
            reporter.note(f"{method} search: {error}")
            continue
        lr, at_edge = _best(points)
        if lr is None:
            reporter.note(f"{method}: every learning rate diverged")
            diverged.append(method)
            continue
        note = f"{method}: best learning rate {lr:g} of {', '.join(f'{p.lr:g}' for p in points)}"
        reporter.note(note + (", at the edge of the grid" if at_edge else ""))
        try:
            done, predictions[method] = _in_process(method, worker.train_and_measure, chosen, method, lr, splits)
        except _FAILURES as error:
            failed[method] = str(error)
            reporter.note(f"{method}: {error}")
            continue
        general = _since(before.get(method, base.result.general), done.general)
        result = done.model_copy(
            update={"search": points, "at_edge": at_edge, "search_seconds": sum(p.seconds for p in points)}
            | {"general": general}
        )
        results.append(result)
        reporter.note(_in_short(result, options))
    differences, forgetting = _differences(results), _forgetting(results)
    report = Report(
        title=options.title
        or f"{', '.join(options.methods)} on {', '.join(Path(source).name for source in options.data)}",
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        git_hash=_git_hash(),
        machine=machine.describe(device),
        model=options.model,
        model_parameters=base.parameters,
        base_fingerprint=identity,
        data={
            "train": ", ".join(options.data),
            "test": ", ".join(options.eval),
            "rows": splits.counts,
            "general": str(options.general or "built in"),
        },
        options=options.model_dump(mode="json"),
        metric=options.metric[0],
        ways=results,
        differences=differences,
        forgetting=forgetting,
        diverged=diverged,
        failed=failed,
        verdict=judge(results, differences, diverged, failed, metric=options.metric[0], forgetting=forgetting),
        samples=_samples(predictions, results),
        next_commands=_next_commands(options, results),
    )
    save(report, options.output / "report.json")
    html.write(report, options.output / "report.html")
    return report


def _split(options: CompareOptions, reporter: Reporter) -> tuple[list[Row], list[Row], list[Row]]:
    """Training, validation and test rows; validation is disjoint from both others by what is asked."""

    def read(given: list[str], limit: int | None = None) -> list[Row]:
        return sources.read(given, columns=options.columns, limit=limit, note=reporter.note).rows

    rows, test = read(options.data), read(options.eval, options.test_rows)
    asked = {_prompt(row) for row in test}
    shared = sum(_prompt(row) in asked for row in rows)
    if shared:
        reporter.note(f"data: {shared} of {len(rows)} training rows ask what a test row asks; test figures flatter")
    if options.validation:
        validation = read(options.validation)
        trained = {_prompt(row) for row in rows}
        for what, others in (("test", asked), ("training", trained)):
            overlap = sum(_prompt(row) in others for row in validation)
            if overlap:
                raise DataError(
                    f"data {', '.join(options.validation)}: {overlap} validation row(s) ask what a {what} row asks; "
                    "choose disjoint files"
                )
        return rows, validation, test
    order = list(range(len(rows)))
    random.Random(options.seed).shuffle(order)
    candidates = [i for i in order if _prompt(rows[i]) not in asked]
    chosen = set(candidates[: options.validation_rows])
    held = {_prompt(rows[i]) for i in chosen}
    left = [row for row in rows if _prompt(row) not in held]  # nor another row that asks the same
    if len(left) < options.batch_size or not chosen:
        raise DataError(
            f"data {', '.join(options.data)}: {len(rows)} rows are too few to take {options.validation_rows} "
            "validation rows; give --validation FILE or fewer --validation-rows"
        )
    return left, [rows[i] for i in sorted(chosen)], test


def _prompt(row: Row) -> str:
    return repr(row.messages[:-1]) if row.messages else row.prompt or row.text


def _of_method(options: CompareOptions, method: str) -> CompareOptions:
    """`options` without those of adapters, or of quantised weights, where `method` has none."""
    fields = CompareOptions.model_fields
    return options.model_copy(update={name: fields[name].get_default() for name in unused_by(method)})


def _claim(options: CompareOptions, source: Source) -> None:
    output = options.output
    given = (*options.data, *options.eval, *options.validation, options.general, options.layer_precision)
    files = [Path(sources.split_weight(str(one))[0]) for one in given if one is not None]
    require_apart(output, [source.path, *(file for file in files if file.exists())], _OWN)
    present = require_ours(output, _OWN, _MARKS, "comparison")
    if present and not options.overwrite:
        raise ConfigError(
            f"output {output}: holds an earlier comparison ({', '.join(present)}); "
            "give --overwrite to replace it, or another --output"
        )
    with atomic.writing(output):
        atomic.write_text(output / _MARKS[0], "")
        for name in present:
            atomic.remove(output / name)


def _write(options: CompareOptions, train: list[Row], validation: list[Row], test: list[Row]) -> worker.Splits:
    count = options.search_rows or max(options.batch_size, len(train) // _SEARCH_SHARE)
    searched = random.Random(options.seed).sample(train, min(count, len(train)))
    parts = {"train": train, "search": searched, "validation": validation, "test": test}
    directory = options.output / "data"
    return worker.Splits(
        train=_write_weighted(directory, "train", train),
        search=_write_weighted(directory, "search", searched),
        validation=write_rows(directory / "validation.jsonl", validation),
        test=write_rows(directory / "test.jsonl", test),
        counts={name: len(rows) for name, rows in parts.items()},
    )


def _write_weighted(directory: Path, name: str, rows: list[Row]) -> list[str]:
    """A file for the rows of each weight; returns them as sources."""
    weights = dict.fromkeys(row.weight for row in rows)
    if set(weights) == {1.0}:
        return [str(write_rows(directory / f"{name}.jsonl", rows))]
    written: list[str] = []
    for weight in weights:
        path = directory / f"{name}-{weight:g}.jsonl"
        written.append(f"{write_rows(path, [row for row in rows if row.weight == weight])}@{weight:g}")
    return written


def _in_process(what: str, function: Callable[..., T], *arguments: Any) -> T:
    """Call `function` in a fresh process, which ends with this call. Its errors are raised here."""
    others = active_children()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise BackendError(
                f"{what}: its process died without a word; the system may have ended it for lack of memory. "
                "Try a smaller --micro-batch-tokens"
            ) from None
        except (KeyboardInterrupt, Interrupted):
            for process in active_children():
                if process not in others:
                    process.kill()  # else the pool would wait for it
            raise


def _best(points: list[SearchPoint]) -> tuple[float | None, bool]:
    """The rate with the least validation loss, and whether it lies at an edge of a grid of two or more."""
    alive = [(p.validation_loss, p.lr) for p in points if p.validation_loss is not None]
    if not alive:
        return None, False
    lr = min(alive)[1]
    rates = [p.lr for p in points]
    return lr, len(rates) > 1 and lr in (min(rates), max(rates))


def _in_short(way: MethodResult, options: CompareOptions) -> str:
    scores = ", ".join(f"{way.scores[name].value:.1%} {title_of(name)}" for name in options.metric)
    return f"{way.method}: {scores}, test loss {way.test_loss:.3f}, general text {way.general.after:.3f}"


def _since(before: General, now: General) -> General:
    """`now`, with what was measured before training."""
    return now.model_copy(update={"before": before.after, "rows_before": before.rows_after})


def _differences(results: list[MethodResult]) -> list[Difference]:
    """Every tuned way against the base, and each pair of tuned ways in the order of the methods."""
    base, *tuned = results
    out = []
    for a, b in [*((way, base) for way in tuned), *itertools.combinations(tuned, 2)]:
        value, low, high = paired_interval(a.row_scores, b.row_scores)
        out.append(Difference(a=a.method, b=b.method, value=value, low=low, high=high, rows=len(a.row_scores)))
    return out


def _rises(way: MethodResult) -> list[float]:
    """What training added to the loss of each general text, in nats."""
    return [after - before for before, after in zip(way.general.rows_before, way.general.rows_after, strict=True)]


def _forgetting(results: list[MethodResult]) -> list[Difference]:
    """The rise of the loss on general text: of every tuned way, and compared for each pair as in `_differences`."""
    base, *tuned = results
    out = []
    for a, b in [*((way, base) for way in tuned), *itertools.combinations(tuned, 2)]:
        more = [x - y for x, y in zip(_rises(a), _rises(b), strict=True)]
        value, low, high = ratio_interval(more, a.general.tokens)
        out.append(Difference(a=a.method, b=b.method, value=value, low=low, high=high, rows=len(more)))
    return out


def _samples(predictions: dict[str, list[Prediction]], results: list[MethodResult]) -> list[Sample]:
    """A few test rows; those on which the tuned ways disagree most come first."""
    scores = {way.method: way.row_scores for way in results}
    tuned = [scores[way.method] for way in results[1:]] or [scores[BASE]]
    spread = [max(row) - min(row) for row in zip(*tuned, strict=True)]
    chosen = sorted(range(len(spread)), key=lambda i: -spread[i])[:_SAMPLES]
    return [
        Sample(
            prompt=predictions[BASE][i].prompt,
            expected=predictions[BASE][i].expected,
            outputs={way: said[i].output for way, said in predictions.items()},
            scores={way: scores[way][i] for way in predictions},
        )
        for i in chosen
    ]


def _next_commands(options: CompareOptions, results: list[MethodResult]) -> list[str]:
    out = []
    for way in results[1:]:
        if way.method == "full":
            parts = ["--model", f"{options.output}/runs/full/model"]
        else:
            precision = ["--precision", "auto"] if way.method in ("qlora", "hybrid") else []
            adapter = f"{way.method}={options.output}/runs/{way.method}/adapter"
            parts = ["--model", options.model, *precision, "--adapter", adapter]
        out.append(shlex.join(["twinlora", "chat", *parts]))
    return out


def _git_hash() -> str | None:
    """The commit of the working directory's repository, if it is one."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
