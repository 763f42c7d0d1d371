"""Continuous batching: requests come and go while others are being written.

The engine works in steps. A step admits requests to free slots, reads one chunk of one prompt, or
several short prompts together, and writes one token for every request whose prompt is read: the
weights are read once for all of them. A long prompt holds the others up by one chunk at a time; who
is finished makes room.

Source: Yu et al., "Orca", OSDI 2022 (scheduling by iteration); Agrawal et al.,
arXiv:2308.16369 (prompts in chunks between tokens).
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from torch import Tensor

from mptbook.infer.faults import Busy, Stopping, Unanswered
from mptbook.infer.request import Counts, Listener, Piece, Request, Stream, Token
from mptbook.infer.running import Running, read_together, settle, take_over
from mptbook.infer.sampling import likeliest
from mptbook.infer.slots import Slots
from mptbook.tokenizer.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class Engine:
    """Answers many requests side by side.

    Args:
        slots: the model and its cache: at most so many requests at once.
        tokenizer: ids that it has are chosen; a padded vocabulary has more.
        chunk_tokens: of prompts, read in one step.
        queue: requests that may wait for a slot.
        observe: called with a name and seconds: time_to_first_token, inter_token_latency and
            e2e_request_latency.

    Attributes:
        said: called by its thread after it told listeners what there was, perhaps nothing.
    """

    def __init__(
        self,
        slots: Slots,
        tokenizer: Tokenizer,
        *,
        chunk_tokens: int = 256,
        queue: int = 64,
        observe: Callable[[str, float], None] = lambda name, seconds: None,
    ) -> None:
        self.slots, self.tokenizer = slots, tokenizer
        self.chunk_tokens, self.queue, self.observe = chunk_tokens, queue, observe
        self.said: Callable[[], None] = lambda: None
        self.counts = Counts()
        self.waiting: deque[tuple[Stream, float]] = deque()
        self.reading: deque[Running] = deque()
        self.writing: list[Running] = []
        self.kept: list[list[int]] = [[] for _ in range(slots.n_slots)]  # ids that a slot holds
        self._used = [0] * slots.n_slots  # step of its last use
        self._steps = 0
        self._n_ids = len(tokenizer)
        self._changed, self._stopping, self._giving_up = threading.Condition(), False, False
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> list[Running]:
        return [*self.reading, *self.writing]

    def submit(self, request: Request, listener: Listener | None = None) -> Stream:
        """Have a request answered; from any thread. A listener is told each piece by the engine's.

        Raises:
            ValueError: if it does not fit into a slot, or has an id that the tokenizer lacks.
            Busy: if too many wait already.
            Stopping: if the engine ends, or has ended.
        """
        request.check_fits(self.slots.n_tokens, self._n_ids)
        stream = Stream(request, listener)
        with self._changed:
            if self._stopping or not (self._thread is None or self.works):
                raise Stopping("the server is stopping; ask another, or later")
            if len(self.waiting) >= self.queue:
                raise Busy(f"{len(self.waiting)} requests wait already; ask again later")
            self.waiting.append((stream, time.perf_counter()))
            self._changed.notify()
        return stream

    @property
    def works(self) -> bool:
        """Whether its thread is there to answer."""
        return self._thread is not None and self._thread.is_alive()

    def step(self) -> bool:
        """Admit, read one chunk of prompts, write one token for each; whether there was work."""
        self._steps += 1
        self._drop_cancelled()
        self._admit()
        if self.reading:
            self._read_chunk()
            self.said()
        elif not self.writing:
            return False
        self._write_tokens([*self.writing])
        return True

    def start(self) -> None:
        """Step in a thread, until `stop`."""
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def stop(self, seconds: float = 30.0) -> None:
        """Take no more requests, finish those there are, cancel what is left after `seconds`."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        assert self._thread is not None, "stop comes after start"
        self._thread.join(seconds)
        self._giving_up = True  # which its thread sees: only it knows what is being read
        self._thread.join()

    def _work(self) -> None:
        try:
            self._steps_until_stopped()
        except Exception as error:
            log.critical("the engine has failed, and ends", exc_info=error)
            with self._changed:
                self._stopping = True
            for stream in [one for one, _ in self.waiting] + [one.stream for one in self.running]:
                self._give_up(stream, error)
            self.said()

    def _steps_until_stopped(self) -> None:
        while True:
            worked = self.step()
            self.said()
            if worked:
                continue
            with self._changed:
                if self._stopping and not self.waiting:
                    return
                if not self.waiting:
                    self._changed.wait()

    def _drop_cancelled(self) -> None:
        if self._giving_up:
            for stream in [one for one, _ in self.waiting] + [one.stream for one in self.running]:
                stream.cancel()
        if self.waiting:
            with self._changed:
                gone = [one for one in self.waiting if one[0].cancelled]
                self.waiting = deque(one for one in self.waiting if not one[0].cancelled)
            for stream, _ in gone:
                self.counts.end("cancelled")
                stream.put(Piece("", finish="cancelled"))
        for one in self.running:
            if one.stream.cancelled:
                self._end(one, "cancelled")

    def _admit(self) -> None:
        if not self.waiting:
            return
        taken = {one.slot for one in self.running}
        free = [slot for slot in range(self.slots.n_slots) if slot not in taken]
        while free:
            with self._changed:
                if not self.waiting:
                    return
                stream, born = self.waiting.popleft()
            try:
                held = self._used, self.slots, self.kept, self.tokenizer
                one = settle(stream, born, free, *held)
            except Exception as error:  # ends this request, and not the engine
                self._give_up(stream, error)
                continue
            free.remove(one.slot)
            self.reading.append(one)
            self.counts.prompt_tokens += len(one.prompt)
            self.counts.reused_tokens += one.read

    def _read_chunk(self) -> None:
        try:
            self.counts.reused_tokens += take_over(self.reading[0], self.slots, self.kept)
        except Exception as error:
            self._fail([self.reading[0]], error)
            return
        rows = read_together(self.reading, self.chunk_tokens)
        one = rows[0]
        try:
            logits = self._read_whole(rows) if len(rows) > 1 else self._read_part(one)
        except Exception as error:
            (self._fail if len(rows) == 1 else self._part)(rows, error)
            return
        if one.read < len(one.prompt):
            self.reading.rotate(-1)  # behind the others: they take turns
            return
        for each in rows:
            self.reading.remove(each)
        self.writing += rows
        if one.stream.request.max_new_tokens == 0:
            self._end(one, "length")
        else:
            self._choose(rows, logits)

    def _part(self, rows: Sequence[Running], error: Exception) -> None:
        """Have prompts read one by one, so that a fault ends only the request it belongs to."""
        log.warning("%d prompts are read again, one by one", len(rows), exc_info=error)
        for one in rows:
            self.slots.crop(one.slot, 0)
            one.alone = True

    def _read_whole(self, rows: Sequence[Running]) -> Tensor:
        """(R, V) logits after the prompts of some requests."""
        prompts = [one.prompt for one in rows]
        logits = self.slots.read_texts([one.slot for one in rows], prompts)
        for one, prompt in zip(rows, prompts, strict=True):
            one.read, self.kept[one.slot] = len(prompt), list(prompt)
        return logits

    def _read_part(self, one: Running) -> Tensor:
        """(1, V) logits after one chunk more of a prompt."""
        request = one.stream.request
        chunk = list(request.prompt[one.read : one.read + self.chunk_tokens])
        logits = self.slots.read(one.slot, chunk, every=request.echo)
        if request.echo:
            one.echo(chunk, logits[:, : self._n_ids])
            logits = logits[-1]
        one.read += len(chunk)
        self.kept[one.slot] += chunk
        return logits[None]

    def _write_tokens(self, rows: list[Running]) -> None:
        if not rows:
            return
        try:
            logits = self.slots.decode([one.slot for one in rows], [one.last for one in rows])
        except Exception as error:
            self._fail(rows, error)
            return
        for one in rows:
            self.kept[one.slot].append(one.last)
        self._choose(rows, logits)

    def _choose(self, rows: list[Running], logits: Tensor) -> None:
        """Choose a token for each of (R, V) logits, say it, and end those whose last it was."""
        # For all at once: each call lets other threads have the interpreter, and waits for it.
        try:
            found = likeliest(logits, self._n_ids)
        except Exception as error:
            self._fail(rows, error)
            return
        for one, (n, best) in zip(rows, enumerate(found), strict=True):
            try:
                self._say(one, one.choose(best, logits, n, self._n_ids))
            except Exception as error:
                self._fail([one], error)

    def _say(self, one: Running, token: Token) -> None:
        one.last = token.id
        one.written += 1
        self.counts.generation_tokens += 1
        name = "inter_token_latency" if one.spoken else "time_to_first_token"
        before, one.spoken = one.spoken or one.born, time.perf_counter()
        self.observe(name, one.spoken - before)
        request = one.stream.request
        ended = one.last in request.stop_ids
        text = "" if ended else one.text.add(one.last)
        if ended or one.text.stopped is not None:
            self._end(one, "stop", text, token)
        elif one.written == request.max_new_tokens:
            self._end(one, "length", text, token)
        else:
            one.stream.put(Piece(text, (token,)))

    def _end(self, one: Running, finish: str, text: str = "", *tokens: Token) -> None:
        (self.writing if one in self.writing else self.reading).remove(one)
        self._used[one.slot] = self._steps
        if finish != "cancelled" and one.text.stopped is None:
            text += one.text.finish()
            finish = "stop" if one.text.stopped is not None else finish
        self.counts.end(finish)
        self.observe("e2e_request_latency", time.perf_counter() - one.born)
        one.stream.put(Piece(text, tokens, finish))

    def _fail(self, rows: Sequence[Running], error: Exception) -> None:
        """End requests with an error; what their slots hold is not to be trusted."""
        for one in rows:
            for its in [each for each in (self.reading, self.writing) if one in each]:
                its.remove(one)
            self.slots.crop(one.slot, 0)
            self.kept[one.slot] = []
            self._give_up(one.stream, error)

    def _give_up(self, stream: Stream, error: Exception) -> None:
        self.counts.end("error")
        told = error if isinstance(error, Unanswered) else Unanswered(str(error) or repr(error))
        told.__cause__ = None if told is error else error
        stream.put(told)
