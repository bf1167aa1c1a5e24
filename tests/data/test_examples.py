import copy

import pytest

from tests.conftest import chat, write_jsonl
from twinlora.data.examples import encode_rows, truncate
from twinlora.data.sources import read_rows
from twinlora.data.template import Example
from twinlora.errors import DataError


@pytest.fixture
def rows(tmp_path):
    """A short row, one with a long prompt, one with a long answer, one that says nothing."""
    values = [chat("a", "b"), chat("x" * 40_000, "kept"), chat("q", "y" * 3000), chat("a", " ")]
    return read_rows(write_jsonl(tmp_path / "x.jsonl", values))


def said(tokenizer, example):
    return tokenizer.decode([t for t, on in zip(example.ids, example.trained, strict=True) if on])


def test_long_and_empty_rows_are_one_error_that_says_what_to_type(rows, tokenizer):
    with pytest.raises(DataError) as caught:
        encode_rows(tokenizer, rows, 2048)
    message = str(caught.value)
    assert message.startswith("2 rows longer than max_length 2,048\n")
    for part in (
        "x.jsonl:2: 40,0",
        "x.jsonl:3: 3,0",
        "--max-length 400",
        "--overlong truncate",
        "1 row with nothing to train on\n  ",
        "x.jsonl:4",
    ):
        assert part in message
    assert "--allow-untrained" in message


def test_dropping(rows, tokenizer):
    notes = []
    examples = encode_rows(tokenizer, rows, 2048, overlong="drop", allow_untrained=True, note=notes.append)
    assert [said(tokenizer, example) for example in examples] == ["b<|im_end|>"]
    assert notes == [
        "data: left out because they train nothing: 1 rows",
        "data: left out because they are longer than 2,048 tokens: 2 examples",
    ]


def test_cutting_keeps_the_answer_and_the_end_of_the_prompt(rows, tokenizer):
    notes = []
    examples = encode_rows(tokenizer, rows[:3], 100, overlong="truncate", note=notes.append)
    assert [len(example.ids) for example in examples] == [len(examples[0].ids), 100, 100]
    assert said(tokenizer, examples[1]) == "kept<|im_end|>"
    assert "xx<|im_end|>\n<|im_start|>assistant\nkept<|im_end|>" in tokenizer.decode(examples[1].ids)
    assert tokenizer.decode(examples[1].ids).startswith("<|im_start|>x"), "the begin token stays first"
    assert said(tokenizer, examples[2]) == "y" * 98, "the begin token, one of the prompt, and the answer's start"
    assert notes == [
        "data: cut to 100 tokens: 2 examples; the end of the answer is lost in 1, only what comes first in the others"
    ]


@pytest.mark.parametrize("limit", range(2, 14))
@pytest.mark.parametrize("bos", [None, 0])
@pytest.mark.parametrize("prompt, answer", [(0, 12), (1, 12), (3, 9), (11, 1), (6, 6)])
def test_a_cut_example_always_trains_something(limit, bos, prompt, answer):
    example = Example(list(range(prompt + answer)), [False] * prompt + [True] * answer, "x")
    cut = truncate(example, limit, bos)
    assert len(cut.ids) == min(limit, prompt + answer)
    assert cut.trained_tokens
    if prompt and answer < limit - (bos is not None):
        assert cut.ids[-answer:] == example.ids[-answer:]
    assert [example.trained[i] for i in cut.ids] == cut.trained
    rest = cut.ids[1:]
    assert rest == list(range(rest[0], rest[-1] + 1)), "one stretch, after the begin token"


def test_no_row_is_left(rows, tokenizer):
    with pytest.raises(DataError, match="none of 2 rows is left"):
        encode_rows(tokenizer, rows[1:3], 99, overlong="drop")
    with pytest.raises(DataError, match="none of 1 rows is left"):
        encode_rows(tokenizer, rows[3:], 99, allow_untrained=True)


def test_rows_that_the_template_refuses_are_all_named(rows, tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{% if messages[0]['content'] == 'Be brief.' %}{{ raise_exception('no system') }}{% endif %}"
    with pytest.raises(DataError) as caught:
        encode_rows(strict, rows[:3], 99)
    assert str(caught.value).startswith(
        "3 rows cannot be trained: the model's chat template refuses these messages: no system"
    )
    assert "x.jsonl:3" in str(caught.value)
