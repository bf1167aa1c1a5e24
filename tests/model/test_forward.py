import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MistralConfig, Qwen3Config

from twinlora.adapters.lora import attach
from twinlora.adapters.targets import LoraConfig
from twinlora.data.packing import make_micro_batch
from twinlora.data.template import Example
from twinlora.model import swap
from twinlora.model.attention import Layout
from twinlora.model.forward import has_plain_head, loss_sum, packing_refusal
from twinlora.model.generate import generate
from twinlora.model.load import load_model, resolve


def examples():
    out = []
    for n in (5, 12, 9):
        ids = torch.randint(0, 256, (n,)).tolist()
        out.append(Example(ids, [False, False] + [True] * (n - 2), "here"))
    return out


@pytest.mark.parametrize("plain_head", [True, False])
def test_packed_and_padded_give_the_loss_of_each_row_alone(tiny, plain_head):
    model = load_model(resolve(str(tiny)), dtype=torch.float32)
    assert has_plain_head(model)
    rows = examples()
    with torch.no_grad():
        alone = 0.0
        for row in rows:
            logits = model(torch.tensor([row.ids])).logits[0]
            alone += torch.nn.functional.cross_entropy(logits[1:-1], torch.tensor(row.ids[2:]), reduction="sum")
        for packed in (True, False):
            micro = make_micro_batch(rows, packed=packed)
            torch.testing.assert_close(loss_sum(model, micro, plain_head=plain_head), alone)


def test_packing_is_admitted_for_llama_and_refused_where_it_leaks(tiny, monkeypatch):
    model = load_model(resolve(str(tiny)))
    assert packing_refusal(model, 256) is None
    init = Layout.__init__
    monkeypatch.setattr(Layout, "__init__", lambda self, lengths, device="cpu": init(self, [sum(lengths)], device))
    assert packing_refusal(model, 256) == "a sequence sees its neighbour"


def test_wrong_positions_are_refused(tiny, monkeypatch):
    model = load_model(resolve(str(tiny)))
    monkeypatch.setattr(Layout, "positions", lambda self: torch.zeros(1, self.tokens, dtype=torch.long))
    assert "differ" in packing_refusal(model, 256)


def test_other_attention_is_refused(tiny):
    model = load_model(resolve(str(tiny)))
    model.set_attn_implementation("sdpa")
    assert "sdpa" in packing_refusal(model, 256)


def test_a_head_with_more_than_a_product_is_seen(tiny):
    model = load_model(resolve(str(tiny)))
    model.lm_head.register_forward_hook(lambda module, args, out: torch.tanh(out / 30) * 30)
    assert not has_plain_head(model)


def test_replaced_blocks_change_nothing_but_rounding(tiny):
    micro = make_micro_batch(examples(), packed=True)
    stock, ours = (load_model(resolve(str(tiny)), dtype=torch.float32) for _ in range(2))
    for model in (stock, ours):
        attach(model, LoraConfig(rank=4), seed=1)
    replaced = swap.replace_blocks(ours)
    expected = {"LlamaAttention → Attention": 2, "LlamaMLP → SwiGLU": 2, "LlamaRMSNorm → RMSNorm": 5}
    assert replaced == expected | {"Linear → DenseLinear": 1}
    gradients = []
    for model in (stock, ours):
        loss = loss_sum(model, micro, plain_head=True)
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        torch.testing.assert_close(loss, loss_sum(stock, micro, plain_head=True), rtol=1e-6, atol=1e-5)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_block_that_differs_is_declined(tiny):
    model = load_model(resolve(str(tiny)))
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()
    notes = []
    replaced = swap.replace_blocks(model, notes.append)
    assert replaced["LlamaMLP → SwiGLU"] == 1
    assert notes == ["LlamaMLP: stock block kept, the probe declined ours"]


def test_a_model_without_our_blocks_trains_on_its_own(tmp_path):
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=64, attn_pdrop=0.0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = load_model(resolve(str(tmp_path)), dtype=torch.float32)
    assert swap.replace_blocks(model) == {"Conv1D → DenseLinear": 4, "Linear → DenseLinear": 1}
    micro = make_micro_batch(examples(), packed=False)
    assert torch.isfinite(loss_sum(model, micro, plain_head=has_plain_head(model)))


def test_attention_with_another_meaning_is_declined(tiny):
    model = load_model(resolve(str(tiny)))
    stock = model.model.layers[0].self_attn
    forward, children = type(stock).forward, dict(stock.named_children())

    class Louder(type(stock)):
        def forward(self, *args, **kwargs):
            out, weights = forward(self, *args, **kwargs)
            return 1.1 * out, weights

    stock.__class__ = Louder
    notes = []
    assert swap.replace_blocks(model, notes.append)["LlamaAttention → Attention"] == 1
    assert notes == ["Louder: stock block kept, the probe declined ours"]
    assert dict(stock.named_children()).keys() == children.keys(), "the probe leaves the block as it was"


def test_a_sliding_window_and_head_norms_are_taken_over(tmp_path):
    shape = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 32}
    shape |= {"num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 512}
    windowed = MistralConfig(**shape, sliding_window=3, bos_token_id=1, eos_token_id=2)
    normed = Qwen3Config(**shape, bos_token_id=1, eos_token_id=2)
    for config in (windowed, normed):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / config.model_type)
        stock, ours = (load_model(resolve(str(tmp_path / config.model_type)), dtype=torch.float32) for _ in range(2))
        replaced = swap.replace_blocks(ours)
        assert replaced[next(kind for kind in replaced if kind.endswith("→ Attention"))] == 2
        micro = make_micro_batch(examples(), packed=True)
        found, expected = (loss_sum(model, micro, plain_head=True) for model in (ours, stock))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
        alone = stock(torch.tensor([list(range(40, 52))])).logits[0, -1].argmax().item()
        assert generate(ours, [list(range(40, 52))], max_new_tokens=1, stop=set()) == [[alone]]
