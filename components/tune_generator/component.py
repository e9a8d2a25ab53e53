"""Tune a generator for a score, by FDFO or Flow-GRPO."""

from kfp import dsl

from components.images import GPU_IMAGE


@dsl.component(base_image=GPU_IMAGE, install_kfp_package=False)
def tune_generator(
    recipe: str,
    overrides: dict,
    sources: str,
    generator: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    summary: dsl.Output[dsl.Markdown],
    launch: str = "process",
):
    """Raise the score of a generator's pictures: pull its velocity toward the better ones.

    Args:
        recipe: Name of a recipe in `flowloom.recipes`.
        overrides: Fields to replace, by stage, nested as in `config.json`.
        sources: Digests of code and data (`begin_turn`): the key of the engine's cache.
        generator: Tuned checkpoint or LoRA, its record and card, grids before and after, curve.
        metrics: Scores before and after.
        summary: Metrics, digest and run of the stage, for a person.
        launch: `process` (this pod), `torchrun:N`, or `trainjob:NODESxPROCESSES[/cpu]`: a job of
            Kubeflow Trainer.
    """
    from flowloom import recipes
    from flowloom.launch import run
    from flowloom.lifecycle.steps import hand_over

    config = recipes.step_config("tune_generator", recipe, overrides, sources)
    hand_over(run("tune_generator", config, launcher=launch), generator, metrics, summary)
