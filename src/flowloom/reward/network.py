"""The network of one reward member: prompt words and workflow nodes to one number.

    prompt    words + positions -> one self-attention block                    once per prompt
    node      sum of its rows; + A mean(nodes that feed it) + B mean(nodes that it feeds)
    block     nodes attend to nodes and prompt words; MLP
    deep      MLP of [sum over nodes, mean over prompt words]
    gates     suits and works of facts (`gates`); works <- (1 - share) * works + share * deep
    score     low + (high - low) * sigmoid(suits) * sigmoid(works), standardised

Shapes: P prompts, B workflows (rows), L prompt words, N nodes, E entries, F files, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowloom.dataset.tokenizer import PAD_ID
from flowloom.reward.config import NetworkConfig
from flowloom.reward.features import Features, fact_key, word_key
from flowloom.reward.gates import Gates

OPEN = 2.0
"""Logit of the gate `works` that an untrained network has."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Workflows, padded to the largest one."""

    rows_E: Tensor
    """Table rows of all nodes, one after the other."""
    offsets_M: Tensor
    """Where each of the M = B * N nodes begins; a padding node is empty."""
    mask_BN: Tensor
    """True where there is a node."""
    feeds_BNN: Tensor
    """Mean over sources: `[b, target, source]` is 1 / number of links into target."""
    fed_BNN: Tensor
    """Mean over targets: `[b, source, target]` is 1 / number of links out of source."""
    workflow_of_F: Tensor
    """Workflow of each file."""
    file_rows_F: Tensor
    """Its table row."""
    file_shares_F: Tensor
    """Its share."""
    fact_keys_E: Tensor
    """Facts of the workflows that hold for any prompt."""
    fact_values_E: Tensor
    """Their values."""
    workflow_of_E: Tensor
    """Workflow of each."""

    @staticmethod
    def of(workflows: Sequence[Features]) -> Batch:
        """Pad and stack."""
        B, N = len(workflows), max(w.num_nodes for w in workflows)
        sizes_BN = np.zeros((B, N), np.int64)
        links_BNN = np.zeros((B, N, N), np.float32)
        mask_BN = np.zeros((B, N), bool)
        for b, w in enumerate(workflows):
            sizes_BN[b] = np.bincount(w.nodes_E, minlength=N)
            np.add.at(links_BNN[b], (w.targets_L, w.sources_L), 1.0)
            mask_BN[b, : w.num_nodes] = True
        ends_M = sizes_BN.ravel().cumsum()
        facts = [w.facts for w in workflows]
        return Batch(
            torch.from_numpy(np.concatenate([w.rows_E for w in workflows])),
            torch.from_numpy(ends_M - sizes_BN.ravel()),
            torch.from_numpy(mask_BN),
            torch.from_numpy(links_BNN / np.maximum(links_BNN.sum(2, keepdims=True), 1)),
            torch.from_numpy(
                (links_BNN / np.maximum(links_BNN.sum(1, keepdims=True), 1)).swapaxes(1, 2).copy()
            ),
            torch.from_numpy(np.repeat(np.arange(B), [len(w.file_rows_F) for w in workflows])),
            torch.from_numpy(np.concatenate([w.file_rows_F for w in workflows])),
            torch.from_numpy(np.concatenate([w.file_shares_F for w in workflows])),
            torch.from_numpy(np.concatenate([keys for keys, _ in facts])),
            torch.from_numpy(np.concatenate([values for _, values in facts])),
            torch.from_numpy(np.repeat(np.arange(B), [len(keys) for keys, _ in facts])),
        )


class Block(nn.Module):
    """Pre-norm attention of queries to keys, then an MLP of squared ReLU."""

    def __init__(self, config: NetworkConfig, dropout: float):
        super().__init__()
        D = config.width
        self.num_heads = config.num_heads
        self.norm_query, self.norm_key, self.norm_mlp = (nn.LayerNorm(D) for _ in range(3))
        self.to_q, self.to_k, self.to_v, self.to_out = (
            nn.Linear(D, D, bias=False) for _ in range(4)
        )
        self.up = nn.Linear(D, config.mlp_ratio * D)
        self.down = nn.Linear(config.mlp_ratio * D, D)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x_BND: Tensor, context_BLD: Tensor | None, mask_BK: Tensor) -> Tensor:
        """Attend from x to itself and the context, whose joint mask is `mask_BK`, K = N + L."""
        keys = self.norm_key(x_BND)
        if context_BLD is not None:
            keys = torch.cat([keys, self.norm_key(context_BLD)], 1)
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.to_q(self.norm_query(x_BND)), self.to_k(keys), self.to_v(keys))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BK[:, None, None])
        x_BND = x_BND + self.to_out(mixed.transpose(1, 2).flatten(2))
        hidden = F.relu(self.up(self.norm_mlp(x_BND))).square()
        return x_BND + self.down(self.dropout(hidden))


class Network(nn.Module):
    """One member; untrained until a state is loaded."""

    def __init__(
        self,
        config: NetworkConfig,
        num_words: int,
        num_rows: int,
        num_facts: int = 0,
        dropout: float = 0.0,
    ):
        """Build a member whose gates know nothing yet.

        Args:
            config: Size.
            num_words: Words of the tokenizer.
            num_rows: Rows of the feature table.
            num_facts: Facts that the gates have weights of.
            dropout: While training.
        """
        super().__init__()
        self.config = config
        self.fact_keys: Tensor
        self.fact_weights: Tensor
        self.biases: Tensor
        self.share: Tensor
        self.units: Tensor
        self.register_buffer("fact_keys", torch.zeros(num_facts, dtype=torch.long))
        self.register_buffer("fact_weights", torch.zeros(num_facts))
        self.register_buffer("biases", torch.zeros(2))
        self.register_buffer("share", torch.ones(()))
        # low, high: the scores that closed and open gates stand for; mean, std: of the train rows.
        self.register_buffer("units", torch.tensor([0.0, 1.0, 0.0, 1.0]))
        D = config.width
        self.words = nn.Embedding(num_words, D)
        self.positions = nn.Parameter(torch.empty(config.num_prompt_tokens, D))
        self.prompt_block = Block(config, dropout)
        self.rows = nn.EmbeddingBag(num_rows, D, mode="sum")
        self.from_sources = nn.Linear(D, D, bias=False)
        self.from_targets = nn.Linear(D, D, bias=False)
        self.blocks = nn.ModuleList(Block(config, dropout) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(2 * D)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(2 * D, config.mlp_ratio * D)
        self.out = nn.Linear(config.mlp_ratio * D, 1)
        for weight in (self.words.weight, self.rows.weight, self.positions):
            nn.init.normal_(weight, std=0.3)
        nn.init.zeros_(self.out.weight)
        nn.init.constant_(self.out.bias, OPEN)

    def set_gates(self, gates: Gates) -> None:
        """Give it other facts, in place of those it has."""
        self.fact_keys = torch.from_numpy(gates.keys_C)
        self.fact_weights = torch.from_numpy(gates.weights_C).float()
        self.biases = torch.tensor([gates.suits, gates.works])

    def go_on_from(self, other: Network, heirs: Mapping[int, Sequence[int]]) -> None:
        """Take the weights of another network; new table rows start as the mean of some."""
        state = self.state_dict()
        facts = ("fact_keys", "fact_weights")
        state |= {k: v.clone() for k, v in other.state_dict().items() if k not in facts}
        for row, sources in heirs.items():
            state["rows.weight"][row] = other.rows.weight[sources].mean(0)
        self.load_state_dict(state)

    @property
    def gates(self) -> Gates:
        """The facts it has."""
        weights_C = self.fact_weights.double().numpy()
        return Gates(self.fact_keys.numpy(), weights_C, *self.biases.tolist())

    def forward(self, ids_PL: Tensor, prompt_of_B: Tensor, batch: Batch) -> Tensor:
        """Standardised scores.

        Args:
            ids_PL: Word ids of each prompt, padded with 0.
            prompt_of_B: Prompt of each workflow.
            batch: The workflows.

        Returns:
            `[B]`.
        """
        suits_B, works_B = self.suits(ids_PL, prompt_of_B, batch), self.works(batch)
        works_B = works_B.lerp(self.deep(ids_PL, prompt_of_B, batch), self.share)
        low, high, mean, std = self.units
        return (low + (high - low) * suits_B.sigmoid() * works_B.sigmoid() - mean) / std

    def deep(self, ids_PL: Tensor, prompt_of_B: Tensor, batch: Batch) -> Tensor:
        """The network's own logit of the gate `works`, `[B]`; arguments as of `forward`."""
        # An empty prompt keeps its first padding position, so that there is something to attend to.
        seen_PL = ids_PL != PAD_ID
        seen_PL = seen_PL | (torch.arange(ids_PL.shape[1]) == 0)
        words_PLD = self.words(ids_PL) + self.positions[: ids_PL.shape[1]]
        words_PLD = self.prompt_block(words_PLD, None, seen_PL)
        weights_PL1 = seen_PL.float()[..., None]
        summary_PD = (words_PLD * weights_PL1).sum(1) / weights_PL1.sum(1)

        B, N = batch.mask_BN.shape
        x_BND = self.rows(batch.rows_E, batch.offsets_M).unflatten(0, (B, N))
        x_BND = (
            x_BND
            + batch.feeds_BNN @ self.from_sources(x_BND)
            + batch.fed_BNN @ self.from_targets(x_BND)
        )
        context_BLD = words_PLD[prompt_of_B]
        mask_BK = torch.cat([batch.mask_BN, seen_PL[prompt_of_B]], 1)
        for block in self.blocks:
            x_BND = block(x_BND, context_BLD, mask_BK)
        present_BN1 = batch.mask_BN.float()[..., None]
        # A sum grows with the workflow; the norm after it keeps the scale.
        pooled_BD = (x_BND * present_BN1).sum(1)
        joined = self.norm(torch.cat([pooled_BD, summary_PD[prompt_of_B]], 1))
        hidden = F.relu(self.up(self.dropout(joined))).square()
        return self.out(hidden).squeeze(1)

    def suits(self, ids_PL: Tensor, prompt_of_B: Tensor, batch: Batch) -> Tensor:
        """Logit of the gate of files and words, `[B]`; arguments as of `forward`."""
        # Words count once; word 0 is in every prompt, but is no fact without a file.
        words_PL = torch.cat([torch.full((len(ids_PL), 1), PAD_ID), ids_PL], 1).sort(1).values
        new_PL = F.pad(words_PL[:, 1:] != words_PL[:, :-1], (1, 0), value=True)
        keys_PL = word_key(words_PL)
        of_words_PL = self._weights(keys_PL) * (new_PL & (words_PL != PAD_ID))
        prompt_of_F = prompt_of_B[batch.workflow_of_F]
        pairs_FL = fact_key(batch.file_rows_F[:, None], keys_PL[prompt_of_F])
        of_files_F = (self._weights(pairs_FL) * new_PL[prompt_of_F]).sum(1) * batch.file_shares_F
        total_B = self.biases[0] + of_words_PL.sum(1)[prompt_of_B]
        return total_B.index_add(0, batch.workflow_of_F, of_files_F)

    def works(self, batch: Batch) -> Tensor:
        """Logit of the gate of files and rows, `[B]`."""
        of_facts_E = self._weights(batch.fact_keys_E) * batch.fact_values_E
        total_B = self.biases[1].expand(len(batch.mask_BN))
        return total_B.index_add(0, batch.workflow_of_E, of_facts_E)

    def _weights(self, keys: Tensor) -> Tensor:
        """Weights of facts by key; 0 for one that no train row had. Shape of `keys`."""
        if not len(self.fact_keys):
            return torch.zeros(keys.shape)
        place = torch.searchsorted(self.fact_keys, keys).clamp(max=len(self.fact_keys) - 1)
        return torch.where(self.fact_keys[place] == keys, self.fact_weights[place], 0.0)
