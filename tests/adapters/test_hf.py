"""The Trainer of transformers on our models: padded, flattened and packed; checkpoints; what it saves is PEFT's."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainingArguments

import twinlora
from tests.conftest import chat, write_jsonl
from twinlora.adapters import files
from twinlora.adapters.lora import lora_layers, trainable_parameters
from twinlora.config import TrainOptions
from twinlora.errors import AdapterError
from twinlora.train.loop import train

IDS = torch.arange(20)[None]


def collator(kind, model, tokenizer):
    if kind == "padded":
        return DataCollatorForSeq2Seq(tokenizer)
    return DataCollatorWithFlattening() if kind == "flattened" else twinlora.PackedCollator(model)


def prepared(tiny, precision="16bit", **options):
    model, tokenizer = twinlora.load(tiny, precision=precision, dtype="float32")
    return twinlora.attach(model, rank=4, **options), tokenizer


def trainer(model, rows, directory, collator=None, eval_rows=None, **changes):
    values = {
        "output_dir": str(directory), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "logging_steps": 1,
        "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    args = TrainingArguments(**(values | changes))
    return Trainer(model=model, args=args, train_dataset=rows, eval_dataset=eval_rows, data_collator=collator)


def losses(trained):
    return [line["loss"] for line in trained.state.log_history if "loss" in line]


@pytest.mark.parametrize("precision", ["16bit", "nf4"])
@pytest.mark.parametrize("kind", ["padded", "flattened", "packed"])
def test_the_trainer_loses_what_our_loop_loses(tiny, data_file, tmp_path, kind, precision):
    options = TrainOptions(
        model=str(tiny), data=data_file, method="qlora" if precision == "nf4" else "lora", output=tmp_path / "ours", dtype="float32",
        rank=4, batch_size=4, lr=5e-3, warmup_steps=0, scheduler="constant", shuffle=False,
    )  # fmt: skip
    train(options)
    ours = [json.loads(line)["loss"] for line in (tmp_path / "ours" / "metrics.jsonl").read_text().splitlines()]
    model, tokenizer = prepared(tiny, precision)
    theirs = trainer(
        model, twinlora.encode(tokenizer, data_file), tmp_path / "theirs", collator(kind, model, tokenizer)
    )
    theirs.train()
    assert losses(theirs)[-1] < 0.8 * losses(theirs)[0]
    assert losses(theirs) == pytest.approx(ours, abs=2e-4)


def test_the_default_collator(tiny, tmp_path):
    data = write_jsonl(tmp_path / "t.jsonl", [chat("say ab", f"word {i}") for i in range(10, 26)])
    model, tokenizer = prepared(tiny)
    trained = trainer(model, twinlora.encode(tokenizer, data), tmp_path / "out")
    trained.train()
    assert losses(trained)[-1] < losses(trained)[0]


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "pissa"}, {"modules_to_save": ["lm_head"]}])
def test_what_it_saves_peft_loads(tiny, data_file, tmp_path, options):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model, tokenizer = prepared(tiny, **options)
    trained = trainer(
        model, twinlora.encode(tokenizer, data_file), tmp_path, twinlora.PackedCollator(model), max_steps=2
    )
    trained.train()
    (tmp_path / "mine.txt").write_text("stays")
    trained.save_model(str(tmp_path))
    assert (tmp_path / "mine.txt").exists()
    assert not (tmp_path / "model.safetensors").exists(), "an adapter, not a model"
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IDS).logits, theirs.eval()(IDS).logits, rtol=1e-5, atol=1e-4)
    config = json.loads((tmp_path / files.CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(tiny)
    again, _ = twinlora.load(tiny, dtype="float32", adapter=tmp_path)
    torch.testing.assert_close(again.eval()(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "precision, options", [("16bit", {}), ("nf4", {}), ("16bit", {"init": "pissa"}), ("16bit", {"dora": True, "modules_to_save": ["lm_head"]})]
)  # fmt: skip
def test_resuming_ends_where_the_whole_run_ends(tiny, data_file, tmp_path, caplog, precision, options):
    model, tokenizer = prepared(tiny, precision, **options)
    rows = twinlora.encode(tokenizer, data_file)
    whole = trainer(model, rows, tmp_path, twinlora.PackedCollator(model), save_strategy="steps", save_steps=3)
    whole.train()
    fresh, _ = prepared(tiny, precision, **options, seed=9)
    resumed = trainer(fresh, rows, tmp_path / "again", twinlora.PackedCollator(fresh))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    wanted = trainable_parameters(model)
    assert all(torch.equal(p, wanted[name]) for name, p in trainable_parameters(fresh).items())
    assert "missing keys" not in caplog.text
    assert load_file(tmp_path / "checkpoint-6" / files.WEIGHTS)


def test_the_best_model_is_loaded_at_the_end(tiny, data_file, tmp_path):
    model, tokenizer = prepared(tiny)
    rows = twinlora.encode(tokenizer, data_file)
    args = {
        "eval_rows": rows[:4],
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    trained = trainer(
        model,
        rows,
        tmp_path,
        twinlora.PackedCollator(model),
        **args,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    trained.train()
    assert trained.state.best_model_checkpoint.endswith("checkpoint-2"), "the highest loss, so that it is not the last"
    best = files.read_adapter(tmp_path / "checkpoint-2")
    assert all(torch.equal(layer.lora_B, best.tensors[name][1]) for name, layer in lora_layers(model).items())


def test_a_checkpoint_of_other_options_is_refused(tiny, data_file, tmp_path):
    model, _ = prepared(tiny, target=["q_proj"])
    model.save_pretrained(tmp_path / "checkpoint-1")
    fresh, _ = prepared(tiny)
    with pytest.raises(AdapterError, match=r"lacks 24 of the tensors[\s\S]*options of the first run"):
        fresh.load_state_dict(load_file(tmp_path / "checkpoint-1" / files.WEIGHTS), strict=False)
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict({})
    for arguments in ({"push_to_hub": True}, {"state_dict": {}}):
        with pytest.raises(AdapterError, match="not supported"):
            fresh.save_pretrained(tmp_path / "b", **arguments)
    twin = copy.deepcopy(fresh)
    twin.save_pretrained(tmp_path / "b")
    assert twin.save_pretrained.__self__ is twin


@pytest.mark.parametrize("kind, precision", [("padded", "16bit"), ("padded", "nf4"), ("packed", "nf4")])
def test_autocast_and_gradient_checkpointing(tiny, data_file, tmp_path, kind, precision):
    """What many recipes switch on: bf16=True over a float32 model, activations computed again."""
    model, tokenizer = prepared(tiny, precision)
    rows = twinlora.encode(tokenizer, data_file)
    changes = {"bf16": True, "gradient_checkpointing": True}
    trained = trainer(model, rows, tmp_path, collator(kind, model, tokenizer), **changes)
    trained.train()
    plain, _ = prepared(tiny, precision)
    reference = trainer(plain, rows, tmp_path, collator(kind, model, tokenizer))
    reference.train()
    assert losses(trained) == pytest.approx(losses(reference), rel=0.02)


@pytest.mark.parametrize("precision", ["16bit", "nf4"])
def test_the_base_as_a_model_of_its_own(tiny, precision):
    base, _ = twinlora.load(tiny, precision=precision, dtype="float32")
    expected = base(IDS).logits
    model = twinlora.attach(base, rank=4).eval()
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    changed = model(IDS).logits
    reference = twinlora.without_adapters(model)
    assert torch.equal(reference(IDS).logits, expected)
    assert torch.equal(model(IDS).logits, changed), "the model keeps its adapters"
    assert not torch.equal(changed, expected)
    ours = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in ours for p in reference.parameters()), "no weight is copied"
    with pytest.raises(AdapterError, match="the base of lm_head is not kept"):
        twinlora.without_adapters(prepared(tiny, modules_to_save=["lm_head"])[0])


@pytest.mark.parametrize("precision", ["16bit", "nf4"])
def test_under_autocast_products_have_its_type(tiny, precision):
    model, _ = prepared(tiny, precision, dora=True)
    layer = next(iter(lora_layers(model).values()))
    x = torch.randn(3, layer.base.in_features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x.bfloat16()).float(), layer(x), rtol=0.02, atol=0.02)
