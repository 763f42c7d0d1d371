import asyncio

from mptbook.infer.request import Piece
from mptbook.serve.writing import Post


def test_the_loop_is_woken_once_for_all_that_a_step_says(monkeypatch):
    async def run():
        loop, woken = asyncio.get_running_loop(), []
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(
            loop, "call_soon_threadsafe", lambda call: woken.append(call) or wake(call)
        )
        post, queues = Post(), [asyncio.Queue(), asyncio.Queue()]
        tell = [post.listener(queues[n // 2], n) for n in range(3)]
        pieces = [Piece(letter) for letter in "abc"]
        for each, piece in zip(tell, pieces, strict=True):
            each(piece)
        assert not woken
        post.deliver()
        await asyncio.sleep(0)
        assert [queues[0].get_nowait(), queues[0].get_nowait()] == [(0, pieces[0]), (1, pieces[1])]
        assert queues[1].get_nowait() == (2, pieces[2])
        post.deliver()  # nothing
        assert len(woken) == 1

    asyncio.run(run())
