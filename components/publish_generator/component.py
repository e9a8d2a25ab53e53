"""Publish a tuned generator as part of the catalogue."""

from kfp import dsl

from components.images import CPU_IMAGE


@dsl.component(base_image=CPU_IMAGE, install_kfp_package=False)
def publish_generator(
    generator: dsl.Input[dsl.Model],
    recipe: str,
    overrides: dict,
    catalogue: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
):
    """Add the tuned checkpoint, its LoRA or both to the catalogue, so that designs can use them.

    Args:
        generator: Tuned checkpoint, LoRA, records and card (`tune_generator`).
        recipe: Name of a recipe in `flowloom.recipes`.
        overrides: Fields to replace, by stage, nested as in `config.json`.
        catalogue: `catalogue.json.gz` and the overlay `models/`, each file with its card.
        metrics: Number of model files.
    """
    from flowloom import recipes, stages
    from flowloom.lifecycle.steps import folders, hand_over

    config = recipes.stage_config(recipe, "publish_generator", overrides.get("publish_generator"))
    inputs = folders(generator=generator)
    hand_over(stages.run("publish_generator", config, inputs), catalogue, metrics)
