"""Why a request is refused, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse

from incipit.errors import (
    ArtifactError,
    AskError,
    BackboneError,
    ClientLimit,
    DataError,
    Draining,
    EngineDown,
    IncipitError,
    PromptError,
    Saturated,
    ServeError,
    StorageError,
    TooLong,
    UnknownPrompt,
)
from incipit.serve.asks import End

INVALID = "invalid_request_error"
# error -> (status, type, code); the first that fits counts
KINDS: tuple[tuple[type[IncipitError], int, str, str], ...] = (
    (TooLong, 400, INVALID, "context_length_exceeded"),
    (UnknownPrompt, 404, INVALID, "model_not_found"),
    (ClientLimit, 429, "rate_limit_error", "rate_limit_exceeded"),
    (Saturated, 503, "overloaded_error", "overloaded"),
    (Draining, 503, "overloaded_error", "shutting_down"),
    (EngineDown, 503, "server_error", "engine_down"),
    (AskError, 400, INVALID, "invalid_value"),
    (ServeError, 400, INVALID, "invalid_value"),
    (ArtifactError, 422, INVALID, "prompt_refused"),
    (BackboneError, 422, INVALID, "not_supported_by_model"),
    (PromptError, 422, INVALID, "prompt_refused"),
    (DataError, 422, INVALID, "invalid_input"),
    (StorageError, 503, "server_error", "storage"),
)


class Json(JSONResponse):
    """JSON of what may come from a stranger's card: what JSON or UTF-8 cannot say becomes null, or "?"."""

    def render(self, content: Any) -> bytes:
        """The bytes."""
        try:
            return super().render(content)
        except ValueError:  # a number that is not finite, half a surrogate pair
            return super().render(_plain(content))


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, Mapping):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


class Refusal(Exception):
    """A request that gets an error in place of an answer. retry_after: seconds, a header where it is not None."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.code, self.param, self.retry_after = code, param, retry_after

    @classmethod
    def of(cls, error: IncipitError) -> Refusal:
        """The refusal that an error of the library is."""
        wait = getattr(error, "retry_after", None)
        for kind, status, name, code in KINDS:
            if isinstance(error, kind):
                later = 1.0 if wait is None and status in (429, 503) else wait
                param = "model" if kind is UnknownPrompt else None
                return cls(status, str(error), kind=name, code=code, param=param, retry_after=later)
        return cls(500, "the server failed on this request", kind="server_error", code="internal_error")

    @classmethod
    def late(cls, seconds: float) -> Refusal:
        """A deadline has passed while the answer was written."""
        said = f"the request was not done within {seconds:.1f} s: ask for less, or allow more by `timeout`"
        return cls(504, said, kind="timeout_error", code="deadline_exceeded")

    @classmethod
    def crowded(cls, seconds: float) -> Refusal:
        """A request that has waited, and that the engine has not begun."""
        said = f"the request could not be begun within {seconds:.1f} s: the server is busy; try again"
        return cls(503, said, kind="overloaded_error", code="overloaded", retry_after=1.0)

    @classmethod
    def ended(cls, end: End) -> Refusal | None:
        """The refusal that an early end of the engine is; None for an answer."""
        if end.reason == "deadline":
            return cls.late(end.seconds)
        if end.reason == "overloaded":
            return cls.crowded(end.seconds)
        if end.reason == "cancelled":
            said = "the request was stopped before its end: the server is shutting down"
            return cls(503, said, kind="server_error", code="cancelled", retry_after=1.0)
        if end.reason == "error":
            said = end.error or "the engine failed on this request"
            return cls(500, said, kind="server_error", code="engine_error")
        return None

    def body(self) -> dict[str, Any]:
        """The JSON value."""
        told = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": told}

    def headers(self) -> dict[str, str]:
        """Retry-After in whole seconds, and how to log in."""
        found = {} if self.retry_after is None else {"retry-after": str(max(1, math.ceil(self.retry_after)))}
        return found | ({"www-authenticate": "Bearer"} if self.status == 401 else {})

    def response(self) -> Json:
        """What is sent."""
        return Json(self.body(), self.status, self.headers())


def invalid(errors: Sequence[Mapping[str, Any]]) -> Refusal:
    """The refusal of a body that is not as the API says. 400: no JSON, or what this server cannot do; else 422.

    What the client sent is not repeated: it may be long, and need not be text.
    """
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "path", "query")]
    param = next((part for part in place if not part.isdigit()), None)
    if first["type"] == "json_invalid":
        return Refusal(
            400, f"the body is no JSON: stopped at character {first['loc'][-1]}", code="invalid_json"
        )
    if first["type"] == "unsupported":
        return Refusal(400, str(first["msg"]), code="unsupported_parameter", param=param)
    if first["type"] == "extra_forbidden":
        said = f"unknown or unsupported argument {param!r}: remove it, nothing is ignored here"
        return Refusal(422, said, code="unknown_parameter", param=param)
    if first["type"] in ("model_attributes_type", "dict_type") and not place:
        return Refusal(
            400, 'the body is no JSON object; send "Content-Type: application/json"', code="invalid_json"
        )
    where = ".".join(place) or "the body"
    return Refusal(422, f"{where}: {first['msg']}", code="invalid_value", param=param)


class Told(BaseModel):
    """One error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """OpenAI's shape of an error."""

    error: Told


MEANINGS = {
    400: "Not JSON, too long for the model, or asks for what this server cannot do",
    401: "No key, or a wrong one",
    403: "Turned off on this server",
    404: "No such prompt or address",
    405: "No such method",
    408: "The body came too slowly",
    413: "The body is too large",
    422: "A wrong value, or a prompt that cannot be served",
    429: "Your own limit; see Retry-After",
    500: "The server failed on this request",
    503: "Saturated, starting or shutting down; see Retry-After",
    504: "Begun, and not done within its deadline",
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """These errors, and those of every address, for the OpenAPI description."""
    every = (401, 408, 413, 429, 500, 503)
    return {s: {"model": ErrorReply, "description": MEANINGS[s]} for s in sorted({*every, *statuses})}
