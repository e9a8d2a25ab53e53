"""Write the report that a person reads."""

from kfp import dsl

from components.images import CPU_IMAGE


@dsl.component(base_image=CPU_IMAGE, install_kfp_package=False)
def report(
    evaluation: dsl.Input[dsl.Dataset],
    generator: dsl.Input[dsl.Model],
    decision: dsl.Input[dsl.Dataset],
    recipe: str,
    overrides: dict,
    page: dsl.Output[dsl.HTML],
):
    """Write what the turn found as one self-contained HTML file.

    Args:
        evaluation: Policies compared by rendering (`evaluate`).
        generator: Tuned checkpoint (`tune_generator`).
        decision: The gate's decision (`promote`).
        recipe: Name of a recipe in `flowloom.recipes`.
        overrides: Fields to replace, by stage, nested as in `config.json`.
        page: The report: one HTML file without external resources.
    """
    from flowloom import recipes, stages
    from flowloom.lifecycle.steps import folders, hand_over

    config = recipes.stage_config(recipe, "report", overrides.get("report"))
    inputs = folders(evaluation=evaluation, generator=generator, decision=decision)
    hand_over(stages.run("report", config, inputs), page, file="report.html")
