"""Drawing and scoring an epoch's pictures, with a scripted method and generator.

Facts pinned here:
- A process draws whole prompts, as many at once as rows allow, with their own texts and seeds.
- What is scored are decoded pictures clamped to [-1, 1]; what lies beyond +-1.05 before that is
  counted, by hand.
- Of a score the total comes first, then each term in its own range.
- Each of N processes has its own run of prompts, and the rows of all are put together in order.
"""

import numpy as np
import pytest
import torch

from flowloom.generator.method import Paths
from flowloom.generator.rollout import Share, roll_out
from flowloom.processes import Processes
from flowloom.score.rubric import Rubric, Term


class Group:
    """A process among others whose rows are known."""

    def __init__(self, num, rank, others=0.0):
        self.num, self.rank, self.others = num, rank, others

    def sum(self, value):
        return value + self.others


class Scripted:
    """Two pictures a prompt: a tenth of its seed, and that with the right half turned around."""

    num_branches = 2

    def __init__(self):
        self.calls = []

    def roll_out(self, flow, prompts, seeds):
        self.calls.append((list(prompts), list(seeds)))
        levels_B = torch.tensor(seeds).repeat_interleave(2) / 10
        images_BCHW = levels_B[:, None, None, None] * torch.ones(1, 3, 32, 32)
        images_BCHW[1::2, ..., 16:] *= -1
        return Paths(images_BCHW, [prompt for prompt in prompts for _ in range(2)])


class Doubling:
    def decode(self, x_BCHW):
        return 2 * x_BCHW


def mean(prompts, images_BCHW, flops):
    return images_BCHW.flatten(1).mean(1).double().numpy()


def words(prompts, images_BCHW, flops):
    return np.array([float(prompt[-1]) for prompt in prompts])


TERMS = Term("mean", mean, 1.0, low=-1.0), Term("words", words, 0.5, low=10.0, high=0.0)
RUBRIC = Rubric("scripted", TERMS, kind="sum")
PROMPTS, SEEDS = [f"p{k}" for k in range(5)], [1, 2, -3, 5, 6]


def draw(share, sample_rows, method=None):
    return roll_out(Doubling(), method or Scripted(), RUBRIC, PROMPTS, SEEDS, share, sample_rows, 0)


@pytest.mark.parametrize(("rows", "sizes"), [(5, [2, 2, 1]), (4, [2, 2, 1]), (1, [1] * 5)])
def test_parts_are_whole_prompts(rows, sizes):
    method = Scripted()
    parts, _, _ = draw(Share(Processes(), 5, 2), rows, method)
    assert [len(part.prompts) for part in parts] == sizes
    assert [k for part in parts for k in part.prompts] == list(range(5))
    assert [text for texts, _ in method.calls for text in texts] == PROMPTS
    assert [seed for _, seeds in method.calls for seed in seeds] == SEEDS


def test_scores_and_wild_values_by_hand():
    _, scored, wild = draw(Share(Processes(), 5, 2), 4)
    # Twice a tenth of the seed, cut off at 1; half and half cancel.
    means = [0.2, 0, 0.4, 0, -0.6, 0, 1, 0, 1, 0]
    for row, (total, first, second) in enumerate(scored.tolist()):
        expected = (means[row] + 1) / 2, 1 - row // 2 / 10
        assert (first, second) == pytest.approx(expected, abs=1e-6)
        assert total == pytest.approx(first + 0.5 * second, abs=1e-6)
    # Only twice .6 is beyond 1.05: all of its first picture, at both ends of its second one.
    assert wild.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1]


def test_rows_of_two_processes_are_put_together():
    whole = draw(Share(Processes(), 5, 2), 4)[1]
    first, second = whole.clone(), whole.clone()
    first[6:], second[:6] = 0, 0
    for rank, (prompts, others) in enumerate(((range(3), second), (range(3, 5), first))):
        rows = slice(prompts.start * 2, prompts.stop * 2)
        share = Share(Group(2, rank, others), 5, 2)
        assert share.prompts == prompts
        torch.testing.assert_close(share.whole(whole[rows]), whole)
        # Its own part alone is the rest of it 0.
        alone = Share(Group(2, rank), 5, 2).whole(whole[rows])
        torch.testing.assert_close(alone, (first, second)[rank])
