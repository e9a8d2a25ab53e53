"""Train one member of the reward ensemble."""

from kfp import dsl

from components.images import GPU_IMAGE


@dsl.component(base_image=GPU_IMAGE, install_kfp_package=False)
def train_reward(
    catalogue: dsl.Input[dsl.Dataset],
    triplets: dsl.Input[dsl.Dataset],
    member: int,
    recipe: str,
    overrides: dict,
    sources: str,
    trained: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    summary: dsl.Output[dsl.Markdown],
):
    """Train one member of the ensemble that predicts the score of a prompt and a workflow.

    Args:
        catalogue: Catalogue with the tuned model files (`publish_generator`).
        triplets: Prompts, workflows and rendered scores (`build_triplets`).
        member: Its number: decides seed and order.
        recipe: Name of a recipe in `flowloom.recipes`.
        overrides: Fields to replace, by stage, nested as in `config.json`.
        sources: Digests of code and data (`begin_turn`): the key of the engine's cache.
        trained: Weights and record of the member.
        metrics: Errors, rank correlation.
        summary: Metrics, digest and run of the stage, for a person.
    """
    from flowloom import recipes, stages
    from flowloom.lifecycle.steps import folders, hand_over

    changes = {**overrides.get("train_reward", {}), "member": int(member)}
    config = recipes.step_config("train_reward", recipe, {"train_reward": changes}, sources)
    inputs = folders(catalogue=catalogue, triplets=triplets)
    hand_over(stages.run("train_reward", config, inputs), trained, metrics, summary)
