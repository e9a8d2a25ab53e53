"""What pipelines do with a generator: tune it, and put it into the catalogue."""

from typing import NamedTuple

from kfp import dsl

from components.publish_generator import publish_generator
from components.tune_generator import tune_generator
from pipelines.resources import cpu_step, gpu_step


class Tuned(NamedTuple):
    """What tuning leaves."""

    generator: dsl.Model
    catalogue: dsl.Dataset


@dsl.pipeline(name="tune-and-publish", description=__doc__)
def tune_and_publish(recipe: str, overrides: dict, sources: str) -> NamedTuple(
    "Tuned", [("generator", dsl.Model), ("catalogue", dsl.Dataset)]
):
    """Tune a generator for a score, and add it to the catalogue.

    Args:
        recipe: Name of a recipe in `flowloom.recipes`.
        overrides: Fields to replace, by stage.
        sources: Digests of code and data.

    Returns:
        generator: Tuned checkpoint or LoRA.
        catalogue: Catalogue with it.
    """
    chosen = {"recipe": recipe, "overrides": overrides, "sources": sources}
    tuned = gpu_step(tune_generator(**chosen))
    generator = tuned.outputs["generator"]
    published = cpu_step(publish_generator(generator=generator, **chosen))
    return Tuned(generator, published.outputs["catalogue"])
