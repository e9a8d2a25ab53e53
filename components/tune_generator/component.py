"""Tune a generator with FDFO."""

from kfp import dsl

from components.images import GPU_IMAGE


@dsl.component(base_image=GPU_IMAGE, install_kfp_package=False)
def tune_generator(
    recipe: str,
    overrides: dict,
    generator: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Pull a checkpoint's velocity toward the better image of pairs sampled from one noise.

    Args:
        recipe: Name of a recipe in `flowloom.recipes`.
        overrides: Fields to replace, by stage, nested as in `config.json`.
        generator: Tuned checkpoint, its record, grids before and after.
        metrics: Scores before and after.
    """
    from flowloom import recipes, stages
    from flowloom.lifecycle.steps import hand_over

    config = recipes.stage_config(recipe, "tune_generator", overrides.get("tune_generator"))
    hand_over(stages.run("tune_generator", config), generator, metrics)
