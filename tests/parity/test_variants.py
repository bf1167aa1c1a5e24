"""Each variant of LoRA against peft's: the same logits from its files, the same start, the same steps."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from twinlora.adapters import files, init
from twinlora.adapters.lora import attach, lora_layers, trainable_parameters, whole_modules
from twinlora.adapters.targets import LoraConfig
from twinlora.config import OptimizerOptions
from twinlora.data.packing import make_batch
from twinlora.data.template import Example
from twinlora.errors import AdapterError
from twinlora.model import swap
from twinlora.model.forward import has_plain_head
from twinlora.model.load import load_model, resolve
from twinlora.numerics.formats import NF4Format
from twinlora.train.optim import MasterAdamW
from twinlora.train.step import train_step

peft = pytest.importorskip("peft")
IDS = torch.arange(20)[None]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def theirs_of(tiny, **config):
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    values = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(base, peft.LoraConfig(**(values | config)))


def ours_of(tiny, config=None, **arguments):
    model = load_model(resolve(str(tiny)), dtype=torch.float32, **arguments)
    if config is not None:
        attach(model, config)
    return model


def reloaded_by_peft(tiny, directory):
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, directory)


def disturb(model):
    """As if it had been trained: every trained parameter moves."""
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


VARIANTS = {
    "rslora": LoraConfig(rank=4, alpha=8, rslora=True),
    "patterns": LoraConfig(rank=4, rank_pattern={"down_proj": 7, r"0\.self_attn\.q_proj": 2}, alpha_pattern={"v_proj": 3}),
    "dora": LoraConfig(rank=4, alpha=8, dora=True),
    "pissa": LoraConfig(rank=4, alpha=8, init="pissa"),
    "whole": LoraConfig(rank=4, target=("q_proj",), modules_to_save=("lm_head", "norm")),
    "dora, rslora, patterns": LoraConfig(rank=4, dora=True, rslora=True, rank_pattern={"up_proj": 3}),
    "layers": LoraConfig(rank=4, layers=(1,), exclude=("o_proj",)),
    "regex": LoraConfig(rank=4, target=(r".*\.0\..*(q|v)_proj",)),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_peft_and_we_read_what_was_saved(tiny, tmp_path, name):
    config = VARIANTS[name]
    ours = ours_of(tiny, config)
    if config.init == "pissa":
        init.pissa(ours)
    disturb(ours)
    files.save_adapter(ours, tmp_path / "a", str(tiny))
    with torch.no_grad():
        expected = ours(IDS).logits
        close(reloaded_by_peft(tiny, tmp_path / "a")(IDS).logits, expected)
        again = ours_of(tiny)
        files.load_adapter(again, files.read_adapter(tmp_path / "a"))
        close(again(IDS).logits, expected)
        assert (expected - ours_of(tiny)(IDS).logits).norm() > 0.1, "the adapter does something"


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
    ],
)
def test_we_compute_what_peft_saved(tiny, tmp_path, config):
    theirs = theirs_of(tiny, init_lora_weights=False, **config)
    disturb(theirs)
    theirs.save_pretrained(tmp_path)
    ours = ours_of(tiny)
    files.load_adapter(ours, files.read_adapter(tmp_path))
    with torch.no_grad():
        close(ours(IDS).logits, theirs.eval()(IDS).logits)


def examples():
    generator = torch.Generator().manual_seed(7)
    rows = torch.randint(0, 250, (2, 4, 14), generator=generator).tolist()
    return 6 * [[Example(ids, [t >= 5 for t in range(14)], "r") for ids in batch] for batch in rows]


def their_losses(model, optimizer, lr):
    for batch in examples():
        ids = torch.tensor([e.ids for e in batch])
        labels = torch.where(torch.tensor([e.trained for e in batch]), ids, -100)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("ratio", 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def our_losses(model, options, lr):
    swap.replace_blocks(model)
    model.train()
    optimizer, plain = MasterAdamW(trainable_parameters(model), options), has_plain_head(model)
    for batch in examples():
        made = make_batch(batch, 400, packed=True)
        yield train_step(model, made, optimizer, lr=lr, max_grad_norm=1.0, plain_head=plain).loss.item()


def test_dora_follows_peft(tiny, tmp_path):
    theirs = theirs_of(tiny, use_dora=True)
    theirs.save_pretrained(tmp_path)
    ours = ours_of(tiny)
    files.load_adapter(ours, files.read_adapter(tmp_path))
    adamw = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], weight_decay=0.0)
    pairs = list(zip(our_losses(ours, OptimizerOptions(), 5e-3), their_losses(theirs, adamw, 5e-3), strict=True))
    assert all(abs(a - b) < 1e-4 for a, b in pairs)
    assert pairs[-1][0] < pairs[1][0] - 0.1


def test_pissa_starts_and_follows_peft(tiny):
    ours, theirs = ours_of(tiny, LoraConfig(rank=4, alpha=8)), theirs_of(tiny, init_lora_weights="pissa")
    init.pissa(ours)
    with torch.no_grad():
        close(ours(IDS).logits, ours_of(tiny)(IDS).logits)
    for name, layer in lora_layers(ours).items():
        a, b = (theirs.get_submodule(f"base_model.model.{name}.lora_{x}.default").weight for x in "AB")
        close(layer.lora_B @ layer.lora_A, b @ a)
    adamw = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], weight_decay=0.0)
    # The same subspace in another basis (signs), so AdamW's steps agree too.
    pairs = list(zip(our_losses(ours, OptimizerOptions(), 1e-3), their_losses(theirs, adamw, 1e-3), strict=True))
    assert all(abs(a - b) < 2e-3 for a, b in pairs)
    assert pairs[-1][0] < pairs[1][0] - 0.05


def test_lora_plus_follows_peft(tiny, tmp_path):
    from peft.optimizers import create_loraplus_optimizer

    theirs = theirs_of(tiny)
    theirs.save_pretrained(tmp_path)
    ours = ours_of(tiny)
    files.load_adapter(ours, files.read_adapter(tmp_path))
    adamw = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.0, weight_decay=0.0
    )
    for group in adamw.param_groups:
        group["ratio"] = group["lr"] / 1e-3
    assert {group["ratio"] for group in adamw.param_groups if group["params"]} == {1.0, 16.0}
    options = OptimizerOptions(lora_plus_ratio=16.0)
    pairs = list(zip(our_losses(ours, options, 1e-3), their_losses(theirs, adamw, 1e-3), strict=True))
    assert all(abs(a - b) < 1e-4 for a, b in pairs)
    assert pairs[-1][0] < pairs[1][0] - 0.1


def test_loftq_makes_up_for_what_quantising_lost(tiny):
    config, found = LoraConfig(rank=8, alpha=8), {}

    def keep(name, weight, quantized):
        found[name] = init.loftq(weight, quantized, config.layer(name))

    model = load_model(resolve(str(tiny)), quantize=NF4Format(), dtype=torch.float32, on_quantized=keep)
    attach(model, config, initial=found)
    original = ours_of(tiny)
    for name, layer in lora_layers(model).items():
        weight = original.get_submodule(name).weight
        lost = weight - layer.base.dense_weight(torch.float32)
        left = (lost - layer.update()).norm()
        u, s, vh = torch.linalg.svd(lost)
        expected = (lost - u[:, :8] * s[:8] @ vh[:8]).norm()  # no approximation of rank 8 leaves less
        torch.testing.assert_close(left, expected, rtol=1e-3, atol=1e-5)


def test_modules_to_save_are_trained_copies(tiny):
    model = ours_of(tiny, LoraConfig(rank=2, target=("q_proj",), modules_to_save=("lm_head",)))
    assert list(whole_modules(model)) == ["lm_head"]
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.model.embed_tokens.weight.requires_grad
    list(our_losses(model, OptimizerOptions(), 1e-2))
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    "config, message",
    [
        (LoraConfig(exclude=("nothing",)), "exclude 'nothing' matches no layer"),
        (LoraConfig(layers=(0, 5)), r"layers \[5\]: the model has blocks 0 to 1"),
        (LoraConfig(target=("q_proj(",)), "not a regular expression"),
        (LoraConfig(rank_pattern={"qproj": 3}), "rank_pattern 'qproj' matches no layer; did you mean .*q_proj"),
        (LoraConfig(modules_to_save=("head",)), "modules_to_save 'head' matches no layer; did you mean .*lm_head"),
        (LoraConfig(target=("q_proj",), exclude=("q_proj",)), "no layer is left"),
    ],
)
def test_what_matches_nothing_is_an_error(tiny, config, message):
    with pytest.raises(AdapterError, match=message):
        ours_of(tiny, config)


def test_quantised_modules_cannot_be_trained_whole(tiny):
    config = LoraConfig(target=("q_proj",), modules_to_save=("up_proj",))
    with pytest.raises(AdapterError, match="quantised and cannot train"):
        ours_of(tiny, config, quantize=NF4Format())


def test_rslora_is_written_as_the_alpha_that_means_the_same(tiny, tmp_path):
    files.save_adapter(ours_of(tiny, VARIANTS["rslora"]), tmp_path / "a", "b")
    config = json.loads((tmp_path / "a" / files.CONFIG).read_text())
    assert config["use_rslora"] is False
    assert config["lora_alpha"] == pytest.approx(8 * math.sqrt(4))
