"""Let the gate decide, and move the alias `champion`."""

from kfp import dsl

from components.images import CPU_IMAGE


@dsl.component(base_image=CPU_IMAGE, install_kfp_package=False)
def promote(
    evaluation: dsl.Input[dsl.Dataset],
    version: str,
    champion: str,
    recipe: str,
    overrides: dict,
    decision: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
):
    """Hold the evaluation against the gate; make the candidate the champion if all checks hold.

    Args:
        evaluation: Policies compared by rendering (`evaluate`).
        version: The candidate, as `register` gave it.
        champion: Version of the champion that was compared; empty if none.
        recipe: Name of a recipe in `flowloom.recipes`.
        overrides: Fields to replace, by stage, nested as in `config.json`.
        decision: `decision.json`: every check with number, bound, verdict.
        metrics: Whether it was promoted.
    """
    from pathlib import Path

    from flowloom import recipes
    from flowloom.lifecycle import registry
    from flowloom.lifecycle.steps import hand_over

    config = recipes.step_config("promote", recipe, overrides)
    result = registry.decide(config, version, Path(evaluation.path), champion or None)
    hand_over(result, decision, metrics)
