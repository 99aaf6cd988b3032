"""Soft prompts by name in vLLM: an ASGI middleware. Runs where vLLM runs, and needs only what vLLM brings along.

PYTHONPATH=BUNDLE vllm serve MODEL --enable-prompt-embeds --middleware incipit_prompts.Prompts
A request with model = a prompt's name becomes one of vLLM's own model, with the prompt's rows (prompt_embeds) before
its text; names in the answer are restored. Everything else goes through untouched. Seen in vLLM 0.32.0.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from .asking import CHAT, COMPLETIONS, NEUTRAL, rewritten, without_penalties
from .replies import Headers, Message, Named, Send, header, measured
from .shelf import Refused, Shelf, packed

MODELS = "/v1/models"
LARGEST_BODY = 4 * 2**20  # bytes of a request
NEAR = 0.5  # between log-probabilities there and here: the rounding of bfloat16 and of quantised weights, not more
CLIENTS = 10_000  # keys that are remembered as let in

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Prompts:
    """The middleware; `vllm serve --middleware incipit_prompts.Prompts` makes one. folder: the bundle."""

    def __init__(self, app: App, folder: Path | None = None) -> None:
        self.app, self.shelf = app, Shelf(folder or Path(__file__).parents[1])
        self._let_in: set[bytes] = set()
        self._base: dict[str, Any] = {}  # the card of vLLM's own model
        self._checking = asyncio.Lock()
        self._checked: Refused | bool = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        path = scope["path"].removeprefix(scope.get("root_path", "")) if scope["type"] == "http" else ""
        method = scope.get("method")
        try:
            if method == "POST" and path in (COMPLETIONS, CHAT):
                await self._ask(path, scope, receive, send)
            elif method == "GET" and (path == MODELS or path.startswith(f"{MODELS}/")):
                await self._models(path, scope, receive, send)
            else:
                await self.app(scope, receive, send)
        except Refused as refused:
            await _answer(send, refused.status, refused.body())
        except _Answered as there:
            await _answer(send, there.status, there.body, there.headers)
        except _Gone:
            return

    # -- questions ---------------------------------------------------------------------------------------------

    async def _ask(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _body(receive)
        try:
            given = json.loads(body)
        except (ValueError, RecursionError):
            given = None  # vLLM says what is wrong with it
        if not isinstance(given, dict):
            return await self.app(scope, _replayed(body, receive), send)
        name = given.get("model")
        if not isinstance(name, str) or name not in self.shelf.entries:
            without_penalties(given)
            return await self.app(scope, _replayed(body, receive), send)
        await self._know(scope)  # before anything is told of a prompt or worked out for it
        if name == self._base["id"]:
            said = f"vLLM's own model is called {name!r} like a prompt: start it with --served-model-name"
            raise Refused(500, said, "ambiguous_name", "model")
        without_penalties(given)
        await self._check(scope)
        new = json.dumps(await asyncio.to_thread(rewritten, path, name, given, self.shelf)).encode()
        there = {**scope, "headers": measured(scope["headers"], new)}
        fingerprint = f"{name}@{self.shelf.entries[name].version}"
        await self.app(there, _replayed(new, receive), Named(send, name, fingerprint))

    async def _know(self, scope: Scope) -> None:
        """Whether this client's key is one of vLLM's, and what its own model is called. Raises vLLM's own answer."""
        key = hashlib.sha256(header(scope["headers"], b"authorization")).digest()
        if key in self._let_in:
            return
        listed, _ = await self._inner(scope, "GET", MODELS)
        self._base = _base(listed)
        if len(self._let_in) >= CLIENTS:
            self._let_in.clear()
        self._let_in.add(key)

    async def _check(self, scope: Scope) -> None:
        """Once: the model that vLLM serves answers the probes as the prompts' backbone did. Raises Refused."""
        async with self._checking:
            if self._checked is False:
                rows = [packed(self.shelf.text(probe["ids"])) for probe in self.shelf.probes]
                asked = {"prompt_embeds": rows, "max_tokens": 1, "temperature": 0, "logprobs": 5, "ignore_eos": True,
                         "return_tokens_as_token_ids": True} | NEUTRAL  # fmt: skip
                found, _ = await self._inner(scope, "POST", COMPLETIONS, json.dumps(asked).encode())
                self._checked = self._compared(found) or True
        if isinstance(self._checked, Refused):
            raise self._checked

    def _compared(self, found: Any) -> Refused | None:
        try:
            logs = [choice["logprobs"]["top_logprobs"][0] for choice in found["choices"]]
            pairs = list(zip(logs, self.shelf.probes, strict=True))
        except (KeyError, TypeError, IndexError, ValueError):
            said = "vLLM answers the probes in another form than 0.32.0: write a bundle for this version"
            return Refused(500, said, "other_version")
        for there, probe in pairs:
            log = there.get(f"token_id:{probe['token']}", -1e9)
            if abs(log - probe["logprob"]) > NEAR:
                said = (
                    f"vLLM serves {self._base.get('root')!r}, which does not answer as {self.shelf.backbone['name']!r} "
                    "did, the model that the prompts were trained on: serve that one"
                )
                return Refused(500, said, "wrong_backbone", "model")
        return None

    # -- models ------------------------------------------------------------------------------------------------

    async def _models(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """vLLM's list and the prompts; one of them by its name, which vLLM has no address for."""
        name = path.removeprefix(f"{MODELS}/") if path != MODELS else ""
        listed, headers = await self._inner(scope, "GET", MODELS)
        base = _base(listed)
        listed["data"] += [self._card(one, base) for one in self.shelf.entries]
        if not name:
            return await _answer(send, 200, json.dumps(listed).encode(), headers)
        for card in listed["data"]:
            if card["id"] == name:
                return await _answer(send, 200, json.dumps(card).encode(), headers)
        await self.app(scope, receive, send)

    def _card(self, name: str, base: dict[str, Any]) -> dict[str, Any]:
        """As vLLM lists an adapter of its model."""
        root = f"{name}@{self.shelf.entries[name].version}"
        return base | {"id": name, "owned_by": "incipit", "root": root, "parent": base["id"]}

    async def _inner(self, scope: Scope, method: str, path: str, body: bytes = b"") -> tuple[Any, Headers]:
        """What vLLM answers to the same client, and its headers. Raises _Answered for anything but 200."""
        kept = [(k, v) for k, v in scope["headers"] if k.lower() in (b"authorization", b"host", b"origin")]
        kept += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        whole = scope.get("root_path", "") + path
        there = {**scope, "method": method, "path": whole, "raw_path": whole.encode(), "query_string": b"",
                 "headers": kept, "state": dict(scope.get("state") or {})}  # fmt: skip
        got = _Got()
        await self.app(there, _replayed(body, _never), got)
        if got.status != 200:
            raise _Answered(got.status, got.headers, b"".join(got.parts))
        return json.loads(b"".join(got.parts)), got.headers


def _base(listed: Any) -> dict[str, Any]:
    """The card of vLLM's own model."""
    return next(card for card in listed["data"] if card.get("parent") is None)


class _Gone(Exception):
    """The client went away before its request was there."""


class _Answered(Exception):
    """vLLM's own answer, to be passed on."""

    def __init__(self, status: int, headers: Headers, body: bytes) -> None:
        super().__init__(status)
        self.status, self.headers, self.body = status, headers, body


class _Got:
    """An ASGI `send` that keeps what it is sent."""

    def __init__(self) -> None:
        self.status, self.headers, self.parts = 500, list[tuple[bytes, bytes]](), list[bytes]()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], list(message.get("headers", ()))
        elif message["type"] == "http.response.body":
            self.parts.append(message.get("body", b""))


async def _body(receive: Receive) -> bytes:
    """The whole body of a request. Raises Refused for one that is too large."""
    parts, size, more = list[bytes](), 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > LARGEST_BODY:
            raise Refused(
                413, f"the body is larger than {LARGEST_BODY} bytes: send less at once", "body_too_large"
            )
    return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives this body, and then waits for what the client does."""
    given = False

    async def ready() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return ready


async def _never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def _answer(send: Send, status: int, body: bytes, headers: Headers = ()) -> None:
    kept: Sequence[tuple[bytes, bytes]] = list(headers) or [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": measured(kept, body)})
    await send({"type": "http.response.body", "body": body, "more_body": False})
