"""Facts pinned: one file, nothing external, everything said; same input, same bytes."""

import json
import re
from html.parser import HTMLParser

import pytest

from flowloom.evaluation.charts import Bar, interval_chart, line_chart
from flowloom.evaluation.config import ReportConfig
from flowloom.evaluation.report import report
from flowloom.runs import Run


def _write(tmp_path, name, **inputs):
    run = Run("report", tmp_path / name)
    run.begin()
    metrics = report(ReportConfig(), run, **inputs)
    text = (run.out / "report.html").read_text()
    assert metrics["report/bytes"] == len(text)
    return text


class _Tags(HTMLParser):
    """Remembers addresses and checks that elements nest."""

    VOID = frozenset({"meta", "img", "br", "circle", "line", "polyline"})

    def __init__(self):
        super().__init__()
        self.open, self.addresses = [], []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in self.VOID

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_self_contained_and_complete(
    tmp_path, evaluation_dir, generator_dir, decision_path
):
    inputs = {
        "evaluation": evaluation_dir,
        "generator": generator_dir,
        "decision": decision_path,
    }
    text = _write(tmp_path, "first", **inputs)
    assert not re.search(r"https?://|url\(|@import|<script|<link", text)
    tags = _Tags()
    tags.feed(text)
    assert tags.addresses
    assert all(address.startswith("data:image/png;base64,") for address in tags.addresses)
    # Two policies x two seeds x four prompts, one grid.
    assert len(tags.addresses) == 17
    assert "beats the best fixed workflow by 0.110" in text
    assert "+0.080 to +0.142" in text
    assert "promoted to champion" in text
    assert text.index('class="who us"') < text.index('class="who"')
    assert "please the reward models, not the score" not in text
    assert "361 distinct, 243 with near-equal ones once" in text
    assert "made to hold 90 % of single renders" in text
    assert "three red circles" in text
    assert "red, orange &lt;warm&gt;" in text
    assert "position" in text
    assert "attribute binding" in text
    assert _write(tmp_path, "second", **inputs) == text


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [(-0.02, 0.05, "No clear difference"), (-0.2, -0.1, "falls behind the best fixed workflow")],
)
def test_headline_follows_the_interval(tmp_path, evaluation_dir, generator_dir, low, high, says):
    path = evaluation_dir / "evaluation.json"
    record = json.loads(path.read_text())
    record["paired"]["vs_best_fixed"] |= {"mean": (low + high) / 2, "low": low, "high": high}
    record["predicted_vs_true"]["gap"] = 0.3
    path.write_text(json.dumps(record))
    text = _write(tmp_path, "run", evaluation=evaluation_dir, generator=generator_dir)
    assert says in text
    assert "please the reward models, not the score" in text
    assert "beats the" not in text
    assert "The gate" not in text


def test_rounds_are_told_apart_in_the_curves(tmp_path, evaluation_dir, generator_dir):
    made = [("train_grpo", "grpo/reward"), ("train_reward", "train/loss")]
    outs = {}
    for stage, metric in made:
        for key in "ab":
            run_dir = tmp_path / "runs" / stage / key
            (run_dir / "out").mkdir(parents=True)
            (run_dir / "config.json").write_text(json.dumps({"stage": stage}))
            lines = [json.dumps({"step": step, metric: step / 10}) for step in (1, 2)]
            (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
            outs.setdefault(stage, []).append(run_dir / "out")
    inputs = {"evaluation": evaluation_dir, "generator": generator_dir}
    text = _write(tmp_path, "with", **inputs, training=outs["train_grpo"] + outs["train_reward"])
    for label in ("reward, round 1", "reward, round 2", "member 0", "member 1"):
        assert label in text


def test_training_curves_come_from_the_run_beside_the_artifact(
    tmp_path, evaluation_dir, generator_dir
):
    run_dir = tmp_path / "runs" / "train_grpo" / "key"
    (run_dir / "out").mkdir(parents=True)
    (run_dir / "config.json").write_text(json.dumps({"stage": "train_grpo"}))
    # Step 2 was logged twice by a run that was killed: drawn once.
    steps = [1, 2, 2, 3]
    lines = [json.dumps({"step": step, "grpo/reward": step / 10}) for step in steps]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    inputs = {"evaluation": evaluation_dir, "generator": generator_dir}
    text = _write(tmp_path, "with", **inputs, training=[run_dir / "out", tmp_path / "elsewhere"])
    assert "GRPO: predicted reward" in text
    without = _write(tmp_path, "without", **inputs)
    assert "GRPO: predicted" not in without


def test_interval_chart_places_points_on_a_round_axis():
    svg = interval_chart([Bar("a", 0.25, 0.2, 0.3), Bar("b<", 0.1, 0.0, 0.4, True)])
    centres = [float(x) for x in re.findall(r'cx="([\d.]+)"', svg)]
    # Axis 0 to .4 over x = 190 to 690.
    assert centres == pytest.approx([190 + 500 * 0.25 / 0.4, 190 + 500 * 0.1 / 0.4], abs=0.06)
    assert "b&lt;" in svg


def test_line_chart_skips_what_is_not_finite():
    svg = line_chart({"x": [(0, 1.0), (1, float("nan")), (2, 3.0)]}, "step")
    (points,) = re.findall(r'points="([^"]+)"', svg)
    assert len(points.split()) == 2
    assert line_chart({"x": [(0, float("inf"))]}, "step") == ""


def test_a_page_shows_what_there_is(tmp_path, evaluation_dir, generator_dir):
    tuned = _write(tmp_path, "tuned", generator=generator_dir)
    assert "report of a tuned generator" in tuned
    assert "a designer can choose it" in tuned
    assert "Policies compared" not in tuned
    assert "Validity and honesty" not in tuned
    designed = _write(tmp_path, "designed", evaluation=evaluation_dir)
    assert "A generator tuned by FDFO" not in designed
    assert "beats the best fixed workflow" in designed
    for text in (tuned, designed):
        tags = _Tags()
        tags.feed(text)
        assert tags.open == []
    with pytest.raises(ValueError, match="report: got neither evaluation nor generator"):
        _write(tmp_path, "nothing")
