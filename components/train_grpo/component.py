"""Optimise the designer against the frozen reward ensemble."""

from typing import Optional

from kfp import dsl

from components.images import GPU_IMAGE


@dsl.component(base_image=GPU_IMAGE, install_kfp_package=False)
def train_grpo(
    catalogue: dsl.Input[dsl.Dataset],
    triplets: dsl.Input[dsl.Dataset],
    designer: dsl.Input[dsl.Model],
    reward: dsl.Input[dsl.Model],
    recipe: str,
    overrides: dict,
    sources: str,
    adapter: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    summary: dsl.Output[dsl.Markdown],
    start: Optional[dsl.Input[dsl.Model]] = None,
    launch: str = "process",
):
    """Optimise the designer with GRPO against the frozen reward ensemble; nothing is rendered.

    Args:
        catalogue: Catalogue with the tuned model files (`publish_generator`).
        triplets: Prompts, workflows and rendered scores (`build_triplets`).
        designer: Designer fine-tuned on pairs (`train_sft`).
        reward: Calibrated reward ensemble (`calibrate_reward`).
        recipe: Name of a recipe in `flowloom.recipes`.
        overrides: Fields to replace, by stage, nested as in `config.json`.
        sources: Digests of code and data (`begin_turn`): the key of the engine's cache.
        adapter: Tuned weights of the designer, and designs to render for the next round.
        metrics: Reward, KL, entropy, validity.
        summary: Metrics, digest and run of the stage, for a person.
        start: Weights of the round before (`train_grpo`) to go on from; else the designer's.
        launch: `process` (this pod), `torchrun:N`, or `trainjob:NODESxPROCESSES[/cpu]`: a job of
            Kubeflow Trainer.
    """
    from flowloom import recipes
    from flowloom.launch import run
    from flowloom.lifecycle.steps import folders, hand_over

    config = recipes.step_config("train_grpo", recipe, overrides, sources)
    inputs = folders(
        catalogue=catalogue, triplets=triplets, designer=designer, reward=reward, start=start
    )
    hand_over(run("train_grpo", config, inputs, launch), adapter, metrics, summary)
