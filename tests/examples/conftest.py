"""Random backbones in folders, under the names that pages and examples use for real ones."""

import shutil
from pathlib import Path

import pytest

from incipit.backbones import tiny


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shelf")
    for name in ("llama", "t5", "bert"):
        tiny.save(name, folder / name)
    return folder


@pytest.fixture
def here(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path  # type: ignore[misc]
    shutil.rmtree(tmp_path, ignore_errors=True)
