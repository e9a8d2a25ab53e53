"""What a position of the embedded policy sees: a rollout's cache, or the rows of a whole batch.

Both give the attention of each head h over the positions before, softmax(q_h k_h / sqrt(K)) v_h,
prompt padding left out.

Shapes: P prompts, B rows, L prompt positions, T new positions, S positions so far, H heads, K head
width, D = H * K, N tokens in a row of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 16
"""A cache grows by this many positions: shorter rows are slower to exponentiate than padded."""
ROWS_PER_BUCKET = 8
"""Rows that share a width when a batch is read at once."""


class Cache:
    """Keys and values of the positions seen so far, per layer."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], hidden_BL: Tensor):
        """Hold the prefilled prompt.

        Args:
            keys: Per layer, B L D.
            values: Per layer, B L D.
            hidden_BL: True where a prompt position is padding.
        """
        self._keys, self._values, self._hidden_BL = keys, values, hidden_BL
        self._bias_BS = _bias(hidden_BL)
        self.length = hidden_BL.shape[1]
        self.num_written = 0

    def __len__(self) -> int:
        return len(self._bias_BS)

    def repeat(self, num: int) -> Cache:
        """Give each row `num` neighbouring copies."""
        return Cache(
            [k.repeat_interleave(num, 0) for k in self._keys],
            [v.repeat_interleave(num, 0) for v in self._values],
            self._hidden_BL.repeat_interleave(num, 0),
        )

    def select(self, rows: Tensor) -> None:
        """Keep `rows`, in ascending order: they move up in place."""
        num, end = len(rows), self.length
        for tensors in (self._keys, self._values):
            for layer, tensor in enumerate(tensors):
                tensor[:num, :end] = tensor[rows, :end]
                tensors[layer] = tensor[:num]
        self._bias_BS = self._bias_BS[rows]

    def open(self, num_new: int) -> None:
        """Make room for T new positions of each row, to be seen by themselves and later ones.

        Every layer then calls `attend` once.
        """
        start, end = self.length, self.length + num_new
        room = -(-end // LANES) * LANES - self._bias_BS.shape[1]
        if room > 0:
            for tensors in (self._keys, self._values):
                tensors[:] = [F.pad(tensor, (0, 0, 0, room)) for tensor in tensors]
            self._bias_BS = F.pad(self._bias_BS, (0, room), value=-torch.inf)
        self._bias_BS[:, start:end] = 0.0
        self._bias = self._bias_BS[:, None]
        if num_new > 1:
            later_TS = torch.ones(num_new, self._bias_BS.shape[1], dtype=torch.bool)
            self._bias = self._bias[:, None] + _bias(later_TS.triu(start + 1))[:, None]
        self.num_new = num_new

    def close(self) -> None:
        """The new positions have been read."""
        self.length += self.num_new
        self.num_written += self.num_new

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write the new positions and attend to all so far. Shapes B * T H K; gives B * T D.

        Queries of the heads stand in blocks of one matrix with zeros between: one product per row
        over the whole width is faster than one per head, though most of what it adds is zeros.
        """
        num_rows, num_new, (_, H, K) = len(self), self.num_new, query.shape
        start, end = self.length, self.length + num_new
        keys, values = self._keys[layer], self._values[layer]
        keys[:, start:end] = key.reshape(num_rows, num_new, H * K)
        values[:, start:end] = value.reshape(num_rows, num_new, H * K)
        blocks_HHK = (torch.eye(H) * K**-0.5)[..., None]
        wide = (query[:, :, None] * blocks_HHK).view(num_rows, num_new * H, H * K)
        scores = torch.bmm(wide, keys.transpose(1, 2))
        if num_new == 1:
            scores += self._bias
        else:
            scores = (scores.view(num_rows, num_new, H, -1) + self._bias).view(scores.shape)
        mixed = torch.bmm(scores.softmax(-1), values).view(-1, H, H, K)
        return mixed.diagonal(dim1=1, dim2=2).transpose(1, 2).reshape(-1, H * K)


class Packed:
    """Rows of differing lengths as one list of tokens, with little padding.

    First the prompts, then the rows by length, a bucket after the other: all but attention works on
    the list, attention on each bucket by itself.
    """

    def __init__(self, prompts_PL: Tensor, inputs_BT: Tensor, lengths_B: Tensor):
        """Lay out a batch.

        Args:
            prompts_PL: Prompt ids, padding 0; each serves B / P neighbouring rows.
            inputs_BT: Inputs of the rows.
            lengths_B: How many of each row's inputs are read.

        `inputs_N` and `positions_N` list the inputs behind the prompts with their positions in the
        rows, `place_BT` says where in the whole list each stands.
        """
        P, B = len(prompts_PL), len(inputs_BT)
        by_length = lengths_B.argsort(descending=True)
        self._num_prompts, self._prompt_of_B = P, by_length // (B // P)
        place, at = torch.zeros(inputs_BT.shape, dtype=torch.long), prompts_PL.numel()
        self._biases, self._sizes, inputs, positions = [], [prompts_PL.numel()], [], []
        for rows in by_length.split(ROWS_PER_BUCKET):
            width = int(lengths_B[rows[0]])
            past = _bias(prompts_PL[rows // (B // P)] == 0)[:, None, None].expand(-1, 1, width, -1)
            later = _bias(torch.ones(width, width, dtype=torch.bool).triu(1))
            self._biases.append(torch.cat([past, later.expand(len(rows), 1, -1, -1)], -1))
            self._sizes.append(len(rows) * width)
            inputs.append(inputs_BT[rows, :width].flatten())
            positions.append(torch.arange(width).repeat(len(rows)))
            place[rows, :width] = at + torch.arange(len(rows) * width).view(len(rows), width)
            at += len(rows) * width
        self.inputs_N, self.positions_N = torch.cat(inputs), torch.cat(positions)
        self.place_BT = place

    def attend(self, _layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend within each row and to its prompt. Shapes N H K; gives N D."""
        (q, *queries), (k, *keys), (v, *values) = (
            x.split(self._sizes) for x in (query, key, value)
        )
        mixed = [attend_causally(q, k, v, self._num_prompts)]
        past_keys, past_values = (
            _by_head(x, self._num_prompts)[self._prompt_of_B].split(ROWS_PER_BUCKET) for x in (k, v)
        )
        for bias, q, k, v, past_k, past_v in zip(
            self._biases, queries, keys, values, past_keys, past_values, strict=True
        ):
            q, k, v = (_by_head(x, len(bias)) for x in (q, k, v))
            k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
            mixed.append(_flat(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))
        return torch.cat(mixed)


def attend_causally(query: Tensor, key: Tensor, value: Tensor, num_rows: int) -> Tensor:
    """Attend within rows of equal length, nothing before them. Shapes N H K; gives N D."""
    q, k, v = (_by_head(x, num_rows) for x in (query, key, value))
    return _flat(F.scaled_dot_product_attention(q, k, v, is_causal=True))


def _bias(hidden: Tensor) -> Tensor:
    """0 where a key is seen, -inf where it is hidden."""
    return torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)


def _by_head(x_NHK: Tensor, num_rows: int) -> Tensor:
    return x_NHK.view(num_rows, -1, *x_NHK.shape[1:]).transpose(1, 2)


def _flat(x_BHTK: Tensor) -> Tensor:
    return x_BHTK.transpose(1, 2).reshape(-1, x_BHTK.shape[1] * x_BHTK.shape[3])
