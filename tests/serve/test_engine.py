"""The engine without HTTP: batches equal solo answers, and a failure stays where it is."""

import contextlib
import dataclasses
import threading

import pytest
import torch

from tests.serve.conftest import MIX
from twinlora.adapters import files
from twinlora.adapters.bank import AdapterBank, BankLinear, Resident
from twinlora.errors import ModelError
from twinlora.model import swap
from twinlora.model.linear import QuantLinear
from twinlora.model.load import load_model, load_tokenizer, resolve
from twinlora.serve.engine import Engine, require_servable
from twinlora.serve.state import Sampling


class Asked:
    def __init__(self, engine, prompt, key, sampling):
        self.tokens, self.logprobs, self.text, self.end, self.over = [], [], "", None, threading.Event()
        self.ticket = engine.submit(prompt, key, sampling, self.take)

    def take(self, event):
        self.text += event.text
        if event.token is not None:
            self.tokens.append(event.token.token)
            self.logprobs.append(event.token.logprob)
        if event.finish:
            self.end = event
            self.over.set()

    def wait(self):
        assert self.over.wait(60)
        return self


@contextlib.contextmanager
def started(tiny, adapters, dtype=torch.float32, quantize=None):
    model = load_model(resolve(str(tiny)), quantize=quantize, dtype=dtype).eval()
    bank, tokenizer = AdapterBank(model), load_tokenizer(resolve(str(tiny)))
    swap.replace_blocks(model)
    require_servable(model, tokenizer)
    for name in ("a0", "a1", "a3"):
        bank.add(name, files.read_adapter(adapters[name]))
    engine = Engine(model, tokenizer, bank, slots=3, capacity=96, budget=16)
    engine.start()
    yield engine
    engine.stop()
    engine.scheduler.check()
    assert not engine.alive


@pytest.fixture
def engine(tiny, adapters):
    with started(tiny, adapters) as engine:
        yield engine


def prompts():
    torch.manual_seed(3)
    made = [torch.randint(0, 250, (n,)).tolist() for n in (3, 40, 70, 1, 17)]
    return [*made, [*made[2][:60], 1, 2], [*made[2][:68], 5]]


def test_batches_equal_solo_answers(engine):
    keys = [None, "a0", "a1", "a3", "a1", "a1", "a0"]
    rules = Sampling(8, top_logprobs=0)
    solo = [Asked(engine, prompt, key, rules).wait() for prompt, key in zip(prompts(), keys, strict=True)]
    assert solo[5].ticket.sequence.reused >= 60, "the beginning of another prompt with the same adapter"
    assert solo[6].ticket.sequence.reused == 0, "never another adapter's"
    batch = [Asked(engine, prompt, key, rules) for prompt, key in zip(prompts(), keys, strict=True)]
    for one, other in zip(solo, batch, strict=True):
        assert other.wait().tokens == one.tokens
        torch.testing.assert_close(torch.tensor(other.logprobs), torch.tensor(one.logprobs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_a_base_of_mixed_precision_says_what_an_evaluation_computes(tiny, adapters, dtype, near):
    keys, rules = [None, "a0", "a1", "a3", "a1", "a1", "a0"], Sampling(8, top_logprobs=0)
    with started(tiny, adapters, dtype, MIX) as engine:
        solo = [Asked(engine, prompt, key, rules).wait() for prompt, key in zip(prompts(), keys, strict=True)]
        batch = [Asked(engine, prompt, key, rules) for prompt, key in zip(prompts(), keys, strict=True)]
        answers = [*solo, *(asked.wait() for asked in batch)]
    assert len({type(layer) for layer in engine.model.modules()} & {QuantLinear, BankLinear}) == 2
    for prompt, key, asked in zip(prompts() * 2, keys * 2, answers, strict=True):
        engine.bank.use(key)
        with torch.no_grad():
            logits = engine.model(torch.tensor([prompt + asked.tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.float().log_softmax(-1).gather(1, torch.tensor(asked.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(asked.logprobs), expected, rtol=0, atol=near)
    if dtype == torch.float32:
        assert [a.tokens for a in answers[: len(keys)]] == [a.tokens for a in answers[len(keys) :]]


def test_a_failing_pass_ends_its_requests_alone(engine, monkeypatch):
    forward, fail = engine.model.forward, threading.Event()

    def broken(*args, **kwargs):
        if fail.is_set():
            fail.clear()
            raise RuntimeError("no memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.model, "forward", broken)
    before = Asked(engine, [1, 2, 3], None, Sampling(4)).wait()
    fail.set()
    lost = Asked(engine, [1, 2, 3], None, Sampling(4)).wait()
    assert (lost.end.finish, lost.end.error) == ("error", "RuntimeError: no memory")
    assert Asked(engine, [1, 2, 3], None, Sampling(4)).wait().tokens == before.tokens
    engine.call(engine.scheduler.check).result()


def test_an_adapter_without_finite_outputs_harms_nobody_else(engine):
    expected = Asked(engine, [1, 2, 3], "a0", Sampling(8)).wait().tokens
    damaged = {
        name: dataclasses.replace(w, a=w.a * float("inf")) for name, w in engine.bank._resident["a1"].layers.items()
    }
    engine.call(lambda: engine.bank.install("damaged", Resident(damaged))).result()
    others = [Asked(engine, [1, 2, 3], "a0", Sampling(8)), Asked(engine, [4], "damaged", Sampling(8, temperature=1.0))]
    assert others[0].wait().tokens == expected
    assert others[1].wait().end.error == "its outputs are not finite"


def test_cancelled_requests_leave(engine):
    asked, gone = Asked(engine, [1, 2, 3], "a0", Sampling(90)), threading.Event()
    engine.cancel(asked.ticket, gone.set)
    assert gone.wait(60)
    count = len(asked.tokens)
    Asked(engine, [4], None, Sampling(3)).wait()
    assert len(asked.tokens) == count < 90
    assert engine.call(lambda: engine.scheduler.busy).result() is False


def test_a_special_token_stops_although_it_has_no_text(engine):
    """Of a base that ends otherwise than the adapter was taught to."""
    free = Asked(engine, [5], "a0", Sampling(12)).wait()
    token = free.tokens[4]
    engine._special["<|turn|>"] = token
    stopped = Asked(engine, [5], "a0", Sampling(12, stop=("<|turn|>",))).wait()
    assert stopped.end.finish == "stop"
    assert stopped.tokens == free.tokens[: free.tokens.index(token) + 1]
    assert engine._special["<|im_end|>"] == 257


def test_answers_end_where_the_context_does(engine):
    asked = Asked(engine, list(range(90)), None, Sampling(50)).wait()
    assert asked.end.finish in ("length", "stop")
    assert len(asked.tokens) <= 6


def test_models_that_cannot_be_batched_are_refused(tiny):
    model, tokenizer = load_model(resolve(str(tiny))), load_tokenizer(resolve(str(tiny)))
    with pytest.raises(ModelError, match="attention blocks are not replaced"):
        require_servable(model, tokenizer)
    swap.replace_blocks(model)
    require_servable(model, tokenizer)
    model.base_model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(ModelError, match="longest sequence of a batch"):
        require_servable(model, tokenizer)
