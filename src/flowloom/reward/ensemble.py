"""The frozen ensemble: predicted scores, the pessimistic reward, and intervals in rubric units.

Shapes: K members, B rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowloom.dataset.tokenizer import WordTokenizer
from flowloom.reward.features import Features, FeatureTable
from flowloom.reward.gates import inherited
from flowloom.reward.member import (
    CATALOGUE_FILE,
    TOKENIZER_FILE,
    VOCABULARY_FILE,
    encode_prompts,
    load_member,
)
from flowloom.reward.network import Batch, Network
from flowloom.workflow import Catalogue, Vocabulary, Workflow

CALIBRATION_FILE = "calibration.json"
BATCH_SIZE = 256
MAX_CACHED = 200_000


class Ensemble:
    """Predicts what a workflow would score on a prompt; nothing is rendered."""

    def __init__(
        self,
        networks: Sequence[Network],
        table: FeatureTable,
        tokenizer: WordTokenizer,
        calibration: dict[str, Any],
    ):
        """Put the parts together; `load` reads them."""
        self.networks, self.table, self.tokenizer = list(networks), table, tokenizer
        self.calibration = calibration
        self._features: dict[tuple[int, ...], Features] = {}
        self._known: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}

    @classmethod
    def load(cls, folder: str | Path) -> Ensemble:
        """Read what `calibrate_reward` wrote.

        Raises:
            ValueError: The folder holds no ensemble.
        """
        folder = Path(folder)
        if not (folder / CALIBRATION_FILE).is_file():
            raise ValueError(
                f"reward: got {str(folder)!r}, expected a folder with {CALIBRATION_FILE}"
            )
        calibration = json.loads((folder / CALIBRATION_FILE).read_text())
        vocabulary = Vocabulary.from_json(json.loads((folder / VOCABULARY_FILE).read_text()))
        table = FeatureTable(Catalogue.load(folder / CATALOGUE_FILE), vocabulary)
        tokenizer = WordTokenizer.load(folder / TOKENIZER_FILE)
        names = [f"member-{k}" for k in range(calibration["members"])]
        networks = [load_member(folder, name, len(tokenizer)) for name in names]
        return cls(networks, table, tokenizer, calibration)

    def extended(self, catalogue: Catalogue, vocabulary: Vocabulary) -> Ensemble:
        """The same ensemble for a catalogue with other files and the vocabulary extended to it.

        The rows of a new file start as the mean of those of its role and family; the members know
        no more of it.
        """
        table = FeatureTable(catalogue, vocabulary)
        heirs = table.heirs(self.table.vocabulary)
        networks = []
        for network in self.networks:
            gates = inherited(network.gates, heirs)
            num_facts = len(gates.keys_C)
            copy = Network(network.config, len(self.tokenizer), table.num_rows, num_facts)
            copy.go_on_from(network, heirs)
            copy.set_gates(gates)
            networks.append(copy.eval().requires_grad_(False))
        return Ensemble(networks, table, self.tokenizer, self.calibration)

    def predict(
        self, prompts: Sequence[str], tokens: Sequence[Sequence[int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean and spread of the members' standardised predictions, `[B]` each.

        Args:
            prompts: One per row.
            tokens: A workflow's code per row.

        Raises:
            CodecError: A row is no code.
        """
        keys = [(text, tuple(map(int, row))) for text, row in zip(prompts, tokens, strict=True)]
        new = [key for key in dict.fromkeys(keys) if key not in self._known]
        if len(self._known) + len(new) > MAX_CACHED:
            self._known.clear()
            self._features.clear()
            new = list(dict.fromkeys(keys))
        for _, code in new:
            if code not in self._features:
                self._features[code] = self.table.of_tokens(code)
        predicted_KB = self._forward([text for text, _ in new], [self._features[c] for _, c in new])
        self._known.update(zip(new, predicted_KB.T, strict=True))
        all_KB = np.array([self._known[key] for key in keys]).reshape(-1, len(self.networks)).T
        return all_KB.mean(0), all_KB.std(0)

    def predict_workflows(
        self, prompts: Sequence[str], workflows: Sequence[Workflow]
    ) -> np.ndarray:
        """Standardised predictions of each member for workflow templates, `[K, B]`; not cached."""
        return self._forward(prompts, [self.table.of_workflow(flow) for flow in workflows])

    def reward(self, prompts: Sequence[str], tokens: Sequence[Sequence[int]]) -> np.ndarray:
        """mean - beta * std, standardised, `[B]`: what a policy is optimised for."""
        mean_B, std_B = self.predict(prompts, tokens)
        return mean_B - self.calibration["beta"] * std_B

    def score_and_interval(
        self, prompts: Sequence[str], tokens: Sequence[Sequence[int]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Predicted score in rubric units, and where a single render's score will lie; `[B]` each.

        The interval holds a share `calibration["coverage"]` of single renders (split conformal, by
        range of the prediction).
        """
        scores_B = self.to_rubric(self.predict(prompts, tokens)[0])
        bins_B = np.searchsorted(self.calibration["edges"], scores_B)
        low_B = scores_B + np.array(self.calibration["low"])[bins_B]
        high_B = scores_B + np.array(self.calibration["high"])[bins_B]
        return scores_B, np.clip(low_B, 0, 1), np.clip(high_B, 0, 1)

    def unfamiliar(self, prompts: Sequence[str], tokens: Sequence[Sequence[int]]) -> np.ndarray:
        """Whether the members disagree more than on nearly all calibration cells, `[B]`.

        A warning only: members trained on the same renders can be wrong together.
        """
        return self.predict(prompts, tokens)[1] > self.calibration["spread_limit"]

    def to_rubric(self, predicted_B: np.ndarray) -> np.ndarray:
        """Standardised predictions in rubric units, clamped to [0, 1]: intercept + slope * p."""
        scores_B = self.calibration["intercept"] + self.calibration["slope"] * predicted_B
        return np.clip(scores_B, 0, 1)

    @torch.inference_mode()
    def _forward(self, prompts: Sequence[str], workflows: Sequence[Features]) -> np.ndarray:
        """Predictions `[K, B]`; rows sorted by size, in batches of `BATCH_SIZE`."""
        predicted_KB = np.empty((len(self.networks), len(prompts)))
        order = np.argsort([w.num_nodes for w in workflows], kind="stable")
        for first in range(0, len(order), BATCH_SIZE):
            rows: list[int] = order[first : first + BATCH_SIZE].tolist()
            different = list(dict.fromkeys(prompts[row] for row in rows))
            number = {text: k for k, text in enumerate(different)}
            prompt_of_B = torch.tensor([number[prompts[row]] for row in rows])
            batch = Batch.of([workflows[row] for row in rows])
            for k, network in enumerate(self.networks):
                ids_PL = encode_prompts(self.tokenizer, different, network.config)
                predicted_KB[k, rows] = network(ids_PL, prompt_of_B, batch).numpy()
        return predicted_KB
