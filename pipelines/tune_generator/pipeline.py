"""Tune a generator for a score, publish it in the catalogue, and report what it does."""

from kfp import dsl

from components.report import report
from pipelines.generator import tuned_and_published
from pipelines.resources import cpu_step
from pipelines.turn import begun, ended


@dsl.pipeline(name="tune-generator", description=__doc__)
def tune_generator(
    recipe: str = "demo",
    overrides: dict = {},  # noqa: B006  kfp writes the default into the YAML
):
    """Tune a generator; its judgements, before and after, are in the report.

    Args:
        recipe: Name of a recipe in `flowloom.recipes`.
        overrides: Fields to replace, by stage, nested as in `config.json`.
    """
    with ended():
        turn = begun("tune_generator", recipe, overrides)
        tuned = tuned_and_published(turn.sourced)
        cpu_step(report(generator=tuned.generator, **turn.chosen))
