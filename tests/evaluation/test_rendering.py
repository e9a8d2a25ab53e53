"""Facts pinned: chunks done before are not rendered again; the number of processes changes nothing;
kept pictures carry their workflow."""

import pytest

from flowloom.evaluation import rendering
from flowloom.evaluation.rendering import JudgedJob, render_and_score
from flowloom.render import png
from flowloom.runs import Run
from tests.render.tiny import CHECKPOINTS, flow, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def _jobs(number):
    prompts = ("a star", "two circles")
    return [
        JudgedJob(
            flow(CHECKPOINTS[k % 2]).fill(prompts[k % 2], seed=k), f"{k:02d}", prompts[k % 2], k < 2
        )
        for k in range(number)
    ]


def _begun(folder):
    run = Run("evaluate", folder)
    run.begin()
    return run


def _call(run, world, jobs, num_processes=1):
    return render_and_score(
        jobs,
        run,
        "scores",
        catalogue_dir=world,
        rubric="shapes",
        chunk_size=4,
        num_processes=num_processes,
    )


def test_resumes_by_chunk_to_the_same_rows(tmp_path, world, monkeypatch):
    jobs = _jobs(10)
    whole = _call(_begun(tmp_path / "whole"), world, jobs)
    assert sorted(whole) == [f"{k:02d}" for k in range(10)]
    assert set(whole["00"]) == {"score", "faithfulness", "crispness", "flops"}

    # As a process killed after two of three chunks leaves it.
    run = _begun(tmp_path / "killed")
    _call(run, world, jobs)
    (run.work / "scores-0002.json").unlink()
    rendered = []
    score_chunk = rendering.score_chunk
    monkeypatch.setattr(
        rendering,
        "score_chunk",
        lambda *arguments: rendered.append(len(arguments[2])) or score_chunk(*arguments),
    )
    assert _call(run, world, jobs) == whole
    assert rendered == [2]
    assert _call(run, world, jobs) == whole
    assert rendered == [2]


def test_processes_change_nothing_and_kept_pictures_are_there(tmp_path, world):
    jobs = _jobs(10)
    one, two = (_begun(tmp_path / name) for name in ("one", "two"))
    assert _call(one, world, jobs, 1) == _call(two, world, jobs, 2)
    kept = sorted(path.name for path in (two.work / "pictures").iterdir())
    assert kept == ["00.png", "01.png"]
    _, workflow = png.read(two.work / "pictures" / "01.png")
    assert workflow is not None
    assert workflow.fingerprint() == jobs[1].workflow.fingerprint()
