"""Render workflows and score the pictures."""

from typing import Optional

from kfp import dsl

from components.images import GPU_IMAGE


@dsl.component(base_image=GPU_IMAGE, install_kfp_package=False)
def build_triplets(
    catalogue: dsl.Input[dsl.Dataset],
    pairs: dsl.Input[dsl.Dataset],
    recipe: str,
    overrides: dict,
    sources: str,
    triplets: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    earlier: Optional[dsl.Input[dsl.Dataset]] = None,
    proposals: Optional[dsl.Input[dsl.Model]] = None,
    parts: Optional[dsl.Input[list[dsl.Dataset]]] = None,
    part: str = "",
):
    """Render prompt-workflow cells with several seeds each, and score every picture.

    Args:
        catalogue: Catalogue with the tuned model files (`publish_generator`).
        pairs: Prompt-workflow pairs (`build_pairs`).
        recipe: Name of a recipe in `flowloom.recipes`.
        overrides: Fields to replace, by stage, nested as in `config.json`.
        sources: Digests of code and data (`begin_turn`): the key of the engine's cache.
        triplets: Shards `triplets-*.parquet`, held-out prompts, the best fixed workflow, a card.
        metrics: Numbers of renders, mean scores.
        earlier: Triplets that a policy's designs join; only with `proposals`.
        proposals: Tuned weights (`train_grpo`) whose designs are rendered.
        parts: What steps with a `part` rendered; only what is missing there is rendered.
        part: `k/N`: render every N-th shard from number k on; empty for all.
    """
    from flowloom import recipes, stages
    from flowloom.lifecycle.steps import folders, hand_over

    changes = {**overrides.get("build_triplets", {}), **({"part": part} if part else {})}
    config = recipes.step_config("build_triplets", recipe, {"build_triplets": changes}, sources)
    designs = {"earlier": earlier, "proposals": proposals}
    inputs = folders(catalogue=catalogue, pairs=pairs, parts=parts, **designs)
    hand_over(stages.run("build_triplets", config, inputs), triplets, metrics)
