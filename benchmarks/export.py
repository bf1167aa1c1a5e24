"""What an adapter is worth in every form in which it ships: answers and loss on banking77, beside the adapter itself.

    python benchmarks/export.py --data DIR --model DIR --scratch DIR [--output benchmarks/results/export.json]
    python benchmarks/export.py … --parts deploy       # only --deploy q4_0 against merging and quantising, three seeds

DIR holds train.jsonl and test.jsonl in the `messages` form. A LoRA and a QLoRA adapter are trained (rank 16, all linear
layers), exported in every way, measured by the gate, and each artefact answers the test rows in its own program: exact match,
and mean loss over all tokens of the right answers. What is in --output already is kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness  # puts src on the path
import llama_cpp

TRAINING = {"rank": 16, "alpha": 32, "lr": 1e-3, "warmup_steps": 10, "batch_size": 16}
ARTEFACTS = [
    "merged",
    "merged:float16",
    "bnb",
    "gguf:f16",
    "gguf:bf16",
    "gguf:q8_0",
    "gguf:q4_0",
    "gguf:iq4_nl",
    "gguf-lora:f16",
    "peft",
]
NEW_TOKENS = 24


def train(args: argparse.Namespace, name: str, **options: Any) -> Path:
    """A run, unless it is there."""
    from twinlora.config import TrainOptions
    from twinlora.reporter import ConsoleReporter
    from twinlora.train.loop import train as run

    out = args.scratch / name
    if not (out / "run.json").exists():
        rows = args.scratch / "train.jsonl"
        rows.write_text("".join((args.data / "train.jsonl").read_text().splitlines(True)[: args.rows]))
        values = {"model": args.model, "data": rows, "output": out, "overwrite": True} | TRAINING | options
        run(TrainOptions(**values), ConsoleReporter(name))
    return out


def test_rows(args: argparse.Namespace) -> list:
    from twinlora.data.sources import read_rows

    return read_rows(args.data / "test.jsonl", limit=args.test_rows)


def in_torch(args: argparse.Namespace, model: str, adapter: Path | None, precision: str) -> dict:
    """Our own evaluation: the adapter beside its base, or a merged checkpoint."""
    from twinlora.config import EvalOptions
    from twinlora.evaluate.evaluate import evaluate
    from twinlora.reporter import ConsoleReporter

    found = evaluate(
        EvalOptions(
            model=model, adapter=adapter, precision=precision, data=[str(args.data / "test.jsonl")],
            rows=args.test_rows, max_new_tokens=NEW_TOKENS,
        ),
        ConsoleReporter("evaluating"),
    )  # fmt: skip
    return {"loss": found["loss"], "exact_match": found["exact_match"]["value"]}


def in_llama_cpp(args: argparse.Namespace, model: Path, lora: Path | None) -> dict:
    """Greedy answers and losses from llama.cpp."""
    from twinlora.data.examples import encode_rows
    from twinlora.data.template import encode_prompt
    from twinlora.export.llama_cpp import LlamaCpp
    from twinlora.export.probes import Probe
    from twinlora.model.load import load_tokenizer, resolve

    tokenizer, rows = load_tokenizer(resolve(args.model)), test_rows(args)
    examples = encode_rows(tokenizer, rows, 2048)
    probes = [Probe(e.ids, [i for i, trained in enumerate(e.trained) if trained and i], e.where) for e in examples]
    hits, total, tokens = 0, 0.0, 0
    with LlamaCpp(model, lora=lora, context=1024) as running:
        for row, probe in zip(rows, probes, strict=True):
            text = running.complete(encode_prompt(tokenizer, row), NEW_TOKENS)
            hits += text.strip() == row.answer.strip()
            for position in probe.positions:
                at = Probe(probe.ids, [position], probe.where)
                for listed in (64, len(tokenizer)):  # all of them, which takes long, where the right one is unlikely
                    (answer,) = running.answers([at], tokenizer, listed=listed)
                    if (right := answer.ids == probe.ids[position]).any():
                        break
                total -= float(answer.log_probs[right].item())
                tokens += 1
    return {"loss": total / tokens, "exact_match": hits / len(rows)}


def ship(args: argparse.Namespace, run: Path, spec: str, **options: Any) -> tuple[dict, dict]:
    """Export with the gate; the record and what the artefact scores."""
    from twinlora.config import ExportOptions
    from twinlora.errors import ParityError
    from twinlora.export.ship import export
    from twinlora.reporter import ConsoleReporter

    to, _, quant = spec.partition(":")
    out = args.scratch / "artefact"
    shutil.rmtree(out, ignore_errors=True)
    values = {"run": run, "output": out, "to": to, "quant": quant or "f16", "data": [str(args.data / "test.jsonl")]}
    if to == "merged":
        values |= {"quant": "f16", "weights": quant or "auto"}
    values |= {"max_kl": 10.0}  # figures are wanted, whatever they are
    reporter, refused = ConsoleReporter(f"{run.name} {spec}"), None
    try:
        record = export(ExportOptions(**(values | options)), reporter)
    except ParityError as error:  # what it is worth is asked all the same
        refused = str(error)
        record = export(ExportOptions(**(values | options | {"gate": False})), reporter)
    if to == "gguf":
        scores = in_llama_cpp(args, next(out.glob("*.gguf")), None)
    elif to == "gguf-lora":
        base = args.scratch / "base.gguf"
        llama_cpp.write_base(args.model, base, quant="f16", dequantised=record["base"] == "dequantised")
        scores = in_llama_cpp(args, base, next(out.glob("*.gguf")))
    elif to == "peft":
        scores = in_torch(args, args.model, out, "auto")
    else:
        scores = in_torch(args, str(out), None, "nf4" if to == "bnb" else "16bit")
    size = sum(file.stat().st_size for file in out.glob("*") if file.suffix in (".gguf", ".safetensors"))
    return record, scores | {"bytes": size} | ({"refused": refused} if refused else {})


def keep(args: argparse.Namespace, results: dict, part: str, key: str, make: Callable[[], dict]) -> None:
    """Measure what is not there yet, and write it at once."""
    part_results = results.setdefault(part, {})
    if key not in part_results:
        part_results[key] = make()
        args.output.write_text(json.dumps(results, indent=1) + "\n")


def formats(args: argparse.Namespace, results: dict) -> None:
    """Both adapters in every form; QLoRA's merged into both bases."""
    for method, precision in (("lora", "16bit"), ("qlora", "nf4")):
        run = train(args, method, method=method)
        keep(args, results, method, "adapter", lambda r=run, p=precision: in_torch(args, args.model, r, p))
        bases = ["16bit", "dequantised"] if method == "qlora" else ["16bit"]
        for base in bases:
            for spec in ARTEFACTS if base == bases[-1] else ["merged", "gguf:f16", "gguf:q4_0"]:

                def one(run: Path = run, spec: str = spec, base: str = base) -> dict:
                    record, scores = ship(args, run, spec, base=base)
                    parity = record.get("parity") or {}
                    return scores | {key: parity.get(key) for key in ("kl_mean", "top1_agreement")}

                keep(args, results, method, f"{spec} on {base}", one)


def deploy(args: argparse.Namespace, results: dict) -> None:
    """--deploy q4_0 against merging and quantising, by seed."""
    for seed in map(int, args.seeds.split(",")):
        for name, options in (("merged, then quantised", {}), ("--deploy q4_0", {"deploy": "q4_0"})):

            def one(seed: int = seed, options: dict = options) -> dict:
                kind = "deploy" if options else "plain"
                run = train(args, f"{kind}-{seed}", method="lora", seed=seed, **options)
                record, scores = ship(args, run, "gguf:q4_0")
                return scores | {"kl_mean": (record.get("parity") or {}).get("kl_mean"), "deploy": record.get("deploy")}

            keep(args, results, "deploy", f"{name}, seed {seed}", one)


def edge(args: argparse.Namespace, results: dict) -> None:
    """Size, memory and speed in llama.cpp of each GGUF format."""
    from twinlora.config import ExportOptions
    from twinlora.export.ship import export

    run = train(args, "lora", method="lora")
    for quant in ("q8_0", "q4_0", "iq4_nl"):

        def one(quant: str = quant) -> dict:
            options = ExportOptions(
                run=run, output=args.scratch / "edge", to="gguf", quant=quant, edge=True, overwrite=True, max_kl=10.0,
                data=[str(args.data / "test.jsonl")],
            )  # fmt: skip
            measured: dict = export(options)["edge"]
            return measured

        keep(args, results, "edge", quant, one)


PARTS = {"formats": formats, "deploy": deploy, "edge": edge}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=harness.ROOT / "benchmarks" / "results" / "export.json")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--test-rows", type=int, default=300)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    results |= harness.facts() | {"rows": args.rows, "test_rows": args.test_rows}
    for part in args.parts.split(","):
        PARTS[part](args, results)


if __name__ == "__main__":
    main()
