"""How every pipeline begins and ends."""

from typing import Any, NamedTuple

from kfp import dsl

from components.begin_turn import begin_turn
from components.end_turn import end_turn
from components.recall import recall
from pipelines.resources import cpu_step, tell_step


def ended() -> dsl.ExitHandler:
    """The scope of a pipeline's steps: however they end, it is recorded."""
    return dsl.ExitHandler(tell_step(end_turn()), name="turn")


class Begun(NamedTuple):
    """What a turn goes by."""

    chosen: dict[str, Any]
    """Recipe and overrides."""
    sourced: dict[str, Any]
    """These, and the digests of code and data."""
    opponent: Any
    """Version of the champion."""
    recalled: Any
    """What to go on from."""


def begun(
    pipeline: str, recipe: Any, overrides: Any, champion: Any = "", previous: Any = ""
) -> Begun:
    """Begin a turn."""
    chosen = {"recipe": recipe, "overrides": overrides}
    task = begin_turn(pipeline=pipeline, champion=champion, previous=previous, **chosen)
    made = cpu_step(task).outputs
    sourced = {**chosen, "sources": made["sources"]}
    return Begun(chosen, sourced, made["opponent"], made["recalled"])


def left(begin: Begun) -> dict[str, Any]:
    """Catalogue, triplets and adapter that an earlier turn left."""
    return cpu_step(recall(recalled=begin.recalled, sources=begin.sourced["sources"])).outputs
