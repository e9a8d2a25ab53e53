"""Facts: the text-to-image profile is every class of its three bands that a server can run; a class
without an installed file, a deprecated one and an unknown one stay out; nothing left is an error.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flowloom.workflow import Catalogue, CatalogueError
from flowloom.workflow.profile import MAY, MUST, SHOULD, TEXT_TO_IMAGE, text_to_image

CATALOGUES = Path(__file__).parents[2] / "data" / "catalogues"


@pytest.fixture(scope="module")
def example() -> Catalogue:
    return Catalogue.load(CATALOGUES / "example.json.gz")


def test_an_installation_has_all_of_it(example):
    assert text_to_image(example) == TEXT_TO_IMAGE
    assert len(set(TEXT_TO_IMAGE)) == len(MUST) + len(SHOULD) + len(MAY) == 70
    assert not any(example.nodes[name].deprecated for name in TEXT_TO_IMAGE)


def test_without_files_loaders_are_left_out(example):
    bare = Catalogue.load(CATALOGUES / "comfyui-0.33.json.gz")
    found = text_to_image(bare)
    lost = set(TEXT_TO_IMAGE) - set(found)
    loaders = {c for c in TEXT_TO_IMAGE if any(i.folder for i in example.nodes[c].inputs)}
    # A server without files still lists one decoder: none.
    assert lost == loaders - {"VAELoader"}


def test_a_list_of_ones_own(example, embedded):
    assert text_to_image(example, ["SaveImage", "NoSuchNode", "VAEDecode", "SaveImage"]) == (
        "SaveImage",
        "VAEDecode",
    )
    old = replace(example.nodes["VAEDecode"], deprecated=True)
    aged = replace(example, nodes={**example.nodes, "VAEDecode": old})
    assert text_to_image(aged, ["SaveImage", "VAEDecode"]) == ("SaveImage",)
    assert "UNETLoader" not in text_to_image(embedded)
    with pytest.raises(CatalogueError, match=r"profile: got 1 classes \(NoSuchNode\)"):
        text_to_image(example, ["NoSuchNode"])
