"""A trained designer where a new model file was installed: known at once, learnt in a short turn.

Its vocabulary takes the file into a reserved row, which starts as the mean of the rows of files of
its role and family. Training then goes on from the old weights: `train_sft` and `train_reward` from
their `start`, and `train_grpo` from the old tuning, carried over to the new reference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from flowloom.designer.loading import extended, load_pair, load_policy
from flowloom.designer.policy import VOCABULARY_FILE, Policy
from flowloom.workflow import Catalogue, Vocabulary

CATALOGUE_FILE = "catalogue.json.gz"


def read_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of a designer folder."""
    return Vocabulary.from_json(json.loads((folder / VOCABULARY_FILE).read_text()))


def file_heirs(older: Vocabulary, vocabulary: Vocabulary) -> dict[int, list[int]]:
    """For each new file's token the known ones of its role and family, or else of its folder."""
    known = {k: token for k, token in enumerate(older.tokens) if token.group == "file"}
    heirs = {}
    for index, token in enumerate(vocabulary.tokens):
        if token.group == "file" and index not in known:
            folder = [k for k, other in known.items() if other.kind == token.kind]
            same = [
                k for k in folder if (known[k].role, known[k].family) == (token.role, token.family)
            ]
            if folder:
                heirs[index] = same or folder
    return heirs


def load_extended(designer_dir: Path, catalogue: Catalogue) -> tuple[Policy, Vocabulary]:
    """A designer folder's policy and vocabulary, extended to the files of a catalogue.

    Raises:
        VocabularyError: More new files than reserved rows.
    """
    older = read_vocabulary(designer_dir)
    vocabulary = older.extend(catalogue)
    heirs = file_heirs(older, vocabulary)
    return extended(load_policy(designer_dir), heirs, vocabulary, catalogue), vocabulary


def carry_adapter(designer_dir: Path, adapter_dir: Path, new_dir: Path, out: Path) -> None:
    """Put the tuning of one designer on another that was trained on from it.

    Tuned weights of the embedded model are carried as a difference (task arithmetic, arXiv
    2212.04089): new + (tuned - reference), all over the new vocabulary. An adapter of a language
    model is a difference already.

    Args:
        designer_dir: The old designer.
        adapter_dir: Its adapter folder.
        new_dir: Designer folder that `train_sft` wrote with the old one as its `start`.
        out: Becomes an adapter folder of the new designer.
    """
    vocabulary, catalogue = read_vocabulary(new_dir), Catalogue.load(new_dir / CATALOGUE_FILE)
    heirs = file_heirs(read_vocabulary(designer_dir), vocabulary)
    tuned, reference = (
        extended(policy, heirs, vocabulary, catalogue)
        for policy in load_pair(designer_dir, adapter_dir)
    )
    if isinstance(tuned, Policy):
        add_difference(
            tuned.tuned_parameters(),
            reference.tuned_parameters(),
            load_policy(new_dir).tuned_parameters(),
        )
    tuned.save_adapter(out, new_dir)


@torch.no_grad()
def add_difference(
    tuned: Mapping[str, Tensor], reference: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> None:
    """Turn `tuned` into new + (tuned - reference), in place."""
    for name, weight in tuned.items():
        weight += new[name] - reference[name]
