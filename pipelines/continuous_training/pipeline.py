"""One turn of the loop: tune, build data, train twice, evaluate by rendering, gate, report."""

from collections.abc import Callable, Mapping
from typing import Any

from kfp import dsl

from components.build_pairs import build_pairs
from components.build_triplets import build_triplets
from components.calibrate_reward import calibrate_reward
from components.evaluate import evaluate
from components.promote import promote
from components.publish_generator import publish_generator
from components.register import register
from components.report import report
from components.train_grpo import train_grpo
from components.train_reward import train_reward
from components.train_sft import train_sft
from components.tune_generator import tune_generator
from pipelines.resources import cpu_step, gpu_step

MEMBERS = [0, 1, 2]


def again(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """A step of the second round, on a GPU; its name says so."""
    return gpu_step(task).set_display_name(f"{task.component_spec.name}-round-2")


def fit_reward(
    step: Callable[[dsl.PipelineTask], dsl.PipelineTask], members: list, given: Mapping[str, Any]
) -> tuple[dsl.PipelineTask, dsl.PipelineTask]:
    """The reward's members, trained at the same time, and their ensemble."""
    with dsl.ParallelFor(members) as member:
        trained = step(train_reward(member=member, **given))
    ensemble = dsl.Collected(trained.outputs["trained"])
    return trained, step(calibrate_reward(members=ensemble, **given))


@dsl.pipeline(name="continuous-training", description=__doc__)
def continuous_training(
    recipe: str = "demo",
    overrides: dict = {},  # noqa: B006  kfp writes the default into the YAML
    champion: str = "auto",
    members: list = MEMBERS,
):
    """Train a candidate and let the gate decide whether it becomes the champion.

    Between two rounds of policy optimisation the policy's designs are rendered, and the reward is
    fitted anew.

    Args:
        recipe: Name of a recipe in `flowloom.recipes`.
        overrides: Fields to replace, by stage, nested as in `config.json`.
        champion: Version of the champion to compare with; empty for none, `auto` for the one
            there is when `evaluate` starts.
        members: Numbers of the reward members; trained at the same time.
    """
    chosen = {"recipe": recipe, "overrides": overrides}

    tuned = gpu_step(tune_generator(**chosen))
    generator = tuned.outputs["generator"]
    published = cpu_step(publish_generator(generator=generator, **chosen))
    catalogue = published.outputs["catalogue"]

    paired = cpu_step(build_pairs(catalogue=catalogue, **chosen))
    pairs = paired.outputs["pairs"]
    scored = gpu_step(build_triplets(catalogue=catalogue, pairs=pairs, **chosen))
    triplets = scored.outputs["triplets"]
    given = {"catalogue": catalogue, "triplets": triplets, **chosen}

    supervised = gpu_step(train_sft(pairs=pairs, **given))
    designer = supervised.outputs["designer"]
    _, calibrated = fit_reward(gpu_step, members, given)
    reward = calibrated.outputs["reward"]
    optimised = gpu_step(train_grpo(designer=designer, reward=reward, **given))
    first = optimised.outputs["adapter"]

    designs = {"earlier": triplets, "proposals": first}
    scored = again(build_triplets(catalogue=catalogue, pairs=pairs, **designs, **chosen))
    triplets = scored.outputs["triplets"]
    given = {"catalogue": catalogue, "triplets": triplets, **chosen}
    trained, calibrated = fit_reward(again, members, given)
    reward = calibrated.outputs["reward"]
    optimised = again(train_grpo(designer=designer, reward=reward, start=first, **given))
    adapter = optimised.outputs["adapter"]

    parts = {"catalogue": catalogue, "triplets": triplets}
    parts |= {"designer": designer, "reward": reward, "adapter": adapter}
    compared = gpu_step(evaluate(champion=champion, **parts, **chosen))
    evaluation, opponent = compared.outputs["evaluation"], compared.outputs["Output"]
    registered = cpu_step(register(champion=opponent, evaluation=evaluation, **parts))
    version = registered.outputs["Output"]
    decided = cpu_step(promote(version=version, champion=opponent, evaluation=evaluation, **chosen))
    decision = decided.outputs["decision"]
    shown = {"evaluation": evaluation, "generator": generator, "decision": decision}
    # Collected is used up by the step it is given to (kfp 2.17): one for each.
    ensemble = dsl.Collected(trained.outputs["trained"])
    curves = {"designer": designer, "members": ensemble, "start": first, "adapter": adapter}
    cpu_step(report(**shown, **curves, **chosen))
