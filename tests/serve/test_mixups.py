"""Adapters are loaded, replaced and unloaded while clients ask: every answer is its own adapter's.

An answer is its words and the log-probabilities of its tokens, which no two adapters share.
"""

import itertools
import random
import threading

import httpx
import pytest

from tests.serve.conftest import ADMIN, start

openai = pytest.importorskip("openai")
ADMIN_HEADERS = {"Authorization": f"Bearer {ADMIN}"}
CLIENTS, REQUESTS, NEW = 4, 100, 6


def ask(api, model, question):
    messages = [{"role": "user", "content": question}]
    answer = api.chat.completions.create(model=model, messages=messages, max_tokens=NEW, temperature=0, logprobs=True)
    choice = answer.choices[0]
    return answer.system_fingerprint, choice.message.content, [token.logprob for token in choice.logprobs.content]


def same(one, other):
    return one[0] == other[0] and one[1] == pytest.approx(other[1], abs=1e-3)


@pytest.mark.parametrize("memory", ["1GiB", "60KB"], ids=["all resident", "few resident"])
def test_no_answer_is_anothers(tiny, adapters, oracle, tmp_path, memory):
    questions = ["tell me", "tell me more", "x" * 40]
    by_content: dict[str, str] = {}
    for server in start(tmp_path, tiny, {}, adapters_dir=adapters["a0"].parent, adapter_memory=memory):
        url = f"{server.url}/admin/adapters"
        for entry in httpx.get(url, headers=ADMIN_HEADERS).json()["adapters"]:
            by_content[entry["identity"].partition("@")[2]] = entry["name"]
        expected = {(name, q): ask(server.openai, name, q)[1:] for name in adapters for q in questions}
        for question in questions:
            assert all(expected[name, question][0] == oracle.chat(name, question, NEW) for name in adapters)
            pairs = itertools.combinations(adapters, 2)
            assert not any(same(expected[a, question], expected[b, question]) for a, b in pairs)
        counter, wrong, outcomes, over = itertools.count(), [], [], threading.Event()

        def client(number, server=server, counter=counter, wrong=wrong, outcomes=outcomes, expected=expected):
            source, api = random.Random(number), server.openai
            while next(counter) < REQUESTS:
                model, question = source.choice(["v0", "v1", "v2", "a5", "a6", "a7"]), source.choice(questions)
                try:
                    fingerprint, *said = ask(api, model, question)
                except (openai.NotFoundError, openai.RateLimitError) as error:
                    outcomes.append(type(error).__name__)
                    continue
                # The version that says it answered is the version whose answer this is.
                name = by_content[fingerprint.partition("@")[2]]
                outcomes.append("answered")
                if not same(said, expected[name, question]) or (model.startswith("a") and name != model):
                    wrong.append((model, name, question, said))

        def admin(server=server, url=url, over=over):
            source = random.Random(99)
            while not over.is_set():
                name, path = source.choice(["v0", "v1", "v2"]), f"a{source.randrange(5)}"
                if source.random() < 0.2:
                    httpx.delete(f"{url}/{name}", headers=ADMIN_HEADERS)
                elif httpx.put(f"{url}/{name}", json={"path": path}, headers=ADMIN_HEADERS).status_code == 404:
                    httpx.post(url, json={"name": name, "path": path}, headers=ADMIN_HEADERS)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
        changes = threading.Thread(target=admin)
        for thread in (changes, *threads):
            thread.start()
        for thread in threads:
            thread.join()
        over.set()
        changes.join()
        assert not wrong
        assert outcomes.count("answered") > REQUESTS / 3, outcomes
        server.settled()
