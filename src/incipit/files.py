"""All disk code: atomic writes, hashes, JSON, JSONL, TOML, safetensors, and places that fsspec can address.

A file is written beside its target under a temporary name, flushed to the disk and renamed, so a reader sees
the old bytes or the new bytes and never a part. A folder is written the same way.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import importlib.metadata
import json
import lzma
import os
import shutil
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, cast

from incipit.errors import ArtifactError, DataError, RecipeError, StorageError

if TYPE_CHECKING:
    from torch import Tensor

PathLike: TypeAlias = str | os.PathLike[str]


@contextmanager
def storage(path: PathLike, doing: str) -> Iterator[None]:
    """Turn an OSError into a StorageError that names the file and the next move."""
    try:
        yield
    except OSError as error:
        hint = {28: "free some space and repeat", 13: "check its permissions", 30: "choose a writable folder"}
        move = hint.get(error.errno or 0, "check the path and the disk")
        raise StorageError(
            f"{doing} {os.fspath(path)!r} failed: {error.strerror or error}; {move}"
        ) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def atomic_write(path: PathLike, content: bytes | str) -> None:
    """Write the whole file or nothing; an existing file stays intact until the new one is on the disk."""
    target = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    with storage(target, "writing"):
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(name, 0o666 & ~_umask())  # mkstemp gives 0600; an artifact is read by others too
            os.replace(name, target)
            _sync_folder(target.parent)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextmanager
def atomic_folder(path: PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends, and vanishes when it raises."""
    target = Path(path)
    if target.exists() and not overwrite:
        raise StorageError(f"{str(target)!r} exists already: choose another folder or pass --overwrite")
    with storage(target, "writing"):
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part"))
        try:
            yield part
            old = None
            if target.exists():
                old = (
                    Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".old"))
                    / "old"
                )
                os.replace(target, old)
            os.chmod(part, 0o777 & ~_umask())
            os.replace(part, target)
            _sync_folder(target.parent)
            if old is not None:
                shutil.rmtree(old.parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def read_bytes(path: PathLike) -> bytes:
    """Read a whole file."""
    with storage(path, "reading"):
        return Path(path).read_bytes()


def content(place: PathLike) -> bytes:
    """A whole file, local or remote."""
    if not is_remote(place):
        return read_bytes(place)
    import fsspec

    with storage(place, "reading"), fsspec.open(os.fspath(place), "rb") as stream:
        return bytes(stream.read())


def exists(path: PathLike) -> bool:
    """Whether a local file or folder is there; a text too long to be a name is none."""
    with storage(path, "reading"):
        try:
            return Path(path).exists()
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
    return False


def read_json(path: PathLike) -> Any:
    """Read a JSON file."""
    try:
        return json.loads(read_bytes(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{os.fspath(path)!r} is not valid JSON: {error}; restore or rewrite the file"
        ) from error


def write_json(path: PathLike, value: Any) -> None:
    """Write JSON with sorted keys, so that equal values give equal bytes."""
    atomic_write(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def append_jsonl(path: PathLike, row: Mapping[str, Any]) -> None:
    """Append one line; a torn last line of a killed writer is closed first."""
    target = Path(path)
    line = json.dumps(row, ensure_ascii=False, allow_nan=True) + "\n"
    with storage(target, "appending to"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "ab+") as stream:
            if stream.tell() > 0:
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":
                    stream.write(b"\n")
            stream.write(line.encode("utf-8"))


def read_jsonl(path: PathLike) -> list[dict[str, Any]]:
    """Read the whole lines of a JSONL file; a torn line (a writer was killed) is left out."""
    rows = []
    for line in read_bytes(path).decode("utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def truncate(path: PathLike, size: int) -> None:
    """Cut a file to `size` bytes (records written after the last checkpoint)."""
    with storage(path, "truncating"):
        if Path(path).exists():
            os.truncate(path, size)


def file_size(path: PathLike) -> int:
    """Bytes of a file; 0 when there is none. Of a folder: the sum of its files."""
    target = Path(path)
    if target.is_dir():
        return sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    return target.stat().st_size if target.exists() else 0


def read_toml(path: PathLike) -> dict[str, Any]:
    """Read a TOML file."""
    try:
        return tomllib.loads(read_bytes(path).decode("utf-8-sig"))  # editors on Windows write the mark
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{os.fspath(path)!r} is not valid TOML: {error}; mend that line") from error


def dump_toml(value: Mapping[str, Any]) -> str:
    """Write a mapping as TOML text; keys with the value None are left out (TOML has no null)."""
    import tomli_w

    def clean(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {str(k): clean(v) for k, v in item.items() if v is not None}
        if isinstance(item, (list, tuple)):
            return [clean(v) for v in item]
        return item

    return tomli_w.dumps(clean(value))


def save_tensors(
    path: PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write safetensors atomically; tensors are stored contiguous, on the CPU, in sorted order."""
    from safetensors.torch import save

    ready = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    atomic_write(path, save(ready, metadata=dict(metadata) if metadata else None))


def load_tensors(path: PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read safetensors: (tensors, metadata). A truncated or foreign file is refused; nothing is unpickled."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = read_bytes(path)
    try:
        tensors = load(data)
        size = int.from_bytes(data[:8], "little")
        metadata: dict[str, str] = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(
            f"{os.fspath(path)!r} is truncated or not a safetensors file ({error}): copy it again from its source"
        ) from error
    return tensors, metadata


def sha256_bytes(data: bytes) -> str:
    """Hex sha256."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: PathLike) -> str:
    """Hex sha256 of a file's bytes."""
    return sha256_bytes(read_bytes(path))


def sha256_json(value: Any) -> str:
    """Hex sha256 of a JSON value with sorted keys."""
    return sha256_bytes(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8"))


def sha256_tensor(tensor: Tensor) -> str:
    """Hex sha256 of dtype, shape and bytes."""
    import torch

    plain = tensor.detach().cpu().contiguous()
    head = f"{plain.dtype}{tuple(plain.shape)}".encode()
    return sha256_bytes(head + plain.view(torch.uint8).numpy().tobytes() if plain.numel() else head)


def package_versions(*names: str) -> dict[str, str]:
    """Versions of the installed ones of these packages."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def remove_run(folder: PathLike) -> None:
    """Remove the checkpoint and metrics of a run, so that a new one may start there; artifacts stay."""
    for name in ("checkpoint.safetensors", "metrics.jsonl"):
        with storage(Path(folder) / name, "removing"):
            (Path(folder) / name).unlink(missing_ok=True)


@contextmanager
def scratch_folder(content: Mapping[str, bytes]) -> Iterator[Path]:
    """A folder with these files, gone when the block ends."""
    with tempfile.TemporaryDirectory() as scratch, storage(scratch, "writing"):
        for name, data in content.items():
            (Path(scratch) / Path(name).name).write_bytes(data)
        yield Path(scratch)


def copy_folder(folder: PathLike, target: PathLike) -> None:
    """Copy the files of a folder; the target is there whole or not at all, and what was there is replaced."""
    with atomic_folder(target, overwrite=True) as part:
        for name in folder_files(folder) or []:
            shutil.copyfile(Path(folder) / name, part / name)


def remove_files(folder: PathLike, names: Iterable[str], top: PathLike) -> None:
    """Remove these files of a folder; then it and the folders above it, below `top`, that nothing else is in."""
    with storage(folder, "removing"):
        for name in names:
            (Path(folder) / name).unlink(missing_ok=True)
        for place in (Path(folder), *Path(folder).parents):
            if place == Path(top) or (place.exists() and any(place.iterdir())):
                return
            if place.exists():
                place.rmdir()


def remove_parts(folder: PathLike) -> None:
    """Remove what writers left unfinished in a folder when they were killed; nobody else may be writing there."""
    for part in Path(folder).glob(".*.part"):
        with storage(part, "removing"):
            if part.is_dir():
                shutil.rmtree(part)
            else:
                part.unlink(missing_ok=True)


def is_remote(place: PathLike) -> bool:
    """Whether a place is a URL that fsspec resolves (s3://, hf://, memory://) and not a local path."""
    return "://" in os.fspath(place)


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


def folder_files(path: PathLike) -> list[str] | None:
    """Names of the files in a folder, sorted, hidden ones left out; None when the path is no folder."""
    target = Path(path)
    with storage(target, "listing"):
        if not target.is_dir():
            return None
        return sorted(f.name for f in target.iterdir() if f.is_file() and not f.name.startswith("."))


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
