"""Ask a server for predictions: what `incipit predict --server URL` needs, with the standard library alone."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from incipit.decode import Prediction
from incipit.errors import ServeError
from incipit.questions import Asked, ask

AT_ONCE = 64  # inputs of one request
TRIES = 5  # of a request that the server is too busy for


@dataclass(frozen=True)
class Remote:
    """A prompt on a server. task: its text form, as an Artifact's."""

    name: str
    task: Mapping[str, Any]


class Client:
    """A server at `url`, such as http://127.0.0.1:8000. timeout: seconds of one request."""

    def __init__(self, url: str, key: str = "", timeout: float = 300.0) -> None:
        self.url, self.key, self.timeout = url.rstrip("/"), key, timeout
        if urllib.parse.urlsplit(self.url).scheme not in ("http", "https"):
            raise ServeError(f"{url!r} is no address of a server: write http://HOST:PORT")

    def prompt(self, name: str) -> Remote:
        """A prompt and its text form. Raises ServeError, with the server's reason."""
        reply = self.call(f"/v1/models/{urllib.parse.quote(name)}")
        told = reply.get("incipit") if isinstance(reply, dict) else None
        if not isinstance(told, dict):
            raise ServeError(f"{self.url} tells no text forms: give the address of an `incipit serve`")
        if "form" not in told:
            raise ServeError(
                f"{name!r} is the bare backbone of {self.url}, which has no text form: name a prompt"
            )
        return Remote(name, told["form"])

    def predict(
        self, prompts: Sequence[Remote], asked: Sequence[tuple[Asked, str]], pairs: Sequence[tuple[int, int]]
    ) -> list[Prediction]:
        """One Prediction for each pair (input, prompt); label words are ranked, free text is written."""
        found: dict[int, Prediction] = {}
        for k, prompt in enumerate(prompts):
            mine = [n for n, (_, of) in enumerate(pairs) if of == k]
            for at in range(0, len(mine), AT_ONCE):
                part = mine[at : at + AT_ONCE]
                inputs = [asked[pairs[n][0]] for n in part]
                found |= zip(part, self._answers(prompt, inputs), strict=True)
        return [found[n] for n in range(len(pairs))]

    def _answers(self, prompt: Remote, inputs: Sequence[tuple[Asked, str]]) -> list[Prediction]:
        examples = [
            ask(prompt.task, *one) for one in inputs
        ]  # what is wrong with an input is said with its place
        if examples[0].choices:
            data = self.call("/v1/classify", {"model": prompt.name, "input": [one for one, _ in inputs]})[
                "data"
            ]
            shares = [row["probabilities"] for row in data]
            return [
                Prediction(row["label"], [*s].index(row["label"]), s)
                for row, s in zip(data, shares, strict=True)
            ]
        if prompt.task["kind"] == "chat":
            return [Prediction(self._chat(prompt, example.messages[:-1])) for example in examples]
        body = {"model": prompt.name, "prompt": [example.input for example in examples]}
        choices = self.call("/v1/completions", body)["choices"]
        return [Prediction(choice["text"].strip()) for choice in sorted(choices, key=lambda c: c["index"])]

    def _chat(self, prompt: Remote, turns: Sequence[Any]) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        said = self.call("/v1/chat/completions", {"model": prompt.name, "messages": messages})
        return str(said["choices"][0]["message"]["content"]).strip()

    def call(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON value of a reply; a busy server is asked again when it says so."""
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {self.key}"} if self.key else {}
        )
        data = None if body is None else json.dumps(body).encode()
        for tries in range(1, TRIES + 1):
            request = urllib.request.Request(self.url + path, data, headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                with error:
                    said, after = error.read(), error.headers.get("Retry-After", "")
                if error.code not in (429, 503) or tries == TRIES or not after.isdigit():
                    raise ServeError(f"{self.url}: {_reason(said, error.code)}") from error
                time.sleep(int(after))
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise ServeError(
                    f"no server of prompts answers at {self.url} ({error}): start one with `incipit serve`"
                ) from error
        raise AssertionError("the last try returns or raises")


def _reason(said: bytes, status: int) -> str:
    try:
        return str(json.loads(said)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {status}"
