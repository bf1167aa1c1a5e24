"""`twinlora merge` and `twinlora export` as they are typed."""

import json

import pytest

from twinlora.cli.main import main

pytest.importorskip("xllamacpp")


def test_merge_prints_the_candidates_and_the_gate(qlora, tmp_path, capsys):
    assert main(["merge", str(qlora), "--output", str(tmp_path / "m")]) == 0
    shown = capsys.readouterr().out
    for part in ("folded into", "dequantised", "kept", "KL, nats", "top-1 agreement", f"written: {tmp_path / 'm'}"):
        assert part in shown


def test_export_prints_json_and_the_edge_report(lora, tmp_path, capsys):
    command = ["export", str(lora), "--to", "gguf", "--quant", "Q8_0", "--output", str(tmp_path / "m"), "--edge"]
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["quant"] == "q8_0"
    assert record["parity"]["stop_tokens"] == "same"
    assert main([*command, "--overwrite"]) == 0
    shown = capsys.readouterr().out
    for part in ("llama.cpp, ", "in llama.cpp here", "peak memory", "estimate for a phone"):
        assert part in shown


def test_a_failed_gate_is_one_message_and_status_1(lora, tmp_path, capsys):
    command = [
        "export",
        str(lora),
        "--to",
        "gguf",
        "--quant",
        "q4_0",
        "--output",
        str(tmp_path / "m"),
        "--max-kl",
        "1e-9",
    ]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "in llama.cpp it does not answer as the trained model does, and was deleted" in error
    assert "first at" in error
    assert not (tmp_path / "m").exists()


def test_wrong_options_are_status_2(lora, tmp_path, capsys):
    out = ["--output", str(tmp_path / "m")]
    assert main(["export", str(tmp_path), "--to", "gguf", *out]) == 2
    assert "no adapter_config.json" in capsys.readouterr().err
    assert main(["export", str(lora), "--to", "peft", "--edge", *out]) == 2
    assert "edge measures GGUF files in llama.cpp: it needs to gguf" in capsys.readouterr().err
    assert main(["export", str(lora), "--to", "gguf-lora", "--quant", "q4_k_m", *out]) == 2
    assert "quant q4_k_m: the base for comparing is one of f16" in capsys.readouterr().err
