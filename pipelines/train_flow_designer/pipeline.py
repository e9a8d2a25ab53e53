"""Train a designer for the catalogue as it is, from data to a gated champion; report."""

from kfp import dsl

from components.publish_generator import publish_generator
from components.report import report
from pipelines.designer import MEMBERS, judge_designer, train_designer
from pipelines.resources import cpu_step
from pipelines.turn import begun, ended, left


@dsl.pipeline(name="train-flow-designer", description=__doc__)
def train_flow_designer(
    recipe: str = "demo",
    overrides: dict = {},  # noqa: B006  kfp writes the default into the YAML
    champion: str = "auto",
    previous: str = "auto",
    members: list = MEMBERS,
):
    """Train a candidate and let the gate decide whether it becomes the champion.

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
        turn = begun("train_flow_designer", recipe, overrides, champion, previous)
        chosen, sourced, before = turn.chosen, turn.sourced, left(turn)
        published = publish_generator(earlier=before["catalogue"], **sourced)
        catalogue = cpu_step(published).outputs["catalogue"]
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
                decision=judged["decision"],
                designer=trained["designer"],
                members=trained["ensemble"],
                start=trained["start"],
                adapter=trained["adapter"],
                **chosen,
            )
        )
