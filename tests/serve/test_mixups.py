"""Adapters are loaded, replaced and unloaded while clients ask: every answer is its own adapter's."""

import itertools
import random
import threading

import httpx
import pytest

from tests.serve.conftest import ADMIN, start

openai = pytest.importorskip("openai")
ADMIN_HEADERS = {"Authorization": f"Bearer {ADMIN}"}
CLIENTS, REQUESTS, NEW = 4, 100, 6


@pytest.mark.parametrize("memory", ["1GiB", "60KB"], ids=["all resident", "few resident"])
def test_no_answer_is_anothers(tiny, adapters, oracle, tmp_path, memory):
    questions = ["a", "tell me", "tell me more", "x" * 40]
    expected = {(name, q): oracle.chat(name, q, NEW) for name, q in itertools.product(adapters, questions)}
    assert len(set(expected.values())) == len(expected), "answers tell adapters apart"
    by_content: dict[str, str] = {}
    for server in start(tmp_path, tiny, {}, adapters_dir=adapters["a0"].parent, adapter_memory=memory):
        url = f"{server.url}/admin/adapters"
        for entry in httpx.get(url, headers=ADMIN_HEADERS).json()["adapters"]:
            by_content[entry["identity"].partition("@")[2]] = entry["name"]
        counter, wrong, outcomes, over = itertools.count(), [], [], threading.Event()

        def client(number, server=server, counter=counter, wrong=wrong, outcomes=outcomes):
            source, api = random.Random(number), server.openai
            while next(counter) < REQUESTS:
                model, question = source.choice(["v0", "v1", "v2", "a5", "a6", "a7"]), source.choice(questions)
                try:
                    answer = api.chat.completions.create(
                        model=model, messages=[{"role": "user", "content": question}], max_tokens=NEW, temperature=0
                    )
                except (openai.NotFoundError, openai.RateLimitError) as error:
                    outcomes.append(type(error).__name__)
                    continue
                # The version that says it answered is the version whose answer this is.
                name = by_content[answer.system_fingerprint.partition("@")[2]]
                said = answer.choices[0].message.content
                outcomes.append("answered")
                if said != expected[name, question] or (model.startswith("a") and name != model):
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
