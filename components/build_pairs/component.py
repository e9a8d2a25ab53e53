"""Draw prompts and random valid workflows."""

from kfp import dsl

from components.images import CPU_IMAGE


@dsl.component(base_image=CPU_IMAGE, install_kfp_package=False)
def build_pairs(
    catalogue: dsl.Input[dsl.Dataset],
    recipe: str,
    overrides: dict,
    sources: str,
    pairs: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
):
    """Pair prompts with random valid workflows of the catalogue.

    Args:
        catalogue: Catalogue with the tuned model files (`publish_generator`).
        recipe: Name of a recipe in `flowloom.recipes`.
        overrides: Fields to replace, by stage, nested as in `config.json`.
        sources: Digests of code and data (`begin_turn`): the key of the engine's cache.
        pairs: Shards `pairs-*.parquet` (prompt, kind, workflow, fingerprint, split) and a card.
        metrics: Numbers of pairs and prompts.
    """
    from flowloom import recipes, stages
    from flowloom.lifecycle.steps import folders, hand_over

    config = recipes.step_config("build_pairs", recipe, overrides, sources)
    inputs = folders(catalogue=catalogue)
    hand_over(stages.run("build_pairs", config, inputs), pairs, metrics)
