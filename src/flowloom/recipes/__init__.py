"""Recipes: functions that return a complete configuration of every stage.

A recipe's docstring says hardware, time and what to expect. Variants use `dataclasses.replace`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from flowloom.config import override
from flowloom.recipes.recipe import Recipe

RECIPES = {
    "smoke": "flowloom.recipes.embedded:smoke",
    "demo": "flowloom.recipes.embedded:demo",
    "bench": "flowloom.recipes.embedded:bench",
    "server": "flowloom.recipes.server:server",
    "qwen3_0_6b": "flowloom.recipes.language_models:qwen3_0_6b",
    "llama_3_1_8b": "flowloom.recipes.language_models:llama_3_1_8b",
    "paper": "flowloom.recipes.language_models:paper",
    "sd35_medium_fdfo": "flowloom.recipes.generators:sd35_medium_fdfo",
    "sd35_medium_80gb": "flowloom.recipes.generators:sd35_medium_80gb",
    "sd35_medium_24gb": "flowloom.recipes.generators:sd35_medium_24gb",
}


def resolve(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Build the recipe `name` with overrides by stage, nested as in `config.json`.

    Raises:
        ValueError: On an unknown recipe or field, or a value out of bounds.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe: got {name!r}, expected one of {', '.join(RECIPES)}")
    module, _, function = RECIPES[name].partition(":")
    build: Callable[[], Recipe] = getattr(importlib.import_module(module), function)
    return override(build(), overrides or {})


def stage_config(name: str, stage: str, overrides: Mapping[str, Any] | None = None) -> Any:
    """The configuration of one stage of a recipe; `overrides` are that stage's fields."""
    recipe = resolve(name, {stage: dict(overrides)} if overrides else None)
    if stage not in {field.name for field in dataclasses.fields(recipe)}:
        raise ValueError(f"stage: got {stage!r}, expected one of the recipe's stages")
    return getattr(recipe, stage)


def step_config(
    stage: str, recipe: str, overrides: Mapping[str, Any], sources: str | None = None
) -> Any:
    """The configuration of a step's stage.

    Args:
        stage: Name of the stage.
        recipe: Name of the recipe.
        overrides: Fields to replace, by stage.
        sources: Digests of code and data that the turn began with, as `turns.sources` gives them.

    Raises:
        ValueError: If this process has other code or data: the engine's cache would take what it
            makes for theirs.
    """
    from flowloom.lifecycle import turns

    if sources is not None:
        turns.check_sources(stage, sources)
    return stage_config(recipe, stage, overrides.get(stage))
