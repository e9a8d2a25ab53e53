"""Masked distributions and guidance past the tuned model. Pure functions.

With logits z and the set L of legal tokens, the masked distribution is
p(v) = exp(z_v) / sum_{u in L} exp(z_u) for v in L, else 0. Rollout, importance ratio, KL and
entropy all use it.

Guidance extrapolates from the reference (0) through the tuned policy (1) as classifier-free
guidance does (arXiv 2207.12598) in output space (FlowRL, arXiv 2505.21478):

    log p_w = l0 + w (l1 - l0) + const  on L,   w = 0: reference, w = 1: tuned, w > 1: beyond it.

Shapes: B rows, V workflow tokens; leading dimensions are free.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 0.01
"""Default plausibility floor of guided sampling."""


def masked_log_softmax(logits_BV: Tensor, legal_BV: Tensor) -> Tensor:
    """Log-probabilities over the legal tokens; -inf elsewhere. Every row needs a legal token."""
    return logits_BV.masked_fill(~legal_BV, -torch.inf).log_softmax(-1)


def masked_entropy(logprobs_BV: Tensor) -> Tensor:
    """Entropy -sum p log p in nats, with 0 log 0 = 0 (its gradient as well). Shape B."""
    legal_BV = logprobs_BV > -torch.inf
    finite_BV = logprobs_BV.masked_fill(~legal_BV, 0.0)
    return -(finite_BV.exp() * finite_BV * legal_BV).sum(-1)


def masked_kl(logprobs_BV: Tensor, reference_BV: Tensor) -> Tensor:
    """KL(p || reference) = sum p (log p - log reference) in nats over the legal tokens. Shape B."""
    legal_BV = logprobs_BV > -torch.inf
    difference_BV = logprobs_BV.masked_fill(~legal_BV, 0.0) - reference_BV.masked_fill(
        ~legal_BV, 0.0
    )
    return (logprobs_BV.exp() * difference_BV).sum(-1)


def guided_log_probs(
    reference_logits_BV: Tensor,
    tuned_logits_BV: Tensor,
    legal_BV: Tensor,
    weight: float,
    floor: float = FLOOR,
) -> Tensor:
    """Mix two policies: log p_w = l0 + w (l1 - l0), masked after mixing and normalised.

    Masking each policy before mixing would give the same: it moves l0 and l1 by a constant per row.
    Beyond the tuned policy (w > 1) a token that it finds implausible, p1(v) < floor * max p1, is
    dropped: there a small l1 - l0 is noise which w multiplies (contrastive decoding's plausibility
    constraint, arXiv 2210.15097). For w <= 1 nothing is dropped, so that w = 0 and 1 are exact.

    Returns:
        Log-probabilities, shape B V.
    """
    if weight == 0.0:
        return masked_log_softmax(reference_logits_BV, legal_BV)
    tuned_BV = masked_log_softmax(tuned_logits_BV, legal_BV)
    if weight == 1.0:
        return tuned_BV
    mixed_BV = reference_logits_BV + weight * (tuned_logits_BV - reference_logits_BV)
    if weight > 1.0 and floor > 0.0:
        best_B1 = tuned_BV.amax(-1, keepdim=True)
        legal_BV = legal_BV & (tuned_BV >= best_B1 + torch.log(torch.tensor(floor)))
    return masked_log_softmax(mixed_BV, legal_BV)


def sharpen(logprobs_BV: Tensor, temperature: float = 1.0, top_p: float | None = None) -> Tensor:
    """Temperature, then nucleus (arXiv 1904.09751): the smallest set of mass >= `top_p` is kept.

    Returns:
        Normalised log-probabilities, shape B V; the most likely token always stays.
    """
    if temperature != 1.0:
        logprobs_BV = (logprobs_BV / temperature).log_softmax(-1)
    if top_p is not None:
        sorted_BV, order_BV = logprobs_BV.sort(-1, descending=True)
        before_BV = sorted_BV.exp().cumsum(-1) - sorted_BV.exp()
        dropped_BV = torch.zeros_like(logprobs_BV, dtype=torch.bool)
        dropped_BV.scatter_(-1, order_BV, before_BV >= top_p)
        logprobs_BV = logprobs_BV.masked_fill(dropped_BV, -torch.inf).log_softmax(-1)
    return logprobs_BV


def sample(logprobs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Invert the cumulative distribution: the first v with F(v) > u F(V). One number per row.

    An illegal token adds nothing to F, so it is never first.
    """
    mass_BV = logprobs_BV.exp().cumsum(-1, dtype=torch.float64)
    threshold_B1 = uniform_B.double()[:, None] * mass_BV[:, -1:]
    return (mass_BV <= threshold_B1).sum(-1)
