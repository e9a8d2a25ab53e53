"""How different the pictures of one prompt are, and how much of that is wrong content.

Pictures of a prompt that do not show what it asks for differ too, but nobody wants their variety: a
tuned generator that draws them no more is less spread and no worse. So distances are taken among
pictures that satisfy their prompt, beside those among all.

Shapes: P prompts, S seeds, F features.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Diversity:
    """Mean distances between the pictures of each prompt; prompts are comparable, not pairs."""

    all_P: np.ndarray
    """Over all pairs of seeds; NaN where there is one seed."""
    satisfied_P: np.ndarray
    """Over pairs whose pictures both satisfy the prompt; NaN where fewer than two do."""
    wrong_P: np.ndarray
    """Part of `all_P` that lies in pairs with a picture that does not satisfy: the sum of their
    distances over the number of all pairs."""


def pair_distances(features_PSF: np.ndarray) -> np.ndarray:
    """Euclidean distances between the seeds of each prompt, `[P, S, S]`."""
    return np.linalg.norm(features_PSF[:, :, None] - features_PSF[:, None], axis=-1)


def diversity(features_PSF: np.ndarray, satisfied_PS: np.ndarray) -> Diversity:
    """Mean distances of different seeds, the same expectation for any number of them.

    Args:
        features_PSF: An embedding of each picture.
        satisfied_PS: Whether it satisfies its prompt.
    """
    num_seeds = features_PSF.shape[1]
    first, second = np.triu_indices(num_seeds, 1)
    distances_PN = pair_distances(features_PSF)[:, first, second]
    both_PN = satisfied_PS[:, first] & satisfied_PS[:, second]
    with np.errstate(invalid="ignore"):
        satisfied_P = (distances_PN * both_PN).sum(1) / both_PN.sum(1)
        all_P = distances_PN.sum(1) / len(first)
        wrong_P = (distances_PN * ~both_PN).sum(1) / len(first)
    return Diversity(all_P, satisfied_P, wrong_P)
