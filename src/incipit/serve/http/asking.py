"""/v1/completions, /v1/chat/completions, /v1/classify."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from incipit.errors import IncipitError
from incipit.serve.asks import Ask, Delta, End, PinnedVersion
from incipit.serve.http import replies, rows
from incipit.serve.http.refusals import Json, Refusal, documented
from incipit.serve.http.rounds import Called, Desk, Round, unless_gone
from incipit.serve.http.rows import Reader
from incipit.serve.http.shapes import ChatBody, ClassifyBody, CompletionBody, Writing

GONE = Response(status_code=499)  # nobody reads it


def router(desk: Desk) -> APIRouter:
    """The three endpoints over one engine."""
    found = APIRouter(tags=["answers"])

    @found.post(
        "/v1/completions",
        response_model=replies.CompletionReply,
        responses=documented(400, 404, 422, 504),
        summary="Write on",
    )
    async def completions(body: CompletionBody, request: Request) -> Response:
        form = replies.Text(desk.engine.backbone, body.logprobs is not None)
        return await _written(
            desk,
            request,
            body,
            form,
            lambda reader, version: rows.completions(reader, body, version, desk.new),
        )

    @found.post(
        "/v1/chat/completions",
        response_model=replies.ChatReply,
        responses=documented(400, 404, 422, 504),
        summary="Answer a conversation",
    )
    async def chat(body: ChatBody, request: Request) -> Response:
        form = replies.Chat(desk.engine.backbone, bool(body.logprobs))
        return await _written(
            desk, request, body, form, lambda reader, version: rows.chat(reader, body, version, desk.new)
        )

    @found.post(
        "/v1/classify",
        response_model=replies.ClassifyReply,
        responses=documented(400, 404, 422, 504),
        summary="Choose among a prompt's labels",
    )
    async def classify(body: ClassifyBody, request: Request) -> Response:
        words: list[tuple[str, ...]] = []

        def ask(reader: Reader, version: PinnedVersion | None) -> Sequence[Ask]:
            if version is None:
                said = "the backbone itself has no labels: name a prompt"
                raise Refusal(400, said, code="no_labels", param="model")
            asks, found = rows.classify(reader, body.all, version)
            words.extend(found)
            return asks

        called: Called = request.scope["incipit"]
        taken = await desk.take(body.model, ask, called, body.timeout)
        try:
            ends = await unless_gone(request.receive, taken, taken.whole())
            if ends is None:
                return GONE
            return Json(_labels(called, body.model, taken, words, ends))
        finally:
            taken.close()

    return found


def _labels(
    called: Called, model: str, taken: Round, words: Sequence[Sequence[str]], ends: Sequence[End]
) -> dict[str, Any]:
    data = []
    for index, (choices, end) in enumerate(zip(words, ends, strict=True)):
        best = max(range(len(end.shares)), key=end.shares.__getitem__) if end.choice is None else end.choice
        shares = dict(zip(choices, end.shares, strict=True))
        data.append({"index": index, "label": choices[best], "probabilities": shares, "seconds": end.seconds})
    return {
        "id": f"class-{called.id}",
        "object": "classification",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": taken.fingerprint or None,
        "data": data,
        "usage": replies.usage(ends),
    }


async def _written(
    desk: Desk,
    request: Request,
    body: Writing,
    form: replies.Form,
    ask: Callable[[Reader, PinnedVersion | None], Sequence[Ask]],
) -> Response:
    """Text, whole or as a stream."""
    if body.stream_options is not None and not body.stream:
        said = "stream_options without stream: set stream to true, or leave them out"
        raise Refusal(422, said, code="invalid_value", param="stream_options")
    called: Called = request.scope["incipit"]
    taken = await desk.take(body.model, ask, called, body.timeout, live=bool(body.stream))
    head = replies.Head(form.prefix + called.id, int(time.time()), body.model, taken.fingerprint)
    if body.stream:
        return Stream(taken, form, head, body)
    texts: list[list[Delta]] = [[] for _ in taken.asks]

    async def gather() -> list[End]:
        async for found in taken.events():
            for index, event in found:
                if isinstance(event, Delta):
                    texts[index].append(event)
                elif refusal := Refusal.ended(event):
                    raise refusal
        return [end for end in taken.ends if end is not None]

    try:
        ends = await unless_gone(request.receive, taken, gather())
        if ends is None:
            return GONE
        choices = [form.choice(i, texts[i], end) for i, end in enumerate(ends)]
        return Json(head.of(form.whole, choices, usage=replies.usage(ends, body.n or 1)))
    finally:
        taken.close()


class Stream(Response):
    """Server-sent events. What goes wrong before the first token is an ordinary error, afterwards an event."""

    def __init__(self, taken: Round, form: replies.Form, head: replies.Head, body: Writing) -> None:
        super().__init__(status_code=200)
        self.taken, self.form, self.head, self.asked = taken, form, head, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the last End, or until the client goes away: then every row is cancelled."""
        try:
            await unless_gone(receive, self.taken, self._run(scope, receive, send))
        finally:
            self.taken.close()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        try:
            async for text in self._messages():
                if not begun:
                    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                    begun = True
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        except (Refusal, IncipitError) as error:
            refusal = error if isinstance(error, Refusal) else Refusal.of(error)
            if not begun:
                await refusal.response()(scope, receive, send)
                return
            text = _event(refusal.body()) + DONE
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _messages(self) -> AsyncIterator[str]:
        """Some events as text, as they come."""
        opened: set[int] = set()
        more: dict[str, Any] = {"usage": None} if self.asked.usage else {}
        async for found in self.taken.events():
            choices: list[dict[str, Any]] = []
            for index, event in found:
                if isinstance(event, End) and (refusal := Refusal.ended(event)):
                    if choices:
                        yield self._all(choices, more)
                    raise refusal
                if index not in opened:
                    opened.add(index)
                    first = self.form.first(index)
                    choices += [first] if first else []
                if isinstance(event, End):
                    choices.append(self.form.last(index, event))
                elif event.text or self.form.logprobs:
                    choices.append(self.form.step(index, event))
            if choices:
                yield self._all(choices, more)
        ends = [end for end in self.taken.ends if end is not None]
        if self.asked.usage:
            yield _event(self.head.of(self.form.piece, [], usage=replies.usage(ends, self.asked.n or 1)))
        yield DONE

    def _all(self, choices: Sequence[dict[str, Any]], more: dict[str, Any]) -> str:
        return "".join(_event(self.head.of(self.form.piece, [choice], **more)) for choice in choices)


DONE = "data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n"
