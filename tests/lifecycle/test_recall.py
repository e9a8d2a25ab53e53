"""What the version registered last left.

Facts pinned:
- where nothing was registered nothing is found, and no tracker is made by looking;
- the candidate is gone on from, whatever the gate said of it; if it has other prompts, rubric or
  data, or no proposals, or no recorded run made it, the champion is, and what was passed over is
  told;
- a version named by a person must fit;
- an artifact is the folder of the run that made it here, else it is fetched by its digest, once;
  one that was changed since is refused.
"""

import dataclasses
import shutil

import pytest

from flowloom import runs
from flowloom.dataset.config import BuildTripletsConfig, PromptsConfig
from flowloom.designer.config import GRPOConfig
from flowloom.generator.config import PublishGeneratorConfig
from flowloom.lifecycle import mlflow_model, recall, registry, tracking, versioning

CONFIG = BuildTripletsConfig()
PROPOSING, SILENT = GRPOConfig(), GRPOConfig(num_proposals=None)
OTHER_PROMPTS = BuildTripletsConfig(prompts=PromptsConfig(seed=1))


@pytest.fixture
def register(tracked, make_parts, monkeypatch):
    """Registers a version made of recorded runs; its number and its parts' folders."""
    # What is served is not looked at, and takes seconds to log.
    monkeypatch.setattr(mlflow_model, "log", lambda _, run, folder: (f"runs:/{run}/m", "m"))

    def make(name, triplets=CONFIG, adapter=PROPOSING):
        parts = make_parts(name, weights=name.encode())
        (parts["triplets"] / "name").write_text(name)
        for part, stage, config in (
            ("catalogue", "publish_generator", PublishGeneratorConfig()),
            ("triplets", "build_triplets", triplets),
            ("adapter", "train_grpo", adapter),
        ):
            run = runs.open_run(stage, config, {"name": name})
            with tracking.recorded(run):
                run.begin()
                shutil.copytree(parts[part], run.out, dirs_exist_ok=True)
                parts[part] = run.finish({}).out_dir
                versioning.publish(parts[part])
        return registry.register(parts)[1], parts

    return make


def digests(version, parts):
    return {"version": version} | {name: runs.input_digest(parts[name]) for name in recall.PARTS}


def test_a_first_turn_finds_nothing():
    assert recall.find(CONFIG) == {}
    assert not (runs.home() / "mlflow.db").exists()


def test_the_candidate_is_gone_on_from_if_it_fits(register, tracked, capsys):
    first, parts = register("a")
    assert recall.find(CONFIG) == digests(first, parts)
    assert recall.find(CONFIG, "") == {}
    tracked.set_registered_model_alias(registry.NAME, registry.CHAMPION, first)
    second, later = register("b", dataclasses.replace(CONFIG, random_cells=1))
    assert (first, second) == ("1", "2")
    assert recall.find(CONFIG) == digests(second, later)  # nobody promoted it
    assert recall.find(CONFIG, first) == digests(first, parts)
    assert capsys.readouterr().err == ""


def test_what_does_not_fit_is_passed_over(register, tracked, capsys):
    first, parts = register("a")
    tracked.set_registered_model_alias(registry.NAME, registry.CHAMPION, first)
    for name, changes, reason in (
        ("b", {"triplets": OTHER_PROMPTS}, "its triplets have another prompts"),
        ("c", {"triplets": BuildTripletsConfig(rubric="x")}, "its triplets have another rubric"),
        ("d", {"adapter": SILENT}, "its policy proposed no designs"),
    ):
        version, _ = register(name, **changes)
        assert recall.find(CONFIG) == digests(first, parts)
        told = f"nothing is recalled from version {version}: {reason}\n"
        assert capsys.readouterr().err.endswith(told)
        with pytest.raises(ValueError, match=f"previous: got version {version}: {reason}"):
            recall.find(CONFIG, version)


def test_a_version_that_no_recorded_run_made_is_passed_over(register, tracked, make_parts, capsys):
    first, parts = register("a")
    tracked.set_registered_model_alias(registry.NAME, registry.CHAMPION, first)
    second = registry.register(make_parts("b"))[1]
    assert recall.find(CONFIG) == digests(first, parts)
    told = f"from version {second}: no recorded run made its triplets, adapter\n"
    assert capsys.readouterr().err.endswith(told)
    known = tracked.get_model_version(registry.NAME, second)
    tags = known.tags | {"flowloom.digest": "0" * 32 + ".dir"}
    made = tracked.create_model_version(registry.NAME, known.source, known.run_id, tags=tags)
    with pytest.raises(ValueError, match="got version 3: no recorded run made it"):
        recall.find(CONFIG, str(made.version))


def test_other_data_or_no_such_version(register, monkeypatch, capsys):
    register("a")
    monkeypatch.setattr(recall, "data_md5", lambda: "0" * 32)
    assert recall.find(CONFIG) == {}
    assert "expected 00000000" in capsys.readouterr().err
    with pytest.raises(ValueError, match="9"):
        recall.find(CONFIG, "9")


def test_an_artifact_is_here_or_fetched(register):
    _, parts = register("a")
    found = digests("", parts)
    del found["version"]
    assert {name: recall.bring(digest) for name, digest in found.items()} == {
        name: parts[name] for name in found
    }
    tracking.drain()
    shutil.rmtree(runs.home() / "runs")
    for digest in found.values():
        folder = recall.bring(digest)
        assert runs.input_digest(folder) == digest
        assert recall.bring(digest) == folder
    (folder / "more").touch()
    with pytest.raises(ValueError, match="remove it"):
        recall.bring(digest)
    with pytest.raises(ValueError, match="got no pointer to it"):
        recall.bring("0" * 32 + ".dir")
