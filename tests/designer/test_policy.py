"""Facts: reading token by token through the cache gives the logits of one full forward pass;
padding of a prompt changes nothing; in a batch of differing lengths each row gives what it gives
alone, however the batch is cut into buckets; saving and loading keeps every bit; an adapter fits
its own designer only; rotary products depend on the distance of positions alone."""

import pytest
import torch

from flowloom.designer import attention
from flowloom.designer.config import PolicyConfig
from flowloom.designer.policy import Policy, _rotary_table, _rotate

ATOL = 1e-5
PROMPTS = ["a red circle", "draw a large green square"]


def _full(policy, prompts, tokens):
    ids = policy.encode_prompts(prompts)
    wanted = torch.ones_like(tokens, dtype=torch.bool)
    return policy(ids, tokens, wanted).view(*tokens.shape, -1)


def test_cache_equals_full_forward(policy):
    tokens = torch.randint(0, policy.num_tokens, (4, 7), generator=torch.Generator().manual_seed(0))
    full = _full(policy, PROMPTS, tokens)
    cache = policy.prefill(policy.encode_prompts(PROMPTS)).repeat(2)
    inputs = torch.cat([policy.start(4), tokens[:, :-1]], 1)
    for t, width in ((0, 1), (1, 3), (4, 1), (5, 2)):
        logits = policy.extend(inputs[:, t : t + width], cache)
        assert torch.allclose(logits, full[:, t + width - 1], atol=ATOL)


def test_selected_rows_keep_their_cache(policy):
    tokens = torch.randint(0, policy.num_tokens, (4, 3), generator=torch.Generator().manual_seed(0))
    full = _full(policy, PROMPTS, tokens)
    cache = policy.prefill(policy.encode_prompts(PROMPTS)).repeat(2)
    policy.extend(torch.cat([policy.start(4), tokens[:, :1]], 1), cache)
    rows = torch.tensor([3, 1])
    cache.select(rows)
    assert torch.allclose(policy.extend(tokens[rows, 1:2], cache), full[rows, 2], atol=ATOL)


def test_padding_changes_nothing(policy):
    tokens = torch.tensor([[5, 6]])
    alone = _full(policy, PROMPTS[:1], tokens)
    beside = _full(policy, PROMPTS, tokens.repeat(2, 1))[:1]
    assert policy.encode_prompts(PROMPTS[:1]).shape[1] < policy.encode_prompts(PROMPTS).shape[1]
    assert torch.allclose(alone, beside, atol=ATOL)


@pytest.mark.parametrize("rows_per_bucket", [1, 2, 8])
def test_rows_of_differing_lengths(policy, monkeypatch, rows_per_bucket):
    monkeypatch.setattr(attention, "ROWS_PER_BUCKET", rows_per_bucket)
    tokens = torch.randint(0, policy.num_tokens, (4, 7), generator=torch.Generator().manual_seed(0))
    wanted = torch.zeros_like(tokens, dtype=torch.bool)
    for row, places in enumerate(((0, 2), (6,), (3, 4), (0,))):
        wanted[row, list(places)] = True
    got = policy(policy.encode_prompts(PROMPTS), tokens, wanted)
    want = []
    for row, prompt in enumerate((PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1])):
        want.append(_full(policy, [prompt], tokens[row : row + 1])[0, wanted[row]])
    assert torch.allclose(got, torch.cat(want), atol=ATOL)


def test_the_cache_grows_past_its_first_room(policy):
    length = 2 * attention.LANES + 3
    tokens = torch.randint(
        0, policy.num_tokens, (2, length), generator=torch.Generator().manual_seed(0)
    )
    full = _full(policy, PROMPTS, tokens)
    cache = policy.prefill(policy.encode_prompts(PROMPTS)).repeat(1)
    inputs = torch.cat([policy.start(2), tokens[:, :-1]], 1)
    for t in range(length):
        assert torch.allclose(policy.extend(inputs[:, t : t + 1], cache), full[:, t], atol=ATOL)


def test_prompt_and_past_are_read(policy):
    tokens = torch.tensor([[5, 6], [7, 6]])
    same_prompt = _full(policy, ["a circle"], tokens)
    assert torch.equal(same_prompt[0, 0], same_prompt[1, 0])  # the first token is not in sight
    assert not torch.allclose(same_prompt[0, 1], same_prompt[1, 1], atol=1e-3)
    other = _full(policy, ["a square"], tokens)
    assert not torch.allclose(same_prompt, other, atol=1e-3)


def test_save_and_load(policy, tmp_path):
    tokens = torch.tensor([[5, 6]])
    policy.save(tmp_path / "designer")
    loaded = Policy.load(tmp_path / "designer")
    assert torch.equal(_full(loaded, PROMPTS[:1], tokens), _full(policy, PROMPTS[:1], tokens))

    policy.head.weight.data += 1.0
    policy.save_adapter(tmp_path / "adapter", tmp_path / "designer")
    tuned = Policy.load(tmp_path / "designer", tmp_path / "adapter")
    assert torch.equal(_full(tuned, PROMPTS[:1], tokens), _full(policy, PROMPTS[:1], tokens))

    policy.save(tmp_path / "other")
    with pytest.raises(ValueError, match="expected one of"):
        Policy.load(tmp_path / "other", tmp_path / "adapter")


def test_embeddings_are_no_part_of_the_adapter(policy):
    tuned = policy.tuned_parameters()
    assert not any(name.startswith("embedding") for name in tuned)
    assert len(tuned) == len(dict(policy.named_parameters())) - 1


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match=r"width: got 66, expected a multiple of 2 \* num_heads"):
        PolicyConfig(width=66)


def test_rotary_products_depend_on_distance_alone():
    cos, sin = (table[:, None, None] for table in _rotary_table(12, 8))
    both = torch.randn(1, 2, 1, 8, generator=torch.Generator().manual_seed(0)).expand(
        12, -1, -1, -1
    )
    query, key = _rotate(both, cos, sin)[:, :, 0].unbind(1)
    products = query @ key.T
    for distance in (0, 3, 7):
        diagonal = products.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=ATOL)
    assert not torch.allclose(products[5, 5], products[5, 2], atol=1e-2)
