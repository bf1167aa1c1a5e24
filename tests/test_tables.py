"""The README's tables from results of every shape: nothing measured, a part, all of it."""

import json
import re

import pytest

from tests.test_docs import ROOT

FACTS = {
    "machine": {"cpu": "AMD EPYC", "threads": 1, "memory_bytes": 24 << 30},
    "versions": {"torch": "2.13.0+cpu", "peft": "0.21.2"},
}
NAMES = {
    "Instruct", "Unsloth", "bitsandbytes", "cpp", "cpu", "epoch", "key", "llama", "nat", "peft", "query", "token", "torch",
    "transformers", "twinlora", "value", "xllamacpp",
}  # fmt: skip


def cell(method, model, error, checkpointing=False, shape="1x512"):
    facts = {"method": method, "model": model, "shape": shape, "checkpointing": checkpointing}
    return facts | {"error": error, "measured": 0.5, "predicted": 0.5, "calibration_seconds": 12.3}


def run(*losses):
    return {"loss_rows": list(losses), "loss_tokens": [2, 1, 1]}


def scores(loss, kl=None):
    return {"loss": loss, "exact_match": 0.5, "bytes": 10**8} | ({} if kl is None else {"kl_mean": kl})


def percentiles(seconds):
    return {"p50": seconds, "p95": 2 * seconds, "p99": 3 * seconds}


def examples():
    """Results with every part."""
    hybrid = json.loads((ROOT / "benchmarks" / "results" / "hybrid.json").read_text())
    for way in hybrid["ways"].values():
        way.pop("runs", None)
    hybrid["ways"]["16bit"]["runs"] = {"0": run(2.0, 1.0, 1.0), "1": run(4.0, 1.0, 1.0)}
    hybrid["ways"]["4"]["runs"] = {"0": run(3.0, 2.0, 1.5), "1": run(5.0, 2.0, 1.5)}
    memory = [cell(m, "llama-1b", {"step": 0.001, "rss": -0.2}) for m in ("full", "lora", "hybrid")]
    errors = {"1x512": 0.1, "16 short": -0.3, "2x1024": 0.2}
    times = [cell("lora", "llama-1b", error, shape=shape) for shape, error in errors.items()]
    rates = {
        "twinlora: base, 8 clients": 400.0, "twinlora: one adapter, 8 clients": 380.0,
        "twinlora: 8 adapters, 8 clients": 300.0, "twinlora: one adapter, one client": 60.0,
        "vllm: 8 adapters, 8 clients": 100.0, "llama.cpp: 8 adapters, 8 clients": 50.0, "static: twinlora, batch of 8": 500.0, "static: transformers + PEFT, one": 30.0,
        "static: llama.cpp Q4_0, base, batch of 8": 350.0,
    }  # fmt: skip
    throughput = {name: {"tokens_per_second": rate} for name, rate in rates.items()}
    throughput["vllm: 8 adapters, 8 clients"] |= {"statuses": {"200": 30, "503": 2}, "first_token": percentiles(0.3)}
    shared = {"facts": FACTS, "precision": "nf4"}
    switching = {name: percentiles(0.01) for name in ("same", "other", "cold", "any of all")}
    serve = {
        "throughput": throughput | shared,
        "switching": switching | {"adapters": 1000, "bytes_on_disk": 2 * 10**6, "rss_bytes": [10**9, 11 * 10**8]} | shared,
        "mixups": {"adapters": 32, "answers": 2000, "wrong": [], "statuses": {"200": 2000}} | shared,
        "outgrow": {"rows": 200, "differing": [{"ours": "a", "vllm": "b", "preferred by ours": 0.12, "preferred by vllm": None}],
                    "tokens": 1382, "mean_apart": 0.0058, "most_apart": 0.14} | shared,
        "soak": {"minutes": 30.0, "statuses": {"200": 9, "429": 3, "500": 1, "0": 5}, "health": {"status": "ok"},
                 "rss_bytes": {"middle third": 10**9, "last third": 11 * 10**8}} | shared,
    }  # fmt: skip
    export = FACTS | {
        "rows": 2000, "test_rows": 300,
        "lora": {"adapter": scores(0.18), "merged on 16bit": scores(0.19, 1e-5), "gguf:q4_0 on 16bit": scores(0.2, 0.05)},
        "qlora": {"adapter": scores(0.28), "merged on 16bit": scores(0.31, 0.2), "merged on dequantised": scores(0.29, 1e-5),
                  "bnb on dequantised": scores(4.7) | {"refused": "it does not answer as the trained model does"}},
        "deploy": {f"{way}, seed {seed}": scores(0.3 + seed, 0.1)
                   for way in ("merged, then quantised", "--deploy q4_0") for seed in (0, 1)},
        "edge": {"q8_0": {"measured": {"q8_0": {"file_bytes": 145 * 10**6, "peak_rss_bytes": 190 * 10**6,
                                               "prompt_tokens_per_second": 900.0, "new_tokens_per_second": 110.0}}}},
    }  # fmt: skip
    return {"hybrid": hybrid, "plan_memory": FACTS | {"cells": memory}, "serve": serve, "export": export} | {
        "plan_time": FACTS | {"cells": times}
    }


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A function: the tables by name, in English or Chinese, with these results beside the repository's own."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables
    from readme import chinese, results

    own = {path.stem: path.read_text() for path in results.RESULTS.glob("*.json")}
    monkeypatch.setattr(results, "RESULTS", tmp_path)

    def make(these, *, translated=False):
        for file in tmp_path.glob("*.json"):
            file.unlink()
        kept = {
            name: text
            for name, text in own.items()
            if name not in ("serve", "export", "plan_memory", "plan_time", "gpu")
        }
        for name, text in (kept | {name: json.dumps(result) for name, result in these.items()}).items():
            (tmp_path / f"{name}.json").write_text(text)
        english = {name: table() for name, table in tables.TABLES.items()}
        return chinese.translated(english) if translated else english

    return make


def test_what_is_not_measured_is_said(made):
    tables = made({})
    for name, command in {"serve": "serve.py", "export": "export.py", "plan_memory": "plan_memory.py"}.items():
        assert f"**not measured** yet: `python benchmarks/{command}` measures." in tables[name]
        assert "|" not in tables[name]
    found = examples()
    found["serve"] = {"soak": found["serve"]["soak"]}
    assert "`python benchmarks/serve.py throughput` measures." in made(found)["serve"]


def test_errors_of_plans_by_method_and_model(made):
    tables = made(examples())
    assert "| LoRA | llama-1b | 1 | 0.10 % | +0.10 % | 20 % | -20 % |" in tables["plan_memory"]
    assert "| LoRA | llama-1b | 3 | 0.50 to 0.50 s | 20 % | -30 % |" in tables["plan_time"]
    assert tables["plan_memory"].index("| LoRA |") < tables["plan_memory"].index("| full |")


def test_loss_after_training_is_per_token_and_paired_by_row(made):
    lines = made(examples())["hybrid"].splitlines()
    # 16 bit: rows 3, 1, 1 over both seeds; 4 bits: 4, 2, 1.5; four tokens
    found = re.search(
        r"\| 1\.8750 \| \+0\.6250 \(\+0\.5000 to (\+[\d.]+)\) \|$", next(x for x in lines if " 4.00 " in x)
    )
    assert found
    assert 0.625 < float(found[1]) <= 1.0
    assert next(x for x in lines if "all 16bit" in x).endswith("| 1.2500 | – |")
    assert next(x for x in lines if "int8" in x).endswith("| – | – |")


def test_throughput_is_compared_and_failures_are_shown(made):
    table = made(examples())["serve"]
    assert "| **twinlora**'s server | base, 8 clients | 400 | 0.75× | – |" in table
    assert "| vLLM's server | 8 adapters, 8 clients | 100 (2 requests failed) | 3.00× | 300 ms |" in table
    assert "1 of 13 answers were errors of the server" in table
    assert table.count("AMD EPYC") == 1


def test_export_shows_both_adapters_and_both_bases_of_qlora(made):
    table = made(examples())["export"]
    assert "| `merged` | 100 | 50.0 % | 0.1900 | 1e-05 | 50.0 % | 0.2900 | 1e-05 |" in table
    assert "| `merged`, QLoRA's into 16 bit | 100 | – | – | – | 50.0 % | 0.3100 | 0.2 |" in table
    assert "| `gguf q4_0` | 100 | 50.0 % | 0.2000 | 0.05 | – | – | – |" in table
    assert "| `--deploy q4_0` | 50.0 % | 0.8000 | 0.1 | 50.0, 50.0 |" in table


def test_every_word_is_translated_and_every_translation_used(made):
    from readme import chinese

    texts = [text for results in ({}, examples()) for text in made(results).values()]
    unused = [pattern for pattern, _ in chinese.WORDS if not any(re.search(pattern, t, re.MULTILINE) for t in texts)]
    assert not unused
    page = "\n".join(text for results in ({}, examples()) for text in made(results, translated=True).values())
    prose = re.sub(r"`[^`]*`|\(http[^)]*\)", "", page)
    left = set(re.findall(r"\b[a-zA-Z][a-z]{2,}\b", prose)) - NAMES
    assert not left, f"words that were not translated: {sorted(left)}"
