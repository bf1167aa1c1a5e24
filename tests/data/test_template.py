"""What is trained is what inference renders: held for templates and tokenizers of several habits."""

import copy

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.conftest import TEMPLATE
from twinlora.data.examples import encode_rows
from twinlora.data.formats import Row, form_of
from twinlora.data.template import answer_opening, encode_prompt, encode_row

# Like Qwen3's: reasoning stays in the turns after the last question and is dropped from those before it.
REASONING = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}<think>\n{{ m['reasoning_content'] }}\n</think>\n\n{% endif %}"
    "{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}<tool_call>{{ c['function'] | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Tokens join across the border of a turn: no special token stands between the prompt and the answer, or after it.
PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }} A: {% else %}{{ m['content'] }} {% endif %}"
    "{% endfor %}"
)


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


@pytest.fixture(scope="module")
def merging():
    """A byte-level BPE with merges, no template and no pad token, as GPT-2's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["Q: what is it? A: it is what it is. Q: what? A: it. "] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def conversation(*contents):
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def thinking(*contents):
    messages = conversation(*contents)
    return [m | {"reasoning_content": f"hm, {m['content']}"} if m["role"] == "assistant" else m for m in messages]


def row_of(record):
    return form_of(record).read(record, "x:1")


def spans(example):
    """(begin, end) of each trained stretch."""
    edges = [i for i in range(1, len(example.ids)) if example.trained[i] != example.trained[i - 1]]
    edges = ([0] if example.trained[0] else []) + edges + ([len(example.ids)] if example.trained[-1] else [])
    return list(zip(edges[::2], edges[1::2], strict=True))


def assert_trained_is_what_inference_renders(tokenizer, row):
    """Before each trained stretch stands exactly what a model gets when it must say that turn, whatever the template."""
    turns = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    found = [(example, begin, end) for example in encode_row(tokenizer, row) for begin, end in spans(example)]
    assert len(found) == len(turns)
    for turn, (example, begin, end) in zip(turns, found, strict=True):
        cut = Row(row.where, row.messages[: turn + 1], tools=row.tools)
        assert example.ids[:begin] == encode_prompt(tokenizer, cut)
        options = {"tools": list(row.tools) or None, "tokenize": False}
        prompt = tokenizer.apply_chat_template(list(cut.messages[:-1]), add_generation_prompt=True, **options)
        whole = tokenizer.apply_chat_template(list(cut.messages), **options)
        trained = tokenizer.decode(example.ids[begin:end]).removesuffix(tokenizer.eos_token)
        assert trained.strip() == whole[len(prompt) :].strip().removesuffix(tokenizer.eos_token)
        assert example.ids[end - 1] == tokenizer.eos_token_id


@pytest.mark.parametrize("messages", [thinking("a", "b", "c", "d", "e", "f"), thinking("a", "\nb")])
@pytest.mark.parametrize("template", [TEMPLATE, REASONING])
def test_chats_of_special_tokens(tokenizer, template, messages):
    assert_trained_is_what_inference_renders(with_template(tokenizer, template), row_of({"messages": messages}))


def test_a_template_that_drops_reasoning_trains_each_turn_with_its_own(tokenizer):
    changed = with_template(tokenizer, REASONING)
    rows = [row_of({"messages": thinking("a", "b", "c", "d")}), row_of({"messages": thinking("e", "f")})]
    notes = []
    examples = encode_rows(changed, rows, 999, note=notes.append)
    texts = [changed.decode(example.ids) for example in examples]
    assert len(texts) == 3
    assert texts[1].count("<think>") == 1, "the first turn's reasoning is not in the second turn's prompt"
    assert texts[1].endswith("<think>\nhm, d\n</think>\n\nd<|im_end|>")
    assert notes == ["data: 2 rows → 3 examples, because the chat template rewrites earlier turns"]


def test_a_chat_whose_tokens_join_across_turns_is_trained_turn_by_turn(merging):
    changed = with_template(merging, PLAIN)
    row = row_of({"messages": conversation("what?", " it is. Q: what", "what is it?", "it.")})
    assert len(encode_row(changed, row)) == 2
    assert_trained_is_what_inference_renders(changed, row)


def test_tools_and_calls_go_through_the_template(tokenizer):
    changed = with_template(tokenizer, REASONING)
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
    messages = [
        {"role": "user", "content": "Rain in Köln?"},
        {"role": "assistant", "content": None, "reasoning_content": "ask", "tool_calls": [call]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Yes.", "reasoning_content": "so"},
    ]
    row = row_of({"messages": messages, "tools": [tool]})
    assert_trained_is_what_inference_renders(changed, row)
    (example,) = encode_row(changed, row)
    text = changed.decode([t for t, on in zip(example.ids, example.trained, strict=True) if on])
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call><|im_end|>' in text
    assert text.endswith("Yes.<|im_end|>")
    assert "Tools: [{" in changed.decode(example.ids)


def test_an_empty_turn_in_the_middle_is_not_trained(tokenizer):
    (example,) = encode_row(tokenizer, row_of({"messages": conversation("a", "", "c", "d")}))
    assert [tokenizer.decode(example.ids[b:e]) for b, e in spans(example)] == ["d<|im_end|>"]


def test_a_tokenizer_like_gpt2_trains_completions_and_texts(merging):
    assert merging.pad_token_id is None
    completion, text = row_of({"prompt": "what is", "completion": " it?"}), row_of({"text": "what is it? 你好"})
    (example,) = encode_row(merging, completion)
    assert merging.decode(example.ids) == "what is it?<|endoftext|>"
    ((begin, end),) = spans(example)
    assert merging.decode(example.ids[begin:end]) == " it?<|endoftext|>"
    (example,) = encode_row(merging, text)
    assert merging.decode(example.ids) == "what is it? 你好<|endoftext|>"
    assert all(example.trained)
    (again,) = encode_row(merging, row_of({"text": "what<|endoftext|>"}))
    assert again.ids.count(merging.eos_token_id) == 1


def test_a_begin_token_that_the_text_spells_stands_once(tokenizer):
    adding = copy.deepcopy(tokenizer)
    from tokenizers.processors import TemplateProcessing

    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 256), ("<|im_end|>", 257)]
    )
    row = row_of({"prompt": "p", "completion": "c"})
    (example,) = encode_row(adding, row)
    assert adding.decode(example.ids) == "<|im_start|>pc<|im_end|>"
    assert example.ids[:2] == encode_prompt(adding, row), "inference does not close the prompt either"
    (example,) = encode_row(adding, row_of({"text": "<|im_start|>x"}))
    assert adding.decode(example.ids) == "<|im_start|>x<|im_end|>"


def test_what_opens_an_answer_is_what_the_template_adds(tokenizer):
    changed = with_template(tokenizer, REASONING)
    assert answer_opening(changed, row_of({"messages": thinking("a", "end")})) == "<think>\nhm, end\n</think>\n\n"
    assert answer_opening(tokenizer, row_of({"messages": thinking("a", "end")})) == ""
    assert answer_opening(tokenizer, row_of({"prompt": "a", "completion": "b"})) == ""
