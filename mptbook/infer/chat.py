"""Answer conversations: the model speaks until its turn is over."""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field, NonNegativeFloat, PositiveInt
from pydantic_settings import CliPositionalArg

from mptbook.directory import find_directory, load_model
from mptbook.infer.generate import next_tokens
from mptbook.infer.sampling import check_sampling
from mptbook.model.mpt import MPT
from mptbook.settings import RunSettings
from mptbook.tokenizer.chat import ChatTemplate, Messages, encode_prompt, stop_ids
from mptbook.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answer:
    text: str  # without what ends it
    ended: bool  # by the model itself; else its tokens were used up


def answer(
    model: MPT,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    conversations: Sequence[Messages],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> list[Answer]:
    """What the model answers to each conversation, which ends on a turn of the user.

    An answer ends before an end-of-text or the template's stop mark, whether that is a token of
    its own or, with GPT-NeoX's tokenizer, spelled in pieces.

    Args:
        max_new_tokens: tokens at most.
        temperature, top_k, top_p: see `mptbook.infer.sampling.sample`.
        seed: the same seed gives the same answers.

    Raises:
        ValueError: if the template refuses a conversation; or as `mptbook.infer.generate`.
    """
    prompts = [encode_prompt(template, tokenizer, messages) for messages in conversations]
    ends = set(stop_ids(template, tokenizer))
    written: list[list[int]] = [[] for _ in prompts]
    found: list[Answer | None] = [None] * len(prompts)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for tokens in next_tokens(model, prompts, max_new_tokens, len(tokenizer), seed, **sampling):
        for row, token in enumerate(tokens.tolist()):
            if found[row] is None:
                written[row] += [] if token in ends else [token]
                text = tokenizer.decode(written[row])
                before, mark, _ = text.partition(template.stop) if template.stop else (text, "", "")
                if token in ends or mark:
                    found[row] = Answer(before, True)
        if None not in found:
            break
    return [
        one or Answer(tokenizer.decode(ids), False) for one, ids in zip(found, written, strict=True)
    ]


class Ask(RunSettings):
    """Put a question to a finetuned model: `mptbook ask DIR --prompt "..."`."""

    model: CliPositionalArg[str] = Field(
        description="a model directory, a run, or a name on the hub"
    )
    prompt: str = Field(description="what the user says")
    system: str = Field("", description="a system turn before it")
    template: str = Field(
        "", description="instruct, instruct-card, chatml, or a Jinja file; none: the model's own"
    )
    max_new_tokens: PositiveInt = Field(128, description="tokens at most")
    temperature: NonNegativeFloat = Field(0.0, description="0 takes the most likely token")
    top_k: PositiveInt | None = Field(None, description="choose among the k most likely")
    top_p: float | None = Field(None, description="choose among the likeliest that reach p")
    seed: int = Field(0, description="the same seed gives the same answer")

    def run(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p)
        folder = find_directory(self.model)
        template = ChatTemplate.load(self.template or folder)
        turns = [("system", self.system)] * bool(self.system) + [("user", self.prompt)]
        messages = [{"role": role, "content": text} for role, text in turns]
        sampling = self.model_dump(include={"max_new_tokens", "temperature", "top_k", "top_p"})
        (found,) = answer(
            load_model(folder),
            Tokenizer.load(folder),
            template,
            [messages],
            **sampling,
            seed=self.seed,
        )
        print(found.text)
