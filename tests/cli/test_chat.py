"""A conversation that is interrupted, or grows too long."""

import pytest

from twinlora.cli import chat
from twinlora.config import ChatOptions
from twinlora.errors import DataError
from twinlora.evaluate.opening import open_model
from twinlora.reporter import Reporter


@pytest.fixture
def conversation(tiny):
    options = ChatOptions(model=str(tiny), dtype="float32", device="cpu", max_new_tokens=8)
    return chat.Conversation(open_model(options, {}, precision="16bit", reporter=Reporter()), options)


def test_what_was_said_before_ctrl_c_is_kept(conversation, monkeypatch):
    from twinlora.model import generate as decoding

    def interrupted(*args, on_token, **kwargs):
        on_token(ord("h") - 33)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "generate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            conversation.answer("hello")
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"]
    assert conversation.turns[1]["content"] == "h"
    conversation.answer("and now?")
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"] * 2


def test_a_conversation_ends_where_the_model_does(conversation):
    with pytest.raises(DataError, match=r"[\d,]+ tokens with what was said before; this model takes 512: /clear"):
        conversation.answer("x" * 600)
    assert conversation.turns == [], "what was not answered was not said"
    assert [conversation._room(used) for used in (100, 504, 510, 511)] == [8, 8, 2, 1]


def test_too_long_a_line_is_told_and_the_chat_goes_on(tiny, monkeypatch, capsys):
    lines = iter(["x" * 600, "hi", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    chat.run(ChatOptions(model=str(tiny), dtype="float32", device="cpu", max_new_tokens=4))
    said = capsys.readouterr()
    assert "this model takes 512" in said.err
    assert said.out, "the second line was answered"
