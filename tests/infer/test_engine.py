import functools
import math
import random
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mptbook.infer.engine import Engine
from mptbook.infer.faults import Busy, Stopping, Unanswered
from mptbook.infer.request import Request
from mptbook.infer.running import place
from mptbook.infer.slots import Slots
from mptbook.infer.text import TextStream
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer.bpe import train_bpe

TOKENIZER = train_bpe(["the cat sat on the mat — olé\n"] * 5, 290)
N = len(TOKENIZER)


@functools.cache
def model():
    torch.manual_seed(2)
    # more ids than the tokenizer has, as in a padded vocabulary
    config = MPTConfig(d_model=36, n_heads=3, n_layers=2, max_seq_len=64, vocab_size=300)
    return MPT(config).eval()


def engine(n_slots=3, n_tokens=60, **how):
    return Engine(Slots(model(), n_slots, n_tokens), TOKENIZER, **how)


def run(engine):
    while engine.step():
        pass


def finished(stream):
    """Text, ids and the reason of a stream that has ended."""
    pieces = list(stream)
    ids = [token.id for piece in pieces for token in piece.tokens]
    return "".join(piece.text for piece in pieces), ids, pieces[-1].finish


@functools.cache
def alone(prompt, n):
    """Greedy tokens, everything read anew for each."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(model()(torch.tensor([ids]))[0, -1, :N].argmax()))
    return ids[len(prompt) :]


def some_prompt(chance, longest=25):
    start = [5, 9, 30, 31, 7, 8][: chance.randrange(7)]  # many begin alike
    return (*start, *(chance.randrange(N) for _ in range(chance.randint(1, longest))))


@given(
    seed=st.integers(0, 999),
    chunk=st.integers(1, 9),
    n_slots=st.integers(1, 4),
    patience=st.integers(0, 5),
)
@settings(max_examples=25, deadline=None)
def test_what_is_written_does_not_depend_on_what_runs_beside_it(seed, chunk, n_slots, patience):
    chance = random.Random(seed)
    requests = [Request(some_prompt(chance), chance.randint(1, 12)) for _ in range(9)]
    ours, streams = engine(n_slots, chunk_tokens=chunk), []
    for request in requests:
        streams.append(ours.submit(request))
        for _ in range(chance.randint(0, patience)):
            ours.step()
    run(ours)
    for request, stream in zip(requests, streams, strict=True):
        text, ids, finish = finished(stream)
        assert ids == alone(request.prompt, request.max_new_tokens)
        assert text == TOKENIZER.decode(ids)
        assert finish == "length"
    assert ours.counts.generation_tokens == sum(r.max_new_tokens for r in requests)
    assert ours.counts.finished == {"length": 9}


def test_a_step_reads_one_chunk_and_writes_one_token_for_each():
    ours = engine(3, chunk_tokens=4)
    short = ours.submit(Request((1, 2), 9))
    ours.step()
    long = ours.submit(Request(tuple(range(20)), 2))
    written = []
    for _ in range(5):  # the long prompt takes five chunks
        ours.step()
        written.append(ours.writing[0].written)
    assert written == [3, 4, 5, 6, 7]  # and holds nobody up
    run(ours)
    assert finished(short)[1] == alone((1, 2), 9)
    assert finished(long)[1] == alone(tuple(range(20)), 2)


def test_a_first_token_is_said_before_the_others_get_their_next():
    ours, told, said = engine(3), [], []
    ours.said = lambda: said.append([name for name, _ in told])
    ours.submit(Request((1, 2), 9), lambda piece: told.append(("first", piece)))
    ours.step()
    ours.submit(Request((3, 4), 9), lambda piece: told.append(("second", piece)))
    told.clear(), said.clear()
    ours.step()
    assert said == [["second"]]
    assert [name for name, _ in told] == ["second", "first", "second"]


def test_prompts_take_turns():
    ours = engine(2, chunk_tokens=2)
    for first in (1, 2):
        ours.submit(Request((first, *range(3, 9)), 1))
    order = []
    for _ in range(4):
        order.append(ours.reading[0].stream.request.prompt[0] if ours.reading else 1)
        ours.step()
    assert order == [1, 2, 1, 2]


def passes(monkeypatch):
    """How many tokens each pass over prompts reads."""
    found, plain, together = [], Slots.read, Slots.read_texts

    def read(slots, slot, ids, every=False):
        found.append([len(ids)])
        return plain(slots, slot, ids, every)

    def read_texts(slots, chosen, texts):
        found.append([len(ids) for ids in texts])
        return together(slots, chosen, texts)

    monkeypatch.setattr(Slots, "read", read)
    monkeypatch.setattr(Slots, "read_texts", read_texts)
    return found


def test_short_prompts_are_read_in_one_pass_as_far_as_a_chunk_has_room(monkeypatch):
    found = passes(monkeypatch)
    ours = engine(5, chunk_tokens=10)
    sizes = [4, 3, 7, 2, 20]
    prompts = [tuple(range(n, n + size)) for n, size in enumerate(sizes)]
    streams = [ours.submit(Request(prompt, 3)) for prompt in prompts]
    ours.step()
    assert [one.prompt for one in ours.writing] == [prompts[n] for n in (0, 1, 3)]
    run(ours)
    assert found == [[4, 3, 2], [7], [10], [10]]
    for prompt, stream in zip(prompts, streams, strict=True):
        assert finished(stream)[1] == alone(prompt, 3)


def test_what_begins_like_a_prompt_that_is_read_waits_and_takes_that_over(monkeypatch):
    found = passes(monkeypatch)
    ours = engine(3)
    start = tuple(range(10, 30))
    streams = [ours.submit(Request((*start, end), 3)) for end in (1, 2)]
    other = ours.submit(Request((7, 8, 9), 3))
    run(ours)
    assert found == [[21, 3], [1]]
    assert [stream.prompt_tokens_reused for stream in streams] == [0, 20]
    assert ours.counts.reused_tokens == 20
    for end, stream in zip((1, 2), streams, strict=True):
        assert finished(stream)[1] == alone((*start, end), 3)
    assert finished(other)[1] == alone((7, 8, 9), 3)


def test_first_come_first_served():
    ours = engine(1)
    streams = [ours.submit(Request((n,), 2)) for n in (4, 5, 6)]
    order = []
    while ours.step():
        order += [s for s in streams if s not in order and not s._pieces.empty()]
    assert order == streams


def test_a_beginning_that_a_slot_holds_is_not_read_again(monkeypatch):
    read = []
    plain = Slots.read
    monkeypatch.setattr(
        Slots,
        "read",
        lambda s, slot, ids, every=False: read.append(len(ids)) or plain(s, slot, ids, every),
    )
    start = tuple(range(10, 30))
    ours = engine(2)
    first = ours.submit(Request((*start, 1), 3))
    run(ours)
    second = ours.submit(Request((*start, 2), 3))  # of one that has ended
    ours.step()
    third = ours.submit(Request((*start, 2, 5), 3))  # of one that is being written: copied
    run(ours)
    assert read == [21, 1, 1]
    assert (second.prompt_tokens_reused, third.prompt_tokens_reused) == (20, 21)
    assert ours.counts.reused_tokens == 41
    for stream, end in ((first, (1,)), (second, (2,)), (third, (2, 5))):
        assert finished(stream)[1] == alone((*start, *end), 3)


def test_an_answer_goes_on_where_the_last_one_ended():
    ours = engine(2)
    first = ours.submit(Request((3, 4, 5), 6))
    run(ours)
    ids = finished(first)[1]
    second = ours.submit(Request((3, 4, 5, *ids, 8), 2))
    run(ours)
    assert second.prompt_tokens_reused == 3 + 5  # the last token was written, but not read


def test_two_conversations_that_begin_alike_keep_what_each_has_said():
    ours, start = engine(3, n_tokens=64), tuple(range(10, 30))
    talks = [[*start, 3], [*start, 4]]
    for turn in range(3):
        for talk in talks:
            stream = ours.submit(Request(tuple(talk), 4))
            run(ours)
            written = finished(stream)[1]
            # All of what was said but for the last token, which is not read yet.
            kept = len(talk) - 2 if turn else 20 * (talk is talks[1])
            assert stream.prompt_tokens_reused == kept
            assert written == alone(tuple(talk), 4)
            talk += [*written, 5 + turn]
    other = ours.submit(Request((7, 8, 9), 2))  # goes where nobody was yet
    run(ours)
    assert finished(other)[1] == alone((7, 8, 9), 2)
    again = ours.submit(Request(tuple(talks[0]), 2))
    run(ours)
    assert again.prompt_tokens_reused == len(talks[0]) - 2


@given(seed=st.integers(0, 999), n_slots=st.integers(1, 4))
def test_a_place_is_free_holds_what_is_said_and_spares_what_it_can(seed, n_slots):
    chance = random.Random(seed)
    kept = [list(some_prompt(chance, 4)) * chance.randrange(2) for _ in range(n_slots)]
    free = chance.sample(range(n_slots), chance.randint(1, n_slots))
    used = [chance.randrange(9) for _ in range(n_slots)]
    request = Request(some_prompt(chance, 4))
    slot, source, read = place(request, free, kept, used)
    assert slot in free
    assert list(request.prompt[:read]) == kept[source][:read]
    assert read == max(request.common(ids) for ids in kept)
    lost = kept[slot][read:] if source == slot else kept[slot]
    assert not lost or used[slot] == min(used[one] for one in free)


def test_what_is_read_counts_as_running(monkeypatch):
    ours, seen = engine(3, chunk_tokens=20), []
    for name in ("read", "read_texts"):
        plain = getattr(ours.slots, name)

        def look(*given, plain=plain, **how):
            seen.append(len(ours.running))
            return plain(*given, **how)

        monkeypatch.setattr(ours.slots, name, look)
    for prompt in ((4, 5), (6, 7, 8), (9,) * 40):
        ours.submit(Request(prompt, 9))
    run(ours)
    assert seen == [3, 3, 3]  # two together, and one in two chunks


def test_a_seed_gives_the_same_text_whatever_runs_beside_it():
    request = Request((4, 5, 6), 15, temperature=1.0, top_p=0.9, seed=11)
    ours = engine(3)
    expected = ours.submit(request)
    run(ours)
    crowd = engine(3, chunk_tokens=2)
    others = [Request((n,), 9, temperature=1.0, seed=n) for n in range(5)]
    crowd.submit(others[0])
    crowd.step()
    found = crowd.submit(request)
    for other in others[1:]:
        crowd.submit(other)
    run(crowd)
    other_seed = ours.submit(Request((4, 5, 6), 15, temperature=1.0, top_p=0.9, seed=12))
    run(ours)
    expected = finished(expected)[1]
    assert finished(found)[1] == expected
    assert finished(other_seed)[1] != expected


def test_stops():
    expected = alone((4, 5, 6), 12)
    text = TOKENIZER.decode(expected)
    ours = engine(3)
    by_string = ours.submit(Request((4, 5, 6), 12, stop=(text[5:8],)))
    by_token = ours.submit(Request((4, 5, 6), 12, stop_ids=frozenset({expected[3]})))
    run(ours)
    cut, ids, finish = finished(by_string)
    assert (cut, finish) == (text[: text.index(text[5:8])], "stop")
    assert len(ids) < 12
    end = expected.index(expected[3])
    assert finished(by_token) == (TOKENIZER.decode(expected[:end]), expected[: end + 1], "stop")


@pytest.mark.parametrize("chunk", [3, 50])
def test_log_probabilities_of_prompt_and_answer_are_those_of_the_model(chunk):
    prompt = (4, 5, 6, 7, 8, 9, 10)
    ours = engine(1, chunk_tokens=chunk)
    ours.submit(Request(prompt[:5], 3))  # what is held must not keep the prompt from being scored
    run(ours)
    stream = ours.submit(Request(prompt, 4, temperature=1.7, seed=3, logprobs=2, echo=True))
    run(ours)
    tokens = [token for piece in stream for token in piece.tokens]
    ids = [token.id for token in tokens]
    assert ids[:7] == list(prompt)
    with torch.no_grad():
        expected = model()(torch.tensor([ids]))[0, :, :N].log_softmax(1)
    assert tokens[0].logprob is None
    for at, token in enumerate(tokens[1:]):
        assert token.logprob == pytest.approx(float(expected[at, token.id]), abs=1e-4)
        values, best = expected[at].topk(2)
        assert [i for i, _ in token.top] == best.tolist()
        assert [v for _, v in token.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_a_prompt_can_be_scored_without_writing():
    ours = engine(1)
    stream = ours.submit(Request((4, 5, 6), 0, logprobs=1, echo=True))
    run(ours)
    pieces = list(stream)
    assert sum(len(piece.tokens) for piece in pieces) == 3
    assert pieces[-1].finish == "length"
    assert ours.counts.generation_tokens == 0


def test_who_goes_away_makes_room():
    ours = engine(1)
    first, second = (ours.submit(Request((n,), 30)) for n in (4, 5))
    waiting = ours.submit(Request((6,), 30))
    ours.step()
    first.cancel()
    waiting.cancel()
    ours.step()
    assert [one.stream for one in ours.running] == [second]
    run(ours)
    assert finished(first)[2] == finished(waiting)[2] == "cancelled"
    assert finished(second)[1] == alone((5,), 30)


def test_what_cannot_be_served_is_refused_at_once():
    ours = engine(1, n_tokens=10, queue=2)
    with pytest.raises(
        ValueError, match="7 tokens and up to 4 more are 11, but there is room for 10"
    ):
        ours.submit(Request(tuple(range(7)), 4))
    with pytest.raises(ValueError, match=f"{N} is no token; the tokenizer has 0 to {N - 1}"):
        ours.submit(Request((1, N), 4))
    ours.submit(Request((1,), 4))
    ours.submit(Request((1,), 4))
    with pytest.raises(Busy, match="2 requests wait already"):
        ours.submit(Request((1,), 4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": ()}, "no tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": -1, "echo": True}, "max_new_tokens is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"logprobs": 21}, "logprobs is 21"),
    ],
)
def test_values_out_of_range_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        Request(**{"prompt": (1,)} | values)


def test_a_fault_ends_the_requests_it_hit_and_no_others(monkeypatch):
    ours = engine(3)
    plain, together, at = Slots.read, Slots.read_texts, {"fails": True}

    def read(slots, slot, ids, every=False):
        if 13 in ids and at["fails"]:
            slots.lengths[slot] += 1  # half done
            raise RuntimeError("cosmic ray")
        return plain(slots, slot, ids, every)

    def read_texts(slots, chosen, texts):
        if any(13 in ids for ids in texts) and at["fails"]:
            slots.lengths[chosen[0]] += 1
            raise RuntimeError("cosmic ray")
        return together(slots, chosen, texts)

    monkeypatch.setattr(Slots, "read", read)
    monkeypatch.setattr(Slots, "read_texts", read_texts)
    good, bad = ours.submit(Request((4, 5), 9)), ours.submit(Request((4, 13, 5), 9))
    run(ours)
    with pytest.raises(Unanswered, match="cosmic ray"):
        list(bad)
    assert finished(good)[1] == alone((4, 5), 9)
    at["fails"] = False
    again = ours.submit(Request((4, 13, 5), 9))
    run(ours)
    assert finished(again)[1] == alone((4, 13, 5), 9)
    assert ours.counts.finished == {"length": 2, "error": 1}


def test_a_fault_while_a_request_is_given_a_slot_ends_it_alone_and_nothing_of_it_is_reused(
    monkeypatch,
):
    ours, copy = engine(3), Slots.copy
    beginning = tuple(range(4, 12))
    first = ours.submit(Request(beginning, 9))
    ours.step()

    def half_a_copy(slots, source, target, length):
        copy(slots, source, target, length)
        slots.keys[:, target] = 7  # half done
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Slots, "copy", half_a_copy)
        bad = ours.submit(Request((*beginning, 13), 5))
        ours.step()
    with pytest.raises(Unanswered, match="no memory"):
        list(bad)
    again = ours.submit(Request((*beginning, 13), 5))
    run(ours)
    assert finished(first)[1] == alone(beginning, 9)
    assert finished(again)[1] == alone((*beginning, 13), 5)
    assert ours.counts.finished == {"length": 2, "error": 1}


def test_a_fault_while_writing_ends_all_that_were_written_and_the_engine_goes_on(monkeypatch):
    ours = engine(3)
    streams = [ours.submit(Request((n,), 5)) for n in (4, 5)]
    ours.step()
    ours.step()
    with monkeypatch.context() as patch:
        patch.setattr(Slots, "decode", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
        run(ours)
    for stream in streams:
        with pytest.raises(Unanswered, match="no memory"):
            list(stream)
    after = ours.submit(Request((6,), 5))
    run(ours)
    assert finished(after)[1] == alone((6,), 5)


def test_a_fault_while_a_request_is_ended_ends_it_alone(monkeypatch):
    ours = engine(3)
    bad, good = (ours.submit(Request((n,), size)) for n, size in ((4, 2), (5, 6)))
    with monkeypatch.context() as patch:
        patch.setattr(TextStream, "finish", lambda self: 1 / 0)
        ours.step()
        ours.step()
    run(ours)
    with pytest.raises(Unanswered, match="division by zero"):
        list(bad)
    assert finished(good)[1] == alone((5,), 6)
    assert not ours.running


def test_nobody_waits_for_an_engine_that_has_failed(monkeypatch, caplog):
    ours = engine(1)
    monkeypatch.setattr(ours, "_write_tokens", lambda rows: 1 / 0)
    streams = [ours.submit(Request((n,), 5)) for n in (4, 5, 6)]
    ours.start()
    for stream in streams:
        with pytest.raises(Unanswered, match="division by zero"):
            list(stream)
    ours.stop()
    assert "the engine has failed" in caplog.text
    with pytest.raises(Stopping):
        ours.submit(Request((7,), 5))


def test_a_fault_while_a_beginning_is_taken_over_ends_one_request_and_the_engine_goes_on(
    monkeypatch,
):
    ours, copy = engine(3), Slots.copy
    beginning = tuple(range(4, 14))
    good, bad = (ours.submit(Request((*beginning, n), 5)) for n in (20, 21))

    def broken(slots, source, target, length):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Slots, "copy", broken)
        run(ours)
    with pytest.raises(Unanswered, match="no memory"):
        list(bad)
    assert finished(good)[1] == alone((*beginning, 20), 5)
    assert Slots.copy is copy
    again = ours.submit(Request((*beginning, 21), 5))
    run(ours)
    assert finished(again)[1] == alone((*beginning, 21), 5)


def test_a_fault_while_tokens_are_chosen_does_not_end_the_thread(monkeypatch):
    ours = engine(3)
    ours.start()
    with monkeypatch.context() as patch:
        patch.setattr("mptbook.infer.engine.likeliest", lambda *_: 1 / 0)
        with pytest.raises(Unanswered, match="division by zero"):
            list(ours.submit(Request((4, 5), 5)))
    assert ours.works
    assert finished(ours.submit(Request((4, 5), 5)))[1] == alone((4, 5), 5)
    ours.stop()
    with pytest.raises(Stopping, match="stopping"):
        ours.submit(Request((4, 5), 5))


def test_what_is_being_read_while_the_engine_is_stopped_is_given_up_too(monkeypatch):
    ours, plain, reading = engine(1), Slots.read, threading.Event()

    def slow(slots, slot, ids, every=False):
        reading.set()
        time.sleep(0.3)
        return plain(slots, slot, ids, every)

    monkeypatch.setattr(Slots, "read", slow)
    stream, waiting = (ours.submit(Request((n,), 50)) for n in (4, 5))
    ours.start()
    assert reading.wait(20)
    ours.stop(0.0)
    _, ids, finish = finished(stream)
    assert finish == "cancelled"
    assert len(ids) < 50
    assert finished(waiting)[2] == "cancelled"


def test_a_prompt_whose_logits_are_not_finite_has_no_scores(monkeypatch):
    ours, plain = engine(1), Slots.read
    monkeypatch.setattr(Slots, "read", lambda *given, **how: plain(*given, **how) * math.nan)
    stream = ours.submit(Request((4, 5, 6), 0, logprobs=1, echo=True))
    run(ours)
    with pytest.raises(Unanswered, match="not finite"):
        list(stream)


def test_a_thread_answers_many_and_leaves_nothing_behind():
    chance = random.Random(0)
    ours = engine(3, queue=400, chunk_tokens=5)
    ours.start()
    requests = [Request(some_prompt(chance), chance.randint(1, 9)) for _ in range(150)]
    streams = [ours.submit(request) for request in requests]
    gone = set(chance.sample(range(150), 40))
    for number in gone:
        streams[number].cancel()
    ours.stop(60)
    ends = {}
    for number, (request, stream) in enumerate(zip(requests, streams, strict=True)):
        _, ids, finish = finished(stream)
        ends[finish] = ends.get(finish, 0) + 1
        if finish != "cancelled":
            assert ids == alone(request.prompt, request.max_new_tokens)
        else:
            assert number in gone
    assert ends["length"] >= 110
    assert ours.counts.finished == ends
    assert ours.running == []
    assert all(
        len(kept) == length for kept, length in zip(ours.kept, ours.slots.lengths, strict=True)
    )
    with pytest.raises(Stopping, match="stopping"):
        ours.submit(requests[0])


def test_stopping_cancels_what_would_take_too_long(monkeypatch):
    plain = Slots.decode
    monkeypatch.setattr(Slots, "decode", lambda *given: time.sleep(0.05) or plain(*given))
    ours = engine(1)
    running, waiting = (ours.submit(Request((4,), 50)) for _ in range(2))
    ours.start()
    ours.stop(0.2)
    assert finished(running)[2] == finished(waiting)[2] == "cancelled"
