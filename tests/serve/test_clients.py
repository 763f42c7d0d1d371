"""Clients that others wrote: the openai package, lm-evaluation-harness, schemathesis."""

import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from tiny_readers import mpt_directory

USER = {"role": "user", "content": "the cat"}


@pytest.fixture
def client(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as one:
        yield one


def test_openai_completes(client):
    asked = {"model": "cat", "prompt": "the cat", "max_tokens": 7, "temperature": 0}
    whole = client.completions.create(**asked, logprobs=2, echo=True, n=2)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.choices[0].text.startswith("the cat")
    assert len(whole.choices[0].logprobs.token_logprobs) > 7
    assert whole.usage.completion_tokens == 14
    pieces = [*client.completions.create(**asked, stream=True)]
    assert "the cat" + "".join(p.choices[0].text for p in pieces) == whole.choices[0].text
    assert pieces[-1].choices[0].finish_reason == "length"


def test_openai_chats(client):
    asked = {"model": "cat", "messages": [USER], "max_completion_tokens": 7, "seed": 3}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    assert len(choice.logprobs.content) == 7
    assert len(choice.logprobs.content[0].top_logprobs) == 3
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    *pieces, last = stream
    assert pieces[0].choices[0].delta.role == "assistant"
    joined = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert joined == choice.message.content
    assert last.usage == whole.usage.model_copy(
        update={"prompt_tokens_details": last.usage.prompt_tokens_details}
    )
    # What was answered can be sent back as it is, with all its null fields.
    again = client.chat.completions.create(
        model="cat", messages=[USER, choice.message.model_dump(), USER], max_tokens=2
    )
    assert again.usage.prompt_tokens > whole.usage.prompt_tokens


def test_openai_lists_the_model(client):
    assert [model.id for model in client.models.list()] == ["cat"]
    assert client.models.retrieve("cat").object == "model"


def test_openai_raises_its_own_exceptions(client, serving):
    asked = {"model": "cat", "prompt": "the"}
    with pytest.raises(openai.NotFoundError, match="there is no model 'dog'") as raised:
        client.completions.create(**asked | {"model": "dog"})
    assert raised.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="greater than or equal") as raised:
        client.completions.create(**asked, temperature=-1)
    assert raised.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="logit_bias is not supported") as raised:
        client.completions.create(**asked, logit_bias={"5": 1})
    assert raised.value.code == "unsupported_field"
    with serving(key="s3cret", n_slots=1, waiting=1) as running:
        how = {"base_url": f"{running.url}/v1", "max_retries": 0}
        wrong, right = (openai.OpenAI(api_key=key, **how) for key in ("wrong", "s3cret"))
        with pytest.raises(openai.AuthenticationError):
            wrong.completions.create(**asked)
        assert right.completions.create(**asked).choices
        with pytest.raises(openai.RateLimitError):
            right.completions.create(**asked, n=9)


def test_openai_raises_an_error_in_the_middle_of_a_stream(client, running, monkeypatch):
    stream = client.completions.create(model="cat", prompt="the", max_tokens=90, stream=True)
    next(stream)
    slots = running.served.engine.slots
    monkeypatch.setattr(slots, "decode", lambda *_: 1 / 0)
    with pytest.raises(openai.APIError, match="the model failed"):
        list(stream)


def test_the_harness_over_http_equals_the_evaluation_in_this_process(serving, tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval.api.registry import get_model
    from lm_eval.evaluator import evaluate

    from mptbook.data.benchmarks import Question
    from mptbook.eval.harness import Harnessed, as_harness_task
    from mptbook.eval.tasks import Choice, Generation, pose

    folder = mpt_directory(tmp_path / "mpt")
    words = "the cat sat on the mat a dog ate the hat".split()
    questions = [
        Question(n, f"A {words[n % 11]} {n}", options=(*words[n % 5 : n % 5 + 3],), gold=n % 3)
        for n in range(1, 24)
    ]
    likely = Choice(data="x.jsonl", shots=1)
    open_ones = [Question(n, f"A {words[n % 11]} {n}", answers=("hat",)) for n in range(6)]
    writes = Generation(data="x.jsonl", max_new_tokens=5, stop=("h",))
    asked = {
        "likely": as_harness_task("likely", likely, pose(likely, questions)),
        "writes": as_harness_task("writes", writes, pose(writes, open_ones)),
    }
    found = []
    with serving(folder=folder, template=None) as running:
        args = {
            "model": "cat", "base_url": f"{running.url}/v1/completions", "batch_size": 5,
            "tokenizer_backend": "huggingface", "tokenizer": str(folder), "max_length": 96,
        }  # fmt: skip
        served = get_model("local-completions").create_from_arg_obj(args, {})
        for model in (served, Harnessed(str(folder))):
            found.append(evaluate(model, asked, log_samples=True, bootstrap_iters=0))
        assert running.served.engine.counts.prompt_tokens > 800  # it was asked
    for name in asked:
        ours, theirs = (
            sorted(one["samples"][name], key=lambda row: row["doc_id"]) for one in found
        )
        for one, other in zip(ours, theirs, strict=True):
            if name == "writes":
                assert one["resps"] == other["resps"]
                continue
            pairs = zip(one["resps"], other["resps"], strict=True)
            for (mine,), (other_one,) in pairs:
                assert float(mine[0]) == pytest.approx(float(other_one[0]), abs=1e-4)
                assert str(mine[1]) == str(other_one[1])  # whether it is the likeliest
        assert found[0]["results"][name] == pytest.approx(found[1]["results"][name])
    accuracy = found[0]["results"]["likely"]["acc,none"]
    assert 0 < accuracy < 1  # so that it could have differed


@pytest.fixture(scope="module")
def described(serving):
    with serving(new_tokens=5, choices=4) as one:
        yield schemathesis.openapi.from_url(f"{one.url}/openapi.json")


load_all_checks()
NAMES = """not_a_server_error status_code_conformance content_type_conformance
    response_schema_conformance unsupported_method""".split()
PLACES = {
    "/v1/completions": "post",
    "/v1/chat/completions": "post",
    "/v1/models": "get",
    "/v1/models/{name}": "get",
    "/health": "get",
    "/metrics": "get",
}


def test_the_description_names_every_place(described):
    assert described.raw_schema["paths"].keys() == PLACES.keys()


MODES = [(path, mode) for mode in GenerationMode for path in PLACES]


@pytest.mark.parametrize(
    ("path", "mode"), [(p, m) for p, m in MODES if m.is_positive or PLACES[p] == "post"]
)
def test_what_schemathesis_makes_up_is_answered_as_described(described, path, mode):
    asked, method = [], PLACES[path]

    @given(case=described[path][method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=60 if method == "post" else 5,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def ask(case):
        if isinstance(case.body, dict) and mode.is_positive:
            known = {
                "model": "cat",
                "max_tokens": 5,
                "n": 2,
                "best_of": 2,
            }  # not in the description
            case.body |= {name: known[name] for name in known if name in case.body}
        response = case.call_and_validate(checks=CHECKS.get_by_names(NAMES))
        asked.append(response.status_code)

    ask()
    assert (404 if path.endswith("{name}") else 200 if mode.is_positive else 400) in asked
