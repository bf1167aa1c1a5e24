"""The server, as the official client and plain HTTP see it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
import torch

from tests.serve.conftest import ADMIN, TOKEN, start
from twinlora.data.template import encode_chat
from twinlora.serve.answers import ChatForm, CompletionForm, stream
from twinlora.serve.engine import Event
from twinlora.serve.http import _Stream
from twinlora.serve.state import Sampling, TokenOut

openai = pytest.importorskip("openai")
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
JSON = {"content-type": "application/json"}
ADMIN_HEADERS = {"Authorization": f"Bearer {ADMIN}"}


def ask(client, model, text, **options):
    values = {"max_tokens": 12, "temperature": 0} | options
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **values)


def test_adapters_answer_together_as_each_does_alone(running, oracle):
    found, client = {}, running.openai

    def work(name):
        found[name] = ask(client, name or "base", f"question {name}")

    names = ["a0", "a1", "a2", "a3", None]
    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        assert found[name].choices[0].message.content == oracle.chat(name, f"question {name}", 12), name
        assert (found[name].system_fingerprint or "base").startswith(name or "base")
    assert len({answer.choices[0].message.content for answer in found.values()}) == 5
    running.settled()


def test_streams_are_the_whole_answer_in_pieces(running, oracle):
    client = running.openai
    chunks = list(ask(client, "a0", "tell", stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == oracle.chat("a0", "tell", 12) == ask(client, "a0", "tell").choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].usage.completion_tokens == 12
    parts = list(client.completions.create(model="a1", prompt="abc", max_tokens=6, temperature=0, stream=True))
    whole = client.completions.create(model="a1", prompt="abc", max_tokens=6, temperature=0)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert whole.usage.prompt_tokens == 3
    ids = running.service.tokenizer("abc")["input_ids"]
    again = client.completions.create(model="a1", prompt=ids, max_tokens=6, temperature=0)
    assert again.choices[0].text == whole.choices[0].text


def test_an_answer_ends_where_the_context_does(running):
    answer = ask(running.openai, "a0", "x", max_tokens=100_000)
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.total_tokens <= 256


def test_stop_ends_before_the_string(running, oracle):
    free = oracle.chat("a0", "tell", 12)
    stop = free[4:6]
    answer = ask(running.openai, "a0", "tell", stop=[stop, "never"])
    assert answer.choices[0].message.content == free[: free.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 12


def test_log_probabilities_are_the_models_own(running, oracle):
    answer = ask(running.openai, "a3", "x", logprobs=True, top_logprobs=3, max_tokens=4)
    prompt = encode_chat(oracle.tokenizer, [{"role": "user", "content": "x"}])
    said = oracle.tokens("a3", prompt, 4)
    oracle.bank.use("a3")
    with torch.no_grad():
        logits = oracle.model(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1].float()
    oracle.bank.use(None)
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(said)[:, None])[:, 0]
    content = answer.choices[0].logprobs.content
    torch.testing.assert_close(torch.tensor([t.logprob for t in content]), expected, rtol=1e-3, atol=1e-3)
    assert all(t.top_logprobs[0].logprob >= t.top_logprobs[2].logprob for t in content)
    assert content[0].top_logprobs[0].token == content[0].token
    legacy = running.openai.completions.create(model="a3", prompt="x", max_tokens=3, temperature=0, logprobs=2)
    assert len(legacy.choices[0].logprobs.token_logprobs) == 3
    assert len(legacy.choices[0].logprobs.top_logprobs[0]) <= 2
    unlikely = (
        running.openai.completions.create(
            model="a3", prompt="x", max_tokens=8, temperature=2, logprobs=1, seed=2**63 - 1
        )
        .choices[0]
        .logprobs
    )
    for token, value, top in zip(unlikely.tokens, unlikely.token_logprobs, unlikely.top_logprobs, strict=True):
        assert top[token] == value, "the chosen one is among them"
    assert max(map(len, unlikely.top_logprobs)) == 2


def test_a_seed_repeats_an_answer_whatever_else_runs(running):
    client = running.openai
    alone = ask(client, "a0", "dice", temperature=1.5, seed=7).choices[0].message.content
    noise = [threading.Thread(target=ask, args=(client, "a1", "x" * i)) for i in range(3)]
    for thread in noise:
        thread.start()
    assert ask(client, "a0", "dice", temperature=1.5, seed=7).choices[0].message.content == alone
    assert ask(client, "a0", "dice", temperature=1.5, seed=8).choices[0].message.content != alone
    for thread in noise:
        thread.join()
    greedy = ask(client, "a0", "dice").choices[0].message.content
    assert ask(client, "a0", "dice", temperature=1.5, top_p=1e-6).choices[0].message.content == greedy


def test_blends_are_the_weighted_sum(running, oracle):
    """Against a base whose weights were changed by hand."""
    mixed = ask(running.openai, "a0:0.5+a1:0.25", "tell").choices[0].message.content
    prompt = encode_chat(oracle.tokenizer, [{"role": "user", "content": "tell"}])
    saved = {}
    with torch.no_grad():
        for name, weight in (("a0", 0.5), ("a1", 0.25)):
            for layer, part in oracle.bank._resident[name].layers.items():
                base = oracle.model.get_submodule(layer).base.weight
                saved.setdefault(layer, base.detach().clone())
                base += weight * part.scale * (part.b @ part.a)
        expected = oracle.tokens(None, prompt, 12)
        for layer, original in saved.items():
            oracle.model.get_submodule(layer).base.weight.copy_(original)
    assert mixed == oracle.tokenizer.decode(expected, skip_special_tokens=True)
    assert mixed not in (oracle.chat("a0", "tell", 12), oracle.chat("a1", "tell", 12))
    with pytest.raises(openai.BadRequestError, match="DoRA adapter cannot be blended"):
        ask(running.openai, "a0:0.5+a3:0.5", "tell")


def test_a_chat_goes_on_with_the_message_that_came_back(running, oracle):
    """Clients send it with the fields that hold nothing, as they got them."""
    client, said = running.openai, [{"role": "user", "content": "hi"}]
    first = ask(client, "a0", "hi").choices[0].message
    text = [{"role": "assistant", "content": first.content}, {"role": "user", "content": "more"}]
    for message in (first, first.model_dump()):
        answer = client.chat.completions.create(
            model="a0", messages=[*said, message, text[1]], max_tokens=12, temperature=0
        )
        assert answer.choices[0].message.content == oracle.messages("a0", [*said, *text], 12)


def test_fields_that_ask_for_nothing_change_nothing(running):
    client, nothing = running.openai, {"response_format": {"type": "text"}, "logit_bias": {}, "tool_choice": "none"}
    assert ask(client, "a0", "hi", **nothing).choices == ask(client, "a0", "hi").choices
    one = client.completions.create(model="a0", prompt=["word"], max_tokens=5, temperature=0)
    assert one.choices == client.completions.create(model="a0", prompt="word", max_tokens=5, temperature=0).choices
    with pytest.raises(openai.BadRequestError, match="prompt"):
        client.completions.create(model="a0", prompt=["one", "two"], max_tokens=5)


@pytest.mark.parametrize("rules", [{"temperature": 1e-40}, {"top_p": 1e-50}, {"temperature": 1e-4, "top_p": 1e-30}])
def test_extreme_rules_end_nobodys_answer(running, rules):
    """With next to no temperature, or of next to nothing, the likeliest token is left."""
    expected = ask(running.openai, "a0", "hi").choices[0].message.content
    assert (
        ask(running.openai, "a0", "hi", seed=1, **({"temperature": 1} | rules)).choices[0].message.content == expected
    )


def test_models_name_their_parent(running):
    models = {model.id: model for model in running.openai.models.list()}
    assert models["base"].parent is None
    assert models["a0"].parent == "base"
    assert models["a0"].root.startswith("a0@")
    assert running.openai.models.retrieve("a2").id == "a2"
    assert running.openai.models.retrieve(models["a0"].root).id == "a0"
    with pytest.raises(openai.NotFoundError):
        running.openai.models.retrieve("nobody")
    pinned = models["a0"].root
    assert ask(running.openai, pinned, "hi").system_fingerprint == pinned


@pytest.mark.parametrize(
    "change, status, message",
    [
        ({"model": "nobody"}, 404, "'nobody' is not served"),
        ({"model": "a0@000000000000"}, 404, "a0 is now a0@"),
        ({"messages": []}, 400, "messages"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, 400, "more than the context"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"n": 2}, 400, "n: "),
        ({"model": "m" * 501}, 400, "model: String should have at most 500 characters"),
        ({"stop": [""]}, 400, "stop.0: String should have at least 1 character"),
        ({"tools": []}, 400, "tools: Input should be None"),
        ({"top_logprobs": 2}, 400, "top_logprobs needs logprobs true"),
        ({"logprobs": False, "top_logprobs": 0}, 400, "top_logprobs needs logprobs true"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options is for streams alone"),
        ({"seed": 2**63}, 400, "seed: Input should be less than"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias: Dictionary should have at most 0 items"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format.type: Input should be 'text'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            400,
            "messages.0.content: Input",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "surrogate"),
    ],
)
def test_errors_are_openais(running, change, status, message):
    body = {"model": "a0", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4} | change
    answer = httpx.post(f"{running.url}/v1/chat/completions", content=json.dumps(body), headers=HEADERS | JSON)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"model": NaN}', b"[" * 100_000])
def test_malformed_bodies_are_the_clients_fault(running, content):
    for path in ("/v1/chat/completions", "/v1/completions"):
        answer = httpx.post(running.url + path, content=content, headers=HEADERS | JSON)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_what_is_wrong_with_a_body_is_said(running):
    url = f"{running.url}/v1/chat/completions"
    text = json.dumps({"model": "a0", "messages": [{"role": "user", "content": "x"}]})
    form = httpx.post(url, content=text, headers=HEADERS | {"content-type": "application/x-www-form-urlencoded"})
    assert "Content-Type: application/json (it came with application/x-www-form" in form.json()["error"]["message"]
    cut = httpx.post(url, content=text[:-1], headers=HEADERS | JSON).json()["error"]
    assert cut["message"] == f"the body is not JSON: Expecting ',' delimiter at character {len(text) - 1}"
    assert cut["param"] is None


def test_tokens_that_are_parts_of_characters(running):
    """The bytes of an answer's tokens are those of its text; offsets count characters."""
    ids = running.service.tokenizer("né 👍 中")["input_ids"]
    form = CompletionForm("m", SimpleNamespace(identity=None), running.service.tokenizer, 1)
    events = [Event("", TokenOut(token, -1.0, ((token, -1.0),))) for token in ids]
    said = form.logprobs(events)
    assert said["tokens"][:4] == ["n", "bytes:\\xc3", "bytes:\\xa9", " "]
    assert said["text_offset"] == [0, 1, 1, 2, 3, 3, 3, 3, 4, 5, 5, 5]
    content = ChatForm("m", SimpleNamespace(identity=None), running.service.tokenizer, 1).logprobs(events)["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == "né 👍 中"


def refusal(ask):
    """The status; the connection may be closed while the rest of the body is on its way."""
    for _ in range(5):
        with contextlib.suppress(httpx.TransportError):
            return ask().status_code
    raise AssertionError("no answer to five requests")


def test_tokens_and_sizes(running):
    chat = f"{running.url}/v1/chat/completions"
    assert httpx.post(chat, json={}).status_code == 401
    assert httpx.post(chat, json={}, headers={"Authorization": "Bearer wrong"}).json()["error"]["code"] == (
        "invalid_api_key"
    )
    assert httpx.get(f"{running.url}/admin/adapters", headers=HEADERS).status_code == 401
    assert httpx.get(f"{running.url}/metrics").status_code == 401
    lower = {"authorization": f"bearer {TOKEN}"}
    assert httpx.get(f"{running.url}/v1/models", headers=lower).status_code == 200, "a scheme has no case"
    large = b"x" * (1 << 20) + b"x"
    assert refusal(lambda: httpx.post(chat, content=large, headers=HEADERS | JSON)) == 413
    pieces = [b"x" * 65536] * 17
    assert refusal(lambda: httpx.post(chat, content=iter(pieces), headers=HEADERS | JSON)) == 413
    assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{running.url}/ready").json() == {"status": "ready"}
    assert httpx.get(f"{running.url}/nothing", headers=HEADERS).json()["error"]["type"] == "not_found_error"
    assert httpx.put(chat, headers=HEADERS).headers["allow"] == "POST"
    assert httpx.patch(f"{running.url}/admin/adapters/x", headers=ADMIN_HEADERS).headers["allow"] == "DELETE, PUT"


def test_a_client_that_leaves_frees_its_slot(running):
    body = {"model": "a0", "messages": [{"role": "user", "content": "x"}], "max_tokens": 200, "temperature": 0}
    with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=body | {"stream": True}, headers=HEADERS) as s:
        next(s.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{running.url}/v1/chat/completions", json=body, headers=HEADERS, timeout=httpx.Timeout(30, read=0.05)
        )
    running.settled()
    metrics = httpx.get(f"{running.url}/metrics", headers=HEADERS).text
    assert 'twinlora_requests_total{adapter="a0",finish="cancelled"} 2.0' in metrics, "streamed, and not"


def test_metrics(running):
    ask(running.openai, "a2", "x")
    text = httpx.get(f"{running.url}/metrics", headers=HEADERS).text
    assert 'twinlora_time_to_first_token_seconds_count{adapter="a2"}' in text
    assert "twinlora_adapter_bytes" in text
    assert 'twinlora_answer_tokens_total{adapter="a2"}' in text
    running.settled()
    before = _refused(running, 404)
    with pytest.raises(openai.NotFoundError):
        ask(running.openai, "nobody", "x")
    assert _refused(running, 404) == before + 1
    text = httpx.get(f"{running.url}/metrics", headers=HEADERS).text
    assert "twinlora_running_requests 0.0" in text, "and not what the last pass had"


def _refused(running, status):
    return running.service.metrics.refused.labels(str(status))._value.get()


def test_prefixes_are_reused_by_content(running):
    text = "the same beginning, long enough to matter " * 3
    first = ask(running.openai, "a1", text, max_tokens=2)
    again = ask(running.openai, "a1", text, max_tokens=2)
    other = ask(running.openai, "a2", text, max_tokens=2)
    prompt = first.usage.prompt_tokens
    assert again.usage.prompt_tokens_details.cached_tokens == prompt - 1
    assert other.usage.prompt_tokens_details.cached_tokens < 20, "the template's beginning at most"
    assert again.choices[0].message.content == first.choices[0].message.content


def test_the_admin_api(tiny, adapters, oracle, tmp_path):
    root = adapters["a0"].parent
    (root / "broken").mkdir(exist_ok=True)
    (root / "broken" / "adapter_config.json").write_text("{")
    for server in start(tmp_path, tiny, {"x": adapters["a0"]}, adapters_dir=root):
        assert any("not served: adapter" in note and "broken" in note for note in server.notes)
        client, url = server.openai, f"{server.url}/admin/adapters"
        assert ask(client, "x", "hi").choices[0].message.content == oracle.chat("a0", "hi", 12)
        assert httpx.post(url, json={"name": "x", "path": "a1"}, headers=ADMIN_HEADERS).status_code == 409
        done = httpx.put(f"{url}/x", json={"path": "a1"}, headers=ADMIN_HEADERS)
        assert done.json()["identity"].startswith("x@")
        assert ask(client, "x", "hi").choices[0].message.content == oracle.chat("a1", "hi", 12)
        for path, status, message in (
            ("..", 404, "inside of"),
            ("/etc", 404, "inside of"),
            ("no\0", 404, "inside of"),
            ("x" * 300, 404, "inside of"),
            ("broken", 400, "adapter_model.safetensors"),
        ):
            answer = httpx.post(url, json={"name": "new", "path": path}, headers=ADMIN_HEADERS)
            assert answer.status_code == status
            assert message in answer.json()["error"]["message"]
        assert httpx.post(f"{url}/x/pin", json={"pinned": True}, headers=ADMIN_HEADERS).json()["pinned"] is True
        listed = httpx.get(url, headers=ADMIN_HEADERS).json()
        assert {"x", "a2", "a7"} <= {entry["name"] for entry in listed["adapters"]}
        assert listed["resident_bytes"] <= listed["limit_bytes"]
        assert httpx.delete(f"{url}/x", headers=ADMIN_HEADERS).status_code == 200
        assert httpx.delete(f"{url}/x", headers=ADMIN_HEADERS).status_code == 404
        with pytest.raises(openai.NotFoundError):
            ask(client, "x", "hi")


def test_overload_is_429_with_retry_after(tiny, tmp_path):
    for server in start(tmp_path, tiny, {}, slots=1, queue=1, batch_tokens=8):
        body = {"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": 150, "temperature": 0}

        def post(body=body, server=server):
            return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=HEADERS, timeout=60)

        found = []
        threads = [threading.Thread(target=lambda found=found, post=post: found.append(post())) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = sorted(answer.status_code for answer in found)
        assert set(statuses) == {200, 429}
        refused = next(answer for answer in found if answer.status_code == 429)
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        server.settled()


def test_overload_is_told_before_a_prompt_is_read(running, monkeypatch):
    """Else any number of long prompts would wait for the one thread that encodes."""
    service, waiting, go = running.service, threading.Event(), threading.Event()

    def encode(tokenizer, messages):
        waiting.set()
        go.wait(30)
        return [1, 2, 3]

    monkeypatch.setattr("twinlora.serve.service.encode_chat", encode)
    monkeypatch.setattr(service.options, "slots", 1)
    monkeypatch.setattr(service.options, "queue", 0)
    first = threading.Thread(target=ask, args=(running.openai, "a0", "long"))
    first.start()
    waiting.wait(30)
    with pytest.raises(openai.RateLimitError, match="1 requests are in work"):
        ask(running.openai, "a0", "next")
    go.set()
    first.join()
    running.settled()


def test_a_client_that_stops_reading_is_cut_off(running, monkeypatch):
    monkeypatch.setattr("twinlora.serve.http._READ_SECONDS", 0.1)
    service = running.service

    async def prepare():
        return [1, 2, 3], Sampling(5)

    async def forever(*_):
        await asyncio.sleep(60)

    async def begin(version):
        answer = await service.begin("a0", prepare)
        response = _Stream(answer, stream(ChatForm("a0", answer, service.tokenizer, None), answer, usage=False))
        await response({"type": "http", "asgi": {"spec_version": version}}, forever, forever)

    for version in ("2.3", "2.4"):
        asyncio.run(asyncio.wait_for(begin(version), 10))
        running.settled()
    assert "took nothing of its answer" in running.notes[-1]


def test_a_client_is_cut_off_for_one_piece_not_for_the_whole(running, monkeypatch):
    """A model that keeps a client waiting, and a slow one that takes every piece, are no reason."""
    monkeypatch.setattr("twinlora.serve.http._READ_SECONDS", 0.4)
    service = running.service

    async def receive():
        await asyncio.sleep(60)

    async def take(seconds, wait=0.0):
        """The pieces taken, of which each takes the next of `seconds`."""
        taken, pace = [], iter(seconds)

        async def send(message):
            await asyncio.sleep(next(pace, 0))
            taken.append(message)

        async def prepare():
            return [1, 2, 3], Sampling(5)

        async def late(pieces):
            await asyncio.sleep(wait)
            async for piece in pieces:
                yield piece

        answer = await service.begin("a0", prepare)
        pieces = stream(ChatForm("a0", answer, service.tokenizer, None), answer, usage=True)
        response = _Stream(answer, late(pieces))
        await asyncio.wait_for(response({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send), 10)
        return taken

    cut = [note for note in running.notes if "took nothing" in note]
    for seconds, wait in (([0.15] * 6, 0.0), ([], 1.0)):
        assert asyncio.run(take(seconds, wait))[-1]["more_body"] is False
    assert [note for note in running.notes if "took nothing" in note] == cut
    begun = time.monotonic()
    assert len(asyncio.run(take([0, 0.3, 60]))) == 2
    assert 0.7 <= time.monotonic() - begun < 5
    assert len([note for note in running.notes if "took nothing" in note]) == len(cut) + 1
    running.settled()


def test_endless_headers_are_refused(running):
    address = running.url.removeprefix("http://").split(":")
    with socket.create_connection(address, 30) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 8 << 20:
                connection.sendall(b"x: " + b"y" * 4000 + b"\r\n")
                sent += 4005
        assert sent < 8 << 20
    assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}


def test_failures_are_counted(running, monkeypatch):
    monkeypatch.setattr(running.service.engine, "_pass", lambda plan: [(chunk, None) for chunk in plan.chunks])
    counter = running.service.metrics.requests.labels("a0", "error")
    before = counter._value.get()
    with pytest.raises(openai.InternalServerError, match="not finite"):
        ask(running.openai, "a0", "hi")
    assert counter._value.get() == before + 1


def test_a_defect_is_told_in_openais_form(running, monkeypatch):
    monkeypatch.setattr("twinlora.serve.service.encode_chat", lambda *_: 1 / 0)
    with pytest.raises(openai.InternalServerError, match="the server failed at this request"):
        ask(running.openai, "a0", "hi")
    monkeypatch.undo()
    running.settled()


def test_one_bad_item_of_many_costs_no_time(running):
    for body in ({"prompt": [""] * 200_000}, {"prompt": [-1] * 300_000}):
        begun = time.monotonic()
        answer = httpx.post(f"{running.url}/v1/completions", json={"model": "a0"} | body, headers=HEADERS)
        assert answer.status_code == 400
        assert len(answer.text) < 3000
        assert time.monotonic() - begun < 2


def test_a_stream_that_never_begins_frees_its_slot(running):
    service = running.service

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        raise OSError("the client has gone")

    async def prepare():
        return [1, 2, 3], Sampling(200)

    async def begin():
        answer = await service.begin("a0", prepare)
        form = ChatForm("a0", answer, service.tokenizer, None)
        response = _Stream(answer, stream(form, answer, usage=False))
        with contextlib.suppress(Exception):
            await response({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send)

    asyncio.run(begin())
    running.settled()
