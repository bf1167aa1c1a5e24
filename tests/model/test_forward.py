import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from twinlora.adapters.lora import LoraConfig, attach
from twinlora.data.packing import make_micro_batch
from twinlora.data.template import Example
from twinlora.model import swap
from twinlora.model.attention import Layout
from twinlora.model.forward import has_plain_head, loss_sum, packing_refusal
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
            micro = make_micro_batch(rows, packed=packed, pad_id=258)
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
    assert replaced == {"LlamaMLP → SwiGLU": 2, "LlamaRMSNorm → RMSNorm": 5}
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
    assert swap.replace_blocks(model) == {}
    micro = make_micro_batch(examples(), packed=False, pad_id=0)
    assert torch.isfinite(loss_sum(model, micro, plain_head=has_plain_head(model)))
