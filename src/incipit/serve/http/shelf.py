"""/v1/models: what can be asked. /v1/prompts and /v1/aliases: change it, with a key of its own."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path
from pydantic import BaseModel
from starlette.responses import Response

from incipit.serve.asks import Listed
from incipit.serve.http.refusals import Json, Refusal, documented
from incipit.serve.http.rounds import Desk
from incipit.serve.http.shapes import AliasBody, UploadBody
from incipit.serve.index import longest, words_of

SHORT = 12  # digits of a version's id, where it is shown
Named = Annotated[str, Path(max_length=300)]


class Model(BaseModel):
    """The backbone, a prompt or an alias. parent: the backbone, for a prompt. root: name@version, or the backbone.

    incipit: what a listing tells of a prompt: task, kind, label words, scores, size.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "incipit"
    root: str
    parent: str | None
    max_model_len: int | None
    incipit: dict[str, Any]


class Models(BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Prompt(BaseModel):
    """One version of a prompt."""

    id: str
    object: Literal["prompt"] = "prompt"
    version: str
    aliases: list[str]
    current: bool
    refused: str
    incipit: dict[str, Any]


class Prompts(BaseModel):
    """GET /v1/prompts."""

    object: Literal["list"] = "list"
    data: list[Prompt]


class Deleted(BaseModel):
    """What a DELETE leaves to say."""

    id: str
    deleted: bool
    versions: int


def router(desk: Desk) -> APIRouter:
    """The addresses over one store."""
    found = APIRouter()

    @found.get(
        "/v1/models",
        response_model=Models,
        responses=documented(),
        tags=["models"],
        summary="What can be asked",
    )
    def models() -> Response:  # a plain function: it runs in a thread, thousands of prompts take a moment
        data = [_backbone(desk)]
        for listed in desk.store.listing():
            if listed.current and not listed.refused:
                data.append(_model(desk, listed.name, listed))
            if not listed.refused:
                data += [_model(desk, alias, listed) for alias in listed.aliases]
        return Json({"object": "list", "data": data})

    @found.get(
        "/v1/models/{model:path}",
        response_model=Model,
        responses=documented(404, 422),
        tags=["models"],
        summary="One of them, with its text form",
    )
    def model(model: Named) -> Response:
        if model == desk.backbone_name:
            return Json(_backbone(desk))
        listed = desk.store.listed(model)
        card = desk.store.card(
            f"{listed.name}@{listed.id}"
        )  # of this version, whatever the name means by now
        told = _model(desk, model, replace(listed, card=card))
        told["incipit"] |= {
            "form": card["task"],
            "versions": card.get("versions", {}),
            "data": card.get("data", {}),
            **_figures(card),
        }
        return Json(told)

    @found.get(
        "/v1/prompts",
        response_model=Prompts,
        responses=documented(403),
        tags=["prompts"],
        summary="All versions",
    )
    def prompts() -> Response:
        return Json({"object": "list", "data": [_prompt(listed) for listed in desk.store.listing()]})

    @found.post(
        "/v1/prompts",
        status_code=201,
        response_model=Prompt,
        responses=documented(400, 403, 422),
        tags=["prompts"],
        summary="Upload a prompt",
    )
    async def upload(body: UploadBody) -> Response:
        listed = await desk.aside(lambda: desk.store.add(_decoded(body.files), body.name))
        return Json(_prompt(listed), 201)

    @found.delete(
        "/v1/prompts/{name:path}",
        response_model=Deleted,
        responses=documented(400, 403, 404, 422),
        tags=["prompts"],
        summary="Forget a prompt",
    )
    async def delete(name: Named) -> Response:
        count = await desk.aside(lambda: desk.store.delete(name))
        return Json({"id": name, "deleted": True, "versions": count})

    _aliases(found, desk)
    return found


def _aliases(found: APIRouter, desk: Desk) -> None:
    @found.put(
        "/v1/aliases/{alias:path}",
        response_model=Prompt,
        responses=documented(400, 403, 404, 422),
        tags=["prompts"],
        summary="Set an alias, at once",
    )
    async def alias(alias: Named, body: AliasBody) -> Response:
        if alias == desk.backbone_name:
            raise Refusal(
                400, "an alias cannot go by the backbone's name: choose another", code="invalid_value"
            )
        return Json(_prompt(await desk.aside(lambda: desk.store.alias(alias, body.target))))

    @found.delete(
        "/v1/aliases/{alias:path}",
        response_model=Deleted,
        responses=documented(400, 403, 404, 422),
        tags=["prompts"],
        summary="Forget an alias",
    )
    async def unalias(alias: Named) -> Response:
        await desk.aside(lambda: desk.store.unalias(alias))
        return Json({"id": alias, "deleted": True, "versions": 0})


def _decoded(given: Mapping[str, str]) -> dict[str, bytes]:
    try:
        return {name: base64.b64decode(text, validate=True) for name, text in given.items()}
    except (binascii.Error, ValueError) as error:
        raise Refusal(
            422, "files: not base64: send each file's bytes in base64", code="invalid_value", param="files"
        ) from error


def _backbone(desk: Desk) -> dict[str, Any]:
    backbone = desk.engine.backbone
    about = {
        "kind": "backbone",
        "family": backbone.family,
        "parameters": backbone.parameters,
        "chat": desk.reader.chats,
    }
    return _entry(desk, desk.backbone_name, desk.backbone_name, None, about | {"writes": desk.reader.writes})


def _model(desk: Desk, name: str, listed: Listed) -> dict[str, Any]:
    root = f"{listed.name}@{listed.id[:SHORT]}"
    return _entry(desk, name, root, desk.backbone_name, _about(listed.card) | {"alias": name != listed.name})


def _entry(desk: Desk, name: str, root: str, parent: str | None, about: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": desk.created,
        "owned_by": "incipit",
        "root": root,
        "parent": parent,
        "max_model_len": desk.engine.backbone.space or None,
        "incipit": dict(about),
    }


def _prompt(listed: Listed) -> dict[str, Any]:
    return {
        "id": listed.name,
        "object": "prompt",
        "version": listed.id,
        "aliases": list(listed.aliases),
        "current": listed.current,
        "refused": listed.refused,
        "incipit": _about(listed.card),
    }


def _about(card: Mapping[str, Any]) -> dict[str, Any]:
    """A card, or the short one of a listing, without recipe (which may hold paths of who trained it)."""
    task, prompt = card.get("task"), card.get("prompt")
    form = task if isinstance(task, Mapping) else {}
    shape = prompt if isinstance(prompt, Mapping) else {}
    return {
        "task": form.get("name", "") if form else str(task or ""),
        "kind": str(form.get("kind") or card.get("kind") or ""),
        "words": list(words_of(form) or words_of(card)),
        "parameters": card.get("parameters", 0),
        "prompt": str(shape.get("kind", "")) if shape else str(prompt or ""),
        "length": shape.get("length", card.get("length")),
        "scores": card.get("scores") or {},
        **_several(card),
    }


def _figures(card: Mapping[str, Any]) -> dict[str, Any]:
    """What a page can draw of a card: how training went, and which pieces of which rows a mask keeps."""
    found: dict[str, Any] = {}
    curve, shape = card.get("curve"), card.get("prompt")
    if isinstance(curve, Mapping):
        found["curve"] = dict(curve)
    while isinstance(shape, Mapping):
        if isinstance(shape.get("mask"), list):
            found["mask"] = {"rows": shape["mask"], "removed": bool(shape.get("removed"))}
        shape = shape.get("inner")
    return found


def _several(card: Mapping[str, Any]) -> dict[str, Any]:
    """What an ensemble has besides: how it is mixed, of whom."""
    members, weights = card.get("members"), card.get("weights")
    weights = list(weights) if isinstance(weights, list) else []
    if not isinstance(members, list | tuple):
        return {}
    names = [str(one.get("name", "")) if isinstance(one, Mapping) else str(one) for one in members]
    whole = [one for one in members if isinstance(one, Mapping)]
    more = {"prompt": "ensemble", "length": longest(whole)} if whole else {}
    return (
        {"method": str(card.get("method", "")), "members": names}
        | more
        | ({"weights": weights} if weights else {})
    )
