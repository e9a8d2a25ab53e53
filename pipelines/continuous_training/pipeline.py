"""One turn of the loop: tune, build data, train twice, evaluate by rendering, gate, report."""

from kfp import dsl

from pipelines.designer import MEMBERS, design
from pipelines.generator import tune_and_publish
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
        before = left(turn)
        tuned = tune_and_publish(earlier=before["catalogue"], **turn.sourced).outputs
        design(turn, before, tuned["catalogue"], members, generator=tuned["generator"])
