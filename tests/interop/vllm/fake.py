"""An ASGI application in vLLM's shapes: it reads prompt_embeds as vLLM 0.32.0 does and writes greedily, one tiny model.

Its replies and addresses are what the middleware must meet there; `make test-vllm` holds it to the real one.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from incipit.backbones import Backbone

BASE = "the/base"
SOFT = "<prompt_embeds>"
KEY = b"Bearer let-me-in"


class Fake:
    """vLLM with one model. seen: bodies of the questions that reached it. keyed: whether it asks for KEY."""

    def __init__(self, backbone: Backbone, template: str = "", keyed: bool = False) -> None:
        self.backbone, self.template, self.keyed = backbone, template, keyed
        self.seen: list[dict[str, Any]] = []
        self.paths: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        self.paths.append(path)
        if self.keyed and dict(scope["headers"]).get(b"authorization") != KEY:
            return await self._json(send, 401, {"error": "Unauthorized"})
        if path == "/v1/models":
            card = {"id": BASE, "object": "model", "created": 1, "owned_by": "vllm", "root": "/models/base",
                    "parent": None, "max_model_len": 128, "permission": []}  # fmt: skip
            origin = dict(scope["headers"]).get(b"origin")
            more = [(b"access-control-allow-origin", origin)] if origin else []
            return await self._json(send, 200, {"object": "list", "data": [card]}, more)
        if path not in ("/v1/completions", "/v1/chat/completions"):
            return await self._json(send, 404, {"detail": "Not Found"})
        message = await receive()
        headers = dict(scope["headers"])
        assert int(headers[b"content-length"]) == len(message["body"]) and not message["more_body"]
        try:
            asked = json.loads(message["body"])
        except (ValueError, RecursionError):
            asked = None
        if not isinstance(asked, dict):
            return await self._json(send, 400, {"error": {"message": "no JSON object"}})
        self.seen.append(asked)
        if asked.get("model", BASE) != BASE:
            return await self._json(send, 404, {"error": {"message": f"no model {asked['model']}"}})
        await self._answer(path == "/v1/chat/completions", asked, send)

    async def _answer(self, chat: bool, asked: Mapping[str, Any], send: Any) -> None:
        rows = [self._conversation(asked["messages"])] if chat else self._prompts(asked)
        answers = [
            self._written(one, asked.get("max_tokens") or asked["max_completion_tokens"]) for one in rows
        ]
        kind = "chat.completion" if chat else "text_completion"
        head = {"id": "x-1", "object": kind, "created": 1, "model": BASE, "system_fingerprint": None}
        if not asked.get("stream"):
            choices = [self._choice(chat, i, *answer) for i, answer in enumerate(answers)]
            read = sum(map(len, rows))
            return await self._json(send, 200, {**head, "choices": choices, "usage": {"prompt_tokens": read}})
        await send({"type": "http.response.start", "status": 200,
                    "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]})  # fmt: skip
        events = [
            {**head, "choices": [{"index": i, "text": self.backbone.piece(t), "finish_reason": None}]}
            for i, (ids, _) in enumerate(answers)
            for t in ids
        ]
        data = b"".join(f"data: {json.dumps(e)}\n\n".encode() for e in events) + b"data: [DONE]\n\n"
        for at in range(0, len(data), 37):  # cut anywhere, as a network may
            await send({"type": "http.response.body", "body": data[at : at + 37], "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _json(self, send: Any, status: int, body: Any, more: Any = ()) -> None:
        data = json.dumps(body).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(data)).encode()),
            *more,
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": data[:5], "more_body": True})
        await send({"type": "http.response.body", "body": data[5:], "more_body": False})

    def _choice(self, chat: bool, index: int, ids: list[int], logs: list[dict[str, float]]) -> dict[str, Any]:
        text = self.backbone.tokenizer.decode(ids)
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return {
            "index": index,
            **said,
            "logprobs": {"top_logprobs": logs},
            "token_ids": ids,
            "finish_reason": "stop",
        }

    def _prompts(self, asked: Mapping[str, Any]) -> list[Tensor]:
        """[S, H] each; embeddings in place of the prompt, as in `preprocess_completion`."""
        if "prompt_embeds" not in asked:
            return [self.backbone.embed(self.backbone.text_ids(asked["prompt"]))]
        given = asked["prompt_embeds"]
        return [unpacked(one) for one in ([given] if isinstance(given, str) else given)]

    def _conversation(self, messages: list[dict[str, Any]]) -> Tensor:
        """[S, H]: the template around the text, rows where the placeholder stands, as in `render_messages`."""
        rows: list[Tensor] = []
        flat = []
        for message in messages:
            content = message["content"]
            if isinstance(content, list):
                rows += [unpacked(part["data"]) for part in content if part["type"] == "prompt_embeds"]
                content = "\n".join(SOFT if p["type"] == "prompt_embeds" else p["text"] for p in content)
            flat.append({**message, "content": content})
        text = self.backbone.tokenizer.apply_chat_template(
            flat, chat_template=self.template or None, tokenize=False, add_generation_prompt=True
        )
        first, *rest = text.split(SOFT)
        parts = [self.backbone.embed(self.backbone.text_ids(first))] if first else []
        for soft, after in zip(rows, rest, strict=True):
            parts += [soft, self.backbone.embed(self.backbone.text_ids(after))]
        return torch.cat(parts)

    @torch.no_grad()
    def _written(self, rows: Tensor, new: int) -> tuple[list[int], list[dict[str, float]]]:
        """(ids, the five likeliest of each place), by the model itself, from its embeddings."""
        ids: list[int] = []
        logs: list[dict[str, float]] = []
        for _ in range(new):
            said = self.backbone.model(inputs_embeds=rows[None]).logits[0, -1].log_softmax(-1)
            best = said.topk(5)
            logs.append(
                {f"token_id:{i}": v for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)}
            )
            ids.append(int(best.indices[0]))
            rows = torch.cat([rows, self.backbone.embed(ids[-1:])])
        return ids, logs


def unpacked(data: str) -> Tensor:
    """What `safe_load_prompt_embeds` reads."""
    found: Tensor = torch.load(io.BytesIO(base64.b64decode(data, validate=True)), weights_only=True)
    assert found.dim() == 2 and found.dtype == torch.float32
    return found
