"""What vLLM answers, with the prompt's name in place of the model's: whole replies, and streams event by event."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]


class Named:
    """An ASGI `send` that restores names. Replies that are neither JSON nor an event stream go through untouched."""

    def __init__(self, send: Send, name: str, fingerprint: str) -> None:
        self._send, self._name, self._fingerprint = send, name, fingerprint
        self._start: Message | None = None  # held until the length of a whole reply is known
        self._kind = b""
        self._parts: list[bytes] = []
        self._half = b""  # an event that has not come in full

    async def __call__(self, message: Message) -> None:
        """Take one message of the application."""
        if message["type"] == "http.response.start":
            self._kind = header(message.get("headers", ()), b"content-type").split(b";")[0].strip()
            if self._kind == b"application/json":
                self._start = message
                return
            await self._send(message)
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._start is not None:
            await self._whole(message, self._start)
        elif self._kind == b"text/event-stream":
            await self._send({**message, "body": self._events(message)})
        else:
            await self._send(message)

    async def _whole(self, message: Message, start: Message) -> None:
        self._parts.append(message.get("body", b""))
        if message.get("more_body"):
            return
        body = self._restored(b"".join(self._parts))
        await self._send({**start, "headers": measured(start.get("headers", ()), body)})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    def _events(self, message: Message) -> bytes:
        """The events that are whole now; the last message brings the rest as it is."""
        *whole, self._half = (self._half + message.get("body", b"")).split(b"\n\n")
        done = b"".join(self._event(event) + b"\n\n" for event in whole)
        if not message.get("more_body"):
            done, self._half = done + self._half, b""
        return done

    def _event(self, event: bytes) -> bytes:
        lines = event.split(b"\n")
        for i, line in enumerate(lines):
            data = line.removeprefix(b"data: ")
            if data is not line and data.startswith(b"{"):
                lines[i] = b"data: " + self._restored(data)
        return b"\n".join(lines)

    def _restored(self, data: bytes) -> bytes:
        try:
            found = json.loads(data)
        except ValueError:
            return data
        if not isinstance(found, dict) or "model" not in found:
            return data  # an error
        found["model"] = self._name
        if "system_fingerprint" in found:
            found["system_fingerprint"] = self._fingerprint
        return json.dumps(found).encode()


def header(headers: Headers, name: bytes) -> bytes:
    """The value of one header; b"" when it is not there."""
    return next((bytes(value) for key, value in headers if key.lower() == name), b"")


def measured(headers: Headers, body: bytes) -> list[tuple[bytes, bytes]]:
    """Headers with this body's length in place of the old one."""
    kept = [(key, value) for key, value in headers if key.lower() != b"content-length"]
    return [*kept, (b"content-length", str(len(body)).encode())]
