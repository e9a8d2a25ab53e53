"""The additive part of a member: logistic regression on facts of prompt and workflow, in one solve.

A product of two rare facts (this checkpoint, that colour) is what a network of this size learns
last, and what choosing a workflow depends on most. So a member is wide and deep (Cheng et al. 2016,
arXiv 1606.07792). The wide part is additive in the logit of the score s in [0, 1]:

    logit s = bias + sum_u a[u] + sum_w b[w] + sum_f share_f (sum_w c[f, w] + sum_u d[f, u]),

with u the table rows of the workflow (each once), w the words of the prompt (each once; word 0 is
in every prompt) and f the files that it loads. On this scale a file that cannot draw a thing takes
the score to 0 whatever else speaks for it, and no sum of merits passes 1. The weights are those of
ridge regression with the cross entropy of a score as its loss, which is convex: Newton's method,
each step by conjugate gradients (Hestenes and Stiefel, 1952).

A fact has a key (`features.fact_key`): of a row, of a word, of a file with either.

Shapes: R renders, E facts of one workflow, C different facts, F files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.sparse as sp
from torch import Tensor

from flowloom.dataset.tokenizer import PAD_ID
from flowloom.reward.config import AdditiveConfig
from flowloom.reward.features import FILE_SPAN, WORD_SPAN, Features, fact_key, word_key

MAX_NEWTON, MAX_GRADIENTS = 12, 200
NEWTON_TOLERANCE, GRADIENT_TOLERANCE = 1e-2, 1e-3
"""Largest change of a scaled weight, and residual of a Newton step relative to its right side."""


@dataclasses.dataclass(frozen=True)
class Additive:
    """Weights of facts."""

    keys_C: np.ndarray
    """Keys of the facts, ascending."""
    weights_C: np.ndarray
    """Their weights; a fact that is not here has none."""
    bias: float
    """Logit of the mean score."""

    def scaled(self, share: float) -> Additive:
        """The same times a number."""
        return Additive(self.keys_C, share * self.weights_C, share * self.bias)

    def plus(self, other: Additive) -> Additive:
        """The sum of two."""
        keys_C, place = np.unique(np.concatenate([self.keys_C, other.keys_C]), return_inverse=True)
        weights_C = np.bincount(place, np.concatenate([self.weights_C, other.weights_C]))
        return Additive(keys_C, weights_C, self.bias + other.bias)


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts of renders as a sparse matrix, with a penalty for each."""

    values_RC: sp.csr_matrix
    """Value of each fact in each render."""
    keys_C: np.ndarray
    """Their keys, ascending."""
    penalties_C: np.ndarray
    """Ridge penalty of each; one render weighs 1."""

    @staticmethod
    def of(
        ids_PL: Tensor,
        prompt_of_R: np.ndarray,
        workflows: Sequence[Features],
        workflow_of_R: np.ndarray,
        config: AdditiveConfig,
    ) -> Facts:
        """Facts of the sorts that have a penalty.

        Args:
            ids_PL: Word ids of each prompt, padded with 0.
            prompt_of_R: Prompt of each render.
            workflows: Different workflows.
            workflow_of_R: Workflow of each render.
            config: Penalties by sort; None leaves a sort out.
        """
        words = [np.unique([PAD_ID, *ids]) for ids in ids_PL.tolist()]
        flows = [_flow_facts(flow, config) for flow in workflows]
        keys: list[np.ndarray] = []
        values: list[np.ndarray] = []
        sizes = np.zeros(len(prompt_of_R), np.int64)
        for row, (p, f) in enumerate(
            zip(prompt_of_R.tolist(), workflow_of_R.tolist(), strict=True)
        ):
            parts = [flows[f]]
            if config.word is not None:
                parts.append((word_key(words[p][1:]), np.ones(len(words[p]) - 1)))
            if config.file_word is not None:
                flow = workflows[f]
                pairs = fact_key(flow.file_rows_F[:, None], word_key(words[p]))
                shares = np.broadcast_to(flow.file_shares_F[:, None], pairs.shape)
                parts.append((pairs.ravel(), shares.ravel()))
            keys += [part[0] for part in parts]
            values += [part[1] for part in parts]
            sizes[row] = sum(len(part[0]) for part in parts)
        keys_C, column = np.unique(np.concatenate(keys), return_inverse=True)
        values_RC = sp.csr_matrix(
            (np.concatenate(values).astype(float), column, np.concatenate([[0], sizes.cumsum()])),
            shape=(len(sizes), len(keys_C)),
        )
        return Facts(values_RC, keys_C, _penalties(keys_C, config))


def fit(facts: Facts, scores_R: np.ndarray, weights_R: np.ndarray) -> Additive:
    """Weights of least sum of cross entropies + penalties * weights^2 / 2.

    Args:
        facts: What is known of each render.
        scores_R: Scores in [0, 1].
        weights_R: How often each render counts.

    Raises:
        ValueError: The solver did not converge.
    """
    scale_C = facts.penalties_C**-0.5
    x_RC = sp.csr_matrix(facts.values_RC @ sp.diags(scale_C))
    x_CR = sp.csr_matrix(x_RC.T)
    mean = float(np.clip(np.average(scores_R, weights=weights_R), 1e-3, 1 - 1e-3))
    bias = float(np.log(mean / (1 - mean)))
    w_C = np.zeros(len(scale_C))
    for _ in range(MAX_NEWTON):
        chance_R = sigmoid(x_RC @ w_C + bias)
        slope_C = x_CR @ (weights_R * (chance_R - scores_R)) + w_C
        curve_R = weights_R * chance_R * (1 - chance_R)
        step_C = _newton_step(x_RC, x_CR, curve_R, -slope_C)
        w_C = w_C + step_C
        if np.abs(step_C).max(initial=0.0) < NEWTON_TOLERANCE:
            return Additive(facts.keys_C, scale_C * w_C, bias)
    raise ValueError(
        "additive: got penalties for which the solver does not converge, expected more"
    )


def inherited(additive: Additive, heirs: Mapping[int, Sequence[int]]) -> Additive:
    """Facts of new table rows: each row's are the mean of those of the rows it resembles.

    Args:
        additive: What is known of the older rows.
        heirs: New row to the rows that it resembles.
    """
    file_C, row_C = additive.keys_C // FILE_SPAN - 1, additive.keys_C % FILE_SPAN
    known = dict(zip(additive.keys_C.tolist(), additive.weights_C.tolist(), strict=True))
    for new, sources in heirs.items():
        for source in sources:
            for place in np.flatnonzero((file_C == source) | (row_C == source)).tolist():
                file, row = int(file_C[place]), int(row_C[place])
                row = new if row == source else row
                key = row if file < 0 else fact_key(new if file == source else file, row)
                share = float(additive.weights_C[place]) / len(sources)
                known[key] = known.get(key, 0.0) + share
    keys_C = np.array(sorted(known), np.int64)
    return Additive(keys_C, np.array([known[key] for key in keys_C.tolist()]), additive.bias)


def sigmoid(z: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-z)), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * z))


def _flow_facts(flow: Features, config: AdditiveConfig) -> tuple[np.ndarray, np.ndarray]:
    keys, values = flow.facts
    wanted = np.where(keys < FILE_SPAN, config.row is not None, config.file_row is not None)
    return keys[wanted], values[wanted]


def _penalties(keys_C: np.ndarray, config: AdditiveConfig) -> np.ndarray:
    of_file_C, of_word_C = keys_C >= FILE_SPAN, keys_C % FILE_SPAN >= WORD_SPAN
    sorts = ((config.row, config.word), (config.file_row, config.file_word))
    penalty = np.array([[np.nan if value is None else value for value in row] for row in sorts])
    return penalty[of_file_C.astype(int), of_word_C.astype(int)]


def _newton_step(
    x_RC: sp.csr_matrix, x_CR: sp.csr_matrix, curve_R: np.ndarray, target_C: np.ndarray
) -> np.ndarray:
    """Solve (X^T diag(curve) X + 1) step = target by conjugate gradients."""
    step_C = np.zeros_like(target_C)
    residual_C = target_C.copy()
    direction_C, square = residual_C.copy(), residual_C @ residual_C
    bound = GRADIENT_TOLERANCE**2 * square
    for _ in range(MAX_GRADIENTS):
        if square <= bound:
            break
        image_C = x_CR @ (curve_R * (x_RC @ direction_C)) + direction_C
        rate = square / (direction_C @ image_C)
        step_C += rate * direction_C
        residual_C -= rate * image_C
        square, previous = residual_C @ residual_C, square
        direction_C = residual_C + square / previous * direction_C
    return step_C
