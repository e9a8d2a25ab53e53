"""Begin a turn: check its arguments, freeze what it goes by."""

from typing import NamedTuple

from kfp import dsl

from components.images import CPU_IMAGE


@dsl.component(base_image=CPU_IMAGE, install_kfp_package=False)
def begin_turn(
    pipeline: str, recipe: str, overrides: dict, champion: str, previous: str
) -> NamedTuple("Begun", [("opponent", str), ("recalled", dict), ("sources", str)]):
    """Check recipe and overrides, freeze the champion and what the turn goes on from.

    Args:
        pipeline: Name of the pipeline.
        recipe: Name of a recipe in `flowloom.recipes`.
        overrides: Fields to replace, by stage, nested as in `config.json`.
        champion: Version of the champion; empty if none, `auto` for the one there is now.
        previous: Version whose catalogue, triplets and proposals the turn goes on from; empty for
            none, `auto` for the one registered last, or the champion if that one does not fit.

    Returns:
        opponent: Version of the champion to compare with; empty if none.
        recalled: Number of the previous version and digests of what it left; empty if none.
        sources: Digests of code and data: with the other inputs they decide what a step makes.
    """
    from flowloom import recipes
    from flowloom.lifecycle import turns

    opponent = turns.begin(pipeline, recipe, overrides, champion)
    chosen = recipes.resolve(recipe, overrides)
    recalled = turns.recalled(chosen.build_triplets, previous)
    return (opponent, recalled, turns.sources())
