"""Files and folders of this machine, written whole or not at all.

A file is written beside its target under a temporary name, flushed to the disk and renamed, so a reader sees
the old bytes or the new bytes and never a part. A folder is written the same way.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from incipit.errors import StorageError, nearest

PathLike: TypeAlias = str | os.PathLike[str]


@contextmanager
def storage(path: PathLike, doing: str) -> Iterator[None]:
    """Turn an OSError into a StorageError that names the file and the next move."""
    try:
        yield
    except OSError as error:
        hint = {28: "free some space and repeat", 13: "check its permissions", 30: "choose a writable folder"}
        move = "; " + hint.get(error.errno or 0, "check the path and the disk")
        if error.errno == errno.ENOENT:
            move = _like(Path(path)) or move
        raise StorageError(f"{doing} {os.fspath(path)!r} failed: {error.strerror or error}{move}") from error


def _like(path: Path) -> str:
    """ "; did you mean 'b.toml'?" of a missing file, where its folder holds a name that is like it."""
    try:
        found = nearest(path.name, os.listdir(path.parent))
    except OSError:
        return ""
    return found if "did you mean" in found else ""


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


def check_writable(path: PathLike, *, folder: bool = False) -> None:
    """Before long work: StorageError where a file, or a folder, of this name could not be written."""
    target = Path(path)
    with storage(target, "writing"):
        if target.exists() and target.is_dir() != folder:
            was, wanted = ("file", "folder") if folder else ("folder", "file")
            raise StorageError(f"{str(target)!r} is a {was}: name a {wanted}")
        near = next(place for place in target.absolute().parents if place.exists())
        if not near.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(near, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


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


def exists(path: PathLike) -> bool:
    """Whether a local file or folder is there; a text too long to be a name is none."""
    with storage(path, "reading"):
        try:
            return Path(path).exists()
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
    return False


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


def folder_files(path: PathLike) -> list[str] | None:
    """Names of the files in a folder, sorted, hidden ones left out; None when the path is no folder."""
    target = Path(path)
    with storage(target, "listing"):
        if not target.is_dir():
            return None
        return sorted(f.name for f in target.iterdir() if f.is_file() and not f.name.startswith("."))
