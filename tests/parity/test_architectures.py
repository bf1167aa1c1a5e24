"""Every family: load, quantise, train with LoRA and QLoRA, save, and the same logits in peft on the same base.

`python -m tests.parity.test_architectures` prints the table.
"""

import copy
from collections.abc import Iterator

import pytest
import torch
import transformers as t
from transformers import AutoConfig, AutoModelForCausalLM

from twinlora.adapters import files
from twinlora.adapters.lora import attach, lora_layers, trainable_parameters
from twinlora.adapters.targets import LoraConfig
from twinlora.config import OptimizerOptions
from twinlora.data.packing import make_batch
from twinlora.data.template import Example
from twinlora.errors import AdapterError
from twinlora.model import swap
from twinlora.model.forward import has_plain_head, packing_refusal
from twinlora.model.linear import QuantLinear
from twinlora.model.load import load_model, resolve
from twinlora.numerics.formats import NF4Format
from twinlora.train.optim import MasterAdamW
from twinlora.train.step import train_step

peft = pytest.importorskip("peft")

SHAPE = {
    "vocab_size": 259, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128, "initializer_range": 0.1,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "llama": t.LlamaConfig(**SHAPE),
    "mistral": t.MistralConfig(**SHAPE, sliding_window=4),
    "qwen2": t.Qwen2Config(**SHAPE, use_sliding_window=False),
    "qwen3": t.Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "gemma2": t.Gemma2Config(**SHAPE, sliding_window=4, query_pre_attn_scalar=32),
    "gemma3": t.Gemma3TextConfig(**SHAPE, sliding_window=4, query_pre_attn_scalar=32),
    "phi3": t.Phi3Config(**{k: v for k, v in SHAPE.items() if k != "head_dim"}),
    "gpt2": t.GPT2Config(
        vocab_size=259, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2,
        initializer_range=0.1, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    ),
    "mixtral": t.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "qwen2-moe": t.Qwen2MoeConfig(**SHAPE, **MOE, num_experts=4, shared_expert_intermediate_size=32),
    "qwen3-moe": t.Qwen3MoeConfig(**SHAPE, **MOE, num_experts=4),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict:
    made = {}
    for name, config in FAMILIES.items():
        torch.manual_seed(3)
        made[name] = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
    return made


def batches() -> Iterator[list[Example]]:
    generator = torch.Generator().manual_seed(7)
    lengths = ((5, 9, 3), (8, 4, 6))
    rows = [[torch.randint(3, 250, (n,), generator=generator).tolist() for n in batch] for batch in lengths]
    for _ in range(6):
        for batch in rows:
            yield [Example(ids, [i >= 2 for i in range(len(ids))], "r") for ids in batch]


def train(model, *, packed: bool) -> list[float]:
    optimizer, plain = MasterAdamW(trainable_parameters(model), OptimizerOptions()), has_plain_head(model)
    model.train()
    losses = []
    for batch in batches():
        made = make_batch(batch, 400, packed=packed)
        losses.append(train_step(model, made, optimizer, lr=1e-2, max_grad_norm=1.0, plain_head=plain).loss.item())
    return losses


def dequantised(directory, ours):
    """The stock model with the weights that ours computes with."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for name, module in ours.named_modules():
        if isinstance(module, QuantLinear):
            weight = module.dense_weight(torch.float32)
            place = model.get_submodule(name.removesuffix(".base"))
            place.weight.data = weight.T.contiguous() if module.fan_in_fan_out else weight
    return model


def through(directory, out, quantize) -> dict:
    """Train, save, and load in peft; what happened, for the table."""
    model = load_model(resolve(str(directory)), quantize=quantize, dtype=torch.float32)
    stock = dequantised(directory, model)
    attach(model, LoraConfig(rank=4, alpha=8))
    replaced = swap.replace_blocks(model)
    packed = packing_refusal(model, 259) is None
    losses = train(model, packed=packed)
    model.eval()
    files.save_adapter(model, out, str(directory))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours = model(ids).logits
        base = stock(ids).logits
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(stock), out)(ids).logits
    return {
        "replaced": sum(n for kind, n in replaced.items() if not kind.endswith("DenseLinear")),
        "adapters": len(lora_layers(model)),
        "packed": packed,
        "losses": (losses[0], losses[-1]),
        "moved": (ours - base).norm().item(),
        "apart": ((ours - theirs).norm() / theirs.norm()).item(),
    }


@pytest.mark.parametrize("quantize", [None, NF4Format()], ids=["lora", "qlora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trains_saves_and_is_the_same_in_peft(checkpoints, tmp_path, family, quantize):
    found = through(checkpoints[family], tmp_path / "a", quantize)
    assert found["losses"][1] < 0.8 * found["losses"][0]
    assert found["moved"] > 1, "the adapter does something"
    assert found["apart"] < 1e-5
    assert found["packed"] == (family != "gemma2"), "what changes here must be on purpose"


def test_packed_and_padded_train_alike(checkpoints):
    for family in sorted(FAMILIES.keys() - {"gemma2"}):
        runs = []
        for packed in (True, False):
            model = load_model(resolve(str(checkpoints[family])), dtype=torch.float32)
            attach(model, LoraConfig(rank=4, alpha=8))
            swap.replace_blocks(model)
            assert packing_refusal(model, 259) is None
            runs.append(train(model, packed=packed))
        for a, b in zip(*runs, strict=True):
            assert abs(a - b) < 2e-4, family


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_stacked_experts_are_refused_by_name(checkpoints, family):
    model = load_model(resolve(str(checkpoints[family])), dtype=torch.float32)
    with pytest.raises(AdapterError, match="experts of this model are stacked parameters"):
        attach(model, LoraConfig(target=("gate_up_proj",)))


@pytest.mark.parametrize("rank, targets, millions", [(1, "qv", 4.7), (8, "qv", 37.7), (2, "qkvo", 18.9)])
def test_counts_of_the_paper(rank, targets, millions):
    """arXiv 2106.09685, section 4.2 and table 5: trainable parameters of GPT-3 175B, whose shape a llama's attention has."""
    gpt3 = t.LlamaConfig(hidden_size=12288, num_hidden_layers=96, num_attention_heads=96, num_key_value_heads=96,
                         intermediate_size=64, vocab_size=100)  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(gpt3, dtype=torch.bfloat16)
        attach(model, LoraConfig(rank=rank, target=tuple(f"{x}_proj" for x in targets)))
    count = sum(p.numel() for p in trainable_parameters(model).values())
    assert round(count / 1e6, 1) == millions


if __name__ == "__main__":
    import tempfile
    from pathlib import Path

    print("| family | method | adapters | blocks of ours | packed | loss, first to last step | apart from peft |")
    print("|---|---|---|---|---|---|---|")
    for family, config in FAMILIES.items():
        assert AutoConfig.for_model(config.model_type) is not None
        for method, quantize in (("LoRA", None), ("QLoRA", NF4Format())):
            with tempfile.TemporaryDirectory() as directory:
                torch.manual_seed(3)
                AutoModelForCausalLM.from_config(config).save_pretrained(directory)
                found = through(Path(directory), Path(directory) / "adapter", quantize)
            first, last = found["losses"]
            packed = "yes" if found["packed"] else "no"
            print(f"| {family} | {method} | {found['adapters']} | {found['replaced']} | {packed} "
                  f"| {first:.3f} → {last:.3f} | {found['apart']:.1e} |")  # fmt: skip
