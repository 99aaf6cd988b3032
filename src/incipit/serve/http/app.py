"""The application: engine and store behind OpenAI's addresses, with limits, figures and a page.

gate = make_app(engine, store, Options())       # an ASGI application
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from incipit import __version__, files
from incipit.errors import IncipitError
from incipit.serve.asks import AnyEngine, AnyStore
from incipit.serve.http import asking, shelf
from incipit.serve.http.gate import Gate, Limits
from incipit.serve.http.keys import Keys
from incipit.serve.http.meters import Meters
from incipit.serve.http.refusals import MEANINGS, Refusal, invalid
from incipit.serve.http.rounds import Desk
from incipit.serve.http.shapes import MAX_ROWS

ABOUT = (
    "Soft prompts over one frozen model, in OpenAI's shapes. `model` names a prompt, an alias, one version "
    "(`name@id`) or the backbone itself."
)


@dataclass(frozen=True)
class Options:
    """How to serve. name: what clients call the backbone ("": as it was loaded, a folder by its last part).

    keys: who may ask (none: anybody). admin: who may change prompts (none: nobody). timeout: longest deadline of a
    request in seconds, and its default. new: tokens to write where neither request nor prompt says. rows: answers of
    one request. by_prompt: figures by the prompt's name. hidden: places that no error tells, as the library's.
    """

    name: str = ""
    keys: Keys = field(default_factory=Keys)
    admin: Keys = field(default_factory=Keys)
    limits: Limits = field(default_factory=Limits)
    timeout: float = 60.0
    new: int = 16
    rows: int = MAX_ROWS
    by_prompt: bool = False
    hidden: tuple[str, ...] = ()


class Ready(BaseModel):
    """Whether a request would be taken, and why not."""

    ready: bool
    why: str


def make_app(engine: AnyEngine, store: AnyStore, options: Options | None = None) -> Gate:
    """The ASGI application. Its lifespan starts the engine and stops it."""
    options = options or Options()
    name = options.name or called(engine.backbone.name)
    meters = Meters(engine, name, options.by_prompt)
    desk = Desk(
        engine, store, meters, backbone_name=name, timeout=options.timeout, new=options.new, rows=options.rows
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await desk.aside(engine.stop)
        desk.close()

    app = FastAPI(
        title="incipit", description=ABOUT, version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        redirect_slashes=False, separate_input_output_schemas=False,
    )  # fmt: skip
    app.include_router(asking.router(desk))
    app.include_router(shelf.router(desk))
    gate = Gate(
        app, keys=options.keys, admin=options.admin, limits=options.limits, meters=meters, stop=engine.stop
    )
    _watched(app, gate, desk)
    _failures(app, options.hidden)
    return gate


def called(name: str) -> str:
    """What clients call a backbone: its own name, of a local folder the last part (a path is nobody's business)."""
    return Path(os.path.abspath(name)).name if files.exists(name) else name


def _watched(app: FastAPI, gate: Gate, desk: Desk) -> None:
    """What operators and browsers look at."""
    with files.open_data(Path(__file__).with_name("page.html")) as stream:
        page = stream.read()
    headers = {"content-security-policy": _policy(page.decode()), "cache-control": "no-cache"}

    @app.get("/healthz", tags=["state"], summary="The process lives")
    async def healthz() -> dict[str, bool]:
        return {"ok": True}

    @app.get(
        "/readyz",
        tags=["state"],
        response_model=Ready,
        responses={503: {"model": Ready}},
        summary="Takes requests",
    )
    async def readyz() -> Response:
        why = "shutting down" if gate.draining else "" if desk.engine.ready else desk.engine.why or "starting"
        return JSONResponse({"ready": not why, "why": why}, 503 if why else 200)

    @app.get("/metrics", tags=["state"], summary="Figures for Prometheus", response_class=Response,
             responses={200: {"content": {METRICS: {"schema": {"type": "string"}}}}})  # fmt: skip
    async def metrics() -> Response:
        return Response(desk.meters.text(), media_type=METRICS)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)


METRICS = "text/plain; version=0.0.4; charset=utf-8"


def _policy(page: str) -> str:
    """The browser runs the page's own script and style and talks to this server, nothing else."""
    found = {}
    for tag in ("script", "style"):
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
        found[tag] = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    return (
        f"default-src 'none'; script-src {found['script']}; style-src {found['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _failures(app: FastAPI, hidden: Sequence[str]) -> None:
    """Every error in OpenAI's shape."""
    places = "|".join(re.escape(place) for place in sorted(filter(None, hidden), key=len, reverse=True))
    secret = re.compile(rf"(?<=['\"])(?:{places})(?=[/'\"])" if places else r"(?!)")  # as errors quote them

    @app.exception_handler(Refusal)
    async def refused(_: Request, error: Refusal) -> Response:
        return error.response()

    @app.exception_handler(IncipitError)
    async def failed(_: Request, error: IncipitError) -> Response:
        refusal = Refusal.of(error)
        refusal.message = secret.sub("LIBRARY", refusal.message)
        return refusal.response()

    @app.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: RequestValidationError) -> Response:
        return invalid(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        said = {404: "no such address: see /openapi.json", 405: "no such method at this address"}
        said |= {400: "the body cannot be read as JSON"}
        refusal = Refusal(
            error.status_code, said.get(error.status_code, MEANINGS.get(error.status_code, "refused"))
        )
        answer = refusal.response()
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def broken(_: Request, __: Exception) -> Response:
        return Refusal(
            500, "the server failed on this request", kind="server_error", code="internal_error"
        ).response()
