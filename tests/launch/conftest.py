"""A stage to launch, in this process and in those that a test starts."""

import os
from pathlib import Path

import pytest

from flowloom import stages
from flowloom.runs import code_digest
from tests.designer.conftest import catalogue, grammar, inputs
from tests.launch import rehearsal

__all__ = ["catalogue", "grammar", "inputs", "rehearse"]


@pytest.fixture
def rehearse(monkeypatch):
    """The rehearsal by name."""
    root = Path(__file__).parents[2]
    monkeypatch.setitem(stages.STAGES, rehearsal.NAME, None)  # restored afterwards
    rehearsal.register()
    paths = [str(root / "tests/launch/site"), str(root), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    # The source may be edited while processes start.
    monkeypatch.setenv("FLOWLOOM_CODE_DIGEST", "0" * 64)
    code_digest.cache_clear()
    # Nothing is recorded: MLflow takes seconds to import.
    monkeypatch.setenv("FLOWLOOM_TRACKING", "spool")
    yield rehearsal.NAME
    code_digest.cache_clear()
