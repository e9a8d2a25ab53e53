"""Pins: constants by hand, independent of the order of rows; a file gives them back; standardised
scores have mean 0 and sd 1; constants of another rubric, other weights or another catalogue are
refused by name, damaged files and columns without spread too."""

import dataclasses
import json
import math

import numpy as np
import pytest

from flowloom.score.rubric import Rubric, Term, get_rubric
from flowloom.score.standard import STANDARD_FILE, Standard

TOLERANCE = 1e-12
RUBRIC = get_rubric("shapes")
COLUMNS = {
    "score": [0.0, 1.0, 0.5],
    "faithfulness": [0.1, 0.2, 0.9],
    "crispness": [0.7, 0.7, 0.7],
    "flops": [1, 2, 3],
}


def fit(columns=COLUMNS, catalogue="abc"):
    return Standard.fit(RUBRIC, catalogue, columns)


def test_constants_by_hand():
    standard = fit()
    assert standard.means["score"] == 0.5
    assert standard.sds["score"] == pytest.approx(math.sqrt(0.5 / 3), abs=TOLERANCE)
    assert standard.means["faithfulness"] == pytest.approx(0.4, abs=TOLERANCE)
    assert standard.sds["faithfulness"] == pytest.approx(math.sqrt(0.38 / 3), abs=TOLERANCE)
    assert standard.sds["crispness"] == 0
    assert set(standard.means) == {"score", "faithfulness", "crispness"}
    assert (standard.num_rows, standard.split) == (3, "train")
    assert (standard.rubric, standard.catalogue) == ("shapes", "abc")
    assert standard.weights == {"faithfulness": None, "crispness": 0.2}


def test_the_order_of_rows_does_not_matter():
    rng = np.random.default_rng(0)
    rows = {name: rng.random(1000) for name in RUBRIC.columns}
    order = rng.permutation(1000)
    assert fit(rows) == fit({name: column[order] for name, column in rows.items()})


def test_standardised_scores_have_mean_0_and_sd_1():
    rng = np.random.default_rng(0)
    rows = {name: rng.random(500) for name in RUBRIC.columns}
    for values in fit(rows).apply(RUBRIC, "abc", rows).values():
        assert values.mean() == pytest.approx(0, abs=TOLERANCE)
        assert values.std() == pytest.approx(1, abs=TOLERANCE)
    # The constants stay what they were, whatever they are applied to.
    found = fit().apply(RUBRIC, "abc", {"score": [0.5, 1.0], "flops": [5, 5]})
    assert list(found) == ["score"]
    np.testing.assert_allclose(found["score"], [0, 0.5 / math.sqrt(0.5 / 3)], atol=TOLERANCE)


def test_a_file_gives_the_constants_back(tmp_path):
    path = tmp_path / STANDARD_FILE
    fit().save(path)
    assert Standard.load(path) == fit()
    first = path.read_bytes()
    fit().save(path)
    assert path.read_bytes() == first


def test_other_rubrics_and_catalogues_are_refused_by_name():
    standard = fit()
    thrift = get_rubric("shapes-thrift")
    with pytest.raises(ValueError, match="constants of rubric 'shapes', expected 'shapes-thrift'"):
        standard.apply(thrift, "abc", COLUMNS)
    with pytest.raises(ValueError, match="constants of catalogue abc, expected def"):
        standard.apply(RUBRIC, "def", COLUMNS)
    lighter = [dataclasses.replace(t, weight=t.weight and 0.1) for t in RUBRIC.terms]
    with pytest.raises(ValueError, match=r"with weights .*0.2.*, expected .*0.1"):
        standard.apply(Rubric("shapes", tuple(lighter)), "abc", COLUMNS)
    more = Rubric("shapes", (*RUBRIC.terms, Term("x", RUBRIC.terms[0].scorer)))
    with pytest.raises(ValueError, match="'shapes' with weights"):
        standard.check(more, "abc")


def test_what_has_no_spread_cannot_be_standardised():
    rows = COLUMNS | {"crispness": [0.7, 0.7, 0.7]}
    with pytest.raises(ValueError, match=r"got 'crispness', which was 0.7 in all 3 rows"):
        fit(rows).apply(RUBRIC, "abc", rows)


def test_columns_must_be_there_and_as_long():
    for rows in ({}, {**COLUMNS, "score": [0.5]}, dict.fromkeys(RUBRIC.columns, ())):
        with pytest.raises(ValueError, match=r"standard: got rows .*, expected as many of each"):
            fit(rows)


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / STANDARD_FILE
    fit().save(path)
    row = json.loads(path.read_text())
    broken = (
        "{",
        "[]",
        "{}",
        json.dumps(row | {"format": 2}),
        json.dumps(row | {"means": {"score": 1}}),
        json.dumps(row | {"sds": row["sds"] | {"score": math.nan}}),
        json.dumps(row | {"surprise": 1}),
    )
    for text in broken:
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"{path}: got a file without standardisation"):
            Standard.load(path)
