"""TRL's trainers on our models: SFT, and DPO against a reference that costs nothing."""

import pytest
import torch

import twinlora
from tests.conftest import chat
from twinlora.adapters import files
from twinlora.adapters.lora import lora_layers

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

COMMON = {
    "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "logging_steps": 1, "report_to": [],
    "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False,
}  # fmt: skip


def prepared(tiny, precision):
    model, tokenizer = twinlora.load(tiny, precision=precision, dtype="float32")
    return twinlora.attach(model, rank=4), tokenizer


def logged(trainer, key):
    return [line[key] for line in trainer.state.log_history if key in line]


@pytest.mark.parametrize("precision, padding_free", [("16bit", False), ("nf4", True)])
def test_sft(tiny, tmp_path, precision, padding_free):
    model, tokenizer = prepared(tiny, precision)
    rows = datasets.Dataset.from_list([chat(f"say {'ab' * (i % 7)}", f"word {i}") for i in range(24)])
    args = trl.SFTConfig(str(tmp_path), padding_free=padding_free, max_length=None, **COMMON)
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]
    trainer.save_model(str(tmp_path / "adapter"))
    saved = files.read_adapter(tmp_path / "adapter")
    assert all(torch.equal(layer.lora_B, saved.tensors[name][1]) for name, layer in lora_layers(model).items())
    assert all(layer.lora_B.any() for layer in lora_layers(model).values())


@pytest.mark.parametrize("precision", ["16bit", "nf4"])
def test_dpo(tiny, tmp_path, precision):
    """Rewards start at 0, whether the reference is the base that shares its weights or log-probabilities kept."""
    pairs = datasets.Dataset.from_list(
        [{"prompt": f"say {i}", "chosen": f" yes {i}", "rejected": " no"} for i in range(8)]
    )
    margins = []
    for kept in (True, False):
        model, tokenizer = prepared(tiny, precision)
        args = trl.DPOConfig(str(tmp_path), precompute_ref_log_probs=kept, bf16=False, **COMMON)
        trainer = trl.DPOTrainer(
            model=model,
            ref_model=None if kept else twinlora.without_adapters(model),
            args=args,
            train_dataset=pairs,
            processing_class=tokenizer,
        )
        trainer.train()
        assert logged(trainer, "rewards/chosen")[0] == logged(trainer, "rewards/rejected")[0] == 0
        margins.append(logged(trainer, "rewards/margins"))
        assert margins[-1][-1] > 0.5, "the chosen answers became likelier than the rejected ones"
    assert margins[0] == pytest.approx(margins[1], abs=1e-4)
