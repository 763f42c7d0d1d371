"""Our models in lm-evaluation-harness, and our tasks as its tasks.

Its command knows only the models of its own package and has no way to be told of others. So this
module is that command with `mptbook` among the models:

    python -m mptbook.eval.harness --model mptbook --model_args pretrained=DIR --tasks piqa

takes what `lm_eval` takes. In a program, importing this module is enough for
`lm_eval.simple_evaluate(model="mptbook", model_args="pretrained=DIR", ...)`.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import torch

from mptbook.eval.reader import load_reader
from mptbook.eval.score import BATCH_TOKENS, continuations, likelihoods
from mptbook.eval.tasks import Choice, Completion, Generation, Posed, Schema, Task, grade
from mptbook.model.precision import Precision

try:
    import lm_eval.models  # noqa: F401 - its own, which it would not look for once there is ours
    from lm_eval import utils
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.api.task import ConfigurableTask
    from tqdm import tqdm
except ImportError:
    raise ImportError(
        "this needs lm-evaluation-harness, which is not here; pip install 'mptbook[eval]'"
    ) from None


@register_model("mptbook")
class Harnessed(TemplateLM):
    """A causal model as lm-evaluation-harness asks for one; prompts share what they can.

    Args:
        pretrained: what `load_reader` reads.
        device, precision: where and how it computes.
        max_length: tokens that are read at most; None: as many as the model was trained on.
        batch_tokens: of all rows at a time; what counts here in place of `batch_size`, which the
            harness passes.
        share: read what prompts have in common once.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        precision: Precision = "fp32",
        max_length: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
        share: bool = True,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        del batch_size, max_batch_size
        if device is None or not torch.cuda.is_available():  # its command asks for cuda:0
            device = "cpu"
        self.reader = load_reader(
            pretrained, device=device, precision=precision, max_tokens=max_length or 0
        )
        self.tokenizer = self.reader.tokenizer
        self._device = self.reader.device
        self._how = {"batch_tokens": batch_tokens}
        self._share = share

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.reader.start

    @property
    def max_length(self) -> int:
        return self.reader.max_tokens

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if add_special_tokens is None:
            return self.reader.encode(string)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="log-likelihoods") as bar:
            found = likelihoods(
                self.reader, pairs, share=self._share, report=bar.update, **self._how
            )
        return [(one.nats, one.greedy) for one in found]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        whose, windows = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            for window in utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                whose.append(number)
                windows.append((None, *utils.make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for number, (nats, _) in zip(whose, found, strict=True):
            totals[number] += nats
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        written: list[str] = [""] * len(requests)
        alike: dict[tuple, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(_how_to_write(request.args[1]), []).append(number)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="texts") as bar:
            for (max_new_tokens, stop), numbers in alike.items():
                texts = continuations(
                    self.reader,
                    [requests[number].args[0] for number in numbers],
                    max_new_tokens=max_new_tokens,
                    stop=stop,
                    report=bar.update,
                    **self._how,
                )
                for number, text in zip(numbers, texts, strict=True):
                    written[number] = text
        return written


def _how_to_write(said: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    if said.get("do_sample") or said.get("temperature"):
        raise ValueError("mptbook writes the likeliest token in evaluations; set do_sample: false")
    until = said.get("until") or []
    until = [until] if isinstance(until, str) else until
    most = said.get("max_gen_toks") or said.get("max_new_tokens") or 256
    return int(most), tuple(mark for mark in until if mark)


def as_harness_task(name: str, task: Task, posed: Sequence[Posed]) -> ConfigurableTask:
    """The same questions, put by the same words, as a task of lm-evaluation-harness.

    Its accuracies `acc`, `acc_norm`, `acc_bytes` and `acc_mutual_info` of a choice are ours
    normalised by none, characters, bytes, and unconditional with an empty `alone`.
    """
    docs = [
        {
            "prompts": [prompt for prompt, _ in one.pairs],
            "continuations": [continuation for _, continuation in one.pairs],
            "options": list(one.options),
            "gold": -1 if one.question.gold is None else one.question.gold,
            "answers": list(one.question.answers),
        }
        for one in posed
    ]
    config: dict[str, Any] = {
        "task": name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(docs)},
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": lambda doc: doc["prompts"][0],
        "target_delimiter": task.delimiter,
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    if isinstance(task, Choice):
        ways = ["acc", "acc_norm", "acc_bytes"]
        ways += ["acc_mutual_info"] if task.normalise == "unconditional" else []
        config |= {
            "output_type": "multiple_choice",
            "doc_to_choice": lambda doc: doc["options"],
            "doc_to_target": lambda doc: doc["gold"],
            "metric_list": [{"metric": way, **mean} for way in ways],
        }
    elif isinstance(task, Schema):
        config |= {
            "output_type": "multiple_choice",
            "doc_to_text": lambda doc: doc["gold"],
            "doc_to_choice": lambda doc: doc["prompts"],
            "doc_to_target": lambda doc: doc["options"][0],
            "metric_list": [{"metric": "acc", **mean}],
        }
    elif isinstance(task, Completion):
        config |= {
            "output_type": "loglikelihood",
            "doc_to_target": lambda doc: doc["continuations"][0],
            "metric_list": [{"metric": "acc", **mean}],
        }
    elif isinstance(task, Generation):
        config |= {
            "output_type": "generate_until",
            "doc_to_target": lambda doc: doc["answers"][0],
            "generation_kwargs": {
                "until": list(task.stop),
                "max_gen_toks": task.max_new_tokens,
                "do_sample": False,
            },
            "process_results": lambda doc, texts: {"acc": grade(task, texts[0], doc["answers"])},
            "metric_list": [{"metric": "acc", **mean}],
        }
    return ConfigurableTask(config=config)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
