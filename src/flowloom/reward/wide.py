"""Which file suits which word: ridge regression on (file, word) pairs, in closed form.

A product of two rare facts (this checkpoint, that colour) is what a network of this size learns
last, and what choosing a workflow depends on most. So a member is wide and deep (Cheng et al. 2016,
arXiv 1606.07792): the wide part is solved first, the network learns what it leaves.

Shapes: R rows, C columns (one for each file row and word, the word 0 standing for any prompt), E
entries of the sparse matrix, F files of a workflow.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flowloom.dataset.tokenizer import PAD_ID
from flowloom.reward.features import Features

TOLERANCE = 1e-6
MAX_ITERATIONS = 2000


def fit_wide(
    ids_PL: Tensor,
    prompt_of_R: np.ndarray,
    workflows: Sequence[Features],
    workflow_of_R: np.ndarray,
    targets_R: Tensor,
    shape: tuple[int, int],
    penalty: float,
) -> Tensor:
    """Weights w of least |X w - y|^2 + penalty |w|^2 over (file row, word) pairs.

    A row of X holds the share of each file that the workflow loads, at each word of the prompt.

    Args:
        ids_PL: Word ids of each prompt, padded with 0.
        prompt_of_R: Prompt of each row.
        workflows: Different workflows.
        workflow_of_R: Workflow of each row.
        targets_R: Standardised scores y.
        shape: (table rows, words) of the result; what names no file stays 0.
        penalty: Ridge penalty; one render weighs 1.

    Raises:
        ValueError: The solver did not converge.
    """
    words = [[PAD_ID, *sorted({w for w in ids if w != PAD_ID})] for ids in ids_PL.tolist()]
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    for row, (prompt, flow) in enumerate(zip(prompt_of_R, workflow_of_R, strict=True)):
        features = workflows[flow]
        for file_row, share in zip(features.file_rows_F, features.file_shares_F, strict=True):
            columns += [file_row * shape[1] + word for word in words[prompt]]
            values += [share] * len(words[prompt])
            rows += [row] * len(words[prompt])
    row_E, column_E = torch.tensor(rows), torch.tensor(columns)
    value_E = torch.tensor(values, dtype=torch.float64)
    size = (len(prompt_of_R), shape[0] * shape[1])
    targets_R = targets_R.double()

    def forward(w_C: Tensor) -> Tensor:
        return torch.zeros(size[0], dtype=w_C.dtype).index_add_(0, row_E, value_E * w_C[column_E])

    def backward(r_R: Tensor) -> Tensor:
        return torch.zeros(size[1], dtype=r_R.dtype).index_add_(0, column_E, value_E * r_R[row_E])

    # Conjugate gradients on the normal equations (Hestenes and Stiefel, 1952).
    w_C = torch.zeros(size[1], dtype=torch.float64)
    residual_C = backward(targets_R)
    direction_C, square = residual_C.clone(), residual_C.dot(residual_C)
    bound = TOLERANCE**2 * square
    for _ in range(MAX_ITERATIONS):
        if square <= bound:
            return w_C.view(shape).float()
        image_C = backward(forward(direction_C)) + penalty * direction_C
        step = square / direction_C.dot(image_C)
        w_C += step * direction_C
        residual_C -= step * image_C
        square, previous = residual_C.dot(residual_C), square
        direction_C = residual_C + square / previous * direction_C
    raise ValueError(f"wide_penalty: got {penalty}, expected one for which the solver converges")
