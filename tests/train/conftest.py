import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """toy.py of this folder; it is also a script, so it is no fixture itself."""
    spec = importlib.util.spec_from_file_location("incipit_toy", Path(__file__).with_name("toy.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["incipit_toy"] = module
    spec.loader.exec_module(module)
    return module
