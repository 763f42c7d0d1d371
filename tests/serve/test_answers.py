"""What is answered, by hand; real clients are in `test_clients.py`."""

import json
import socket
import threading
import time

import httpx
import pytest
import torch
from http_answers import error_of, events, wait_until

from mptbook.serve import server
from mptbook.serve.limits import Limits
from mptbook.serve.served import Served
from mptbook.tokenizer.chat import ChatTemplate, encode_prompt


def greedy(model, tokenizer, ids, n):
    """Ids that follow, everything read anew for each."""
    ids = list(ids)
    start = len(ids)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids]))[0, -1, : len(tokenizer)].argmax()))
    return ids[start:]


def test_a_completion_is_what_the_model_finds_likeliest(running, model, tokenizer):
    found = running.complete(max_tokens=9, temperature=0).json()
    ids = tokenizer.encode("the cat")
    assert found["choices"][0]["text"] == tokenizer.decode(greedy(model, tokenizer, ids, 9))
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["choices"][0]["logprobs"] is None
    assert (found["object"], found["model"]) == ("text_completion", "cat")
    usage = found["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(ids), 9)
    assert usage["total_tokens"] == len(ids) + 9


def test_text_and_tokens_are_the_same_prompt_and_a_list_is_many(running, tokenizer):
    texts = ["the cat", "A dog ate"]
    one_by_one = [running.complete(text, temperature=0).json() for text in texts]
    alone = [answer["choices"][0]["text"] for answer in one_by_one]
    for prompt in (texts, [tokenizer.encode(text) for text in texts]):
        found = running.complete(prompt, temperature=0).json()["choices"]
        assert [choice["text"] for choice in found] == alone
        assert [choice["index"] for choice in found] == [0, 1]
    ids = tokenizer.encode(texts[0])
    assert running.complete(ids, temperature=0).json()["choices"][0]["text"] == alone[0]


def test_an_empty_prompt_asks_for_a_new_document(running, tokenizer):
    empty = running.complete("", temperature=0).json()
    end = running.complete([tokenizer.end_of_text], temperature=0).json()
    assert empty["choices"][0]["text"] == end["choices"][0]["text"]
    assert empty["usage"]["prompt_tokens"] == 1


def test_n_choices_differ_and_a_seed_gives_them_again(running):
    def texts(prompt="the cat", **fields):
        found = running.complete(prompt, n=3, max_tokens=12, **fields).json()
        return [choice["text"] for choice in found["choices"]], found["usage"]

    first, usage = texts(seed=7)
    assert len(set(first)) == 3
    assert texts(seed=7)[0] == first
    assert texts(seed=8)[0] != first
    assert texts(["A dog", "the cat"], seed=7)[0][3:] == first  # whatever is asked beside it
    assert len(running.complete(seed=-(2**63), n=2).json()["choices"]) == 2
    assert len(running.complete(seed=2**63 - 1, n=2).json()["choices"]) == 2
    assert usage["completion_tokens"] == 36
    assert usage["prompt_tokens"] * 3 + 36 > usage["total_tokens"]  # the prompt counts once


def test_log_probabilities_are_those_of_the_model(running, model, tokenizer):
    asked = {"max_tokens": 6, "echo": True, "logprobs": 2, "seed": 5}
    choice = running.complete("the cat — olé", **asked).json()["choices"][0]
    found = choice["logprobs"]
    prompt = tokenizer.encode("the cat — olé")
    assert len(found["tokens"]) == len(prompt) + 6
    # What the tokens are, found in the vocabulary by their bytes.
    words = running.served.words
    spelled = {words.text(id): id for id in range(len(tokenizer))}
    assert len(spelled) == len(tokenizer)  # no two are written alike
    ids = [spelled[token] for token in found["tokens"]]
    assert ids[: len(prompt)] == prompt
    assert tokenizer.decode(ids) == choice["text"]
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0, :, : len(tokenizer)].log_softmax(1)
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    for at, (nats, top) in enumerate(
        zip(found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True)
    ):
        assert nats == pytest.approx(float(expected[at, ids[at + 1]]), abs=1e-4)
        best = {words.text(i): float(expected[at, i]) for i in expected[at].topk(2).indices}
        assert best.items() <= {key: pytest.approx(v, abs=1e-4) for key, v in top.items()}.items()
        assert found["tokens"][at + 1] in top
        assert len(top) <= 3


def test_offsets_point_at_the_characters_of_the_text(running, tokenizer):
    choice = running.complete("the — olé — cat", max_tokens=0, echo=True, logprobs=0).json()
    choice = choice["choices"][0]
    places = zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True)
    whole = [(token, place) for token, place in places if not token.startswith("bytes:")]
    assert len(whole) > 5
    for token, place in whole:
        assert choice["text"][place:].startswith(token)


def test_a_prompt_can_be_scored_and_nothing_be_written(running, tokenizer):
    found = running.complete("the cat sat", max_tokens=0, echo=True, logprobs=1).json()
    assert found["choices"][0]["text"] == "the cat sat"
    assert len(found["choices"][0]["logprobs"]["tokens"]) == len(tokenizer.encode("the cat sat"))
    assert found["usage"]["completion_tokens"] == 0
    echoed = running.complete("the cat sat", max_tokens=2, echo=True, temperature=0).json()
    assert echoed["choices"][0]["text"].startswith("the cat sat")
    assert echoed["choices"][0]["logprobs"] is None
    assert echoed["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_in_pieces_is_the_whole(running, echo):
    asked = {"max_tokens": 9, "seed": 3, "n": 2, "logprobs": 1, "echo": echo}
    whole = running.complete("— olé", **asked).json()
    pieces = events(running.complete("— olé", stream=True, **asked))
    for choice in whole["choices"]:
        of = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in of) == choice["text"]
        assert [p["finish_reason"] for p in of] == [None] * (len(of) - 1) + ["length"]
        for name, values in choice["logprobs"].items():
            joined = [value for piece in of for value in piece["logprobs"][name]]
            if name in ("tokens", "text_offset"):
                assert joined == values
            assert len(joined) == len(values)
    assert len({piece["id"] for piece in pieces}) == 1


def test_a_stop_string_ends_a_text_and_is_no_part_of_it(running):
    plain = running.complete(max_tokens=20, temperature=0).json()["choices"][0]["text"]
    mark = plain[5:8]
    for stop in (mark, ["never there", mark]):
        found = running.complete(max_tokens=20, temperature=0, stop=stop).json()
        assert found["choices"][0]["text"] == plain[: plain.index(mark)]
        assert found["choices"][0]["finish_reason"] == "stop"
        pieces = events(running.complete(max_tokens=20, temperature=0, stop=stop, stream=True))
        joined = "".join(piece["choices"][0]["text"] for piece in pieces)
        assert joined == plain[: plain.index(mark)]


def test_a_chat_is_read_by_the_template(running, model, tokenizer):
    parts = [{"type": "text", "text": text} for text in ("the ", "cat")]
    turns = [
        {"role": "system", "content": "A dog"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "sat"},
        {"role": "user", "content": "the mat"},
    ]
    plain = [turns[0], {"role": "user", "content": "the cat"}, *turns[2:]]
    ids = encode_prompt(ChatTemplate.load("chatml"), tokenizer, plain)
    expected = tokenizer.decode(greedy(model, tokenizer, ids, 9))
    found = running.chat(turns, max_tokens=9, temperature=0).json()
    assert found["object"] == "chat.completion"
    assert found["choices"][0]["message"]["content"] == expected
    assert found["choices"][0]["message"]["role"] == "assistant"
    assert found["usage"]["prompt_tokens"] == len(ids)
    turns[0]["role"] = "developer"  # as newer clients call it
    again = running.chat(turns, max_completion_tokens=9, temperature=0).json()
    assert again["choices"][0]["message"]["content"] == expected
    # All but the last token of the prompt was read before.
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == len(ids) - 1


def test_a_chat_in_pieces_is_the_whole(running):
    asked = {"max_tokens": 8, "seed": 4, "n": 2, "logprobs": True, "top_logprobs": 2}
    whole = running.chat(**asked).json()
    pieces = events(running.chat(**asked, stream=True, stream_options={"include_usage": True}))
    assert [p["choices"][0]["delta"] for p in pieces[:2]] == [
        {"role": "assistant", "content": ""}
    ] * 2
    *pieces, last = pieces
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 16
    assert all(piece["usage"] is None for piece in pieces)
    for choice in whole["choices"]:
        of = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == choice["index"]]
        joined = "".join(piece["delta"].get("content", "") for piece in of)
        assert joined == choice["message"]["content"]
        assert of[-1]["finish_reason"] == choice["finish_reason"] == "length"
        said = [
            entry for piece in of if piece["logprobs"] for entry in piece["logprobs"]["content"]
        ]
        assert [entry["token"] for entry in said] == [
            entry["token"] for entry in choice["logprobs"]["content"]
        ]
        for entry in said:
            assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"] or entry[
                "token"
            ].startswith("bytes:")
            assert len(entry["top_logprobs"]) == 2


def test_an_answer_without_a_bound_takes_the_room_there_is(running, tokenizer):
    usage = running.chat(temperature=0).json()["usage"]
    assert usage["total_tokens"] == running.served.engine.slots.n_tokens


def test_an_answer_ends_before_the_mark_of_the_template(serving, tokenizer, monkeypatch):
    mark = tokenizer.encode("so<|im_end|>and on")
    with serving() as running:
        engine = running.served.engine
        plain, step = engine.slots.decode, iter(mark[1:])

        def decode(slots, ids):
            logits = plain(slots, ids)
            logits[0] = -1e3
            logits[0, next(step)] = 0
            return logits

        def read(slot, ids, every=False):
            logits = torch.full((300,), -1e3)
            logits[mark[0]] = 0
            engine.slots.lengths[slot] += len(ids)
            return logits

        monkeypatch.setattr(engine.slots, "decode", decode)
        monkeypatch.setattr(engine.slots, "read", read)
        choice = running.chat(temperature=0, max_tokens=len(mark)).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("so", "stop")


def test_models_health_and_what_is_measured(serving):
    with serving(n_slots=2) as running:
        card = running.ask("/v1/models").json()["data"][0]
        assert (card["id"], card["object"], card["max_model_len"]) == ("cat", "model", 230)
        assert card["chat"] == "turns"
        assert running.ask("/v1/models/cat").json() == card
        error_of(running.ask("/v1/models/dog"), 404, "there is no model 'dog'")
        assert running.ask("/health").json() == {"status": "ok"}
        for _ in range(2):
            running.complete([[5, 6, 7, 8]], max_tokens=3, temperature=0)
        lines = running.ask("/metrics").text.splitlines()
        found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        name = 'model_name="cat"'
        expected = {
            f"vllm:prompt_tokens_total{{{name}}}": 8,
            f"vllm:generation_tokens_total{{{name}}}": 6,
            f"vllm:prefix_cache_queries_total{{{name}}}": 8,
            f"vllm:prefix_cache_hits_total{{{name}}}": 3,
            f"vllm:num_requests_running{{{name}}}": 0,
            f"vllm:num_requests_waiting{{{name}}}": 0,
            f"vllm:kv_cache_usage_perc{{{name}}}": 0,
            f'vllm:request_success_total{{finished_reason="length",{name}}}': 2,
            f'vllm:request_success_total{{finished_reason="abort",{name}}}': 0,
            f"vllm:time_to_first_token_seconds_count{{{name}}}": 2,
            f"vllm:inter_token_latency_seconds_count{{{name}}}": 4,
            f"vllm:e2e_request_latency_seconds_count{{{name}}}": 2,
        }
        assert {key: float(found[key]) for key in expected} == expected


def test_a_template_of_one_turn_says_so_and_a_model_without_one_completes_only(serving):
    with serving(template="instruct") as running:
        assert running.ask("/v1/models").json()["data"][0]["chat"] == "single"
        turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
        error_of(running.chat(turns), 400, "has one instruction and one response")
    with serving(template=None) as running:
        assert running.ask("/v1/models").json()["data"][0]["chat"] is None
        error = error_of(running.chat(), 400, "cat has no chat template", "/v1/completions")
        assert error["code"] == "no_chat_template"
        assert running.complete().status_code == 200


def test_a_dead_engine_is_not_healthy(serving):
    with serving() as running:
        running.served.engine.stop()
        error_of(running.ask("/health"), 503, "the engine has stopped")
        error_of(running.complete(), 503, "the server is stopping")


def test_a_fault_of_the_model_is_an_error_of_the_server_and_the_next_is_answered(
    serving, monkeypatch
):
    with serving() as running:
        slots = running.served.engine.slots
        with monkeypatch.context() as patch:
            patch.setattr(slots, "read", lambda *_, **__: 1 / 0)
            error = error_of(running.complete(), 500, "the model failed")
            assert error["type"] == "server_error"
            assert "division" not in error["message"]  # which is for the log only
            (event,) = events(running.complete(stream=True))
            assert event["error"]["type"] == "server_error"
        assert running.complete().status_code == 200


def test_time_is_bounded_also_of_a_stream(serving, monkeypatch):
    with serving(seconds=0.3, n_slots=1) as running:
        slots = running.served.engine.slots
        plain = slots.decode
        monkeypatch.setattr(slots, "decode", lambda *given: time.sleep(0.05) or plain(*given))
        error_of(running.complete(max_tokens=80), 503, "longer than 0.3 s")
        *_, last = events(running.complete(max_tokens=80, stream=True))
        assert "longer than 0.3 s" in last["error"]["message"]
        assert running.complete(max_tokens=1).status_code == 200  # the slot was given back


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_makes_room(serving, monkeypatch, stream):
    with serving(n_slots=1) as running:
        engine = running.served.engine
        plain = engine.slots.decode
        monkeypatch.setattr(engine.slots, "decode", lambda *g: time.sleep(0.02) or plain(*g))
        body = {"model": "cat", "prompt": "the", "max_tokens": 90, "n": 3, "stream": stream}
        with httpx.Client() as client:
            request = client.build_request("POST", f"{running.url}/v1/completions", json=body)
            if stream:
                client.send(request, stream=True)
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(request.url, json=body, timeout=0.3)
            wait_until(lambda: engine.counts.generation_tokens > 3)
        wait_until(lambda: not engine.running and not engine.waiting)
        assert engine.counts.finished == {"cancelled": 3}
        assert engine.counts.generation_tokens < 90


def test_a_client_that_left_before_the_first_event_is_not_written_for(serving):
    """A generator that was never begun runs no `finally`."""
    import asyncio

    from mptbook.infer.request import Request
    from mptbook.serve.writing import Events, Writing

    with serving() as running:

        async def leave():
            writing = Writing(running.served.engine, running.served.post, [Request((5,), 90)], 9)

            async def receive():
                return {"type": "http.disconnect"}

            async def send(message):
                await asyncio.sleep(0.05)

            async def never():
                yield 1 / 0

            await Events(writing, never())({"type": "http", "asgi": {}}, receive, send)
            return writing.streams[0].cancelled

        assert asyncio.run(leave())


@pytest.mark.parametrize("seconds", [0.1, 4.0])  # that a step takes
@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_finish_in_time_is_told_so_when_the_server_stops(
    serving, monkeypatch, stream, seconds
):
    monkeypatch.setattr(server, "TELL", 1)  # a step takes longer than uvicorn waits
    with serving(drain=1, n_slots=1) as running:
        engine = running.served.engine
        plain = engine.slots.decode
        monkeypatch.setattr(engine.slots, "decode", lambda *g: time.sleep(seconds) or plain(*g))
        found = {}

        def ask(name):
            found[name] = httpx.post(
                f"{running.url}/v1/completions",
                json={"model": "cat", "prompt": "the", "max_tokens": 90, "stream": stream},
                timeout=30,
            )

        askers = [threading.Thread(target=ask, args=(name,)) for name in ("runs", "waits")]
        for each in askers:
            each.start()
        wait_until(lambda: engine.running and engine.waiting)
        running.server.should_exit = True
        for each in askers:
            each.join()
        assert found.keys() == {"runs", "waits"}
        for one in found.values():
            if stream:
                *_, last = events(one)
                assert last["error"]["message"] == "the server is stopping; ask another, or later"
                assert one.text.endswith("data: [DONE]\n\n")
            else:
                error_of(one, 503, "the server is stopping")


def test_who_is_still_asking_when_the_server_stops_is_told_so(serving, monkeypatch):
    monkeypatch.setattr(server, "TELL", 1)
    with serving(drain=1) as running:
        address = running.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1])), timeout=30) as half:
            half.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
            )
            time.sleep(0.3)
            running.server.should_exit = True
            found = b"".join(iter(lambda: half.recv(4096), b"")).decode()
        assert found.startswith("HTTP/1.1 503 ")
        assert json.loads(found.partition("\r\n\r\n")[2])["error"]["type"] == "server_error"


def test_what_runs_is_finished_after_the_server_was_told_to_stop(serving, monkeypatch):
    with serving() as running:
        engine = running.served.engine
        plain = engine.slots.decode
        monkeypatch.setattr(engine.slots, "decode", lambda *g: time.sleep(0.01) or plain(*g))
        body = {"model": "cat", "prompt": "the", "max_tokens": 60, "stream": True}
        with httpx.stream("POST", f"{running.url}/v1/completions", json=body) as response:
            running.server.should_exit = True
            lines = [line for line in response.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"]
        assert engine.counts.finished == {"length": 1}


def test_limits_have_a_description_each():
    assert all(field.description for field in Limits.model_fields.values())
    assert Served.__doc__
