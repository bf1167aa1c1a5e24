"""Pieces of text add up to what the tokenizer says of the whole."""

import random

import pytest

from twinlora.serve.text import TextStream


@pytest.mark.parametrize("seed", range(30))
def test_pieces_add_up(tokenizer, seed):
    source = random.Random(seed)
    text = "".join(source.choice(["a", "é", "中", "👍🏽", " ", "\n", "stop"]) for _ in range(30))
    tokens = tokenizer(text)["input_ids"]
    if seed % 3 == 0:
        tokens = [source.randrange(256) for _ in range(40)]  # often no characters at all
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokens] + [stream.finish()]
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    assert "".join(pieces).replace("\N{REPLACEMENT CHARACTER}", "") == whole.replace("\N{REPLACEMENT CHARACTER}", "")
    if seed % 3:
        assert "".join(pieces) == text
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


@pytest.mark.parametrize("stops", [("stop",), ("op", "never"), ("stopping", "st"), ("中",)])
def test_nothing_of_a_stop_string_is_shown(tokenizer, stops):
    text = "go, don't sto, 中 stop here"
    stream, shown = TextStream(tokenizer, stops), ""
    for token in tokenizer(text)["input_ids"]:
        shown += stream.push(token)
        if stream.stopped:
            break
    expected = min(text.index(stop) for stop in stops if stop in text)
    assert stream.stopped
    assert shown + stream.finish() == text[:expected]


def test_the_beginning_of_a_stop_string_is_shown_at_the_end(tokenizer):
    stream = TextStream(tokenizer, ("stop!",))
    shown = "".join(stream.push(token) for token in tokenizer("do not stop")["input_ids"])
    assert shown == "do not "
    assert stream.finish() == "stop"
