"""Write the report that a person reads."""

from typing import Optional

from kfp import dsl

from components.images import CPU_IMAGE


@dsl.component(base_image=CPU_IMAGE, install_kfp_package=False)
def report(
    evaluation: dsl.Input[dsl.Dataset],
    generator: dsl.Input[dsl.Model],
    decision: dsl.Input[dsl.Dataset],
    designer: dsl.Input[dsl.Model],
    members: dsl.Input[list[dsl.Model]],
    adapter: dsl.Input[dsl.Model],
    recipe: str,
    overrides: dict,
    page: dsl.Output[dsl.HTML],
    start: Optional[dsl.Input[dsl.Model]] = None,
):
    """Write what the turn found as one self-contained HTML file.

    Args:
        evaluation: Policies compared by rendering (`evaluate`).
        generator: Tuned checkpoint (`tune_generator`).
        decision: The gate's decision (`promote`).
        designer: Designer fine-tuned on pairs (`train_sft`): its training curve is shown.
        members: Reward members (`train_reward`), likewise.
        adapter: Weights tuned by GRPO (`train_grpo`), likewise.
        recipe: Name of a recipe in `flowloom.recipes`.
        overrides: Fields to replace, by stage, nested as in `config.json`.
        page: The report: one HTML file without external resources.
        start: Weights that GRPO went on from (`train_grpo`), likewise.
    """
    from flowloom import recipes, stages
    from flowloom.lifecycle.steps import folders, hand_over

    config = recipes.stage_config(recipe, "report", overrides.get("report"))
    rounds = [start, adapter] if start else [adapter]
    training = [designer, *members, *rounds]
    inputs = folders(
        evaluation=evaluation, generator=generator, decision=decision, training=training
    )
    hand_over(stages.run("report", config, inputs), page, file="report.html")
