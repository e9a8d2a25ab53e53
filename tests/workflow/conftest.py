from __future__ import annotations

import pytest

from flowloom.workflow import Catalogue, Grammar, Vocabulary
from tests.workflow.flows import world_catalogue


@pytest.fixture(scope="session")
def embedded() -> Catalogue:
    return world_catalogue()


@pytest.fixture(scope="session")
def vocabulary(embedded) -> Vocabulary:
    return Vocabulary.build(embedded)


@pytest.fixture(scope="session")
def grammar(embedded, vocabulary) -> Grammar:
    return Grammar(embedded, vocabulary)
