"""Facts: sampled log-probabilities are those of teacher forcing; every design is valid and ends; a
row's design does not depend on other rows or on finished rows; guidance 0 and 1 draw what the
reference and the policy draw; forced tokens have log-probability 0 and no gradient, and skipping
them changes no design; replaying gives the same masks."""

import numpy as np
import pytest
import torch

from flowloom.designer import rollout as engine
from flowloom.designer.policy import Policy
from flowloom.designer.rollout import choice_logprobs, replay, rollout
from flowloom.workflow import Grammar, decode, validate
from tests.designer.tiny import PROMPTS

ATOL = 1e-5


def test_logprobs_equal_teacher_forcing(policy, grammar):
    sampled = rollout(policy, grammar, PROMPTS, 8, seed=3)
    sequences = sampled.sequences
    _, logprobs = choice_logprobs(policy, policy.encode_prompts(PROMPTS), sequences)
    assert torch.allclose(logprobs, sampled.logprobs_BT[sequences.choice_BT], atol=ATOL)


def test_every_design_is_valid_and_decodes(policy, grammar, catalogue):
    sampled = rollout(policy, grammar, PROMPTS, 64, seed=0)
    assert len(sampled.tokens) == 256
    replay(grammar, sampled.tokens)  # refuses what is illegal or does not end
    for tokens in sampled.tokens:
        problems = validate(decode(tokens, grammar), catalogue)
        assert not [p for p in problems if p.severity == "error"]


def test_finished_rows_do_not_change_others(policy, grammar, monkeypatch):
    at_a_quarter = rollout(policy, grammar, PROMPTS, 16, seed=5)
    for frac in (1e-9, 2.0):  # at once, never
        monkeypatch.setattr(engine, "COMPACT_FRAC", frac)
        other = rollout(policy, grammar, PROMPTS, 16, seed=5)
        assert other.tokens == at_a_quarter.tokens
        assert torch.allclose(other.logprobs_BT, at_a_quarter.logprobs_BT, atol=ATOL)


def test_rows_do_not_depend_on_the_batch(policy, grammar, monkeypatch):
    whole = rollout(policy, grammar, PROMPTS, 4, seed=5)
    first = rollout(policy, grammar, PROMPTS[:1], 4, seed=5)
    assert first.tokens == whole.tokens[:4]
    monkeypatch.setattr(engine, "MAX_ROWS", 8)
    chunked = rollout(policy, grammar, PROMPTS, 4, seed=5)
    assert chunked.tokens == whole.tokens
    assert np.array_equal(chunked.sequences.packed_NV, whole.sequences.packed_NV)


def test_guidance_endpoints(policy, grammar):
    reference = Policy(policy.config, policy.tokenizer, policy.num_tokens, seed=9)
    reference.head.weight.data *= 20
    tuned = rollout(policy, grammar, PROMPTS, 4, seed=1)
    plain = rollout(reference, grammar, PROMPTS, 4, seed=1)
    assert tuned.tokens != plain.tokens
    for weight, want in ((0.0, plain), (1.0, tuned)):
        got = rollout(policy, grammar, PROMPTS, 4, seed=1, reference=reference, guidance=weight)
        assert got.tokens == want.tokens
        assert torch.equal(got.logprobs_BT, want.logprobs_BT)
    with pytest.raises(ValueError, match="without a reference policy"):
        rollout(policy, grammar, PROMPTS, guidance=1.5)


def test_towards_zero_temperature_is_greedy(policy, grammar):
    cold = [rollout(policy, grammar, PROMPTS, 1, temperature=1e-3, seed=s).tokens for s in (1, 2)]
    assert cold[0] == cold[1]
    nucleus = rollout(policy, grammar, PROMPTS, 1, top_p=1e-6, seed=3).tokens
    assert nucleus == cold[0]


def test_forced_tokens_carry_no_loss(policy, grammar):
    sampled = rollout(policy, grammar, PROMPTS, 4, seed=0)
    sequences = sampled.sequences
    forced = ~sequences.choice_BT
    assert (sampled.logprobs_BT[forced] == 0).all()
    lengths = sequences.lengths_B
    inside = torch.arange(forced.shape[1]) < lengths[:, None]
    assert (forced & inside).sum() > len(lengths)  # there are such tokens
    # Moving the logits of forced positions leaves the likelihood alone: they are never computed.
    every, chosen = choice_logprobs(policy, policy.encode_prompts(PROMPTS), sequences)
    assert len(every) == len(chosen) == int(sequences.choice_BT.sum())
    assert ((every > -torch.inf).sum(1) > 1).all()


def test_skipping_forced_tokens_changes_no_design(policy, grammar):
    skipped = rollout(policy, grammar, PROMPTS, 4, seed=0)
    every = rollout(policy, grammar, PROMPTS, 4, seed=0, skip_forced=False)
    assert every.tokens == skipped.tokens
    assert torch.allclose(every.logprobs_BT, skipped.logprobs_BT, atol=ATOL)
    sequences = every.sequences
    assert torch.equal(sequences.choice_BT.sum(1), sequences.lengths_B)
    _, logprobs = choice_logprobs(policy, policy.encode_prompts(PROMPTS), sequences)
    assert torch.allclose(logprobs, every.logprobs_BT[sequences.choice_BT], atol=ATOL)


def test_replay_gives_the_masks_of_the_rollout(policy, grammar):
    sequences = rollout(policy, grammar, PROMPTS, 8, seed=2).sequences
    again = replay(grammar, sequences.rows())
    assert torch.equal(again.tokens_BT, sequences.tokens_BT)
    assert torch.equal(again.choice_BT, sequences.choice_BT)
    assert np.array_equal(again.packed_NV, sequences.packed_NV)
    # and they are the grammar's own, asked one row at a time
    row = sequences.rows()[5]
    masks = [grammar.run(row[:t]).mask()[0] for t in range(len(row))]
    masks = np.array([mask for mask in masks if mask.sum() > 1])
    assert np.array_equal(again.select(torch.tensor([5])).legal().numpy(), masks)


def test_select_keeps_rows_with_their_masks(policy, grammar):
    sequences = rollout(policy, grammar, PROMPTS, 8, seed=2).sequences
    ids = policy.encode_prompts(PROMPTS)
    _, whole = choice_logprobs(policy, ids, sequences)
    per_row = whole.split(sequences.choice_BT.sum(1).tolist())
    part = sequences.select(torch.arange(8, 24))
    _, logprobs = choice_logprobs(policy, ids[1:3], part)
    assert torch.allclose(logprobs, torch.cat(per_row[8:24]), atol=ATOL)


def test_a_grammar_without_choices(policy, catalogue, grammar):
    row = rollout(policy, grammar, PROMPTS[:1], 1, seed=2).tokens[0]
    inputs = decode(row, grammar).nodes.values()
    required = {
        f"{n.class_type}.{k}": v
        for n in inputs
        for k, v in n.inputs.items()
        if not isinstance(v, tuple) and k not in ("seed", "text")
    }
    classes = {n.class_type for n in inputs}
    narrow = Grammar(catalogue, budget=len(row), classes=classes, require=required)
    sampled = rollout(policy, narrow, PROMPTS[:1], 3, seed=0)
    assert len(sampled.tokens) == 3
    assert replay(narrow, sampled.tokens).choice_BT.equal(sampled.sequences.choice_BT)


def test_illegal_designs_are_refused(policy, grammar):
    good = rollout(policy, grammar, PROMPTS[:1], 1, seed=2).tokens[0]
    with pytest.raises(ValueError, match="design 1, token 0: got 3, expected a token"):
        replay(grammar, [good, [3, *good[1:]]])
    with pytest.raises(ValueError, match="ends before the grammar does"):
        replay(grammar, [good[:-1]])


def test_a_broken_policy_stops_the_rollout(policy, grammar):
    policy.head.weight.data[:] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        rollout(policy, grammar, PROMPTS)
