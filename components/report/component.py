"""Write the report that a person reads."""

from typing import Optional

from kfp import dsl

from components.images import CPU_IMAGE


@dsl.component(base_image=CPU_IMAGE, install_kfp_package=False)
def report(
    recipe: str,
    overrides: dict,
    page: dsl.Output[dsl.HTML],
    evaluation: Optional[dsl.Input[dsl.Dataset]] = None,
    generator: Optional[dsl.Input[dsl.Model]] = None,
    decision: Optional[dsl.Input[dsl.Dataset]] = None,
    designer: Optional[dsl.Input[dsl.Model]] = None,
    members: Optional[dsl.Input[list[dsl.Model]]] = None,
    start: Optional[dsl.Input[dsl.Model]] = None,
    adapter: Optional[dsl.Input[dsl.Model]] = None,
):
    """Write what the turn found as one self-contained HTML file.

    Args:
        recipe: Name of a recipe in `flowloom.recipes`.
        overrides: Fields to replace, by stage, nested as in `config.json`.
        page: The report: one HTML file without external resources.
        evaluation: Policies compared by rendering (`evaluate`), where a designer was trained.
        generator: Tuned checkpoint (`tune_generator`), where one was tuned.
        decision: The gate's decision (`promote`).
        designer: Designer fine-tuned on pairs (`train_sft`): its training curve is shown.
        members: Reward members (`train_reward`), likewise.
        start: Weights that GRPO went on from (`train_grpo`), likewise.
        adapter: Weights tuned by GRPO (`train_grpo`), likewise.
    """
    from flowloom import recipes, stages
    from flowloom.lifecycle.steps import folders, hand_over

    config = recipes.step_config("report", recipe, overrides)
    curves = [item for item in (designer, *(members or []), start, adapter) if item]
    found = {"evaluation": evaluation, "generator": generator, "decision": decision}
    inputs = folders(**found, training=curves or None)
    hand_over(stages.run("report", config, inputs), page, file="report.html")
