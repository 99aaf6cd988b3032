"""What clients send, in OpenAI's words and some of vLLM's. An argument that is not here is refused, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_ROWS = 256  # texts, or texts times n, of one request
MAX_CHOICES = 16

Name = Annotated[
    str, Field(min_length=1, max_length=256, description="A prompt, an alias, name@id, or the backbone")
]
Text = Annotated[str, Field(max_length=4_000_000)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


def _only(*allowed: Any, do: str) -> AfterValidator:
    """Accept the values that change nothing, refuse what is not built."""

    def check(value: Any) -> Any:
        if value is None or value in allowed:
            return value
        raise PydanticCustomError("unsupported", "this server has no {what}", {"what": do})

    return AfterValidator(check)


class Body(BaseModel):
    """A JSON object without surprises."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """include_usage: a last message with the counts of tokens."""

    include_usage: bool = False


class Asking(Body):
    """What every question has. timeout: seconds until the answer must be there; the server's own bound counts too.
    user: not used."""

    model: Name
    timeout: Annotated[float, Field(gt=0, le=86_400)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None


class Writing(Asking):
    """How to write. Where temperature and max_tokens are not given, the prompt's own recipe says."""

    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=256)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=16)]
        | None
    ) = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool | None = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[float | None, _only(0, do="penalties: leave presence_penalty at 0")] = 0
    frequency_penalty: Annotated[float | None, _only(0, do="penalties: leave frequency_penalty at 0")] = 0
    repetition_penalty: Annotated[float | None, _only(1, do="penalties: leave repetition_penalty at 1")] = 1
    min_p: Annotated[float | None, _only(0, do="min_p: leave it at 0")] = 0
    logit_bias: Annotated[dict[str, float] | None, _only({}, do="logit_bias: leave it out")] = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage(self) -> bool:
        """Whether a stream ends with its counts."""
        return self.stream_options is not None and self.stream_options.include_usage


Prompt = (
    Text
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_ROWS)]
    | Annotated[list[TokenId], Field(min_length=1, max_length=1_000_000)]
    | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_ROWS)]
)


class CompletionBody(Writing):
    """POST /v1/completions. The row is the soft prompt, then `prompt` word for word; with `form`, in the prompt's
    text form."""

    prompt: Prompt
    form: bool = False
    logprobs: Annotated[
        Annotated[int, Field(ge=0, le=20)] | None,
        _only(0, do="list of likeliest tokens: logprobs = 0 gives those of the tokens that were written"),
    ] = None
    echo: Annotated[bool | None, _only(False, do="echo: leave it out")] = False
    suffix: Annotated[str | None, _only("", do="suffix: leave it out")] = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None


class Part(Body):
    """A part of a message; text is the only kind."""

    type: Literal["text"]
    text: Text


# What the stock client sends back with an answer that it was given; it has no meaning here, and is empty.
Empty = Annotated[Any, _only("", [], do="answers but text: leave out what a message has besides its content")]


class Turn(Body):
    """One message of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=64)]
    name: Annotated[str | None, _only("", do="names of speakers: leave `name` out")] = None
    refusal: Empty = None
    annotations: Empty = None
    audio: Empty = None
    function_call: Empty = None
    tool_calls: Empty = None

    @property
    def text(self) -> str:
        """Its text; parts stand on lines of their own, as in vLLM."""
        return (
            self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        )


class ResponseFormat(Body):
    """Plain text is the only form."""

    type: Annotated[str, _only("text", do='response formats but {"type": "text"}')]


class ChatBody(Writing):
    """POST /v1/chat/completions: the soft prompt, then the conversation in the tokenizer's chat template."""

    messages: Annotated[list[Turn], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int | None, _only(0, do="list of likeliest tokens: leave top_logprobs at 0")] = (
        None
    )
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any] | None, _only([], do="tools: leave them out")] = None
    tool_choice: Annotated[Any, _only("none", do="tools: leave tool_choice out")] = None


Asked = Text | dict[str, Any]


class ClassifyBody(Asking):
    """POST /v1/classify. A text fills the only field of the prompt's text form, an object all of them."""

    input: Asked | Annotated[list[Asked], Field(min_length=1, max_length=MAX_ROWS)]

    @property
    def all(self) -> list[str | dict[str, Any]]:
        """The inputs, one or many."""
        return self.input if isinstance(self.input, list) else [self.input]


class UploadBody(Body):
    """POST /v1/prompts. files: base64 of card.json and prompt.safetensors. name: in place of the card's own."""

    files: Annotated[dict[Annotated[str, Field(max_length=64)], str], Field(min_length=1, max_length=8)]
    name: Annotated[str, Field(max_length=256)] = ""


class AliasBody(Body):
    """PUT /v1/aliases/ALIAS. target: a prompt, another alias, or name@id."""

    target: Name
