"""How every pipeline begins and ends."""

from typing import Any

from kfp import dsl

from components.begin_turn import begin_turn
from components.end_turn import end_turn
from pipelines.resources import cpu_step


def ended() -> dsl.ExitHandler:
    """The scope of a pipeline's steps: however they end, it is recorded."""
    return dsl.ExitHandler(cpu_step(end_turn()), name="turn")


def begun(
    pipeline: str, recipe: Any, overrides: Any, champion: Any = ""
) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Begin a turn.

    Returns:
        Recipe and overrides; these and the digests of code and data; version of the champion.
    """
    chosen = {"recipe": recipe, "overrides": overrides}
    begin = cpu_step(begin_turn(pipeline=pipeline, champion=champion, **chosen))
    return chosen, {**chosen, "sources": begin.outputs["sources"]}, begin.outputs["opponent"]
