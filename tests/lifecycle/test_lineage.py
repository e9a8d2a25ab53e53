"""Where an artifact comes from.

Facts pinned:
- a lineage lists every artifact once, what it was made from before it, by tags or by run folders;
- one run recorded for two turns is one maker; two runs of one digest are two, and said so, and an
  artifact that no run made is said so;
- whom a candidate was compared with is named, and its own lineage is not part of this one's;
- a model version, a run id and a run folder name the same artifact.
"""

import dataclasses
import json

import pytest

from flowloom import runs
from flowloom.lifecycle import registry, tracking
from flowloom.lifecycle.lineage import trace
from flowloom.lifecycle.records import Records, read_tags


@dataclasses.dataclass(frozen=True)
class Config:
    """A stage's configuration."""

    seed: int = 0


def finished(stage, text, inputs=None, seed=0):
    run = runs.open_run(stage, Config(seed), inputs or {})
    run.begin()
    (run.out / "a.txt").write_text(text)
    return run.finish({})


@pytest.fixture
def chain():
    """Pairs, two members of them, an ensemble of both: digests by name."""
    pairs = finished("build_pairs", "pairs").digest
    members = [finished("train_reward", f"m{k}", {"triplets": pairs}, k).digest for k in range(2)]
    reward = finished("calibrate_reward", "r", {"members": ",".join(members), "rows": pairs})
    return {"pairs": pairs, "members": members, "reward": reward.digest}


def test_run_folders_give_a_lineage_without_a_tracker(chain):
    found = trace(Records(), [chain["reward"]])
    assert list(found.artifacts) == [chain["pairs"], *chain["members"], chain["reward"]]
    stages = [item.makers[0].stage for item in found.artifacts.values()]
    assert stages == ["build_pairs", "train_reward", "train_reward", "calibrate_reward"]
    record = found.to_dict()
    assert record["problems"] == []
    assert record["code"] == [runs.code_digest()]
    assert record["artifacts"][0]["made_by"][0]["inputs"]["members"] == chain["members"]


def test_made_by_two_runs_or_by_none_is_said(chain):
    twin = finished("build_pairs", "pairs", seed=1)
    assert twin.digest == chain["pairs"]
    lost = "0" * 32 + ".dir"
    last = finished("report", "page", {"evaluation": lost, "rows": chain["pairs"]}).digest
    found = trace(Records(), [last])
    assert found.artifacts[lost].problem == "no recorded run made it"
    assert found.artifacts[chain["pairs"]].problem.startswith("2 runs made it")
    assert len(found.to_dict()["problems"]) == 2
    assert found.artifacts[last].problem is None


def test_the_opponent_is_named_and_not_followed(chain):
    older = finished("register", "model", {"reward": chain["reward"]}).digest
    last = finished("evaluate", "table", {"champion": older}).digest
    found = trace(Records(), [last])
    assert list(found.artifacts) == [older, last]
    assert not found.artifacts[older].followed
    # Unless it is part of the lineage for another reason, too.
    both = finished("report", "page", {"champion": older, "other": older}).digest
    below = [chain["pairs"], *chain["members"], chain["reward"]]
    assert list(trace(Records(), [both]).artifacts) == [*below, older, both]
    found = trace(Records(), [last, older])
    assert found.artifacts[older].followed
    assert list(found.artifacts) == [*below, older, last]


def test_of_several_makers_one_is_followed_or_all():
    inputs = [finished("build_pairs", text).digest for text in ("a", "b")]
    (digest,) = {finished("train_sft", "same", {"pairs": each}).digest for each in inputs}
    makers = Records().by_digest(digest)
    for maker in makers:
        found = trace(Records(), [digest], {digest: maker})
        assert list(found.artifacts) == [*maker.artifacts["pairs"], digest]
        assert found.artifacts[digest].makers[0] == maker
        assert len(found.artifacts[digest].makers) == 2
    assert set(trace(Records(), [digest], every=True).artifacts) == {*inputs, digest}


def test_a_long_chain_is_no_recursion():
    digest = finished("train_grpo", "0").digest
    deep = {f"{n:032x}.dir": f"{n - 1:032x}.dir" for n in range(1, 3000)}

    class Long(Records):
        def by_digest(self, digest):
            inputs = {"flowloom.input.start": deep[digest]} if digest in deep else {}
            return (read_tags("r", {"flowloom.stage": "train_grpo", **inputs}),)

    assert len(trace(Long(), [f"{2999:032x}.dir"]).artifacts) == 3000
    assert digest


def test_two_turns_of_one_run_are_one_maker(tracked, make_run, monkeypatch):
    monkeypatch.setenv("FLOWLOOM_COMMIT", "abc")
    run = make_run()
    for turn in ("0001", "0002"):
        monkeypatch.setenv("FLOWLOOM_TURN", turn)
        tracking.record_now(run)
    (record,) = Records().by_digest(run.result().digest)
    assert len(record.run_ids) == 2
    assert trace(Records(), [record.digest]).to_dict()["commits"] == ["abc"]
    assert record.folder == run.dir
    assert record.packages["python"]
    assert Records().identity(record) == json.loads((run.dir / "config.json").read_text())


def test_a_version_a_run_id_and_a_folder_name_the_same(tracked, make_parts):
    result, version = registry.register(make_parts())
    records = Records()
    of_version = records.subject(f"models:/flow-designer/{version}")
    assert of_version.digest == result.digest
    assert of_version.record.stage == "register"
    for text in (of_version.record.run_ids[0], str(result.out_dir.parent)):
        assert records.subject(text).record == of_version.record
    assert records.subject("flow-designer@candidate").digest == result.digest
    assert set(of_version.record.artifacts) == {
        "catalogue", "triplets", "designer", "adapter", "reward", "evaluation",
    }  # fmt: skip
    for text in ("models:/flow-designer@champion", "models:/other@champion", "nothing", "0" * 32):
        with pytest.raises(ValueError, match=r"no such model|expected models|expected an|tracker"):
            records.subject(text)
