"""Facts: with little noise a cell's own mean counts, with much noise its workflow's and prompt's;
no spread at all leaves the plain means; the best cells are the largest, ties by fingerprint."""

import numpy as np
import pytest

from flowloom.designer.selection import best_cells, shrunk_means


def _world(noise, seed=0, num_prompts=40, num_workflows=10, num_seeds=2, cell_sd=0.02):
    rng = np.random.default_rng(seed)
    level = rng.normal(0, 0.1, num_prompts)
    quality = rng.normal(0, 0.1, num_workflows)
    cell = rng.normal(0, cell_sd, (num_prompts, num_workflows))
    truth = level[:, None] + quality + cell + 0.4
    rows = [
        (f"p{p}", "ab"[p % 2], f"w{w}", truth[p, w] + rng.normal() * noise)
        for p in range(num_prompts)
        for w in range(num_workflows)
        for _ in range(num_seeds)
    ]
    return truth, list(zip(*rows, strict=True))


def test_noiseless_scores_are_kept():
    truth, rows = _world(noise=0.0)
    shrunk = shrunk_means(*rows)
    for (prompt, workflow), value in shrunk.items():
        assert value == pytest.approx(truth[int(prompt[1:]), int(workflow[1:])], abs=1e-3)


def test_noisy_cells_borrow_from_their_workflow():
    truth, rows = _world(noise=0.3)
    shrunk = shrunk_means(*rows)
    got = np.array([shrunk[f"p{p}", f"w{w}"] for p in range(40) for w in range(10)])
    scores = np.asarray(rows[3]).reshape(40 * 10, 2).mean(1)
    error, raw = np.abs(got - truth.ravel()).mean(), np.abs(scores - truth.ravel()).mean()
    assert error < 0.4 * raw


def test_nothing_but_noise_gives_the_kind_means():
    rng = np.random.default_rng(0)
    rows = [(f"p{i}", "a" if i < 50 else "b", f"w{i}", (i >= 50) * 0.5) for i in range(100)]
    rows = [(*row[:3], row[3] + rng.normal() * 0.2) for row in rows for _ in range(4)]
    values = np.array(list(shrunk_means(*zip(*rows, strict=True)).values()))
    assert values[:50].std() < 0.05
    assert values[50:].mean() - values[:50].mean() == pytest.approx(0.5, abs=0.05)


def test_a_workflow_that_was_only_lucky_is_shrunk():
    rng = np.random.default_rng(0)
    cells = [(f"p{i // 10}", "a", f"w{i % 25}") for i in range(100)]
    rows = [(*cell, 0.5 + rng.normal() * 0.2) for cell in cells for _ in range(2)]
    values = np.array(list(shrunk_means(*zip(*rows, strict=True)).values()))
    assert values.std() < 0.03  # raw means of a workflow vary by .07, of a cell by .14


def test_best_cells():
    shrunk = {("p", "c"): 0.5, ("p", "b"): 0.7, ("q", "d"): 0.1, ("p", "a"): 0.5}
    assert best_cells(shrunk, 2) == [("p", "b"), ("p", "a"), ("q", "d")]


def test_bad_scores_are_refused():
    with pytest.raises(ValueError, match="non-finite"):
        shrunk_means(["p"], ["a"], ["w"], [float("nan")])
