import json
import shutil
from importlib.metadata import PackageNotFoundError, version

import pytest

from twinlora.cli import doctor
from twinlora.cli.main import main
from twinlora.numerics import cpu, pool


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(doctor, "_rates", lambda: {"bfloat16": 9e11, "float32": 2e11})


def test_the_same_facts_in_words_and_as_json(capsys):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["cores"] > 0
    assert "cpu" in facts["backend"]
    assert facts["disk"]["here"]["free_bytes"] == pytest.approx(shutil.disk_usage(".").free, rel=0.1)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert f"backend   {facts['backend']}" in shown
    assert "bfloat16  fast (900 GFLOP/s on the CPU, float32 200)" in shown
    assert facts["hub"]["cache"] in shown


def test_what_is_installed_and_how_to_get_the_rest(capsys, monkeypatch):
    def found(name):
        if name == "wandb":
            raise PackageNotFoundError
        return "9.8.7" if name == "sacrebleu" else version(name)

    monkeypatch.setattr(doctor, "version", found)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (missing,) = [line for line in lines if "--report-to wandb" in line]
    assert missing.endswith("pip install wandb")
    (here,) = [line for line in lines if "--metric chrf" in line]
    assert "9.8.7" in here
    assert "pip install" not in here
    assert len({line.index("--") for line in (missing, here)}) == 1, "aligned"


def test_packages_are_known_to_the_registry_of_metrics():
    from twinlora.evaluate.scores import METRICS

    wanted = {metric.package: f"--metric {name}" for name, metric in METRICS.items() if metric.package}
    assert wanted.items() <= doctor._OPTIONAL.items()


def test_the_token_is_never_shown(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for arguments in (["doctor"], ["doctor", "--json"]):
        assert main(arguments) == 0
        assert "hf_secret" not in capsys.readouterr().out
    assert doctor._hub()["token"] is True
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert main(["doctor"]) == 0
    assert "token not set (hf auth login)" in capsys.readouterr().out


def test_missing_backend_disk_and_gpu_come_with_what_mends_them(capsys, monkeypatch):
    monkeypatch.setattr(cpu, "_native", None)
    cpu.extension.cache_clear()
    monkeypatch.setattr(doctor, "_free", lambda path: 10**9)
    monkeypatch.setattr(doctor, "_gpu", lambda: {"devices": [], "torch_cuda": None, "driver": True})
    assert main(["doctor"]) == 0
    cpu.extension.cache_clear()
    shown = capsys.readouterr().out
    assert "(reference)" in shown
    assert "→ install a C++ compiler, then `pip install --editable .`" in shown
    assert "room on disk: 1.0 GB free (hub cache, " in shown
    assert "→ make CUDA=1" in shown
    assert "none (torch is a CPU build; an NVIDIA driver is here)" in shown


def test_why_torch_has_no_pool_is_said(capsys, monkeypatch):
    monkeypatch.setattr(pool, "refusal", lambda: None)  # as where there is one
    assert main(["doctor"]) == 0
    assert "no pool" not in capsys.readouterr().out
    monkeypatch.setattr(pool, "refusal", lambda: "the address space is limited (ulimit -v)")
    assert main(["doctor"]) == 0
    assert "no pool for torch's large tensors: the address space is limited (ulimit -v)" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    assert "ulimit" in json.loads(capsys.readouterr().out)["no_tensor_pool"]


@pytest.mark.parametrize("version", [None, "3.6.0"])
def test_a_gpu_wants_triton(version, capsys, monkeypatch):
    device = {"name": "H100", "capability": "9.0", "memory_bytes": 80 * 2**30, "free_bytes": 70 * 2**30}
    monkeypatch.setattr(doctor, "_gpu", lambda: {"devices": [device], "torch_cuda": "13.0", "driver": True})
    monkeypatch.setattr(doctor, "_version", lambda package: version)
    assert main(["doctor", "--json"]) == 0
    missing = [line["mend"] for line in json.loads(capsys.readouterr().out)["missing"]]
    assert ("pip install triton" in missing) == (version is None)


def test_a_gpu_is_described():
    device = {"name": "H100", "capability": "9.0", "memory_bytes": 80 * 2**30, "free_bytes": 70 * 2**30}
    line = doctor._gpu_line({"devices": [device], "torch_cuda": "13.0", "driver": True})
    assert line == "H100, 70.0 of 80.0 GiB free, capability 9.0"


def test_a_directory_that_is_not_yet_there_is_on_its_parents_disk(tmp_path):
    assert doctor._free(tmp_path / "a" / "b") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


def test_programs_that_artefacts_run_in_are_known():
    from twinlora.export.ship import _PROGRAMS

    assert set(_PROGRAMS.values()) <= doctor._OPTIONAL.keys()
