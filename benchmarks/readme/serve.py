"""The server under load: throughput, switching, mix-ups, abuse."""

from __future__ import annotations

from readme.results import load, machine_line, markdown, measured, not_yet

_MIXED = "twinlora: 8 adapters, 8 clients"
_TITLES = {
    "twinlora": "**twinlora**'s server",
    "vllm": "vLLM's server",
    "llama.cpp": "llama.cpp's server (F16)",
    "static": "in one process",
}


def serve() -> str:
    """Those parts that were measured, each with its machine if that is another than before."""
    result = load("serve") if measured("serve") else {}
    if not result:
        return "The server under load: " + not_yet("serve.py")
    made = {"throughput": _throughput, "switching": _switching, "mixups": _mixups, "soak": _soak, "outgrow": _outgrow}
    parts, machines = [], set()
    for name, make in made.items():
        text = make(result[name]) if name in result else not_yet(f"serve.py {name}")
        machine = machine_line(result[name]["facts"]) if name in result else ""
        first, *rest = text.split("\n\n")
        parts += [first if machine in machines else f"{first} {machine}".rstrip(), *rest]
        machines.add(machine)
    return "\n\n".join(parts)


def _precision(part: dict) -> str:
    return {"16bit": "bfloat16", "nf4": "NF4"}[part["precision"]]


def _throughput(part: dict) -> str:
    """Every way, and how fast eight adapters at once are compared with it."""
    ways = {name: way for name, way in part.items() if "tokens_per_second" in way}
    mixed, rows = ways[_MIXED]["tokens_per_second"], []
    for name, way in ways.items():
        where, _, what = name.partition(": ")
        rate = way["tokens_per_second"]
        failed = sum(count for status, count in way.get("statuses", {}).items() if status != "200")
        first = way.get("first_token", {})
        cells = [_TITLES[where], what, f"{rate:.0f}" + f" ({failed} requests failed)" * (failed > 0)]
        cells.append("–" if name == _MIXED else f"{mixed / rate:.2f}×")
        rows.append([*cells, f"{1e3 * first['p50']:.0f} ms" if first else "–"])
    setting = (
        f"SmolLM2-135M-Instruct in {_precision(part)}, adapters of rank 16 on all linear layers, answers of 64 tokens."
    )
    header = "| with | load | tokens/s | 8 adapters at once, compared with it | first token, median |"
    return setting + "\n\n" + markdown(header, rows)


def _switching(part: dict) -> str:
    titles = {
        "same": "adapter of the request before",
        "other": "another one, in memory",
        "cold": "one that is on disk alone",
        "any of all": f"any of {part['adapters']:,}",
    }
    rows = [[title, *(f"{1e3 * part[name][p]:.1f}" for p in ("p50", "p95", "p99"))] for name, title in titles.items()]
    setting = (
        f"Switching: one client, one token a request, in {_precision(part)}, adapters of rank 8 on queries and values "
        f"({part['bytes_on_disk'] / 1e6:.2f} MB each). Serving {part['adapters']:,} of them, the process grew by "
        f"{(part['rss_bytes'][1] - part['rss_bytes'][0]) / 1e6:.0f} MB."
    )
    header = "| a request for, milliseconds | p50 | p95 | p99 |"
    return setting + "\n\n" + markdown(header, rows)


def _mixups(part: dict) -> str:
    return (
        f"Mix-ups: {len(part['wrong']):,} of {part['answers']:,} answers, from {part['adapters']} adapters that each say "
        "their own code word, while names were loaded, replaced and unloaded."
    )


def _soak(part: dict) -> str:
    """Errors of ours are statuses from 500 on."""
    statuses = {int(status): count for status, count in part["statuses"].items()}
    failed = sum(count for status, count in statuses.items() if status >= 500)
    middle, last = (part["rss_bytes"][third] for third in ("middle third", "last third"))
    return (
        f"Abuse: in {part['minutes']:.0f} minutes of clients that leave, malformed and oversized requests and bad adapters, "
        f"{failed:,} of {sum(statuses.values()) - statuses.get(0, 0):,} answers were errors of the server; it ended "
        f"“{part['health']['status']}”, its memory {100 * (last / middle - 1):+.1f} % between the middle and the last third."
    )


def _outgrow(part: dict) -> str:
    """How often vLLM says the same, and how near the others were to it."""
    equal = part["rows"] - len(part["differing"])
    told = (
        f"A trained adapter in vLLM's server: {equal:,} of {part['rows']:,} greedy answers are the same, the "
        f"log-probabilities of their {part['tokens']:,} common tokens {part['mean_apart']:.3f} nats apart on average"
    )
    margins = [place[side] for place in part["differing"] for side in ("preferred by ours", "preferred by vllm")]
    if not margins:
        return f"{told}."
    known = [margin for margin in margins if margin is not None]
    return f"{told}; where answers part, a server preferred its token by {max(known):.2f} nats at most."
