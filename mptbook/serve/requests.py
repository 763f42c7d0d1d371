"""What can be asked, field by field: OpenAI's names, and what of them is supported here.

A field that would change the answer and is not supported is refused by its name. A field that is
null counts as left out.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mptbook.infer.request import MOST_LOGPROBS

SEEDS = {"ge": -(2**63), "le": 2**63 - 1}


def _one_of(what: str) -> WrapValidator:
    """One message for a value of several types, in place of one for each type."""

    def check(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("shape", f"should be {what}") from None

    return WrapValidator(check)


def _neutral(*values: Any) -> AfterValidator:
    """Only values that change nothing; all that are empty, zero or false are."""

    def check(value: Any) -> Any:
        if value and value not in values:
            raise PydanticCustomError("unsupported", "is not supported here; leave it out")
        return value

    return AfterValidator(check)


def _unicode(text: str) -> str:
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # halves, which JSON can spell
        raise PydanticCustomError("unicode", "should be Unicode without lone surrogates")
    return text


Text = Annotated[str, AfterValidator(_unicode)]
Stop = Annotated[Text | list[Text], _one_of("a string, or a list of strings")]
Prompt = Annotated[
    Text | list[Text] | list[int] | list[list[int]],
    _one_of("a string, a list of strings, a list of token ids, or a list of such lists"),
]


class Part(BaseModel):
    """A piece of a message; of OpenAI's kinds only text is read."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: Text


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        return {name: value for name, value in given.items() if value is not None}


class Message(_Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Text | list[Part], _one_of('a string, or a list of parts {"type": "text", "text": ...}')
    ]

    @property
    def turn(self) -> dict[str, str]:
        """The message as `mptbook.tokenizer.chat` has it."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(_Fields):
    include_usage: bool = False


class _Asked(_Fields):
    """What completions and chats have in common."""

    model: Text = Field(description="the name of the served model")
    n: int = Field(1, ge=1, description="choices for each prompt")
    temperature: float = Field(1.0, ge=0, le=2, description="0: the most likely token")
    top_p: float = Field(1.0, gt=0, le=1, description="choose among the likeliest that reach p")
    top_k: int | None = Field(None, ge=1, description="choose among the k most likely")
    seed: int | None = Field(None, **SEEDS, description="the same seed gives the same text")
    stop: Stop = Field([], description="strings that end the text, and are no part of it")
    stream: bool = Field(False, description="answer with server-sent events")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="ignored")
    metadata: dict[str, str] | None = Field(None, description="ignored")
    frequency_penalty: Annotated[float, _neutral()] = 0.0
    presence_penalty: Annotated[float, _neutral()] = 0.0
    logit_bias: Annotated[dict[str, float], _neutral()] = {}

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("together", "stream_options takes stream=true")
        return self


class CompletionRequest(_Asked):
    """A text to be continued."""

    prompt: Prompt
    max_tokens: int = Field(16, ge=0, description="tokens at most; 0 with echo: only score")
    echo: bool = Field(False, description="the prompt, too, with its log-probabilities")
    logprobs: int | None = Field(
        None, ge=0, le=MOST_LOGPROBS, description="log-probabilities, and of so many likeliest"
    )
    best_of: int | None = Field(None, ge=1, description="no other than n")
    suffix: Annotated[str, _neutral()] = ""

    @model_validator(mode="after")
    def _check_best_of(self) -> Self:
        if self.best_of not in (None, self.n):
            raise PydanticCustomError("together", "best_of other than n is not supported")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Text or ids of each prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class ChatRequest(_Asked):
    """A conversation to be answered."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, description="as max_completion_tokens")
    max_completion_tokens: int | None = Field(
        None, ge=1, description="tokens at most; none: as many as there is room for"
    )
    logprobs: bool = Field(False, description="log-probabilities of the answer's tokens")
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    response_format: Annotated[dict[str, Any], _neutral({"type": "text"})] = {}
    tools: Annotated[list[Any], _neutral()] = []
    tool_choice: Annotated[str | dict[str, Any], _neutral("none", "auto")] = "none"
    parallel_tool_calls: bool = Field(True, description="ignored: there are no tools")

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("together", "top_logprobs takes logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise PydanticCustomError("together", "give max_completion_tokens or max_tokens")
        if self.messages[-1].role != "user":
            raise PydanticCustomError("together", "the last message should be the user's")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens
