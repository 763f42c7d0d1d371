"""What is answered, in OpenAI's shapes."""

from typing import Any, Literal

from pydantic import BaseModel

Finish = Literal["stop", "length"]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorDetail


class PromptDetails(BaseModel):
    cached_tokens: int = 0  # that an earlier request had read


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Logprobs(BaseModel):
    """Of a completion; lists with an entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]  # nats; None for a text's first token
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]  # of the token's first character in the text


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: Finish | None = None


class Completion(BaseModel):
    """An answer, or with stream=true a piece of one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None = None


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    index: int
    delta: dict[str, str]  # role and content, of which what is new
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None = None


class ChatChunk(BaseModel):
    """A piece of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatDelta]
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mptbook"
    max_model_len: int  # tokens of prompt and answer together
    chat: Literal["turns", "single"] | None  # turns that its template takes; None: it has none


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok"] = "ok"


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Statuses of refusals, for the OpenAPI description."""
    return {status: {"model": ErrorReply} for status in sorted(statuses)}
