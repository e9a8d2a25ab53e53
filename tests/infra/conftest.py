"""Runs and parts of models, as the tests of their life make them."""

from tests.lifecycle.conftest import evaluation, make_parts, make_run

__all__ = ["evaluation", "make_parts", "make_run"]
