"""Fine-tune the designer on prompt-workflow pairs."""

from kfp import dsl

from components.images import GPU_IMAGE


@dsl.component(base_image=GPU_IMAGE, install_kfp_package=False)
def train_sft(
    catalogue: dsl.Input[dsl.Dataset],
    pairs: dsl.Input[dsl.Dataset],
    triplets: dsl.Input[dsl.Dataset],
    recipe: str,
    overrides: dict,
    sources: str,
    designer: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    summary: dsl.Output[dsl.Markdown],
    launch: str = "process",
):
    """Fine-tune the designer on pairs, then on the best workflow of each prompt.

    Args:
        catalogue: Catalogue with the tuned model files (`publish_generator`).
        pairs: Prompt-workflow pairs (`build_pairs`).
        triplets: Prompts, workflows and rendered scores (`build_triplets`).
        recipe: Name of a recipe in `flowloom.recipes`.
        overrides: Fields to replace, by stage, nested as in `config.json`.
        sources: Digests of code and data (`begin_turn`): the key of the engine's cache.
        designer: Model folder: weights, vocabulary, tokenizer, configuration.
        metrics: Losses in nats per token, validity.
        summary: Metrics, digest and run of the stage, for a person.
        launch: `process` (this pod), `torchrun:N`, or `trainjob:NODESxPROCESSES[/cpu]`: a job of
            Kubeflow Trainer.
    """
    from flowloom import recipes
    from flowloom.launch import run
    from flowloom.lifecycle.steps import folders, hand_over

    config = recipes.step_config("train_sft", recipe, overrides, sources)
    inputs = folders(catalogue=catalogue, pairs=pairs, triplets=triplets)
    hand_over(run("train_sft", config, inputs, launch), designer, metrics, summary)
