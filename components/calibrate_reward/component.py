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
    reward: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Standardise the members, choose beta, fit conformal quantiles on prompts held out for it.

    Args:
        catalogue: Catalogue with the tuned model files (`publish_generator`).
        triplets: Prompts, workflows and rendered scores (`build_triplets`).
        members: The members (`train_reward`, one folder each).
        recipe: Name of a recipe in `flowloom.recipes`.
        overrides: Fields to replace, by stage, nested as in `config.json`.
        reward: Ensemble folder: members, calibration, tokenizer, vocabulary.
        metrics: Coverage, rank correlation.
    """
    from flowloom import recipes, stages
    from flowloom.lifecycle.steps import folders, hand_over

    config = recipes.stage_config(recipe, "calibrate_reward", overrides.get("calibrate_reward"))
    inputs = folders(catalogue=catalogue, triplets=triplets, members=members)
    hand_over(stages.run("calibrate_reward", config, inputs), reward, metrics)
