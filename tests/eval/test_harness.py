"""The same task and model through lm-evaluation-harness: equal item by item."""

import json
import os
import subprocess
import sys

import pytest
from tiny_readers import PEERS, mpt_directory, peer_reader

from mptbook.data.benchmarks import Question
from mptbook.eval.questions import load_questions
from mptbook.eval.reader import load_reader
from mptbook.eval.score import continuations, likelihoods
from mptbook.eval.suite import _judged, load_suite, run_task, summary
from mptbook.eval.tasks import Choice, Completion, Generation, Schema, grade, pose

pytest.importorskip("lm_eval")

WORDS = "the cat sat on the mat a dog ate the hat yes no 1 2 3".split()


def options_of(n):
    return tuple(" ".join(WORDS[(n * k + k) % 16 :][: 1 + (n + k) % 4]) for k in range(1, 4))


CHOICES = [
    Question(n, f"A {WORDS[n % 16]} sat {n}", options=options_of(n), gold=n % 3)
    for n in range(1, 24)
]
SCHEMAS = [
    Question(n, "", options=(f"the {WORDS[n % 16]} {n}", f"the {WORDS[n % 9]} {n}?"), gold=n % 2,
             answers=("ate the hat",))
    for n in range(1, 12)
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return mpt_directory(tmp_path_factory.mktemp("models") / "mpt")


@pytest.fixture(scope="module")
def reader(folder):
    return load_reader(folder, precision="fp32")


def theirs(model, task, posed, folder):
    from lm_eval.api.registry import get_model
    from lm_eval.evaluator import evaluate

    from mptbook.eval.harness import as_harness_task

    ours = as_harness_task("asked", task, posed)
    args = {"pretrained": str(folder), "dtype": "float32"}
    if model == "mptbook":
        args = {"pretrained": str(folder), "share": False}
    read = get_model(model).create_from_arg_obj(args, {"batch_size": 4, "device": "cuda:0"})
    found = evaluate(read, {"asked": ours}, log_samples=True, bootstrap_iters=0)
    samples = sorted(found["samples"]["asked"], key=lambda sample: sample["doc_id"])
    return found["results"]["asked"], samples


def our_rows(reader, task, posed):
    pairs = [pair for one in posed for pair in (*one.pairs, *one.alone)]
    found = iter(likelihoods(reader, [reader.pair(*pair) for pair in pairs]))
    return [_judged(task, one, [next(found) for _ in (*one.pairs, *one.alone)]) for one in posed]


def nats_of(sample):
    return [float(answer[0][0]) for answer in sample["resps"]]


@pytest.mark.parametrize("model", ["hf", "mptbook"])
def test_choices_equal_item_by_item_under_each_convention(folder, reader, model):
    task = Choice(data="x.jsonl", normalise="unconditional", shots=2, draw="each")
    posed = pose(task, CHOICES)
    rows = our_rows(reader, task, posed)
    totals, samples = theirs(model, task, posed, folder)
    ways = {"acc": "none", "acc_norm": "characters", "acc_bytes": "bytes"}
    ways["acc_mutual_info"] = "unconditional"
    for row, sample in zip(rows, samples, strict=True):
        assert row["nats"] == pytest.approx(nats_of(sample)[:3], abs=1e-4)
        for metric, how in ways.items():
            assert sample[metric] == float(row["chosen"][how] == row["gold"])
    found = summary(posed, rows)
    for metric, how in ways.items():
        assert totals[f"{metric},none"] == pytest.approx(found["conventions"][how])
    assert len({round(share, 3) for share in found["conventions"].values()}) > 1


@pytest.mark.parametrize("kind", PEERS)
def test_models_of_other_families_equal_item_by_item(kind):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from mptbook.eval.harness import as_harness_task

    reader = peer_reader(kind)
    task = Choice(data="x.jsonl", shots=2)
    posed = pose(task, CHOICES)
    rows = our_rows(reader, task, posed)
    read = HFLM(reader.model, tokenizer=reader.tokenizer, batch_size=3, max_length=96)
    asked = {"asked": as_harness_task("asked", task, posed)}
    found = evaluate(read, asked, log_samples=True, bootstrap_iters=0)
    samples = sorted(found["samples"]["asked"], key=lambda sample: sample["doc_id"])
    for row, sample in zip(rows, samples, strict=True):
        assert row["nats"] == pytest.approx(nats_of(sample), abs=1e-4)
        assert sample["acc_norm"] == float(row["chosen"]["characters"] == row["gold"])


@pytest.mark.parametrize("model", ["hf", "mptbook"])
def test_schemas_equal_item_by_item(folder, reader, model):
    task = Schema(data="x.jsonl")
    posed = pose(task, SCHEMAS)
    rows = our_rows(reader, task, posed)
    _, samples = theirs(model, task, posed, folder)
    for row, sample in zip(rows, samples, strict=True):
        assert row["nats"] == pytest.approx(nats_of(sample), abs=1e-4)
        assert row["score"] == sample["acc"]


@pytest.mark.parametrize("model", ["hf", "mptbook"])
def test_completions_equal_item_by_item(folder, reader, model):
    prompts = [question.query for question in CHOICES]
    likeliest = continuations(reader, prompts, max_new_tokens=2, stop=())
    answers = [text if n % 2 else " hat" for n, text in enumerate(likeliest)]
    # Of the half that the model would write itself some are right; a text has no other tokens.
    questions = [
        Question(n, prompt, answers=(answer,))
        for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        if answer.strip()
    ]
    task = Completion(data="x.jsonl", delimiter="")
    posed = pose(task, questions)
    rows = our_rows(reader, task, posed)
    _, samples = theirs(model, task, posed, folder)
    for row, sample in zip(rows, samples, strict=True):
        assert row["nats"] == pytest.approx(nats_of(sample), abs=1e-4)
        assert row["score"] == sample["acc"]
    assert 0 < sum(row["score"] for row in rows) < len(rows)


@pytest.mark.parametrize("model", ["hf", "mptbook"])
def test_texts_equal_item_by_item(folder, reader, model):
    task = Generation(data="x.jsonl", max_new_tokens=5, stop=("\n", "h"))
    questions = [Question(q.number, q.query, answers=("hat",)) for q in CHOICES]
    posed = pose(task, questions)
    prompts = [one.pairs[0][0] for one in posed]
    ours = continuations(reader, prompts, max_new_tokens=5, stop=task.stop)
    _, samples = theirs(model, task, posed, folder)
    for text, sample in zip(ours, samples, strict=True):
        assert text == sample["resps"][0][0]
        assert sample["acc"] == grade(task, text, ["hat"])


SUITE = load_suite("default").tasks


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SUITE if name != "humaneval"])
def test_every_task_of_the_default_suite_equals_that_of_the_harness(name, tmp_path):
    folder = mpt_directory(tmp_path / "model", max_seq_len=4096)
    reader, task = load_reader(folder, precision="fp32"), SUITE[name]
    posed = pose(task, load_questions(task)[0], 6)
    found = run_task(reader, task, items=6)
    _, samples = theirs("hf", task, posed, folder)
    metric = {"characters": "acc_norm", "bytes": "acc_bytes"}
    for row, sample in zip(found["items"], samples, strict=True):
        if "nats" in row:
            assert row["nats"] == pytest.approx(nats_of(sample), abs=1e-4, rel=2e-6)
        else:
            assert row["text"] == sample["resps"][0][0]
        assert row["score"] == sample[metric.get(getattr(task, "normalise", ""), "acc")]


def test_whole_texts_cost_as_much_as_through_their_own_model(folder):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from mptbook.eval.harness import Harnessed

    texts = ["the cat sat on the mat. " * 20, "A dog"]  # the first is longer than the model reads
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    ours = Harnessed(str(folder)).loglikelihood_rolling(asked, disable_tqdm=True)
    theirs = HFLM(str(folder), device="cpu", dtype="float32").loglikelihood_rolling(
        asked, disable_tqdm=True
    )
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_sampling_is_refused(folder):
    from lm_eval.api.instance import Instance

    from mptbook.eval.harness import Harnessed

    asked = [Instance("generate_until", {}, ("A", {"do_sample": True}), 0)]
    with pytest.raises(ValueError, match="set do_sample: false"):
        Harnessed(str(folder)).generate_until(asked, disable_tqdm=True)


TASK = """task: cats
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.slow  # the harness asks the machine many things before it writes results
def test_the_command_of_the_harness_takes_our_model(folder, reader, tmp_path):
    task = Choice(data="x.jsonl")
    posed = pose(task, CHOICES[:4])
    rows = [{"query": q.query, "choices": list(q.options), "gold": q.gold} for q in CHOICES[:4]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "cats.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    words = ["--model", "mptbook", "--model_args", f"pretrained={folder}", "--tasks", "cats"]
    words += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "mptbook.eval.harness", *words],
        env=os.environ | {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("results*.json")
    accuracy = summary(posed, our_rows(reader, task, posed))["accuracy"]
    assert json.loads(file.read_text())["results"]["cats"]["acc,none"] == accuracy
