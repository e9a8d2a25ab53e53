"""Facts: the package imports neither torch nor scipy, and graphs and validation not even numpy."""

from __future__ import annotations

import subprocess
import sys

import pytest

import flowloom.workflow as package


def modules_after(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_no_heavy_imports():
    loaded = modules_after("from flowloom.workflow import *")
    assert not loaded & {"torch", "scipy", "transformers", "mlflow", "pandas"}
    light = modules_after("from flowloom.workflow import Workflow, Catalogue, validate")
    assert not light & {"torch", "numpy"}


def test_every_name_is_there():
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing
