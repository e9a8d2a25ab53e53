"""One turn of the loop: tune, build data, train, evaluate by rendering, register, gate, report."""

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


@dsl.pipeline(name="continuous-training", description=__doc__)
def continuous_training(
    recipe: str = "demo",
    overrides: dict = {},  # noqa: B006  kfp writes the default into the YAML
    champion: str = "auto",
    members: list = MEMBERS,
):
    """Train a candidate and let the gate decide whether it becomes the champion.

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
    data = {"catalogue": catalogue, "triplets": triplets}

    supervised = gpu_step(train_sft(pairs=pairs, **data, **chosen))
    designer = supervised.outputs["designer"]
    with dsl.ParallelFor(members) as member:
        trained = gpu_step(train_reward(member=member, **data, **chosen))
    # Collected is used up by the step it is given to (kfp 2.17): one for each.
    ensemble = dsl.Collected(trained.outputs["trained"])
    calibrated = gpu_step(calibrate_reward(members=ensemble, **data, **chosen))
    reward = calibrated.outputs["reward"]

    optimised = gpu_step(train_grpo(designer=designer, reward=reward, **data, **chosen))
    parts = {**data, "designer": designer, "reward": reward}
    parts["adapter"] = optimised.outputs["adapter"]

    compared = gpu_step(evaluate(champion=champion, **parts, **chosen))
    evaluation, opponent = compared.outputs["evaluation"], compared.outputs["Output"]
    registered = cpu_step(register(champion=opponent, evaluation=evaluation, **parts))
    version = registered.outputs["Output"]
    decided = cpu_step(promote(version=version, champion=opponent, evaluation=evaluation, **chosen))
    decision = decided.outputs["decision"]
    shown = {"evaluation": evaluation, "generator": generator, "decision": decision}
    members_again = dsl.Collected(trained.outputs["trained"])
    curves = {"designer": designer, "members": members_again, "adapter": parts["adapter"]}
    cpu_step(report(**shown, **curves, **chosen))
