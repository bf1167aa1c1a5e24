"""From the engine's thread to the event loop, and on to the pieces of a stream, without a model."""

import asyncio
import json
import threading
from types import SimpleNamespace

from twinlora.serve.answers import ChatForm, stream
from twinlora.serve.engine import Event
from twinlora.serve.service import Mailbox


def test_one_wake_up_serves_all_that_waits():
    wakes, seen = [], []
    box = Mailbox(SimpleNamespace(call_soon_threadsafe=wakes.append))
    for i in range(3):
        box.post(lambda i=i: seen.append(i))
    assert len(wakes) == 1
    box.post(lambda: box.post(lambda: seen.append("while it is emptied")))
    wakes[0]()
    assert seen == [0, 1, 2, "while it is emptied"]
    for wake in wakes[1:]:
        wake()  # there may be nothing left
    count = len(wakes)
    box.post(lambda: seen.append("later"))
    assert len(wakes) == count + 1
    wakes[-1]()
    assert seen[-1] == "later"


def test_nothing_is_lost_or_out_of_order_between_two_threads():
    seen, count = [], 50_000

    async def main():
        box, done = Mailbox(asyncio.get_running_loop()), asyncio.Event()

        def produce():
            for i in range(count):
                box.post(lambda i=i: seen.append(i))
            box.post(done.set)

        thread = threading.Thread(target=produce)
        thread.start()
        await asyncio.wait_for(done.wait(), 60)
        thread.join()

    asyncio.run(main())
    assert seen == list(range(count))


def test_a_loop_that_has_gone_is_no_error():
    loop = asyncio.new_event_loop()
    loop.close()
    box = Mailbox(loop)
    box.post(print)
    box.post(print)


def test_pieces_are_whole_objects():
    """Also where the constant part has what ends it in it."""

    class Answer:
        identity, usage = 'x@"choices":[]}', {"total_tokens": 2}

        async def __aiter__(self):
            yield Event("né", None)
            yield Event("", None, "stop")

    async def main():
        form = ChatForm('a"]}', Answer(), None, None)
        return form.head, [piece async for piece in stream(form, Answer(), usage=True)]

    head, pieces = asyncio.run(main())
    head |= {"object": "chat.completion.chunk", "usage": None}
    assert pieces.pop() == b"data: [DONE]\n\n"
    assert all(piece.startswith(b"data: ") and piece.endswith(b"}\n\n") for piece in pieces)
    choice = {"index": 0, "logprobs": None}
    assert [json.loads(piece[6:]) for piece in pieces] == [
        head | {"choices": [choice | {"delta": {"role": "assistant", "content": "né"}, "finish_reason": None}]},
        head | {"choices": [choice | {"delta": {}, "finish_reason": "stop"}]},
        head | {"choices": [], "usage": {"total_tokens": 2}},
    ]
