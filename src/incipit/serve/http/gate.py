"""The gate in front of every address: ids, keys, limits of size and rate, draining, and one log line a request."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from incipit.serve.http import logs
from incipit.serve.http.keys import Keys, Rate
from incipit.serve.http.meters import Meters
from incipit.serve.http.refusals import INVALID, Refusal
from incipit.serve.http.rounds import Called

ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
OPEN = ("/healthz", "/readyz", "/metrics", "/", "/openapi.json")  # without a key, and while draining
ADMIN = ("/v1/prompts", "/v1/aliases")
GONE = 499  # the status in log and figures of a client that went away, as nginx writes it
DRAINED = 64 * 2**20  # bytes of a body that is too large and read nevertheless, so that the reason arrives


@dataclass
class Limits:
    """max_body, max_upload: bytes. body_seconds: for a body to arrive. rate: requests a second of one client."""

    max_body: int = 2**20
    max_upload: int = 64 * 2**20
    body_seconds: float = 30.0
    rate: Rate = field(default_factory=Rate)


class Gate:
    """ASGI: passes on what may pass. stop: ends the engine and with it every request.

    `active` counts the requests that are under way, those of OPEN left out.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        admin: Keys,
        limits: Limits,
        meters: Meters,
        stop: Callable[[], None],
    ) -> None:
        self.app, self.keys, self.admin, self.limits, self.meters, self.stop = (
            app,
            keys,
            admin,
            limits,
            meters,
            stop,
        )
        self.draining = False
        self.active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the lifespan."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            else:  # no WebSockets here
                await send({"type": "websocket.close", "code": 1000})
            return
        counted = scope["path"] not in OPEN
        self.active += counted
        self.meters.active.set(self.active)
        try:
            await self._one(scope, receive, send)
        finally:
            self.active -= counted
            self.meters.active.set(self.active)

    async def _one(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun, status = time.perf_counter(), 0
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        called = scope["incipit"] = Called(given if ID.fullmatch(given) else uuid.uuid4().hex, "")

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [(b"x-request-id", called.id.encode())]
                more += [(b"connection", b"close")] if self.draining or status in (408, 413) else []
                message = {**message, "headers": [*message.get("headers", ()), *more, *SAFE]}
            await send(message)

        failed: Exception | None = None
        try:
            self._admit(scope, headers, called)
            ready = await self._body(scope, headers, receive)
            await self.app(scope, ready, sending)
        except Refusal as refusal:
            await refusal.response()(scope, receive, sending)
        except ClientGone:
            status = GONE
        except Exception as error:
            failed = error
            if not status:
                said = Refusal(
                    500, "the server failed on this request", kind="server_error", code="internal_error"
                )
                await said.response()(scope, receive, sending)
        status = status or GONE  # a stream that was left before it began
        route = getattr(scope.get("route"), "path", "unmatched")
        self.meters.called(route, status)
        level = logging.ERROR if failed else logging.DEBUG if scope["path"] in OPEN else logging.INFO
        logs.tell("request", level, failed, id=called.id, method=_method(scope), route=route, status=status,
                  seconds=round(time.perf_counter() - begun, 6), client=called.client, model=called.model,
                  rows=called.rows, tokens=called.tokens)  # fmt: skip

    def _admit(self, scope: Scope, headers: dict[bytes, str], called: Called) -> None:
        """Raises Refusal for who may not ask now."""
        path: str = scope["path"]
        called.client = f"ip:{scope['client'][0]}" if scope.get("client") else "ip:"
        if path in OPEN:
            return
        if self.draining:
            said = "the server is shutting down: ask another one"
            raise Refusal(503, said, kind="overloaded_error", code="shutting_down", retry_after=1.0)
        admin = path.startswith(ADMIN)
        if admin and not self.admin:
            said = "prompts cannot be changed here: the server was started without --admin-keys"
            raise Refusal(403, said, code="turned_off")
        keys = self.admin if admin else self.keys
        if keys:
            name = keys.name(headers.get(b"authorization", ""))
            if name is None:
                what = "an admin key" if admin else "a key"
                said = f'no valid key: send "Authorization: Bearer KEY" with {what} of this server'
                raise Refusal(401, said, code="invalid_api_key")
            called.client = f"admin:{name}" if admin else f"key:{name}"
        wait = self.limits.rate.wait(called.client)
        if wait:
            said = f"more than {self.limits.rate.each:g} requests a second: wait {wait:.2f} s"
            raise Refusal(429, said, kind="rate_limit_error", code="rate_limit_exceeded", retry_after=wait)

    async def _body(self, scope: Scope, headers: dict[bytes, str], receive: Receive) -> Receive:
        """A `receive` that gives the whole body at once. Raises Refusal for one too large or too slow."""
        if scope["method"] in ("GET", "HEAD", "OPTIONS") and scope["path"] in OPEN:
            return receive
        most = self.limits.max_upload if scope["path"].startswith(ADMIN) else self.limits.max_body
        told = headers.get(b"content-length", "")
        large = told.isdigit() and int(told) > most
        if large and ("100-continue" in headers.get(b"expect", "").lower() or int(told) > 4 * DRAINED):
            raise _large(most)  # the client waits with its body, or would send for too long
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    size += len(message.get("body", b""))
                    if size <= most and not large:
                        parts.append(message.get("body", b""))
                    elif size > most + 4 * DRAINED:
                        raise _large(most)
                    if not message.get("more_body"):
                        break
        except TimeoutError as error:
            if large or size > most:
                raise _large(most) from error
            said = f"the body did not arrive within {self.limits.body_seconds:g} s"
            raise Refusal(408, said, code="body_timeout") from error
        if large or size > most:
            raise _large(most)
        return _replayed(b"".join(parts), receive)


class ClientGone(Exception):
    """The client went away before its body was there."""


SAFE = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


def _large(most: int) -> Refusal:
    return Refusal(
        413, f"the body is larger than {most} bytes: send less at once", kind=INVALID, code="body_too_large"
    )


def _method(scope: Scope) -> str:
    """The method, where it is one of HTTP's own."""
    known = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT")
    return scope["method"] if scope["method"] in known else "other"


def _replayed(body: bytes, receive: Receive) -> Receive:
    given = False

    async def ready() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return ready
