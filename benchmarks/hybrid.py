"""Hybrid precision on banking77: what each budget costs before training, and after it.

    python benchmarks/hybrid.py --data DIR --model DIR --output benchmarks/results/hybrid.json
    python benchmarks/hybrid.py … --train 4,4.5,nf4-64-dq256,16bit --seeds 0,1,2

The first writes, for every budget in bits per weight of the linear layers and for the bases in one format, the
Kullback-Leibler divergence of the next-token distributions from the 16-bit base, in nats a token, over all tokens of
held-out rows. Products are float32, so that differences come from the stored weights alone. Layers are chosen from
training rows, as `twinlora train --method hybrid` does. `--train` adds runs of one epoch over those bases, a process
each, and each held-out row's loss; runs that the output already has are kept. DIR holds train.jsonl and test.jsonl in the `messages` form.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import harness  # puts src on the path

if TYPE_CHECKING:
    from twinlora.plan.precision import Choice

BUDGETS = "3.25,3.5,4,4.5,5.5,8"
UNIFORM = ("nf3-64-dq256", "nf4-64-dq256", "int8-64", "16bit")
LR = 1e-3


def first_rows(path: Path, count: int) -> str:
    return "".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:count])


def choices(args: argparse.Namespace) -> dict[str, dict]:
    """For each budget and each single format: the format of every layer, and what is stored and expected of it."""
    import torch

    from twinlora.config import TrainOptions
    from twinlora.model.fingerprint import fingerprint
    from twinlora.plan import sensitivity
    from twinlora.plan.precision import Choice, choose
    from twinlora.reporter import ConsoleReporter
    from twinlora.train.hybrid import candidates
    from twinlora.train.inputs import read_inputs
    from twinlora.train.notes import Notes

    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch, "train.jsonl")
        data.write_text(first_rows(args.data / "train.jsonl", args.rows), encoding="utf-8")
        options = TrainOptions(model=args.model, data=data, method="hybrid", bits=4, output=Path(scratch, "run"))
        inputs = read_inputs(options, Notes(ConsoleReporter()))
    found = sensitivity.measure(
        inputs.source, sensitivity.calibration_rows(inputs.examples), candidates(options), note=print,
        fingerprint=fingerprint(inputs.source), dtype=torch.bfloat16, device=torch.device("cpu"),
    )  # fmt: skip
    sizes, total = found.sizes(torch.bfloat16), sum(found.weights.values())
    made = {budget: choose(found.rises, sizes, int(float(budget) / 8 * total)) for budget in args.budgets.split(",")}
    for name in UNIFORM:
        loss = sum(rises[name] for rises in found.rises.values())
        taken = sum(size[name] for size in sizes.values())
        made[name] = Choice(dict.fromkeys(found.rises, name), taken, loss, loss)
    return {name: account(choice, found.other_bytes, total) for name, choice in made.items()}


def account(choice: Choice, other_bytes: int, linear_weights: int) -> dict:
    whole = choice.stored_bytes + other_bytes
    return {
        "formats": choice.formats, "layers": choice.counts, "expected_kl": choice.loss, "bound": choice.bound,
        "weight_bytes": whole, "bits_per_linear_weight": 8 * choice.stored_bytes / linear_weights,
        "bits_per_weight": 8 * whole / (linear_weights + other_bytes // 2),
    }  # fmt: skip


def measure(args: argparse.Namespace) -> dict[str, dict]:
    """The divergence of every choice, and what it stores."""
    import torch

    from twinlora.data.examples import encode_rows
    from twinlora.data.sources import read_rows
    from twinlora.evaluate.stats import ratio_interval
    from twinlora.model.load import load_model, load_tokenizer, resolve

    source = resolve(args.model)
    examples = encode_rows(load_tokenizer(source), read_rows(args.data / "test.jsonl")[: args.kl_rows], 512)
    ids = [torch.tensor([example.ids]) for example in examples]

    @torch.no_grad()
    def log_probs(layers: dict[str, str] | None) -> list[torch.Tensor]:
        model = load_model(source, quantize=layers, dtype=torch.float32)
        return [model(input_ids=row, use_cache=False).logits[0].log_softmax(-1) for row in ids]

    base, out = log_probs(None), {}
    for name, chosen in choices(args).items():
        pairs = zip(base, log_probs(chosen["formats"]), strict=True)
        rows = [(wanted.exp() * (wanted - found)).sum().item() for wanted, found in pairs]
        mean, low, high = ratio_interval(rows, [row.shape[1] for row in ids])
        kept = {key: value for key, value in chosen.items() if key != "formats"}
        out[name] = kept | {"kl": mean, "kl_interval": [low, high], "kl_rows": rows}
        print(f"{name}: expected {chosen['expected_kl']:.4g}, measured {mean:.4g}", file=sys.stderr, flush=True)
    return out


def train_one(args: argparse.Namespace) -> dict:
    """One run, and the loss of every held-out row."""
    from twinlora.config import TrainOptions
    from twinlora.data.examples import encode_rows
    from twinlora.data.sources import read_rows
    from twinlora.evaluate.metrics import row_losses
    from twinlora.reporter import ConsoleReporter
    from twinlora.train.loop import train

    with tempfile.TemporaryDirectory() as scratch:
        data, layers = Path(scratch, "train.jsonl"), Path(scratch, "layers.json")
        data.write_text(first_rows(args.data / "train.jsonl", args.rows), encoding="utf-8")
        layers.write_text(json.dumps(choices(args)[args.one]["formats"]), encoding="utf-8")
        options = TrainOptions(
            model=args.model, data=data, method="hybrid", layer_precision=layers, output=Path(scratch, "run"), lr=LR,
            seed=int(args.seeds),
        )  # fmt: skip
        done = train(options, ConsoleReporter(f"{args.one} seed {args.seeds}"))
    examples = encode_rows(done.tokenizer, read_rows(args.data / "test.jsonl")[: args.test_rows], 512)
    losses = row_losses(
        done.model, examples, micro_batch_tokens=2048, packed=done.packed,
        plain_head=done.plain_head,
    )  # fmt: skip
    kept = ("peak_rss_bytes", "base_weight_bytes", "bits_per_linear_weight", "bits_per_weight")
    rows = {"loss_rows": [row.total for row in losses], "loss_tokens": [row.tokens for row in losses]}
    return {key: done.record[key] for key in kept} | rows


def train_all(args: argparse.Namespace, results: dict) -> None:
    for name in args.train.split(","):
        for seed in args.seeds.split(","):
            runs = results["ways"][name].setdefault("runs", {})
            if seed in runs:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                part = Path(scratch, "part.json")
                command = [
                    sys.executable,
                    __file__,
                    *sys.argv[1:],
                    "--one",
                    name,
                    "--seeds",
                    seed,
                    "--output",
                    str(part),
                ]
                subprocess.run(command, check=True)
                runs[seed] = json.loads(part.read_text())
            args.output.write_text(json.dumps(results, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--budgets", default=BUDGETS, help="bits per weight of the linear layers")
    parser.add_argument("--rows", type=int, default=2000, help="training rows")
    parser.add_argument("--kl-rows", type=int, default=48, help="held-out rows for the divergence")
    parser.add_argument("--test-rows", type=int, default=1500, help="held-out rows for the trained loss")
    parser.add_argument("--train", help="add runs over these bases, whose divergences the output has: 4,nf4-64-dq256,…")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        args.output.write_text(json.dumps(train_one(args)))
    elif args.train:
        train_all(args, json.loads(args.output.read_text()))
    else:
        args.output.write_text(json.dumps(harness.facts() | {"ways": measure(args)}, indent=1))


if __name__ == "__main__":
    main()
