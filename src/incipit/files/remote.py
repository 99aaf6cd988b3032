"""Places that fsspec can address (s3://, hf://, memory://) beside those of this machine."""

from __future__ import annotations

import gzip
import lzma
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from incipit.errors import StorageError
from incipit.files.disk import PathLike, read_bytes, storage


def is_remote(place: PathLike) -> bool:
    """Whether a place is a URL that fsspec resolves (s3://, hf://, memory://) and not a local path."""
    return "://" in os.fspath(place)


def content(place: PathLike) -> bytes:
    """A whole file, local or remote."""
    if not is_remote(place):
        return read_bytes(place)
    import fsspec

    with storage(place, "reading"), fsspec.open(os.fspath(place), "rb") as stream:
        return bytes(stream.read())


def fetch_folder(place: PathLike, into: Path) -> Path:
    """Copy a remote folder to a local one through fsspec; a local folder is returned as it is."""
    if not is_remote(place):
        return Path(place)
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(os.fspath(place))
        system.get(root.rstrip("/") + "/", str(into) + "/", recursive=True)
    except (OSError, ValueError, ImportError) as error:
        raise StorageError(
            f"reading {os.fspath(place)!r} failed: {error}; check the address and access"
        ) from error
    return into


def push_folder(local: Path, place: PathLike, *, overwrite: bool = False) -> None:
    """Copy a local folder to a remote place; the card goes last, so a torn copy is not taken for an artifact."""
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(os.fspath(place))
        if system.exists(root) and not overwrite:
            raise StorageError(
                f"{os.fspath(place)!r} exists already: choose another place or pass --overwrite"
            )
        system.makedirs(root, exist_ok=True)
        for file in sorted(local.iterdir(), key=lambda f: (f.name == "card.json", f.name)):
            system.put_file(str(file), f"{root.rstrip('/')}/{file.name}")
    except (OSError, ValueError, ImportError) as error:
        raise StorageError(
            f"writing {os.fspath(place)!r} failed: {error}; check the address and access"
        ) from error


def list_folders(place: PathLike, marker: str) -> list[str]:
    """Addresses of all folders at or below `place` that hold a file named `marker`, sorted."""
    if not is_remote(place):
        near = Path(place).rglob(marker)
        return sorted(str(p.parent) for p in near if not any(map(_unfinished, p.relative_to(place).parts)))
    import fsspec

    system, root = fsspec.core.url_to_fs(os.fspath(place))
    found = [f for f in system.find(root) if f.rsplit("/", 1)[-1] == marker]
    return sorted(system.unstrip_protocol(f.rsplit("/", 1)[0]) for f in found)


def _unfinished(name: str) -> bool:
    """Whether a folder is one that `atomic_folder` was writing, or has put aside."""
    return name.startswith(".") and name.endswith((".part", ".old"))


@contextmanager
def open_data(path: PathLike) -> Iterator[BinaryIO]:
    """Open a local or remote file for reading; gzip and xz (known by their first bytes) are unpacked."""
    with storage(path, "reading"), ExitStack() as stack:
        if is_remote(path):
            import fsspec

            raw: BinaryIO = stack.enter_context(fsspec.open(os.fspath(path), "rb"))
        else:
            raw = stack.enter_context(open(path, "rb"))
        head = raw.read(6)
        raw.seek(0)
        if head.startswith(b"\x1f\x8b"):
            yield cast(BinaryIO, stack.enter_context(gzip.GzipFile(fileobj=raw)))
        elif head == b"\xfd7zXZ\x00":
            yield cast(BinaryIO, stack.enter_context(lzma.LZMAFile(raw)))
        else:
            yield raw
