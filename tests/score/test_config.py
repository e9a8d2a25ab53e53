"""Pins: rubrics are stated by name or whole, in Python and in nested mappings; what does not fit is
named; sums and ranges by hand; a scorer that breaks down, hangs or is not finite is named with its
prompt; models are loaded by the first pictures, once per process, and freed by closing."""

import dataclasses
import gc
import threading
import time

import numpy as np
import pytest
import torch

from flowloom.config import override, to_dict
from flowloom.score.build import build_rubric
from flowloom.score.config import (
    AestheticsConfig,
    AlignmentConfig,
    DetectorConfig,
    HPSConfig,
    PickScoreConfig,
    RubricConfig,
    ShapesConfig,
    TermConfig,
    VLMConfig,
)
from flowloom.score.models import ModelScorer, shared
from flowloom.score.rubric import Rubric, Term, get_rubric
from tests.score.tiny import pictures

TOLERANCE = 1e-12


def values(*numbers):
    return lambda prompts, images, flops: np.array(numbers[: len(prompts)], float)


def scores(rubric, count=2):
    rows = rubric.score(["a cat", "a dog"][:count], pictures(count))
    return [row["score"] for row in rows], rows


def test_sums_by_hand():
    terms = (Term("pick", values(21, 18), 1.0, low=18, high=24), Term("yes", values(0.9, 0.2), 0.1))
    found, rows = scores(Rubric("both", terms, kind="sum"))
    assert found == pytest.approx([0.5 + 0.09, 0 + 0.02], abs=TOLERANCE)
    assert [row["pick"] for row in rows] == [21, 18]
    # Any finite value will do, and less may be better.
    far = Term("far", values(-7, 103), 0.5, low=3, high=-1)
    assert scores(Rubric("far", (far,), kind="sum"))[0] == pytest.approx([1.25, -12.5])
    with pytest.raises(ValueError, match=r"terms: got \['a'\], expected a weight for every term"):
        Rubric("sum", (Term("a", values(1, 1)),), kind="sum")


def test_a_product_wants_values_in_their_range():
    term = Term("grade", values(3, 5), low=1, high=5)
    assert scores(Rubric("grades", (term,)))[0] == pytest.approx([0.5, 1], abs=TOLERANCE)
    less = dataclasses.replace(term, low=5, high=1)
    assert scores(Rubric("grades", (less,)))[0] == pytest.approx([0.5, 0], abs=TOLERANCE)
    with pytest.raises(ValueError, match=r"grades: grade: got 5.0 for 'a dog', .* in \[1, 4\]"):
        scores(Rubric("grades", (dataclasses.replace(term, high=4),)))
    for low, high in ((1, 1), (0, np.inf), (np.nan, 1)):
        with pytest.raises(ValueError, match=r"term grade.low, high: got .*, expected two differ"):
            dataclasses.replace(term, low=low, high=high)


def test_terms_get_the_pictures_they_want():
    shapes = []

    def look(prompts, images, flops):
        shapes.append([tuple(image.shape) for image in images])
        return np.zeros(len(prompts))

    terms = (Term("small", look, 0.5), Term("whole", look, 0.5, native=False))
    scores(Rubric("both", terms, kind="sum"))
    assert shapes == [[(3, 32, 32)] * 2, [(3, 32, 32), (3, 40, 24)]]


def test_what_goes_wrong_names_term_and_prompt_in_one_line():
    def breaks(prompts, images, flops):
        raise torch.OutOfMemoryError("no memory\n for this")

    with pytest.raises(RuntimeError) as caught:
        scores(Rubric("r", (Term("vlm", breaks),)))
    expected = "r: vlm: broke down for 'a cat' and 1 more: OutOfMemoryError: no memory for this"
    assert str(caught.value) == expected
    for kind in ("sum", "product"):
        with pytest.raises(FloatingPointError, match="r: vlm is not finite for 'a dog'"):
            scores(Rubric("r", (Term("vlm", values(1, np.inf), 1.0),), kind=kind))


def test_a_scorer_that_hangs_is_left():
    release = threading.Event()

    def hangs(prompts, images, flops):
        release.wait(20)
        return np.zeros(len(prompts))

    rubric = Rubric("r", (Term("vlm", hangs),), timeout_s=0.05)
    started = time.perf_counter()
    with pytest.raises(TimeoutError, match=r"^r: vlm: no values after 0.05 s for 'a cat' and 1"):
        scores(rubric)
    assert time.perf_counter() - started < 10
    release.set()
    # Errors and values come through as they are.
    assert scores(Rubric("r", (Term("a", values(1, 0)),), timeout_s=20))[0] == [1, 0]

    def refuses(prompts, images, flops):
        raise ValueError("prompt 'a cat': no")

    with pytest.raises(ValueError, match=r"^prompt 'a cat': no$"):
        scores(Rubric("r", (Term("a", refuses),), timeout_s=20))
    with pytest.raises(ValueError, match="timeout_s: got 0, expected > 0 or null"):
        Rubric("r", (Term("a", refuses),), timeout_s=0)


class Counted(ModelScorer):
    """Gives 1, by a model that says when it is loaded."""

    loads = 0

    def load(self):
        def read():
            Counted.loads += 1
            return torch.nn.Linear(1, 1)

        return shared(("counted",), read)

    def values(self, loaded, prompts, pictures):
        return np.ones(len(prompts))


def test_models_are_loaded_once_when_needed_and_freed_by_closing():
    terms = [Term(name, Counted(2), 1.0, native=False) for name in ("a", "b")]
    rubric = Rubric("r", tuple(terms), kind="sum")
    assert Counted.loads == 0
    assert rubric.score([], []) == []
    assert Counted.loads == 0
    for _ in range(2):
        assert scores(rubric)[0] == [2, 2]
        assert Counted.loads == 1
    Rubric("half", (terms[0],), kind="sum").close()
    assert scores(rubric)[0] == [2, 2]
    assert Counted.loads == 1
    rubric.close()
    rubric.close()
    gc.collect()
    assert scores(rubric)[0] == [2, 2]
    assert Counted.loads == 2
    rubric.close()
    get_rubric("shapes").close()


def test_model_scorers_refuse_pictures_that_are_not_finite():
    rubric = Rubric("r", (Term("a", Counted(2), 1.0, native=False),), kind="sum")
    spoilt = pictures(2)
    spoilt[1][0, 0, 0] = np.nan
    with pytest.raises(FloatingPointError, match="the picture is not finite for 'a dog'"):
        rubric.score(["a cat", "a dog"], spoilt)


PAPER = RubricConfig(
    name="pickscore-vlm",
    terms=(
        TermConfig(scorer=PickScoreConfig(), weight=1.0, low=18.0, high=24.0),
        TermConfig(scorer=VLMConfig(question="{prompt}?"), weight=0.1, name="yes"),
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    rubric: str | RubricConfig = "shapes"


def test_mappings_state_the_same_rubric():
    rubric = {
        "name": "pickscore-vlm",
        "terms": [
            {"scorer": {"kind": "pickscore"}, "weight": 1, "low": 18, "high": 24},
            {"scorer": {"kind": "vlm", "question": "{prompt}?"}, "weight": 0.1, "name": "yes"},
        ],
    }
    assert override(Stage(), {"rubric": rubric}) == Stage(rubric=PAPER)
    assert override(Stage(), to_dict(Stage(rubric=PAPER))) == Stage(rubric=PAPER)
    assert override(Stage(rubric=PAPER), {"rubric": "shapes"}) == Stage()
    longer = override(Stage(rubric=PAPER), {"rubric": {"timeout_s": 60}})
    assert longer == Stage(rubric=dataclasses.replace(PAPER, timeout_s=60.0))
    terms = [{"scorer": {"kind": "beauty"}}]
    with pytest.raises(ValueError, match=r"terms\[0\].scorer.kind: got 'beauty', expected one of"):
        override(Stage(), {"rubric": {"terms": terms}})


def test_rubrics_are_built_without_loading_a_model():
    rubric = build_rubric(PAPER, timeout_s=9)
    assert [(t.name, t.weight, t.low, t.high, t.native) for t in rubric.terms] == [
        ("pickscore", 1.0, 18.0, 24.0, False),
        ("yes", 0.1, 0.0, 1.0, False),
    ]
    assert (rubric.name, rubric.kind, rubric.timeout_s) == ("pickscore-vlm", "sum", 9)
    assert build_rubric(dataclasses.replace(PAPER, timeout_s=3.0), timeout_s=9).timeout_s == 3
    assert build_rubric("shapes") == get_rubric("shapes")
    kinds = (HPSConfig(), AlignmentConfig(), AestheticsConfig(), DetectorConfig())
    every = RubricConfig(terms=tuple(TermConfig(scorer=scorer, weight=0.5) for scorer in kinds))
    names = [term.name for term in build_rubric(every).terms]
    assert names == ["hps", "clip", "aesthetics", "geneval"]


def test_the_shapes_score_can_be_stated_in_full():
    terms = (
        TermConfig(scorer=ShapesConfig()),
        TermConfig(scorer=ShapesConfig(kind="crispness"), weight=0.2),
    )
    stated = build_rubric(RubricConfig(name="shapes", kind="product", terms=terms))
    assert stated == get_rubric("shapes")


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"terms: got \(\), expected at least one"):
        RubricConfig(terms=())
    with pytest.raises(ValueError, match="rubric: got 'beauty', expected one of shapes"):
        build_rubric("beauty")
    with pytest.raises(ValueError, match=r"terms: got \['pickscore'\], expected a weight"):
        build_rubric(RubricConfig(terms=(TermConfig(scorer=PickScoreConfig()),)))
    for scorer, message in (
        (lambda: PickScoreConfig(batch_size=0), "batch_size: got 0, expected >= 1"),
        (lambda: HPSConfig(model=""), "model: got '', expected a folder or a name"),
        (lambda: VLMConfig(question="?"), "question: got .*, expected {prompt} once"),
        (lambda: VLMConfig(yes=()), "yes: got .*, expected at least one word"),
        (lambda: DetectorConfig(threshold=2.0), r"threshold: got 2.0, expected in \[0, 1\]"),
        (lambda: DetectorConfig(max_objects=0), "max_objects: got 0, expected >= 1"),
        (lambda: AestheticsConfig(head=""), "head: got '', expected a file"),
    ):
        with pytest.raises(ValueError, match=message):
            scorer()
