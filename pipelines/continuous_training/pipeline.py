"""One turn of the loop: tune, build data, train twice, evaluate by rendering, gate, report."""

from kfp import dsl

from components.report import report
from pipelines.designer import MEMBERS, judge_designer, train_designer
from pipelines.generator import tune_and_publish
from pipelines.resources import cpu_step
from pipelines.turn import begun, ended, left


@dsl.pipeline(name="continuous-training", description=__doc__)
def continuous_training(
    recipe: str = "demo",
    overrides: dict = {},  # noqa: B006  kfp writes the default into the YAML
    champion: str = "auto",
    previous: str = "auto",
    members: list = MEMBERS,
):
    """Train a candidate and let the gate decide whether it becomes the champion.

    The tuned generator is in the catalogue before the designer is trained. Between two rounds of
    policy optimisation the policy's designs are rendered, and the reward is fitted anew. A later
    turn begins with the catalogue and triplets of the one before, and renders what its policy
    proposed last.

    Args:
        recipe: Name of a recipe in `flowloom.recipes`.
        overrides: Fields to replace, by stage, nested as in `config.json`.
        champion: Version of the champion to compare with; empty for none, `auto` for the one
            there is when the turn begins.
        previous: Version whose catalogue, triplets and proposals the turn goes on from; empty for
            none, `auto` for the one registered last, or the champion if that one does not fit.
        members: Numbers of the reward members; trained at the same time.
    """
    with ended():
        turn = begun("continuous_training", recipe, overrides, champion, previous)
        chosen, sourced, before = turn.chosen, turn.sourced, left(turn)
        tuned = tune_and_publish(earlier=before["catalogue"], **sourced).outputs
        catalogue = tuned["catalogue"]
        trained = train_designer(
            catalogue=catalogue,
            earlier=before["triplets"],
            proposals=before["adapter"],
            members=members,
            **sourced,
        ).outputs
        parts = {name: trained[name] for name in ("triplets", "designer", "adapter", "reward")}
        judged = judge_designer(
            catalogue=catalogue, champion=turn.opponent, **parts, **chosen
        ).outputs
        cpu_step(
            report(
                evaluation=judged["evaluation"],
                generator=tuned["generator"],
                decision=judged["decision"],
                designer=trained["designer"],
                members=trained["ensemble"],
                start=trained["start"],
                adapter=trained["adapter"],
                **chosen,
            )
        )
