"""Two runs side by side.

Facts pinned: only fields that differ are listed, 3 and 3.0 are equal, metrics have a difference
where both have them; pictures are paired by name; the page needs nothing outside itself; of a
registered model, metrics and pictures are its evaluation's; seconds are no metric to compare.
"""

import base64
import dataclasses
import shutil

import pytest

from flowloom import runs
from flowloom.lifecycle import comparison, tracking
from flowloom.lifecycle.record import Subject
from flowloom.lifecycle.records import Records
from flowloom.lifecycle.surroundings import different

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@dataclasses.dataclass(frozen=True)
class Config:
    """A stage's configuration."""

    lr: float = 0.1
    steps: int = 3
    text: str = "<b>"


def finished(config, metrics, **pictures):
    run = runs.open_run("tune_generator", config, {})
    run.begin()
    (run.out / "a.txt").write_text("<b>")
    for name, data in pictures.items():
        (run.out / f"{name}.png").write_bytes(data)
    run.finish(metrics)
    return str(run.dir)


@pytest.fixture
def found():
    a = finished(Config(), {"eval/score": 0.5, "eval/old": 1.0}, grid=PNG, same=PNG)
    b = finished(
        Config(lr=0.2, text="<i>"), {"eval/score": 0.75}, grid=PNG + b"x", same=PNG, more=PNG
    )
    records = Records()
    return comparison.compare(records, records.subject(a), records.subject(b))


def test_what_differs_is_listed(found):
    assert found.config == (("lr", "0.1", "0.2"), ("text", "<b>", "<i>"))
    assert found.inputs == ()
    metrics = {metric.name: metric.difference for metric in found.metrics}
    assert metrics == {"eval/score": 0.25, "eval/old": None}
    verdicts = {picture.name: picture.verdict for picture in found.pictures}
    assert verdicts == {"grid.png": "differs", "same.png": "equal", "more.png": "in one alone"}
    assert found.to_dict()["config"]["lr"] == {"a": "0.1", "b": "0.2"}


def test_numbers_that_are_equal_are_no_difference():
    assert different({"a": "3", "b": "x"}, {"a": "3.0", "b": "x"}) == []
    assert different({"a": "3"}, {"b": "null"}) == [("a", "3", "(none)"), ("b", "(none)", "null")]
    assert different({"a": "1"}, None) == []


def test_the_page_is_self_contained(found):
    page = comparison.page(found)
    assert page.count("data:image/png;base64,") == 5
    assert "http" not in page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "eval/score" in page
    assert "+0.25" in page


def test_of_a_registered_model_its_evaluation_is_shown():
    evaluation = finished(Config(), {"eval/score": 0.5}, grid=PNG)
    records = Records()
    evaluated = records.subject(evaluation)
    run = runs.open_run("register", Config(), {"evaluation": evaluated.digest})
    run.begin()
    run.finish({})
    model = records.subject(str(run.dir))
    found = comparison.compare(records, model, evaluated)
    assert [metric.difference for metric in found.metrics] == [0.0]
    assert [picture.verdict for picture in found.pictures] == ["equal"]
    assert found.facts[0] == ("stage", "register", "tune_generator")
    assert found.inputs == (("evaluation", evaluated.digest, "(none)"),)
    unknown = Subject(title="flow-designer version 9", digest=None, record=None)
    with pytest.raises(ValueError, match="flow-designer version 9: no recorded run made it"):
        comparison.compare(records, evaluated, unknown)


def test_metrics_come_from_the_tracker_where_no_folder_is_left(tracked, make_run):
    run = make_run()
    tracking.record_now(run)
    digest = run.result().digest
    shutil.rmtree(run.dir)
    (record,) = Records().by_digest(digest)
    tracked.log_metric(record.run_ids[0], f"{comparison.SECONDS}total", 1.0)
    subject = Records().subject(record.run_ids[0])
    found = comparison.compare(Records(), subject, subject)
    assert {"eval/score": 0.5}.items() <= {
        metric.name: metric.a for metric in found.metrics
    }.items()
    assert not any(metric.name.startswith(comparison.SECONDS) for metric in found.metrics)
