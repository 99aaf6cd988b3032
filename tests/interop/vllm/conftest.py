"""A bundle of two prompts over a tiny model, and its middleware, imported from there, around a vLLM that is none."""

import asyncio
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.interop.vllm.fake import Fake

from incipit import artifact
from incipit.artifact import Artifact
from incipit.backbones import Backbone, tiny, wrap
from incipit.interop import vllm
from incipit.prompts import Framed, InputPrompt, Prompt

TASK = {"kind": "text", "input": "Review: {text}"}
LENGTHS = {"mood": 4, "items": 7}  # rows, without the opening token


@pytest.fixture(scope="session")
def llama() -> Backbone:
    return wrap("llama", *tiny.build("llama"))


def soft(backbone: Backbone, length: int, seed: int) -> Prompt:
    """[bos; rows]: a trained prompt's layout."""
    rows = torch.randn(length, backbone.geometry.hidden, generator=torch.Generator().manual_seed(seed))
    inner = InputPrompt(backbone.geometry, length, rows)
    return Framed(backbone.geometry, inner, backbone.layout_ids("{bos}"), (), backbone.embed)


def kept(place: Path, prompt: Prompt, backbone: Backbone, **more: Any) -> Artifact:
    artifact.save(place, prompt=prompt, backbone=backbone, name=place.name, task=TASK, overwrite=True, **more)
    return artifact.load(place)


@pytest.fixture(scope="session")
def shelved(tmp_path_factory: pytest.TempPathFactory, llama: Backbone) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("library")
    recipe = {"decode": {"max_new_tokens": 3, "sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 4}}
    return {
        name: kept(
            folder / name, soft(llama, length, length), llama, recipe=recipe if name == "items" else None
        )
        for name, length in LENGTHS.items()
    }


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, llama: Backbone, shelved: dict[str, Artifact]) -> Path:
    place = tmp_path_factory.mktemp("vllm") / "bundle"
    vllm.write(list(shelved.values()), llama, place)
    return place


def brought(folder: Path) -> ModuleType:
    """A bundle's module as vLLM imports it; nothing of it stays for the next bundle."""

    def forget() -> None:
        for name in [n for n in sys.modules if n.split(".")[0] == "incipit_prompts"]:
            del sys.modules[name]

    forget()
    importlib.invalidate_caches()
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("incipit_prompts")
    finally:
        sys.path.remove(str(folder))
        forget()


@pytest.fixture(scope="session")
def middleware(bundle: Path) -> ModuleType:
    """The module that lies in the bundle."""
    return brought(bundle)


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        *events, done = self.body.decode().strip().split("\n\n")
        assert done == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events]


Call = Callable[..., Reply]


def asked(
    app: Any, path: str, body: Any = None, key: bytes = b"", root: str = "", origin: bytes = b""
) -> Reply:
    """One request, its body in two messages."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    headers = [(b"host", b"here"), (b"content-length", str(len(data)).encode())]
    headers += [(b"authorization", key)] if key else []
    headers += [(b"origin", origin)] if origin else []
    scope = {"type": "http", "method": "GET" if body is None else "POST", "path": root + path, "headers": headers,
             "query_string": b"", "root_path": root}  # fmt: skip
    messages = [
        {"type": "http.request", "body": data[:9], "more_body": True},
        {"type": "http.request", "body": data[9:], "more_body": False},
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    start, *rest = sent
    found = Reply(
        start["status"],
        {k.decode(): v.decode() for k, v in start["headers"]},
        b"".join(m["body"] for m in rest),
    )
    assert not rest[-1].get("more_body") and all(m.get("more_body") for m in rest[:-1])
    assert int(found.headers.get("content-length", len(found.body))) == len(found.body)
    return found


@pytest.fixture
def fake(llama: Backbone, bundle: Path) -> Fake:
    return Fake(llama, (bundle / "chat_template.jinja").read_text(encoding="utf-8"))


@pytest.fixture
def call(fake: Fake, middleware: ModuleType) -> Call:
    """Ask a fresh middleware around `fake`."""
    app = middleware.Prompts(fake)
    return lambda path, body=None, **more: asked(app, path, body, **more)
