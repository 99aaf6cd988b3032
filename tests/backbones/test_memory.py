"""How much memory there is."""

import os
from pathlib import Path

import pytest
import torch

from incipit.backbones import memory

HERE = torch.device("cpu")


def test_a_container_has_less_than_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    granted = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CONTAINER", str(granted))
    whole = memory.total(HERE)
    assert whole == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for said, found in (("max\n", whole), ("4096\n", 4096), (str(2 * whole), whole), ("", whole)):
        granted.write_text(said)
        assert memory.total(HERE) == found


def test_a_system_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf_names", {})
    assert memory.total(HERE) == 0
