"""benchmarks/gpu.py without a device: its sections run, its file grows cell by cell, and no page believes a dry run."""

import json
from pathlib import Path

import pytest
import torch


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import gpu

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["gpu.py", *map(str, arguments)])
        gpu.main()

    return gpu, run


def sections(path):
    return json.loads(path.read_text())["sections"]


def test_sections_run_on_tiny_shapes(bench, tmp_path, monkeypatch):
    _, run = bench
    output = tmp_path / "gpu.json"
    run("--dry-run", "--only", "rates,head,blocks,steps", "--output", output, "--rounds", 1)
    found = sections(output)
    assert found.keys() == {"rates", "head", "blocks", "steps"}
    assert all(section["dry_run"] and section["results"] for section in found.values())
    pair = found["steps"]["results"]["32 tokens, recomputed"]
    assert pair["lora"]["loss"] == pytest.approx(pair["qlora"]["loss"], abs=0.05)
    assert pair["qlora_over_lora"] == pytest.approx(pair["qlora"]["seconds"] / pair["lora"]["seconds"])
    import tables
    from readme import results

    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert tables.gpu.gpu_results("steps") == {}
    assert "0." not in tables.gpu.gpu_steps()


def test_a_file_is_continued(bench, tmp_path, monkeypatch):
    gpu, run = bench
    ran, output = [], tmp_path / "gpu.json"

    def full():
        raise torch.OutOfMemoryError("out of memory")

    def broken():
        raise RuntimeError("kernel failed")

    cells = {"good": lambda: ran.append(1) or {"seconds": 1.0}, "large": full, "bad": broken}
    monkeypatch.setattr(gpu, "sections", lambda: {"some": lambda setting: cells.items()})
    with pytest.raises(SystemExit) as stop:
        run("--dry-run", "--output", output)
    assert stop.value.code == 1
    results = sections(output)["some"]["results"]
    assert results == {
        "good": {"seconds": 1.0}, "large": {"out_of_memory": True}, "bad": {"error": "RuntimeError: kernel failed"},
    }  # fmt: skip
    cells["bad"] = lambda: {"seconds": 2.0}
    with pytest.raises(SystemExit, match="stopped before some: bad"):
        run("--dry-run", "--output", output, "--continue", "--seconds", -1)
    run("--dry-run", "--output", output, "--continue")
    assert sections(output)["some"]["results"]["bad"] == {"seconds": 2.0}
    assert len(ran) == 1
    with pytest.raises(SystemExit, match="no section other; known: some"):
        run("--dry-run", "--only", "other")


def test_measured_results_reach_the_pages(bench, tmp_path, monkeypatch):
    """With made-up figures, in a directory of their own."""
    import tables
    from readme import results as measured

    one = {"tokens_per_second": 12345.6, "seconds": 0.5, "flops": 2e14}
    steps = {
        "2048 tokens": {"lora": one, "qlora": one, "qlora_over_lora": 1.07},
        "16384 tokens": {"lora": {"out_of_memory": True}, "qlora": one},
        "peft-lora, 2048 tokens": {"error": "RuntimeError: no"},
    }
    fits = {"65B within 48 GB": {"reserved_bytes": 38e9, "context_bytes": 5e8, "tokens_per_second": 99.4}}
    kernels = {"dequantize 8B q": {"share_of_copy": 0.91, "seconds": {"twinlora": 1.0, "bitsandbytes": 2.5}}}
    facts = {"dry_run": False, "machine": {"device": "Some GPU"}, "versions": {"torch": "2.11"}}
    made = {"steps": steps, "fits": fits, "kernels": kernels, "rates": {"rates": {"gemm_flops": 8e14}}}
    document = {"sections": {name: facts | {"results": results} for name, results in made.items()}}
    (tmp_path / "gpu.json").write_text(json.dumps(document))
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    first, *_ = (line for line in tables.gpu.gpu_steps().splitlines() if line.startswith("| 2,048 |"))
    assert first.startswith("| 2,048 | 12,346 | 50 % | 12,346 | 1.07 | did not run | **not measured** |")
    long, *_ = (line for line in tables.gpu.gpu_steps().splitlines() if line.startswith("| 16,384 |"))
    assert long.startswith("| 16,384 | out of memory | out of memory | 12,346 | – |")
    assert "Some GPU; torch 2.11." in tables.gpu.gpu_steps()
    assert "| 65B within 48 GB | 38.5 GB | 99 |" in tables.gpu.gpu_fits()
    assert "| 4096 × 4096 | 91 % | 2.5× |" in tables.gpu.gpu_fits()
    assert "| 7B within 8 GB | **not measured** |" in tables.gpu.gpu_fits()
