"""Compare policies by rendering held-out prompts."""

from kfp import dsl

from components.images import GPU_IMAGE


@dsl.component(base_image=GPU_IMAGE, install_kfp_package=False)
def evaluate(
    catalogue: dsl.Input[dsl.Dataset],
    triplets: dsl.Input[dsl.Dataset],
    designer: dsl.Input[dsl.Model],
    adapter: dsl.Input[dsl.Model],
    reward: dsl.Input[dsl.Model],
    champion: str,
    recipe: str,
    overrides: dict,
    evaluation: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    summary: dsl.Output[dsl.Markdown],
) -> str:
    """Render the designs of every policy on the same held-out prompts and noise, and compare.

    Args:
        catalogue: Catalogue with the tuned model files (`publish_generator`).
        triplets: Prompts, workflows and rendered scores (`build_triplets`).
        designer: Designer fine-tuned on pairs (`train_sft`).
        adapter: Weights tuned by GRPO (`train_grpo`).
        reward: Calibrated reward ensemble (`calibrate_reward`).
        champion: Version of the champion; empty if none, `auto` for the one there is now.
        recipe: Name of a recipe in `flowloom.recipes`.
        overrides: Fields to replace, by stage, nested as in `config.json`.
        evaluation: `evaluation.json`, one row per render, picture grids.
        metrics: Mean scores and paired differences.
        summary: Metrics, digest and run of the stage, for a person.

    Returns:
        Version of the champion that was compared; empty if none.
    """
    from flowloom import recipes, stages
    from flowloom.lifecycle.registry import opponent
    from flowloom.lifecycle.steps import folders, hand_over

    config = recipes.step_config("evaluate", recipe, overrides)
    inputs = folders(
        catalogue=catalogue, triplets=triplets, designer=designer, adapter=adapter, reward=reward
    )
    compared, folder = opponent(champion)
    if folder:
        inputs["champion"] = folder
    hand_over(stages.run("evaluate", config, inputs), evaluation, metrics, summary)
    return compared
