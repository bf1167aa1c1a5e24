from collections import Counter

import pytest
import torch

from tests.conftest import chat, write_jsonl
from twinlora.data.examples import encode_rows
from twinlora.data.packing import epoch_order, epoch_size, make_batch, make_micro_batch
from twinlora.data.sources import read_rows
from twinlora.data.template import Example, encode_prompt, encode_row
from twinlora.errors import DataError


def said(tokenizer, example):
    return tokenizer.decode([t for t, on in zip(example.ids, example.trained, strict=True) if on])


def row_of(tmp_path, value):
    return read_rows(write_jsonl(tmp_path / "x.jsonl", [value]))[0]


def test_only_the_answer_and_its_end_are_trained(tmp_path, tokenizer):
    (example,) = encode_row(tokenizer, row_of(tmp_path, chat("你好 🙂", "hey there")))
    assert said(tokenizer, example) == "hey there<|im_end|>"
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n你好 🙂<|im_end|>\n<|im_start|>assistant\nhey there<|im_end|>"
    assert tokenizer.decode(example.ids) == expected


def test_every_assistant_turn_is_trained(tmp_path, tokenizer):
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": r, "content": f"c{i}"} for i, r in enumerate(roles)]
    (example,) = encode_row(tokenizer, row_of(tmp_path, {"messages": messages}))
    assert said(tokenizer, example) == "c1<|im_end|>c3<|im_end|>"
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(example.ids) == rendered.rstrip("\n")


def test_a_template_that_rewrites_history_gives_one_example_a_turn(tmp_path, tokenizer):
    changed = tokenizer.__class__.from_pretrained(_saved(tokenizer, tmp_path))
    changed.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and not loop.last %}(old){% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    examples = encode_row(changed, row_of(tmp_path, {"messages": messages}))
    assert [said(changed, e) for e in examples] == ["b<|im_end|>", "d<|im_end|>"]
    assert "(old)b" in changed.decode(examples[1].ids)


def _saved(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tok")
    return tmp_path / "tok"


def test_prompt_and_completion(tmp_path, tokenizer):
    row = row_of(tmp_path, {"prompt": "Q: x\nA:", "completion": " y"})
    (example,) = encode_row(tokenizer, row)
    assert tokenizer.decode(example.ids) == "Q: x\nA: y<|im_end|>"
    assert said(tokenizer, example) == " y<|im_end|>"


def test_training_prompts_are_inference_prompts(tmp_path, tokenizer):
    for value in (chat("x", "y"), {"prompt": "p", "completion": "c"}):
        row = row_of(tmp_path, value)
        (example,) = encode_row(tokenizer, row)
        prompt = encode_prompt(tokenizer, row)
        assert example.ids[: len(prompt)] == prompt
        assert not any(example.trained[: len(prompt)])
        assert all(example.trained[len(prompt) :])


def test_a_model_without_a_template(tmp_path, tokenizer):
    bare = tokenizer.__class__.from_pretrained(_saved(tokenizer, tmp_path))
    bare.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        encode_rows(bare, [row_of(tmp_path, chat("a", "b"))], 99)


def test_loss_rows_predict_the_next_trained_token():
    examples = [Example([1, 2, 3], [False, True, True], "a"), Example([4, 5], [False, True], "b")]
    packed = make_micro_batch(examples, packed=True)
    assert packed.input_ids[0, :5].tolist() == [1, 2, 3, 4, 5]
    assert packed.layout.lengths == [3, 2, 59], "filled up by a sequence of its own, on a CPU"
    assert packed.tokens == 5
    assert packed.loss_rows.tolist() == [0, 1, 3]
    assert packed.labels.tolist() == [2, 3, 5]
    padded = make_micro_batch(examples, packed=False)
    assert padded.input_ids.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert padded.loss_rows.tolist() == [0, 1, 3]
    assert padded.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert packed.trained_tokens == padded.trained_tokens == 3


@pytest.mark.parametrize("packed", [True, False])
def test_micro_batches_keep_the_limit_and_lose_nothing(packed):
    examples = [Example([7] * n, [False] + [True] * (n - 1), str(n)) for n in (3, 30, 5, 8, 2, 2)]
    batch = make_batch(examples, 16, packed=packed)
    assert batch.tokens == 50
    sizes = [m.tokens if packed else m.input_ids.numel() for m in batch.micro_batches]
    assert all(size <= 16 or m.tokens == 30 for size, m in zip(sizes, batch.micro_batches, strict=True))
    assert batch.trained_tokens == 44


def test_order_is_a_function_of_seed_and_epoch():
    first = epoch_order([1.0] * 50, 0, 1, shuffle=True)
    assert sorted(first) == list(range(50))
    assert first == epoch_order([1.0] * 50, 0, 1, shuffle=True)
    assert first != epoch_order([1.0] * 50, 1, 1, shuffle=True)
    assert first != epoch_order([1.0] * 50, 0, 2, shuffle=True)
    assert epoch_order([1.0] * 4, 3, 1, shuffle=False) == [0, 1, 2, 3]
    assert epoch_order([1.0, 2.0, 1.0], 3, 1, shuffle=False) == [0, 1, 1, 2]
    torch.manual_seed(5)
    assert first == epoch_order([1.0] * 50, 0, 1, shuffle=True)


def test_a_fraction_is_another_random_share_in_each_epoch():
    weights = [1.0] * 10 + [0.5] * 20 + [2.25] * 8
    epochs = [epoch_order(weights, epoch, 7, shuffle=True) for epoch in range(40)]
    assert all(len(order) == epoch_size(weights) == 10 + 10 + 18 for order in epochs)
    counts = Counter(i for order in epochs for i in order)
    assert all(counts[i] == 40 for i in range(10))
    assert all(8 <= counts[i] <= 32 for i in range(10, 30)), "each is seen in about half of the epochs"
    assert all(80 < counts[i] < 110 for i in range(30, 38))
    assert epochs[0] == epoch_order(weights, 0, 7, shuffle=True)
    assert set(epochs[0]) != set(epochs[1])
