"""Publish a tuned generator as part of the catalogue."""

from typing import Optional

from kfp import dsl

from components.images import CPU_IMAGE


@dsl.component(base_image=CPU_IMAGE, install_kfp_package=False)
def publish_generator(
    recipe: str,
    overrides: dict,
    sources: str,
    catalogue: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    generator: Optional[dsl.Input[dsl.Model]] = None,
    earlier: Optional[dsl.Input[dsl.Dataset]] = None,
):
    """Add the tuned checkpoint, its LoRA or both to the catalogue, so that designs can use them.

    Args:
        recipe: Name of a recipe in `flowloom.recipes`.
        overrides: Fields to replace, by stage, nested as in `config.json`.
        sources: Digests of code and data (`begin_turn`): the key of the engine's cache.
        catalogue: `catalogue.json.gz` and the overlay `models/`, each file with its card.
        metrics: Number of model files.
        generator: Tuned checkpoint, LoRA, records and card (`tune_generator`); else none joins.
        earlier: Catalogue of an earlier turn (`recall`), whose tuned generators stay.
    """
    from flowloom import recipes, stages
    from flowloom.lifecycle.steps import folders, hand_over

    config = recipes.step_config("publish_generator", recipe, overrides, sources)
    inputs = folders(generator=generator, earlier=earlier)
    hand_over(stages.run("publish_generator", config, inputs), catalogue, metrics)
