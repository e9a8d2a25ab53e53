"""The two gates of a member: what its files can draw, and whether they are used well.

A product of two rare facts (this checkpoint, that colour) is what a network of this size learns
last, and what choosing a workflow depends on most. So a member is wide and deep (Cheng et al. 2016,
arXiv 1606.07792). The wide part of the score s in [0, 1] is a product of two logistic regressions,
for a picture is good where the files can draw what is asked *and* the workflow lets them:

    s = sigmoid(suits) * sigmoid(works)
    suits = bias + sum_w b[w] + sum_f share_f sum_w c[f, w]
    works = bias + sum_u a[u] + sum_f share_f sum_u d[f, u]

with w the words of the prompt (each once; word 0 is in every prompt), u the table rows of the
workflow (each once) and f the files that it loads. A checkpoint that cannot draw a thing takes the
score to 0 however well it is sampled, and one that can does not mend bad settings; one sum of all
facts lets merits of one sort pay for faults of the other. The weights are the minimum of the cross
entropy of the scores plus a ridge, found by L-BFGS (Liu and Nocedal, 1989) from equal gates.

A fact has a key (`features.fact_key`): of a row, of a word, of a file with either.

Shapes: R renders, E facts of one workflow, C different facts, F files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from flowloom.dataset.tokenizer import PAD_ID
from flowloom.reward.config import GatesConfig
from flowloom.reward.features import FILE_SPAN, WORD_SPAN, Features, fact_key, word_key

# Only what fits gates imports scipy, inside: it takes half a second.
if TYPE_CHECKING:
    import scipy.sparse as sp

MAX_ITERATIONS, MEMORY = 300, 20
"""Steps of L-BFGS, and how many of them it remembers; twice the steps change no score by .01."""


@dataclasses.dataclass(frozen=True)
class Gates:
    """Weights of facts."""

    keys_C: np.ndarray
    """Keys of the facts, ascending."""
    weights_C: np.ndarray
    """Their weights, in the gate that a fact belongs to; a fact that is not here has none."""
    suits: float
    """Bias of the gate of files and words."""
    works: float
    """Bias of the gate of files and rows."""


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
        config: GatesConfig,
    ) -> Facts:
        """Facts of the sorts that have a penalty.

        Args:
            ids_PL: Word ids of each prompt, padded with 0.
            prompt_of_R: Prompt of each render.
            workflows: Different workflows.
            workflow_of_R: Workflow of each render.
            config: Penalties by sort; None leaves a sort out.
        """
        import scipy.sparse as sp

        words = [np.unique([PAD_ID, *ids]) for ids in ids_PL.tolist()]
        flows = [_flow_facts(flow, config) for flow in workflows]
        wants_base, wants_extra = config.file_word is not None, config.extra_word is not None
        bases = np.concatenate([flow.file_rows_F[flow.file_is_base_F] for flow in workflows])
        keys: list[np.ndarray] = []
        values: list[np.ndarray] = []
        sizes = np.zeros(len(prompt_of_R), np.int64)
        for row, (p, f) in enumerate(
            zip(prompt_of_R.tolist(), workflow_of_R.tolist(), strict=True)
        ):
            parts = [flows[f]]
            if config.word is not None:
                parts.append((word_key(words[p][1:]), np.ones(len(words[p]) - 1)))
            flow = workflows[f]
            wanted_F = np.where(flow.file_is_base_F, wants_base, wants_extra)
            pairs = fact_key(flow.file_rows_F[wanted_F, None], word_key(words[p]))
            shares = np.broadcast_to(flow.file_shares_F[wanted_F, None], pairs.shape)
            parts.append((pairs.ravel(), shares.ravel()))
            keys += [part[0] for part in parts]
            values += [part[1] for part in parts]
            sizes[row] = sum(len(part[0]) for part in parts)
        keys_C, column = np.unique(np.concatenate(keys), return_inverse=True)
        values_RC = sp.csr_matrix(
            (np.concatenate(values).astype(float), column, np.concatenate([[0], sizes.cumsum()])),
            shape=(len(sizes), len(keys_C)),
        )
        return Facts(values_RC, keys_C, _penalties(keys_C, bases, config))


def of_words(keys_C: np.ndarray) -> np.ndarray:
    """Which facts are of words, alone or with a file: those of the gate `suits`."""
    return keys_C % FILE_SPAN >= WORD_SPAN


def fit(facts: Facts, scores_R: np.ndarray, weights_R: np.ndarray) -> Gates:
    """Weights of least sum of cross entropies + penalties * weights^2 / 2.

    Args:
        facts: What is known of each render.
        scores_R: Scores in [0, 1].
        weights_R: How often each render counts.
    """
    import scipy.optimize
    import scipy.sparse as sp

    scale_C = facts.penalties_C**-0.5
    scaled_RC = facts.values_RC @ sp.diags(scale_C)
    suits_C = of_words(facts.keys_C)
    columns = [np.flatnonzero(suits_C), np.flatnonzero(~suits_C)]
    gates = [sp.csr_matrix(scaled_RC[:, half]) for half in columns]
    turned = [sp.csr_matrix(gate.T) for gate in gates]
    cut = 1 + len(columns[0])

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        """Cross entropy of the product and ridge, and the slope; a gate's bias comes first."""
        parts = np.split(w, [cut])
        logits = [gate @ part[1:] + part[0] for gate, part in zip(gates, parts, strict=True)]
        log_R = sum(-np.logaddexp(0, -z_R) for z_R in logits)
        chance_R = np.clip(np.exp(log_R), 1e-9, 1 - 1e-9)
        loss_R = -scores_R * log_R - (1 - scores_R) * np.log1p(-chance_R)
        # d loss / d log chance, and d log sigmoid(z) / d z = sigmoid(-z).
        slope_R = weights_R * ((1 - scores_R) * chance_R / (1 - chance_R) - scores_R)
        slopes, ridge = [], 0.0
        for gate, part, z_R in zip(turned, parts, logits, strict=True):
            through_R = slope_R * sigmoid(-z_R)
            slopes += [[through_R.sum()], gate @ through_R + part[1:]]
            ridge += 0.5 * float(part[1:] @ part[1:])
        return float(weights_R @ loss_R) + ridge, np.concatenate(slopes)

    mean = float(np.clip(np.average(scores_R, weights=weights_R), 1e-3, 1 - 1e-3))
    start = np.zeros(2 + len(scale_C))
    start[[0, cut]] = np.log(np.sqrt(mean) / (1 - np.sqrt(mean)))
    options = {"maxiter": MAX_ITERATIONS, "maxcor": MEMORY}
    found = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    weights_C = np.zeros(len(scale_C))
    weights_C[columns[0]], weights_C[columns[1]] = found.x[1:cut], found.x[cut + 1 :]
    return Gates(facts.keys_C, scale_C * weights_C, float(found.x[0]), float(found.x[cut]))


def inherited(gates: Gates, heirs: Mapping[int, Sequence[int]]) -> Gates:
    """Facts of new table rows: each row's are the mean of those of the rows it resembles.

    Args:
        gates: What is known of the older rows.
        heirs: New row to the rows that it resembles.
    """
    file_C, row_C = gates.keys_C // FILE_SPAN - 1, gates.keys_C % FILE_SPAN
    known = dict(zip(gates.keys_C.tolist(), gates.weights_C.tolist(), strict=True))
    for new, sources in heirs.items():
        for source in sources:
            for place in np.flatnonzero((file_C == source) | (row_C == source)).tolist():
                file, row = int(file_C[place]), int(row_C[place])
                row = new if row == source else row
                key = row if file < 0 else fact_key(new if file == source else file, row)
                share = float(gates.weights_C[place]) / len(sources)
                known[key] = known.get(key, 0.0) + share
    keys_C = np.array(sorted(known), np.int64)
    weights_C = np.array([known[key] for key in keys_C.tolist()])
    return Gates(keys_C, weights_C, gates.suits, gates.works)


def sigmoid(z: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-z)), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * z))


def _flow_facts(flow: Features, config: GatesConfig) -> tuple[np.ndarray, np.ndarray]:
    keys, values = flow.facts
    wanted = np.where(keys < FILE_SPAN, config.row is not None, config.file_row is not None)
    return keys[wanted], values[wanted]


def _penalties(keys_C: np.ndarray, bases: np.ndarray, config: GatesConfig) -> np.ndarray:
    of_file_C = keys_C >= FILE_SPAN
    sorts = ((config.row, config.word), (config.file_row, config.extra_word))
    penalty = np.array([[np.nan if value is None else value for value in row] for row in sorts])
    penalties_C = penalty[of_file_C.astype(int), of_words(keys_C).astype(int)]
    if config.file_word is not None:
        of_base_C = of_words(keys_C) & np.isin(keys_C // FILE_SPAN - 1, bases)
        penalties_C[of_base_C] = config.file_word
    return penalties_C
