"""What pipelines do with a generator: tune it, and put it into the catalogue."""

from typing import Any, NamedTuple

from kfp import dsl

from components.publish_generator import publish_generator
from components.tune_generator import tune_generator
from pipelines.resources import cpu_step, launch, train_step


class Tuned(NamedTuple):
    """What tuning leaves."""

    generator: dsl.Model
    catalogue: dsl.Dataset


def tuned_and_published(chosen: dict[str, Any], **earlier: Any) -> Tuned:
    """Tune a generator; add it to the catalogue, to that of an earlier turn if `earlier` is one."""
    generator = train_step(tune_generator(launch=launch(), **chosen)).outputs["generator"]
    published = cpu_step(publish_generator(generator=generator, **earlier, **chosen))
    return Tuned(generator, published.outputs["catalogue"])


@dsl.pipeline(name="tune-and-publish", description=__doc__)
def tune_and_publish(
    earlier: dsl.Input[dsl.Dataset], recipe: str, overrides: dict, sources: str
) -> NamedTuple("Tuned", [("generator", dsl.Model), ("catalogue", dsl.Dataset)]):
    """Tune a generator for a score, and add it to the catalogue.

    Args:
        earlier: Catalogue of an earlier turn; may be nothing.
        recipe: Name of a recipe in `flowloom.recipes`.
        overrides: Fields to replace, by stage.
        sources: Digests of code and data.

    Returns:
        generator: Tuned checkpoint or LoRA.
        catalogue: Catalogue with it.
    """
    chosen = {"recipe": recipe, "overrides": overrides, "sources": sources}
    return tuned_and_published(chosen, earlier=earlier)
