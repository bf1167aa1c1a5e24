"""Pieces of text add up to what the tokenizer says of the whole."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from twinlora.serve.text import TextStream, spelled


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


def test_a_text_goes_on_with_the_space_before_it():
    """SentencePiece's decoder takes the first space of what it is given."""
    backend = sentencepiece()
    prompt, answer = (backend(text, add_special_tokens=False)["input_ids"] for text in ("n", "é x"))
    assert backend.decode(answer) == "é x"
    for after, expected in (((), "é x"), (prompt, " é x")):
        stream = TextStream(backend, after=after)
        assert "".join([*map(stream.push, answer), stream.finish()]) == expected
    stream = TextStream(backend, (" é",), after=prompt)
    assert "".join(map(stream.push, answer)) == ""
    assert stream.stopped


def test_the_bytes_of_tokens_add_up_to_the_text(tokenizer):
    text = "né 👍🏽 中 <x>"
    for backend in (tokenizer, sentencepiece()):
        tokens = backend(text, add_special_tokens=False)["input_ids"]
        pieces = [spelled(backend, token) for token in tokens]
        assert b"".join(raw for _, raw in pieces).decode().removeprefix(" ") == text
        assert all(shown.encode() == raw or "\N{REPLACEMENT CHARACTER}" in shown for shown, raw in pieces)


def sentencepiece() -> PreTrainedTokenizerFast:
    """Words with a mark for the space before them, bytes for what has no piece, as llama 2 has them."""
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    for piece in ("▁", "n", "é", "<", "x", ">"):
        vocabulary[piece] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
