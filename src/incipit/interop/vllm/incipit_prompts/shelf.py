"""The bundle's own files, read where vLLM runs: manifest, prompts, embedding table, tokenizer. No incipit is needed.

# P length, T text, V vocabulary, H hidden
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

SCHEMA = 1
MANIFEST, PROMPTS, EMBEDDINGS, TOKENIZER = (
    "manifest.json",
    "prompts.safetensors",
    "embeddings.safetensors",
    "tokenizer.json",
)
ROWS = "rows"  # the one tensor of EMBEDDINGS, [V, H]
LARGEST = 2**28  # numbers that one request may become: 1 GiB of them


class Refused(Exception):
    """A request that is not taken, in OpenAI's shape."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> bytes:
        """What the client reads."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        told = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": told}).encode()


@dataclass(frozen=True)
class Entry:
    """What the manifest says of one prompt. decode: the request's settings where a client gives none."""

    length: int
    version: str
    sha256: str
    decode: Mapping[str, Any]


def digest(rows: Tensor) -> str:
    """sha256 of float32 rows [P, H], in their order in memory."""
    return hashlib.sha256(rows.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


class Shelf:
    """Prompts by name, and texts in their embeddings. Raises ValueError for a bundle that is not whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = _manifest(folder)
        self.backbone: Mapping[str, Any] = manifest["backbone"]
        self.no_chat = str(manifest["no_chat"])
        self.probes: Sequence[Mapping[str, Any]] = manifest["probes"]
        self.entries = {name: Entry(**entry) for name, entry in manifest["prompts"].items()}
        self._file = _opened(folder / PROMPTS)
        if missing := sorted(self.entries.keys() - set(self._file.keys())):
            raise ValueError(f"{folder / PROMPTS} lacks {', '.join(missing[:4])}: {AGAIN}")
        self.table: Tensor = _opened(folder / EMBEDDINGS).get_tensor(ROWS)  # mapped: what is asked is read
        wanted = (self.backbone["vocab"], self.backbone["hidden"])
        if tuple(self.table.shape) != wanted:
            raise ValueError(f"{folder / EMBEDDINGS} is {tuple(self.table.shape)}, not {wanted}: {AGAIN}")
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._read: dict[str, Tensor | Refused] = {}

    def rows(self, name: str) -> Tensor:
        """The rows of a prompt [P, H], checked on first use. Raises Refused for damaged ones, each time."""
        if name not in self._read:
            self._read[name] = self._checked(name)
        found = self._read[name]
        if isinstance(found, Refused):
            raise found
        return found

    def _checked(self, name: str) -> Tensor | Refused:
        entry, hidden = self.entries[name], self.backbone["hidden"]
        said = ""
        try:
            rows: Tensor = self._file.get_tensor(name)
        except SafetensorError as error:
            return Refused(500, f"prompt {name!r} cannot be read ({error}): {AGAIN}", "damaged_prompt")
        if tuple(rows.shape) != (entry.length, hidden) or rows.dtype != torch.float32:
            said = f"is {rows.dtype} of shape {tuple(rows.shape)}, not float32 {(entry.length, hidden)}"
        elif not bool(torch.isfinite(rows).all()):
            said = "holds NaN or infinite numbers"
        elif digest(rows) != entry.sha256:
            said = "does not have the hash that the manifest names"
        return Refused(500, f"prompt {name!r} {said}: {AGAIN}", "damaged_prompt") if said else rows

    def ids(self, text: str) -> list[int]:
        """Token ids of a text without special tokens: the prompt's rows bring the opening one."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Refused(
                400, "the text holds half a surrogate pair: send valid Unicode", "invalid_value", "prompt"
            ) from error
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def embedded(self, name: str, ids: Sequence[int]) -> Tensor:
        """[rows of the prompt; embeddings of the text]: [P + T, H] float32. Raises Refused."""
        rows = self.rows(name)
        room = int(self.backbone["positions"])
        if room and len(rows) + len(ids) >= room:
            said = f"a prompt of {len(rows)} rows and a text of {len(ids)} tokens leave nothing of {room} positions"
            raise Refused(400, f"{said}: shorten the text", "context_length_exceeded", "prompt")
        return torch.cat([rows, self.text(ids)])  # [P + T, H]

    def text(self, ids: Sequence[int]) -> Tensor:
        """Embeddings of a text [T, H] float32. Raises Refused for an id that is none."""
        vocab = len(self.table)
        wrong = [i for i in ids if not 0 <= i < vocab]
        if wrong:
            said = f"token id {wrong[0]} is not in the vocabulary (0..{vocab - 1})"
            raise Refused(400, said, "invalid_value", "prompt")
        return self.table[torch.tensor(list(ids), dtype=torch.int64)].float()  # [T, H]

    def payloads(self, name: str, texts: Sequence[Sequence[int]]) -> list[str]:
        """What vLLM reads as prompt_embeds: base64 of each text behind the prompt's rows. Raises Refused."""
        numbers = sum(self.entries[name].length + len(t) for t in texts) * int(self.backbone["hidden"])
        if numbers > LARGEST:
            said = f"{len(texts)} texts become {numbers:,} numbers, at most {LARGEST:,} go into one request"
            raise Refused(400, f"{said}: ask for fewer at once", "invalid_value", "prompt")
        return [packed(self.embedded(name, ids)) for ids in texts]


AGAIN = "write the bundle again with incipit export"


def packed(rows: Tensor) -> str:
    """Rows as vLLM reads them: base64 of torch.save. Raises Refused for numbers that are not finite."""
    if not bool(torch.isfinite(rows).all()):
        raise Refused(
            500, f"the embeddings hold NaN or infinite numbers: {AGAIN}", "damaged_embeddings", "prompt"
        )
    stream = io.BytesIO()
    torch.save(rows.clone(), stream)  # a clone: a view would take its whole storage along
    return base64.b64encode(stream.getvalue()).decode()


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        schema = found["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is no bundle of prompts ({error}): {AGAIN}") from error
    if schema != SCHEMA:
        raise ValueError(f"{folder} is a bundle of schema {schema}, this middleware reads {SCHEMA}: {AGAIN}")
    return found


def _opened(path: Path) -> Any:
    """A safetensors file, mapped; nothing is unpickled."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}): {AGAIN}") from error
