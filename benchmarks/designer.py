"""Speed of the embedded designer on one core, beside `transformers.generate` at the same size.

    python -m benchmarks.designer [--quick] [--json]

A policy is trained briefly on random workflows so that its designs have a realistic length. The
peer is a `LlamaForCausalLM` of the same width, depth and vocabulary with random weights, which
samples as many tokens per design (prompt of 8 tokens, DynamicCache, no grammar: most of what such
a model writes is no workflow; here only its time counts). Times are CPU seconds of this process.
"""

from __future__ import annotations

import argparse
import json
import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

from flowloom.dataset.tokenizer import WordTokenizer
from flowloom.designer.config import PolicyConfig
from flowloom.designer.grpo import clipped_gain
from flowloom.designer.guidance import masked_kl
from flowloom.designer.policy import Policy
from flowloom.designer.rollout import choice_logprobs, replay, rollout
from flowloom.designer.sft import is_valid
from flowloom.shapes.prompts import sample_prompt
from flowloom.workflow import Catalogue, Grammar, decode, random_workflows

GROUP = 8


def seconds(function, repeats):
    """Median CPU seconds of a call, and what the last one returned."""
    times = []
    for _ in range(repeats + 1):
        began = time.process_time()
        value = function()
        times.append(time.process_time() - began)
    return float(np.median(times[1:])), value


def train_briefly(policy, grammar, prompts, num_steps, batch_size=128):
    """Maximum likelihood on random workflows; sequences per CPU second."""
    designs = [e.tokens for e in random_workflows(grammar, 1024, 0)]
    sequences = replay(grammar, designs)
    order = torch.argsort(sequences.lengths_B, stable=True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, fused=True)
    ids = policy.encode_prompts(prompts[:batch_size])
    rng = np.random.default_rng(0)
    began = time.process_time()
    for _ in range(num_steps):
        first = int(rng.integers(len(order) - batch_size))
        rows = order[first : first + batch_size]
        loss = -choice_logprobs(policy, ids, sequences.select(rows))[1].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return num_steps * batch_size / (time.process_time() - began)


def update(policy, ids_PL, sampled):
    """The eight updates of a GRPO step, forward and backward, reference included."""
    num_rows = len(sampled.sequences)
    per_minibatch = num_rows // 8
    for first in range(0, num_rows, per_minibatch):
        rows = torch.arange(first, first + per_minibatch)
        part = sampled.sequences.select(rows)
        prompts = ids_PL[first // GROUP : (first + per_minibatch) // GROUP]
        with torch.no_grad():
            reference_NV, reference_N = choice_logprobs(policy, prompts, part)
        logprobs_NV, logprobs_N = choice_logprobs(policy, prompts, part)
        gain_N = clipped_gain(logprobs_N, reference_N, torch.ones_like(reference_N), 0.2)
        (-gain_N + 0.05 * masked_kl(logprobs_NV, reference_NV)).mean().backward()


def generate_with_transformers(policy, num_rows, num_tokens):
    """Designs of the peer: same size, same number of tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = policy.config
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=policy.embedding.num_embeddings,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()
    prompts = torch.randint(1, policy.num_words, (num_rows, 8))
    mask = torch.ones_like(prompts)

    def generate():
        with torch.no_grad():
            return model.generate(
                prompts,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
            )

    return generate


def main():
    """Print a table; with --json one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute on 2 cores")
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    options = parser.parse_args()
    repeats, steps = (2, 30) if options.quick else (7, 120)
    torch.set_num_threads(1)
    torch.manual_seed(0)

    rng = np.random.default_rng(0)
    prompts = [sample_prompt(rng).text for _ in range(128)]
    catalogue = Catalogue.load("embedded")
    grammar = Grammar(catalogue)
    tokenizer = WordTokenizer.fit(prompts)
    policy = Policy(PolicyConfig(), tokenizer, grammar.vocabulary.size)
    result = {"params": sum(weight.numel() for weight in policy.parameters())}
    result["sft_sequences_per_s"] = train_briefly(policy, grammar, prompts, steps)

    groups = prompts[:32]
    rows = len(groups) * GROUP
    plain_s, sampled = seconds(lambda: rollout(policy, grammar, groups, GROUP, seed=1), repeats)
    guided_s, _ = seconds(
        lambda: rollout(policy, grammar, groups, GROUP, seed=1, reference=policy, guidance=1.5),
        repeats,
    )
    ids_PL = policy.encode_prompts(groups)
    update_s, _ = seconds(lambda: update(policy, ids_PL, sampled), repeats)
    mean_tokens = sampled.sequences.lengths_B.float().mean().item()
    generate = generate_with_transformers(policy, rows, round(mean_tokens))
    peer_s, _ = seconds(generate, max(1, repeats // 2))
    valid = [is_valid(decode(tokens, grammar), catalogue) for tokens in sampled.tokens]
    result |= {
        "tokens_per_design": mean_tokens,
        "forced_frac": 1 - sampled.sequences.choice_BT.sum().item() / (mean_tokens * rows),
        "valid_frac": float(np.mean(valid)),
        "designs_per_s": rows / plain_s,
        "guided_designs_per_s": rows / guided_s,
        "grpo_rollout_s": plain_s,
        "grpo_update_s": update_s,
        "transformers_designs_per_s": rows / peer_s,
        "ratio_to_transformers": peer_s / plain_s,
    }
    for name, value in result.items():
        print(f"{name:28} {value:10.4g}")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
