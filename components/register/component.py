"""Register the candidate model."""

from kfp import dsl

from components.images import CPU_IMAGE


@dsl.component(base_image=CPU_IMAGE, install_kfp_package=False)
def register(
    catalogue: dsl.Input[dsl.Dataset],
    triplets: dsl.Input[dsl.Dataset],
    designer: dsl.Input[dsl.Model],
    adapter: dsl.Input[dsl.Model],
    reward: dsl.Input[dsl.Model],
    evaluation: dsl.Input[dsl.Dataset],
    champion: str,
    model: dsl.Output[dsl.Model],
) -> str:
    """Build the model's folder and register it in MLflow as `candidate`.

    Args:
        catalogue: Catalogue with the tuned model files (`publish_generator`).
        triplets: Prompts, workflows and rendered scores (`build_triplets`).
        designer: Designer fine-tuned on pairs (`train_sft`).
        adapter: Weights tuned by GRPO (`train_grpo`).
        reward: Calibrated reward ensemble (`calibrate_reward`).
        evaluation: Policies compared by rendering (`evaluate`).
        champion: Version of the champion that was compared; empty if none.
        model: Folder of the registered model.

    Returns:
        The version in the registry.
    """
    from flowloom.lifecycle import registry
    from flowloom.lifecycle.steps import folders, hand_over

    parts = folders(
        catalogue=catalogue,
        triplets=triplets,
        designer=designer,
        adapter=adapter,
        reward=reward,
        evaluation=evaluation,
    )
    result, version = registry.register(parts, champion or None)
    hand_over(result, model)
    return version
