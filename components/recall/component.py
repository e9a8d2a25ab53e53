"""Bring what an earlier turn left."""

from kfp import dsl

from components.images import CPU_IMAGE


@dsl.component(base_image=CPU_IMAGE, install_kfp_package=False)
def recall(
    recalled: dict,
    sources: str,
    catalogue: dsl.Output[dsl.Dataset],
    triplets: dsl.Output[dsl.Dataset],
    adapter: dsl.Output[dsl.Model],
):
    """Bring catalogue, triplets and adapter of an earlier turn, from this home or the store.

    Args:
        recalled: Their digests (`begin_turn`); empty on a first turn: then the outputs are nothing,
            which steps take as an input that is not given.
        sources: Digests of code and data (`begin_turn`): the key of the engine's cache.
        catalogue: Catalogue with the generators tuned so far (`publish_generator`).
        triplets: Every design rendered so far (`build_triplets`).
        adapter: Tuned weights, with designs that were proposed and not rendered (`train_grpo`).
    """
    from flowloom.lifecycle import turns
    from flowloom.lifecycle.steps import hand_on

    turns.check_sources("recall", sources)
    hand_on(catalogue, recalled, "catalogue")
    hand_on(triplets, recalled, "triplets")
    hand_on(adapter, recalled, "adapter")
