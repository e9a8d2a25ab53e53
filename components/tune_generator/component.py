"""Tune a generator for a score, by FDFO or Flow-GRPO."""

from kfp import dsl

from components.images import GPU_IMAGE


@dsl.component(base_image=GPU_IMAGE, install_kfp_package=False)
def tune_generator(
    recipe: str,
    overrides: dict,
    generator: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Raise the score of a generator's pictures: pull its velocity toward the better ones.

    Args:
        recipe: Name of a recipe in `flowloom.recipes`.
        overrides: Fields to replace, by stage, nested as in `config.json`.
        generator: Tuned checkpoint or LoRA, its record and card, grids before and after, curve.
        metrics: Scores before and after.
    """
    from flowloom import recipes, stages
    from flowloom.lifecycle.steps import hand_over

    config = recipes.stage_config(recipe, "tune_generator", overrides.get("tune_generator"))
    hand_over(stages.run("tune_generator", config), generator, metrics)
