"""Sampling under the grammar, and the same probabilities again with given tokens.

One engine for design, GRPO and evaluation: the prompt is read once per group, a token follows from
the distribution over legal tokens alone, finished rows leave the batch once they are a quarter of
it. Where the grammar leaves one token there is nothing to choose: it is appended, its
log-probability is 0, and it takes no part in any loss.

Shapes: P prompts, G designs per prompt, B = P * G rows (rows of a prompt are neighbours), T tokens,
V vocabulary, N choices: the places with more than one legal token, in row-major order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from flowloom.designer import guidance as guide
from flowloom.designer.policy import Policy
from flowloom.workflow import Grammar

MAX_ROWS = 256
"""Rows sampled at once; more are sampled in turn."""
COMPACT_FRAC = 0.25
"""Share of finished rows at which they are dropped: copying the cache has its price too."""


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Designs as tokens, with what the grammar allowed at each choice."""

    tokens_BT: Tensor
    """Token ids, padded with 0."""
    choice_BT: Tensor
    """True where more than one token was legal."""
    lengths_B: Tensor
    """Tokens per row."""
    packed_NV: np.ndarray
    """Legal tokens of each choice, eight to a byte."""
    num_tokens: int
    """Size V of the vocabulary."""

    def __len__(self) -> int:
        return len(self.tokens_BT)

    def rows(self) -> list[list[int]]:
        """Tokens of each row without padding."""
        pairs = zip(self.tokens_BT.tolist(), self.lengths_B.tolist(), strict=True)
        return [tokens[:length] for tokens, length in pairs]

    def legal(self) -> Tensor:
        """Legal tokens of each choice. Shape N V."""
        bits = np.unpackbits(self.packed_NV, axis=1, count=self.num_tokens)
        return torch.from_numpy(bits.view(bool))

    def select(self, rows: Tensor) -> Sequences:
        """These rows, in this order, padded to the longest of them."""
        ends = self.choice_BT.sum(1).cumsum(0).tolist()
        spans = [range(ends[row - 1] if row else 0, ends[row]) for row in rows.tolist()]
        choices = np.fromiter((i for span in spans for i in span), np.int64)
        width = int(self.lengths_B[rows].max())
        return Sequences(
            self.tokens_BT[rows, :width],
            self.choice_BT[rows, :width],
            self.lengths_B[rows],
            self.packed_NV[choices],
            self.num_tokens,
        )


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Sampled designs and their probabilities."""

    sequences: Sequences
    """Rows of a prompt are neighbours."""
    logprobs_BT: Tensor
    """Log-probability of each token under the mask, before temperature; 0 where forced."""

    @property
    def tokens(self) -> list[list[int]]:
        """Tokens of each row without padding."""
        return self.sequences.rows()


def rollout(
    policy: Policy,
    grammar: Grammar,
    prompts: Sequence[str],
    num_per_prompt: int = 1,
    *,
    temperature: float = 1.0,
    top_p: float | None = None,
    reference: Policy | None = None,
    guidance: float = 1.0,
    floor: float = guide.FLOOR,
    seed: int = 0,
    streams: Sequence[int] | None = None,
    skip_forced: bool = True,
) -> Rollout:
    """Sample designs.

    Args:
        policy: The policy; with `guidance` the tuned one.
        grammar: Which tokens are legal.
        prompts: P texts.
        num_per_prompt: Designs G for each.
        temperature: Divides the log-probabilities; towards 0 the likeliest token is taken.
        top_p: Mass of the nucleus, or None for all of it.
        reference: What guidance extrapolates from; needed unless `guidance` is 1.
        guidance: Weight w of `guidance.guided_log_probs`.
        floor: Its plausibility floor.
        seed: Row b draws from stream b of this seed, whatever else is in the batch.
        streams: Stream of each row instead, P * G numbers: of rows that are part of a larger batch.
        skip_forced: Whether a token without alternative is no choice; False to see what that saves.

    Raises:
        ValueError: `guidance` without `reference`, or a policy with non-finite output.
    """
    if guidance != 1.0 and reference is None:
        raise ValueError(f"guidance: got {guidance} without a reference policy, expected 1")
    policies = [policy] if guidance == 1.0 else [policy, reference]
    max_length = policy.config.num_workflow_tokens
    streams = range(len(prompts) * num_per_prompt) if streams is None else streams
    noise = np.random.Generator(np.random.Philox(key=seed))
    noise_BT = noise.random((max(streams) + 1, max_length), np.float32)[np.asarray(streams)]
    prompts_per_chunk = max(1, MAX_ROWS // num_per_prompt)
    chunks = []
    with torch.no_grad():
        for start in range(0, len(prompts), prompts_per_chunk):
            chunk = prompts[start : start + prompts_per_chunk]
            uniform_BT = noise_BT[start * num_per_prompt :][: len(chunk) * num_per_prompt]
            sampler = _Sampler(policies, grammar, chunk, num_per_prompt, max_length, skip_forced)
            for legal_BV, logits in sampler:
                if guidance == 1.0:
                    logprobs_BV = guide.masked_log_softmax(logits[0], legal_BV)
                else:
                    logprobs_BV = guide.guided_log_probs(
                        logits[1], logits[0], legal_BV, guidance, floor
                    )
                sharp_BV = guide.sharpen(logprobs_BV, temperature, top_p)
                uniform_B = torch.from_numpy(uniform_BT[sampler.rows, sampler.position])
                sampler.append(guide.sample(sharp_BV, uniform_B), logprobs_BV)
            chunks.append(sampler.result())
    return _join(chunks)


class _Sampler:
    """The state of one batch of rows: iterate over choices, `append` a token to every row."""

    def __init__(
        self,
        policies: Sequence[Policy],
        grammar: Grammar,
        prompts: Sequence[str],
        num_per_prompt: int,
        max_length: int,
        skip_forced: bool,
    ):
        self.policies, self.max_length, self.skip_forced = policies, max_length, skip_forced
        num_rows = len(prompts) * num_per_prompt
        self.state = grammar.start(num_rows)
        self.rows = np.arange(num_rows)
        self.position = 0
        self.num_tokens = policies[0].num_tokens
        self.caches = [
            policy.prefill(policy.encode_prompts(prompts)).repeat(num_per_prompt)
            for policy in policies
        ]
        self.unread_BK = policies[0].start(num_rows)
        self.tokens_BT = torch.zeros(num_rows, max_length, dtype=torch.long)
        self.logprobs_BT = torch.zeros(num_rows, max_length)
        self.choice_BT = torch.zeros(num_rows, max_length, dtype=torch.bool)
        self.lengths_B = torch.zeros(num_rows, dtype=torch.long)
        self.packed = [np.zeros((0, -(-self.num_tokens // 8)), np.uint8)]
        self.packed_rows = [np.zeros(0, np.int64)]

    def __iter__(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        while len(self.rows):
            if self.position == self.max_length:
                raise ValueError(
                    f"rollout: a design is longer than {self.max_length} tokens; "
                    "expected a grammar budget within the policy's num_workflow_tokens"
                )
            self.legal_BV = torch.from_numpy(self.state.mask())
            self.choice_B = self.legal_BV.sum(1) > 1
            if not self.skip_forced:
                self.choice_B = torch.from_numpy(~self.state.done)
            if not self.choice_B.any():
                # Nothing to choose in any row: read these tokens together with the next ones.
                self.append(self.legal_BV.int().argmax(1), None)
                continue
            logits = self.policies[0].extend_together(self.policies, self.unread_BK, self.caches)
            self.unread_BK = self.unread_BK[:, :0]
            yield self.legal_BV, logits

    def append(self, tokens_B: Tensor, logprobs_BV: Tensor | None) -> None:
        """Append a token to each row; finished rows leave once they are many."""
        rows, t = torch.from_numpy(self.rows), self.position
        self.tokens_BT[rows, t] = tokens_B
        # A finished row takes <pad>, its only legal token, and grows no longer.
        self.lengths_B[rows] += torch.from_numpy(~self.state.done)
        if logprobs_BV is not None:
            chosen_B = logprobs_BV.gather(1, tokens_B[:, None])[:, 0]
            if not chosen_B.isfinite().all():
                raise ValueError(f"rollout: the policy's output is not finite at token {t}")
            self.logprobs_BT[rows, t] = chosen_B
            self.choice_BT[rows, t] = self.choice_B
            self.packed.append(np.packbits(self.legal_BV[self.choice_B].numpy(), axis=1))
            self.packed_rows.append(self.rows[self.choice_B.numpy()])
        self.state.advance(tokens_B.numpy())
        self.position += 1
        self.unread_BK = torch.cat([self.unread_BK, tokens_B[:, None]], 1)
        done = self.state.done
        if done.all():
            self.rows = self.rows[:0]
        elif done.sum() >= COMPACT_FRAC * len(done):
            (alive,) = np.nonzero(~done)
            kept = torch.from_numpy(alive)
            self.state = self.state.select(alive)
            self.rows, self.unread_BK = self.rows[alive], self.unread_BK[kept]
            for cache in self.caches:
                cache.select(kept)

    def result(self) -> Rollout:
        width = int(self.lengths_B.max())
        order = np.argsort(np.concatenate(self.packed_rows), kind="stable")
        sequences = Sequences(
            self.tokens_BT[:, :width],
            self.choice_BT[:, :width],
            self.lengths_B,
            np.concatenate(self.packed)[order],
            self.num_tokens,
        )
        return Rollout(sequences, self.logprobs_BT[:, :width])


def _join(chunks: Sequence[Rollout]) -> Rollout:
    if len(chunks) == 1:
        return chunks[0]
    width = max(chunk.logprobs_BT.shape[1] for chunk in chunks)

    def stack(tensors: Sequence[Tensor]) -> Tensor:
        pads = (width - tensor.shape[1] for tensor in tensors)
        padded = (torch.nn.functional.pad(t, (0, p)) for t, p in zip(tensors, pads, strict=True))
        return torch.cat(list(padded))

    parts = [chunk.sequences for chunk in chunks]
    sequences = Sequences(
        stack([part.tokens_BT for part in parts]),
        stack([part.choice_BT for part in parts]),
        torch.cat([part.lengths_B for part in parts]),
        np.concatenate([part.packed_NV for part in parts]),
        parts[0].num_tokens,
    )
    return Rollout(sequences, stack([chunk.logprobs_BT for chunk in chunks]))


def replay(grammar: Grammar, tokens: Sequence[Sequence[int]]) -> Sequences:
    """Walk given designs through the grammar once, and keep what was legal at each choice.

    Raises:
        ValueError: A token is illegal, or a design does not end where its tokens do.
    """
    lengths_B = torch.tensor([len(row) for row in tokens])
    tokens_BT = torch.zeros(len(tokens), int(lengths_B.max()), dtype=torch.long)
    for index, row in enumerate(tokens):
        tokens_BT[index, : len(row)] = torch.tensor(row)
    choice_BT = torch.zeros(tokens_BT.shape, dtype=torch.bool)
    num_tokens = grammar.vocabulary.size
    packed = [np.zeros((0, -(-num_tokens // 8)), np.uint8)]
    packed_rows = [np.zeros(0, np.int64)]
    # Longest first: the rows still running are a prefix.
    order = np.argsort(-lengths_B.numpy(), kind="stable")
    state = grammar.start(len(tokens))
    for t in range(tokens_BT.shape[1]):
        alive = order[: int((lengths_B > t).sum())]
        if len(alive) < len(state.done):
            state = state.select(np.arange(len(alive)))
        legal_BV = state.mask()
        chosen_B = tokens_BT[alive, t].numpy()
        bad = np.nonzero(state.done | ~legal_BV[np.arange(len(alive)), chosen_B])[0]
        if len(bad):
            row = int(alive[bad[0]])
            raise ValueError(
                f"replay: design {row}, token {t}: got {int(chosen_B[bad[0]])}, "
                "expected a token that the grammar allows"
            )
        choice_B = legal_BV.sum(1) > 1
        choice_BT[alive, t] = torch.from_numpy(choice_B)
        packed.append(np.packbits(legal_BV[choice_B], axis=1))
        packed_rows.append(alive[choice_B])
        state.advance(chosen_B)
    if not np.all(state.done):
        raise ValueError("replay: a design ends before the grammar does")
    by_row = np.argsort(np.concatenate(packed_rows), kind="stable")
    return Sequences(tokens_BT, choice_BT, lengths_B, np.concatenate(packed)[by_row], num_tokens)


def choice_logprobs(
    policy: Policy, prompts_PL: Tensor, sequences: Sequences
) -> tuple[Tensor, Tensor]:
    """Teacher-forced distribution at each choice; forced tokens, certain anyway, are left out.

    Args:
        policy: The policy.
        prompts_PL: Prompt ids; each serves B / P neighbouring rows.
        sequences: B designs.

    Returns:
        log pi(v | prompt, tokens so far) of every token, -inf where illegal, shape N V; and that of
        the token chosen, shape N.
    """
    logits_NV = policy(prompts_PL, sequences.tokens_BT, sequences.choice_BT)
    device = logits_NV.device
    logprobs_NV = guide.masked_log_softmax(logits_NV, sequences.legal().to(device))
    chosen_N = sequences.tokens_BT[sequences.choice_BT].to(device)
    return logprobs_NV, logprobs_NV.gather(1, chosen_N[:, None])[:, 0]
