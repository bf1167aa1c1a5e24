import pytest

from twinlora.config.groups import _FIELDS
from twinlora.data.formats import FORMS, form_of
from twinlora.errors import DataError


def row_of(record):
    return form_of(record).read(record, "x:1")


def said(row):
    return [(message["role"], message["content"]) for message in row.messages]


def test_sharegpt():
    turns = [("system", "s"), ("human", "q"), ("gpt", "a"), ("human", "q2"), ("gpt", "a2"), ("human", "left over")]
    row = row_of({"conversations": [{"from": who, "value": what} for who, what in turns], "id": "7"})
    assert said(row) == [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "q2"), ("assistant", "a2")]
    assert row.unanswered == 1
    row = row_of(
        {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "system": "s"}
    )
    assert said(row) == [("system", "s"), ("user", "q"), ("assistant", "a")]


def test_sharegpt_calls_become_tool_calls():
    turns = [
        ("human", "weather?"),
        ("function_call", '{"name": "weather", "arguments": {"city": "Köln"}}'),
        ("observation", "rain"),
        ("gpt", "It rains."),
    ]
    record = {"conversations": [{"from": who, "value": what} for who, what in turns], "tools": '[{"name": "weather"}]'}
    row = row_of(record)
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
    assert row.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert row.messages[2] == {"role": "tool", "content": "rain"}
    assert row.tools == ({"name": "weather"},)


def test_openai_parts_and_calls():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": null}'}}
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    row = row_of({"messages": messages})
    assert row.messages[0]["content"] == "ab"
    assert row.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": None}
    assert not row.empty
    with pytest.raises(DataError, match="parts that are not text"):
        row_of({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]})


def test_alpaca():
    row = row_of({"instruction": "Add.", "input": "1 2", "output": "3", "text": "Below is …"})
    assert said(row) == [("user", "Add.\n\n1 2"), ("assistant", "3")]
    row = row_of({"instruction": "Add.", "input": None, "output": "3", "system": "s", "history": [["q", "a"]]})
    assert said(row) == [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "Add."), ("assistant", "3")]
    with pytest.raises(DataError, match="pairs of question and answer"):
        row_of({"instruction": "x", "output": "y", "history": ["q"]})


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "q"}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]},
        {"instruction": "x", "output": None},
        {"prompt": "x", "completion": "\n"},
        {"text": " "},
    ],
)
def test_rows_with_nothing_to_say_are_empty(record):
    assert row_of(record).empty


def test_an_empty_last_answer_leaves_those_before_it():
    turns = [("user", "q"), ("assistant", "a"), ("user", "q2"), ("assistant", "")]
    row = row_of({"messages": [{"role": who, "content": what} for who, what in turns]})
    assert (row.answer, row.unanswered, row.empty) == ("a", 2, False)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"prompt": 3, "completion": "x"}, "`prompt` is int, expected text"),
        ({"messages": "not json"}, "`messages` is text but not JSON"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [1]}, "`tools` is not a list of objects"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "a tool call has no `name`"),
        ({"chosen": "a", "rejected": "b"}, "unknown form: found `chosen`, `rejected`"),
        ({}, "found no columns"),
    ],
)
def test_what_is_wrong_with_a_row(record, message):
    with pytest.raises(DataError, match=message):
        row_of(record)


def test_every_column_of_a_form_can_be_mapped():
    assert {column for form in FORMS for column in form.columns} == set(_FIELDS)
