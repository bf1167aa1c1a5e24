"""Losses of rows against transformers' own loss; general text; forgetting measured end to end."""

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import TEMPLATE, chat, write_jsonl
from twinlora.data.examples import encode_rows
from twinlora.data.sources import read_rows
from twinlora.errors import DataError
from twinlora.evaluate.general import encode_texts, read_texts
from twinlora.evaluate.metrics import mean_loss, predict, row_losses
from twinlora.model import swap
from twinlora.model.load import load_model, resolve


def stock_loss(tiny, example):
    """Sum of nats over the trained tokens of one example, by transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    labels = [token if trained else -100 for token, trained in zip(example.ids, example.trained, strict=True)]
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([example.ids]), labels=torch.tensor([labels])).loss
    return loss.item() * example.trained_tokens


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("plain_head", [True, False])
def test_row_losses_are_transformers(tiny, tokenizer, tmp_path, packed, plain_head):
    data = write_jsonl(tmp_path / "d.jsonl", [chat("x" * n, "y" * (n % 4 + 1)) for n in (9, 2, 30, 5)])
    examples = encode_rows(tokenizer, read_rows(data), 512)
    model = load_model(resolve(str(tiny)), dtype=torch.float32)
    swap.replace_blocks(model)
    arguments = {"micro_batch_tokens": 128, "packed": packed, "plain_head": plain_head}
    losses = row_losses(model, examples, **arguments)
    for example, loss in zip(examples, losses, strict=True):
        assert loss.total == pytest.approx(stock_loss(tiny, example), rel=1e-4)
        assert loss.tokens == example.trained_tokens
    mean = sum(row.total for row in losses) / sum(row.tokens for row in losses)
    assert mean == pytest.approx(mean_loss(model, examples, **arguments), rel=1e-5)


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary(tiny, tokenizer):
    model = load_model(resolve(str(tiny)), dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    examples = encode_texts(tokenizer, read_texts(None), 512)
    losses = row_losses(model, examples, micro_batch_tokens=2048, packed=False, plain_head=False)
    assert math.exp(sum(r.total for r in losses) / sum(r.tokens for r in losses)) == pytest.approx(259, rel=1e-4)


def test_an_answer_is_compared_without_what_the_template_opens_it_with(tiny, tokenizer, tmp_path, monkeypatch):
    rows = read_rows(write_jsonl(tmp_path / "d.jsonl", [chat("a", "yes")]))
    opened = copy.deepcopy(tokenizer)
    opened.chat_template = TEMPLATE.replace(
        "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}<think>{% endif %}{{ m['content'] }}"
    )
    said = [opened("<think>yes")["input_ids"]]
    monkeypatch.setattr("twinlora.evaluate.metrics.generate", lambda *_, **__: said)
    model = load_model(resolve(str(tiny)), dtype=torch.float32)
    for known, output in ((opened, "yes"), (tokenizer, "<think>yes")):
        (prediction,) = predict(model, known, rows, batch_size=1, max_new_tokens=4)
        assert prediction.output == output


def test_built_in_texts_are_a_few_dozen_in_two_languages():
    texts = read_texts(None)
    chinese = [text for text in texts if "。" in text]
    assert len(texts) == len(set(texts)) == 40
    assert len(chinese) == 16
    assert all(60 <= len(text) <= 400 for text in texts)


def test_texts_from_a_file_and_in_pieces(tokenizer, tmp_path):
    path = tmp_path / "g.txt"
    path.write_text("\ufeffone\n two \n\n \n\nthree\n", encoding="utf-8")
    assert read_texts(path) == ["one\ntwo", "three"]
    examples = encode_texts(tokenizer, ["abcdefg", "hi", "k"], 3)
    assert [len(e.ids) for e in examples] == [3, 3, 2], "single tokens predict nothing"
    assert [e.where for e in examples] == ["general text 1", "general text 1", "general text 2"]
    with pytest.raises(DataError, match="no paragraph has two tokens"):
        encode_texts(tokenizer, ["k"], 3)
    path.write_text(" \n\n")
    with pytest.raises(DataError, match="no text"):
        read_texts(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_texts(tmp_path / "none.txt")
