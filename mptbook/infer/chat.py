"""Answer conversations: the model speaks until its turn is over."""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field, NonNegativeFloat, PositiveInt
from pydantic_settings import CliPositionalArg

from mptbook.directory import find_directory
from mptbook.infer.generate import complete
from mptbook.infer.load import BitsSetting, load
from mptbook.infer.request import Request
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
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    ends = frozenset(stop_ids(template, tokenizer))
    stop = (template.stop,) if template.stop else ()
    requests = []
    for row, messages in enumerate(conversations):
        prompt = tuple(encode_prompt(template, tokenizer, messages))
        requests.append(
            Request(prompt, max_new_tokens, seed=seed + row, stop=stop, stop_ids=ends, **how)
        )
    found = complete(model, tokenizer, requests)
    return [Answer(one.text, one.finish == "stop") for one in found]


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
    bits: BitsSetting | None = Field(
        None, description="of a weight: 16, 8 or 4; none: as it is stored"
    )

    def run(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p)
        folder = find_directory(self.model)
        template = ChatTemplate.load(self.template or folder)
        turns = [("system", self.system)] * bool(self.system) + [("user", self.prompt)]
        messages = [{"role": role, "content": text} for role, text in turns]
        sampling = self.model_dump(include={"max_new_tokens", "temperature", "top_k", "top_p"})
        (found,) = answer(
            load(folder, self.bits),
            Tokenizer.load(folder),
            template,
            [messages],
            **sampling,
            seed=self.seed,
        )
        print(found.text)
