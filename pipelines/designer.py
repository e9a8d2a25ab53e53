"""What pipelines do with a designer: train it in two rounds, and let the gate decide."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from kfp import dsl

from components.build_pairs import build_pairs
from components.build_triplets import build_triplets
from components.calibrate_reward import calibrate_reward
from components.evaluate import evaluate
from components.promote import promote
from components.register import register
from components.train_grpo import train_grpo
from components.train_reward import train_reward
from components.train_sft import train_sft
from pipelines.resources import cpu_step, gpu_step

MEMBERS = [0, 1, 2]


class Trained(NamedTuple):
    """What training leaves."""

    triplets: dsl.Dataset
    designer: dsl.Model
    reward: dsl.Model
    start: dsl.Model
    adapter: dsl.Model
    ensemble: list[dsl.Model]


class Judged(NamedTuple):
    """What judging leaves."""

    evaluation: dsl.Dataset
    decision: dsl.Dataset


def fit_reward(
    members: list, given: Mapping[str, Any], repeat: int
) -> tuple[dsl.PipelineTask, dsl.PipelineTask]:
    """The reward's members, trained at the same time, and their ensemble."""
    with dsl.ParallelFor(members) as member:
        trained = gpu_step(train_reward(member=member, **given), repeat=repeat)
    ensemble = dsl.Collected(trained.outputs["trained"])
    return trained, gpu_step(calibrate_reward(members=ensemble, **given), repeat=repeat)


@dsl.pipeline(name="train-designer", description="Train a designer in two rounds.")
def train_designer(
    catalogue: dsl.Input[dsl.Dataset],
    earlier: dsl.Input[dsl.Dataset],
    proposals: dsl.Input[dsl.Model],
    recipe: str,
    overrides: dict,
    sources: str,
    members: list,
) -> Trained:
    """Train on rendered workflows, then again after rendering what the policy designs.

    Args:
        catalogue: Catalogue of model files.
        earlier: Triplets of an earlier turn, which join; may be nothing, as may the next.
        proposals: Adapter of that turn: what it proposed is rendered in place of other workflows.
        recipe: Name of a recipe in `flowloom.recipes`.
        overrides: Fields to replace, by stage.
        sources: Digests of code and data.
        members: Numbers of the reward members.

    Returns:
        triplets: Every rendered design.
        designer: Designer fine-tuned on pairs.
        reward: Calibrated ensemble of the second round.
        start: Weights of the first round.
        adapter: Weights of the second round.
        ensemble: Members of the second round.
    """
    chosen = {"recipe": recipe, "overrides": overrides, "sources": sources}
    paired = cpu_step(build_pairs(catalogue=catalogue, **chosen))
    pairs = paired.outputs["pairs"]
    designs = {"earlier": earlier, "proposals": proposals}
    scored = build_triplets(catalogue=catalogue, pairs=pairs, **designs, **chosen)
    triplets = gpu_step(scored).outputs["triplets"]
    given = {"catalogue": catalogue, "triplets": triplets, **chosen}

    supervised = gpu_step(train_sft(pairs=pairs, **given))
    designer = supervised.outputs["designer"]
    _, calibrated = fit_reward(members, given, repeat=1)
    reward = calibrated.outputs["reward"]
    optimised = gpu_step(train_grpo(designer=designer, reward=reward, **given))
    first = optimised.outputs["adapter"]

    designs = {"earlier": triplets, "proposals": first}
    again = build_triplets(catalogue=catalogue, pairs=pairs, **designs, **chosen)
    triplets = gpu_step(again, repeat=2).outputs["triplets"]
    given = {"catalogue": catalogue, "triplets": triplets, **chosen}
    trained, calibrated = fit_reward(members, given, repeat=2)
    reward = calibrated.outputs["reward"]
    further = train_grpo(designer=designer, reward=reward, start=first, **given)
    adapter = gpu_step(further, repeat=2).outputs["adapter"]
    # Collected is used up by the step it is given to (kfp 2.17): one for each.
    ensemble = dsl.Collected(trained.outputs["trained"])
    return Trained(triplets, designer, reward, first, adapter, ensemble)


@dsl.pipeline(name="judge-designer", description="Compare by rendering, register, gate.")
def judge_designer(
    catalogue: dsl.Input[dsl.Dataset],
    triplets: dsl.Input[dsl.Dataset],
    designer: dsl.Input[dsl.Model],
    adapter: dsl.Input[dsl.Model],
    reward: dsl.Input[dsl.Model],
    champion: str,
    recipe: str,
    overrides: dict,
) -> Judged:
    """Render held-out prompts, register the candidate, and let the gate decide.

    Args:
        catalogue: Catalogue of model files.
        triplets: Every rendered design.
        designer: Designer fine-tuned on pairs.
        adapter: Weights tuned by GRPO.
        reward: Calibrated reward ensemble.
        champion: Version of the champion; empty if none.
        recipe: Name of a recipe in `flowloom.recipes`.
        overrides: Fields to replace, by stage.

    Returns:
        evaluation: Policies compared by rendering.
        decision: What the gate decided.
    """
    chosen = {"recipe": recipe, "overrides": overrides}
    parts = {"catalogue": catalogue, "triplets": triplets}
    parts |= {"designer": designer, "adapter": adapter, "reward": reward}
    compared = gpu_step(evaluate(champion=champion, **parts, **chosen))
    evaluation, opponent = compared.outputs["evaluation"], compared.outputs["Output"]
    registered = cpu_step(register(champion=opponent, evaluation=evaluation, **parts))
    version = registered.outputs["Output"]
    decided = promote(version=version, champion=opponent, evaluation=evaluation, **chosen)
    # Never again by itself: a person looks at a promotion that stopped half way.
    decision = cpu_step(decided, retries=0).outputs["decision"]
    return Judged(evaluation, decision)
