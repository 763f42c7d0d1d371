"""What cannot be answered is refused with the error object, and harms no other request."""

import json
import socket
import threading
import time

import httpx
import pytest
from http_answers import error_of

HUGE = "9" * 5000


def post(running, body, path="/v1/completions", **headers):
    content = body if isinstance(body, bytes) else body.encode()
    headers = {"content-type": "application/json"} | headers
    return running.client.post(path, content=content, headers=headers)


@pytest.fixture
def unharmed(running):
    """A request that runs beside what a test sends, and must be answered as if alone."""
    alone = running.complete(max_tokens=200, temperature=0).json()["choices"][0]["text"]
    found = []

    def ask():
        body = {"model": "cat", "prompt": "the cat", "max_tokens": 200, "temperature": 0}
        answer = httpx.post(f"{running.url}/v1/completions", json=body, timeout=30)
        found.append(answer.json()["choices"][0]["text"])

    thread = threading.Thread(target=ask)
    thread.start()
    yield
    thread.join()
    assert found == [alone]
    assert running.served.engine.counts.finished.get("error") is None


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("{", ["the body is not JSON", "property name"]),
        ("", ["must be a JSON object"]),
        (b'{"model": "\xff"}', ["no JSON in UTF-8"]),
        ("[" * 100_000, ["no JSON in UTF-8, or none of bounded depth"]),
        ('{"seed": ' + HUGE + "}", ["no JSON"]),
        ("[1]", ["must be a JSON object"]),
        ('"the cat"', ["must be a JSON object"]),
        ("null", ["must be a JSON object"]),
    ],
    ids=["cut", "empty", "not UTF-8", "deep", "long number", "list", "string", "null"],
)
@pytest.mark.usefixtures("unharmed")
def test_a_body_that_is_no_object_of_json_is_refused(running, body, words):
    for path in ("/v1/completions", "/v1/chat/completions"):
        error = error_of(post(running, body, path), 400, *words)
        assert error["type"] == "invalid_request_error"


PLAIN = {"model": "cat", "prompt": "the"}
WRONG = [
    ('"prompt": 3', "prompt", "should be a string, a list of strings"),
    ('"prompt": [1, "the"]', "prompt", "should be a string"),
    ('"prompt": [1.5]', "prompt", "should be a string"),
    ('"prompt": [true]', "prompt", "should be a string"),
    ('"prompt": NaN', "prompt", "should be a string"),
    ('"prompt": null', "prompt", "is missing"),
    ('"prompt": "\\ud800"', "prompt", "should be a string"),
    ('"prompt": []', "prompt", "no prompt in the list"),
    ('"prompt": [[]]', None, "the prompt has no tokens"),
    ('"prompt": [-1]', None, "-1 is no token; the tokenizer has 0 to "),
    ('"prompt": [295]', None, "295 is no token"),  # the model has it, the tokenizer does not
    ('"prompt": [1000000000000000000000000]', None, "is no token"),
    ('"model": 3', "model", "valid string"),
    ('"max_tokens": -1', "max_tokens", "greater than or equal to 0"),
    ('"max_tokens": 0', None, "max_new_tokens is 0"),
    ('"max_tokens": "5"', "max_tokens", "valid integer"),
    ('"max_tokens": 5.5', "max_tokens", "valid integer"),
    ('"max_tokens": 1e400', "max_tokens", "valid integer"),
    ('"max_tokens": 5000', "max_tokens", "max_tokens is 5000; 4096 are allowed"),
    ('"max_tokens": 230', None, "the model has room for 230"),
    ('"n": 0', "n", "greater than or equal to 1"),
    ('"n": 129', "n", "128 are allowed"),
    ('"n": 100000000000000000000000', "n", "128 are allowed"),
    ('"temperature": -0.1', "temperature", "greater than or equal to 0"),
    ('"temperature": 1e9', "temperature", "less than or equal to 2"),
    ('"temperature": NaN', "temperature", "finite"),
    ('"temperature": 1e400', "temperature", "finite"),
    ('"temperature": "hot"', "temperature", "valid number"),
    ('"top_p": 0', "top_p", "greater than 0"),
    ('"top_p": Infinity', "top_p", "finite"),
    ('"top_k": 0', "top_k", "greater than or equal to 1"),
    ('"seed": 9223372036854775808', "seed", "less than or equal to"),
    ('"stop": 3', "stop", "a string, or a list of strings"),
    ('"stop": ' + json.dumps(["a"] * 17), "stop", "17 stop strings; 16 are allowed"),
    ('"logprobs": 21', "logprobs", "less than or equal to 20"),
    ('"logprobs": true', "logprobs", "valid integer"),
    ('"stream": "yes"', "stream", "valid boolean"),
    ('"stream_options": {"include_usage": true}', None, "takes stream=true"),
    ('"logit_bias": {"5": 100}', "logit_bias", "logit_bias is not supported here"),
    ('"presence_penalty": 0.5', "presence_penalty", "is not supported here"),
    ('"frequency_penalty": -2', "frequency_penalty", "is not supported here"),
    ('"suffix": "end"', "suffix", "is not supported here"),
    ('"best_of": 3', None, "best_of other than n is not supported"),
    ('"min_p": 0.1', "min_p", "min_p is not supported; leave it out"),
    ('"__class__": "x"', "__class__", "is not supported"),
]


@pytest.mark.parametrize(("field", "param", "words"), WRONG, ids=[row[0][:40] for row in WRONG])
def test_a_wrong_value_is_refused_and_named(running, field, param, words):
    name = json.loads("{" + field.partition(":")[0] + ": 0}").popitem()[0]
    rest = {key: value for key, value in PLAIN.items() if key != name}
    body = "{" + field + "".join(f", {json.dumps(k)}: {json.dumps(v)}" for k, v in rest.items())
    error = error_of(post(running, body + "}"), 400, words)
    assert error["param"] == param


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": []}, "at least 1 item"),
        ({"messages": "hi"}, "valid list"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "'system', 'developer', 'user'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "list of parts"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages.0.name is not"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "should be the user's"),
        ({"messages": [{"role": "user", "content": "a<|im_end|>"}]}, "turn 1 spells <|im_end|>"),
        ({"messages": [{"role": "user", "content": "<|endoftext|>"}]}, "spells <|endoftext|>"),
        ({"messages": [{"role": "user", "content": "the cat " * 99}]}, "has room for 230"),
        ({"tools": [{"type": "function"}]}, "tools is not supported here"),
        ({"tool_choice": "required"}, "tool_choice is not supported here"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported here"),
        ({"top_logprobs": 2}, "top_logprobs takes logprobs=true"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "give max_completion_tokens or max_tokens"),
        ({"max_tokens": 0}, "greater than or equal to 1"),
        ({"modalities": ["audio"]}, "modalities is not supported"),
    ],
)
def test_a_conversation_that_cannot_be_answered_is_refused(running, fields, words):
    error_of(running.chat(**fields), 400, words)


def test_fields_that_change_nothing_are_taken(running):
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "u"}
    neutral |= {"stop": None, "seed": None, "metadata": {"a": "b"}, "n": 1}
    assert running.complete(best_of=1, suffix=None, **neutral).status_code == 200
    chat = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}}
    assert running.chat(max_tokens=2, **chat, **neutral).status_code == 200


@pytest.mark.parametrize("fields", [{"temperature": 1e-300}, {"top_p": 1e-300}, {"top_k": 2**70}])
def test_values_at_the_edge_are_taken(running, fields):
    plain = running.complete(temperature=0).json()["choices"][0]["text"]
    found = running.complete(**fields)
    assert found.status_code == 200
    if "top_k" not in fields:  # a draw among one
        assert found.json()["choices"][0]["text"] == plain


def test_another_model_is_not_found(running):
    for path in ("/v1/completions", "/v1/chat/completions"):
        body = {"model": "../cat", "prompt": "a"}
        if "chat" in path:
            body = {"model": "../cat", "messages": [{"role": "user", "content": "a"}]}
        error = error_of(running.ask(path, body), 404, "no model '../cat'", "has 'cat'")
        assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_places_and_methods_that_are_not_there_are_errors_of_the_same_shape(running):
    for path in ("/nope", "/v1", "/v1/completions/", "/docs", "/page/", "/page/nope.js"):
        error_of(running.ask(path), 404)
    for place in ("/page/../server.py", "/page/%2e%2e/server.py", "/page/..%2fserver.py"):
        raw = running.client.build_request("GET", running.url + place)
        raw.url = raw.url.copy_with(raw_path=place.encode())  # as it is
        assert running.client.send(raw).status_code == 404
    found = running.ask("/v1/completions")
    error_of(found, 405, "/v1/completions does not take GET")
    assert found.headers["allow"] == "POST"
    error_of(running.client.delete("/v1/models"), 405, "DELETE")


def test_only_json_is_read(running):
    """A form, or text, a page of elsewhere could send without asking."""
    error_of(post(running, "{}", **{"content-type": "text/plain"}), 415, "is text/plain; send")
    error_of(running.client.post("/v1/completions"), 415, "of no type")


def test_a_large_body_is_refused_with_or_without_its_length(serving):
    with serving(body_bytes=1000) as running:
        large = json.dumps({"model": "cat", "prompt": "a" * 1000})
        error_of(post(running, large), 413, "larger than 1000 bytes")
        chunks = (large[at : at + 100].encode() for at in range(0, len(large), 100))
        headers = {"content-type": "application/json"}
        chunked = running.client.post("/v1/completions", content=chunks, headers=headers)
        error_of(chunked, 413, "larger than 1000 bytes")
        assert running.complete(max_tokens=1).status_code == 200


def test_who_waits_in_a_full_queue_is_told_to_come_again(serving):
    with serving(n_slots=1, waiting=2) as running:
        found = running.complete(n=9, max_tokens=40)
        error = error_of(found, 429, "requests wait already")
        assert error["type"] == "rate_limit_error"
        assert int(found.headers["retry-after"]) > 0
        assert running.complete(n=2, max_tokens=1).status_code == 200  # nothing of it was left


def test_more_requests_than_allowed_are_refused(serving, monkeypatch):
    with serving(n_slots=1, requests=1) as running:
        plain = running.served.engine.slots.decode
        slow = lambda *given: time.sleep(0.02) or plain(*given)  # noqa: E731
        monkeypatch.setattr(running.served.engine.slots, "decode", slow)
        body = {"model": "cat", "prompt": "a", "max_tokens": 60, "stream": True}
        with httpx.stream("POST", f"{running.url}/v1/completions", json=body) as response:
            error_of(running.complete(), 503, "1 requests are being answered")
            for path in ("/health", "/metrics"):  # or who watches it would start it anew
                assert running.ask(path).status_code == 200
            response.read()
        assert running.complete(max_tokens=1).status_code == 200


def test_a_key_is_asked_for_everywhere_but_for_health_and_the_page(serving):
    with serving(key="s3cret") as running:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nope", "/v1/models/cat"):
            found = running.ask(path)
            error = error_of(found, 401, "the key is missing or wrong")
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
            assert found.headers["www-authenticate"] == "Bearer"
        for wrong in ("Bearer s3cre", "Bearer s3crett", "Basic s3cret", "s3cret", "Bearer é"):
            headers = {"authorization": wrong.encode("latin-1")}
            error_of(running.ask("/v1/models", headers=headers), 401)
        error_of(running.complete(), 401)
        error_of(running.chat(), 401)
        right = {"authorization": "Bearer s3cret"}
        assert running.ask("/v1/models", headers=right).status_code == 200
        assert running.ask("/metrics", headers=right | {"host": "cat.example"}).status_code == 200
        for path in ("/health", "/"):
            assert running.ask(path).status_code == 200


def test_a_key_is_compared_in_constant_time(monkeypatch):
    import hmac

    from mptbook.serve import gate
    from mptbook.serve.limits import Limits

    compared = []
    plain = hmac.compare_digest
    monkeypatch.setattr(
        gate.hmac, "compare_digest", lambda *pair: compared.append(pair) or plain(*pair)
    )
    ours = gate.Gate(None, Limits(), "s3cret")
    for given in ("", "Bearer s", "Bearer " + "s" * 1000):
        with pytest.raises(gate.Refused):
            ours._check_key(given)
    assert [len(one) for pair in compared for one in pair] == [32] * 6  # whatever was sent


def test_without_a_key_only_names_of_this_machine_are_answered(running):
    """Or a page could give its own name our address, and read what it asks."""
    error_of(running.ask("/v1/models", headers={"host": "evil.example"}), 400, "header Host")
    error_of(running.ask("/", headers={"host": "127.0.0.1.evil.example:80"}), 400)
    for name in ("localhost", "LOCALHOST:1", "127.0.0.1:99", "[::1]:5"):
        assert running.ask("/v1/models", headers={"host": name}).status_code == 200


def test_everything_is_said_to_be_for_this_page_only(running):
    for path in ("/", "/page/page.js", "/v1/models", "/nope"):
        headers = running.ask(path).headers
        assert "script-src 'self';" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers


def talk(running, data, seconds=5.0):
    """What comes back for bytes over a socket, until the server hangs up."""
    host, port = running.url.removeprefix("http://").split(":")
    found = b""
    with socket.create_connection((host, int(port)), timeout=seconds) as own:
        own.sendall(data)
        while True:
            try:
                chunk = own.recv(65536)
            except ConnectionResetError:
                return found
            if not chunk:
                return found
            found += chunk


def test_who_is_slow_to_ask_is_hung_up_on(serving):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with serving(patience=0.4) as running:
        began = time.monotonic()
        assert talk(running, b"") == b""  # nothing at all
        assert talk(running, head) == b""  # headers that do not end
        body = talk(running, head + b"Content-Length: 500\r\n\r\n{")
        assert body.startswith(b"HTTP/1.1 408 ")
        assert b"did not come within 0.4 s" in body
        assert 1.2 < time.monotonic() - began < 10
        assert running.complete(max_tokens=1).status_code == 200


def test_a_trickle_does_not_prolong_it(serving):
    with serving(patience=0.4) as running:
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as own:
            began = time.monotonic()

            def trickle():
                while time.monotonic() - began < 8:
                    own.sendall(b"G")
                    time.sleep(0.05)

            with pytest.raises(OSError, match=r"reset|Broken pipe"):
                trickle()
            assert time.monotonic() - began < 6


def test_what_is_no_http_is_answered_with_the_error_object(running):
    for junk in (b"\x00\x01\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 70_000):
        found = talk(running, junk)
        head, _, body = found.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body)["error"]["message"] == "Invalid HTTP request received."
