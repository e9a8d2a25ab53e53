"""Train a designer for the catalogue as it is, from data to a gated champion; report."""

from kfp import dsl

from components.publish_generator import publish_generator
from pipelines.designer import MEMBERS, design
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
        before = left(turn)
        published = publish_generator(earlier=before["catalogue"], **turn.sourced)
        design(turn, before, cpu_step(published).outputs["catalogue"], members)
