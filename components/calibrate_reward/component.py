"""Calibrate the reward ensemble."""

from kfp import dsl

from components.images import GPU_IMAGE


@dsl.component(base_image=GPU_IMAGE, install_kfp_package=False)
def calibrate_reward(
    catalogue: dsl.Input[dsl.Dataset],
    triplets: dsl.Input[dsl.Dataset],
    members: dsl.Input[list[dsl.Model]],
    recipe: str,
    overrides: dict,
    sources: str,
    reward: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    summary: dsl.Output[dsl.Markdown],
):
    """Standardise the members, choose beta, fit conformal quantiles on prompts held out for it.

    Args:
        catalogue: Catalogue with the tuned model files (`publish_generator`).
        triplets: Prompts, workflows and rendered scores (`build_triplets`).
        members: The members (`train_reward`, one folder each).
        recipe: Name of a recipe in `flowloom.recipes`.
        overrides: Fields to replace, by stage, nested as in `config.json`.
        sources: Digests of code and data (`begin_turn`): the key of the engine's cache.
        reward: Ensemble folder: members, calibration, tokenizer, vocabulary.
        metrics: Coverage, rank correlation.
        summary: Metrics, digest and run of the stage, for a person.
    """
    from flowloom import recipes, stages
    from flowloom.lifecycle.steps import folders, hand_over

    config = recipes.step_config("calibrate_reward", recipe, overrides, sources)
    inputs = folders(catalogue=catalogue, triplets=triplets, members=members)
    hand_over(stages.run("calibrate_reward", config, inputs), reward, metrics, summary)
