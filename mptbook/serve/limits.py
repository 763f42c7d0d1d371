"""What a client may ask for, and for how long it is waited."""

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt


class Limits(BaseModel):
    """Past one of these a request is refused; every other request goes on."""

    model_config = ConfigDict(extra="forbid")

    body_bytes: PositiveInt = Field(4_000_000, description="of the body of a request (413)")
    new_tokens: PositiveInt = Field(4096, description="that a choice may have at most (400)")
    choices: PositiveInt = Field(128, description="of a request: prompts times n (400)")
    stops: PositiveInt = Field(16, description="stop strings of a request (400)")
    waiting: PositiveInt = Field(256, description="choices that wait for a slot (429)")
    requests: PositiveInt = Field(256, description="at once, of any kind (503)")
    seconds: PositiveFloat = Field(600, description="that a request may take, in seconds (503)")
    patience: PositiveFloat = Field(
        30, description="seconds to send a whole request (408), or to take what is answered"
    )
    drain: PositiveInt = Field(
        60, description="seconds that requests have to finish after SIGTERM; then they are ended"
    )
