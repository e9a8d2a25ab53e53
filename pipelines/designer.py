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
from components.report import report
from components.train_grpo import train_grpo
from components.train_reward import train_reward
from components.train_sft import train_sft
from pipelines import clusters
from pipelines.resources import cpu_step, launch, render_step, tell_step, train_step
from pipelines.turn import Begun

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


def render_triplets(repeat: int = 1, **given: Any) -> Any:
    """Triplets: rendered in one step, or in parts at the same time where the cluster has several.

    Of a plan of several rounds the parts are of the first one; the step that joins them renders the
    others. What they join to is what one step makes, byte by byte.
    """
    num = clusters.current().num_parts
    if num > 1:
        with dsl.ParallelFor([f"{k}/{num}" for k in range(num)]) as part:
            rendered = render_step(build_triplets(part=part, **given), repeat=repeat)
        given = {**given, "parts": dsl.Collected(rendered.outputs["triplets"])}
    return render_step(build_triplets(**given), repeat=repeat).outputs["triplets"]


def fit_reward(
    members: list, given: Mapping[str, Any], repeat: int
) -> tuple[dsl.PipelineTask, dsl.PipelineTask]:
    """The reward's members, trained at the same time, and their ensemble."""
    with dsl.ParallelFor(members) as member:
        trained = train_step(train_reward(member=member, **given), repeat=repeat)
    ensemble = dsl.Collected(trained.outputs["trained"])
    return trained, train_step(calibrate_reward(members=ensemble, **given), repeat=repeat)


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
    source = {"catalogue": catalogue, "pairs": pairs, **chosen}
    triplets = render_triplets(earlier=earlier, proposals=proposals, **source)
    given = {"catalogue": catalogue, "triplets": triplets, **chosen}

    how = {"launch": launch()}
    supervised = train_step(train_sft(pairs=pairs, **how, **given))
    designer = supervised.outputs["designer"]
    _, calibrated = fit_reward(members, given, repeat=1)
    reward = calibrated.outputs["reward"]
    optimised = train_step(train_grpo(designer=designer, reward=reward, **how, **given))
    first = optimised.outputs["adapter"]

    triplets = render_triplets(repeat=2, earlier=triplets, proposals=first, **source)
    given = {"catalogue": catalogue, "triplets": triplets, **chosen}
    trained, calibrated = fit_reward(members, given, repeat=2)
    reward = calibrated.outputs["reward"]
    further = train_grpo(designer=designer, reward=reward, start=first, **how, **given)
    adapter = train_step(further, repeat=2).outputs["adapter"]
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
    compared = render_step(evaluate(champion=champion, **parts, **chosen))
    evaluation, opponent = compared.outputs["evaluation"], compared.outputs["Output"]
    registered = cpu_step(register(champion=opponent, evaluation=evaluation, **parts))
    version = registered.outputs["Output"]
    decided = promote(version=version, champion=opponent, evaluation=evaluation, **chosen)
    # Never again by itself: a person looks at a promotion that stopped half way.
    decision = tell_step(decided, retries=0).outputs["decision"]
    return Judged(evaluation, decision)


def design(
    turn: Begun, before: Mapping[str, Any], catalogue: Any, members: list, **tuned: Any
) -> None:
    """Train a designer for a catalogue, let the gate decide, and report.

    Args:
        turn: What the turn goes by.
        before: What an earlier turn left.
        catalogue: Catalogue of model files.
        members: Numbers of the reward members.
        **tuned: The tuned generator, for the report, where the turn tuned one.
    """
    designs = {"earlier": before["triplets"], "proposals": before["adapter"]}
    made = train_designer(catalogue=catalogue, members=members, **designs, **turn.sourced).outputs
    parts = {name: made[name] for name in ("triplets", "designer", "adapter", "reward")}
    judged = judge_designer(
        catalogue=catalogue, champion=turn.opponent, **parts, **turn.chosen
    ).outputs
    curves = {name: made[name] for name in ("designer", "start", "adapter")}
    found = {name: judged[name] for name in ("evaluation", "decision")}
    cpu_step(report(members=made["ensemble"], **curves, **found, **tuned, **turn.chosen))
