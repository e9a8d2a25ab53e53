"""Speed of the embedded designer on one core, beside what generic tools need for the same.

    python -m benchmarks.designer [--quick] [--json]

Everything has the same width, depth and heads. Times are CPU seconds of this process with one
thread, after a warm-up, medians of turns. Memory is what a call adds at its peak.

generate  transformers.generate with random weights, as many tokens per design as ours have
twin      a model trained on the same pairs as minified JSON, sampled until it ends; the batch is
          the best of a few. Per design counts all that it writes, per valid what is a workflow
trl       GRPOTrainer: same prompts, groups, updates per rollout and KL; ours with forced skipping
          off. Rows end where ours do, or all at the mean length (the best case for padding)
as used   our step against TRL's on the twin, per workflow written and per valid one; as many rows
          per update, fewer updates, for a row takes far longer
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.json_twin import JsonTwin, llama
from benchmarks.memory import Peak
from benchmarks.trl_step import CLIP, KL_COEF, trl_steps
from flowloom.dataset.config import PriorConfig
from flowloom.dataset.prompts import draw_prompts
from flowloom.dataset.tokenizer import WordTokenizer
from flowloom.dataset.workflows import draw_workflows
from flowloom.designer.config import PolicyConfig
from flowloom.designer.guidance import masked_kl
from flowloom.designer.objective import clipped_gain, group_advantages
from flowloom.designer.policy import Policy
from flowloom.designer.rollout import choice_logprobs, replay, rollout
from flowloom.designer.sft import is_valid
from flowloom.shapes.prompts import KINDS
from flowloom.workflow import Catalogue, Grammar, decode, encode

NUM_PROMPTS, GROUP, NUM_UPDATES = 32, 8, 8
NUM_ROWS = NUM_PROMPTS * GROUP


def clocked(function):
    """CPU seconds of a call, and what it returned."""
    began = time.process_time()
    value = function()
    return time.process_time() - began, value


def seconds(function, repeats):
    """Median CPU seconds of a call after a first one, and what the last one returned."""
    turns = [clocked(function) for _ in range(repeats + 1)]
    return float(np.median([spent for spent, _ in turns[1:]])), turns[-1][1]


def train_briefly(policy, grammar, prompts, workflows, num_steps, batch_size=128):
    """Maximum likelihood on pairs; CPU seconds and sequences per CPU second."""
    sequences = replay(grammar, [encode(workflow, grammar).tokens for workflow in workflows])
    order = torch.argsort(sequences.lengths_B, stable=True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, fused=True)
    rng = np.random.default_rng(0)
    began = time.process_time()
    for _ in range(num_steps):
        first = int(rng.integers(len(order) - batch_size))
        rows = order[first : first + batch_size]
        ids = policy.encode_prompts([prompts[row] for row in rows.tolist()])
        loss = -choice_logprobs(policy, ids, sequences.select(rows))[1].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    spent = time.process_time() - began
    return {"sft_cpu_s": spent, "sft_sequences_per_s": num_steps * batch_size / spent}


class GRPOStep:
    """Rollout, a reward that costs nothing, updates: what `train_grpo` does with a batch."""

    def __init__(self, policy, grammar, prompts, skip_forced):
        """Tune a copy of the policy."""
        self.policy, self.reference = copy.deepcopy(policy), policy
        self.grammar, self.prompts, self.skip_forced = grammar, prompts, skip_forced
        self.tuned = list(self.policy.tuned_parameters().values())
        self.policy.embedding.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.tuned, lr=1e-3, fused=True)
        self.rollout_s, self.update_s, self.peak_mb = [], [], 0.0

    def roll_out(self, seed=1):
        """Designs of the policy as it is."""
        return rollout(
            self.policy, self.grammar, self.prompts, GROUP, seed=seed, skip_forced=self.skip_forced
        )

    def __call__(self):
        """One step; its seconds are kept."""
        peak = Peak()
        spent, sampled = clocked(self.roll_out)
        self.rollout_s.append(spent)
        self.update_s.append(clocked(lambda: self._update(sampled))[0])
        self.peak_mb = max(self.peak_mb, peak.mb())

    def seconds(self):
        """Medians of rollout and update, without the first step."""
        return float(np.median(self.rollout_s[1:])), float(np.median(self.update_s[1:]))

    def _update(self, sampled):
        sequences = sampled.sequences
        rewards_B = torch.tensor([float(len(row) % 7) for row in sampled.tokens])
        advantages_B = group_advantages(rewards_B.view(-1, GROUP)).flatten()
        prompts_PL = self.policy.encode_prompts(self.prompts)
        for rows_B in torch.arange(len(sequences)).chunk(NUM_UPDATES):
            part = sequences.select(rows_B)
            prompt_rows = prompts_PL[rows_B[0] // GROUP : rows_B[-1] // GROUP + 1]
            with torch.no_grad():
                reference_NV, _ = choice_logprobs(self.reference, prompt_rows, part)
            logprobs_NV, logprobs_N = choice_logprobs(self.policy, prompt_rows, part)
            of_N = part.choice_BT.nonzero()[:, 0]
            old_N = sampled.logprobs_BT[rows_B, : part.choice_BT.shape[1]][part.choice_BT]
            gain_N = clipped_gain(logprobs_N, old_N, advantages_B[rows_B][of_N], CLIP)
            self.optimizer.zero_grad()
            (-gain_N + KL_COEF * masked_kl(logprobs_NV, reference_NV)).mean().backward()
            torch.nn.utils.clip_grad_norm_(self.tuned, 1.0)
            self.optimizer.step()


def word_llama(policy, prompts):
    """A Llama over prompt words and workflow tokens, and its tokenizer: token counts are ours."""
    words = sorted({word for text in prompts for word in text.split()})
    names = ["<pad>", "<end>", *words, *(f"t{k}" for k in range(policy.num_tokens))]
    vocabulary = {name: index for index, name in enumerate(names)}
    table = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=table, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )
    model = llama(policy.config, len(names), 256, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    return model.eval(), tokenizer


def generate_as_many(model, tokenizer, prompts, num_tokens):
    """`transformers.generate` of a fixed number of tokens."""
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)

    def generate():
        with torch.no_grad():
            model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=True,
                top_k=0,
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
            )

    return generate


def race_twin(twin, prompts, ours, batches, turns):
    """The twin's seconds per design at its best batch size, with ours in turn."""
    tried = {}
    for num in batches:
        peak = Peak()
        spent, texts = clocked(lambda n=num: twin.sample(prompts[:n]))
        tried[num] = (spent / num, texts, peak.mb())
    best = min(tried, key=lambda num: tried[num][0])
    first, texts, twin_mb = tried[best]
    twin_s, our_s = [first], []
    peak = Peak()
    ours()
    our_mb = peak.mb()
    for _ in range(turns):
        our_s.append(clocked(ours)[0] / NUM_ROWS)
        if turns > 1:
            spent, more = clocked(lambda: twin.sample(prompts[:best]))
            twin_s.append(spent / best)
            texts = texts + more
    valid = float(np.mean([twin.valid(text) for text in texts]))
    theirs, mine = float(np.median(twin_s)), float(np.median(our_s))
    return {
        "twin_batch": best,
        "twin_designs_per_s": 1 / theirs,
        "twin_valid_frac": valid,
        "twin_valid_designs_per_s": valid / theirs,
        "designs_per_s": 1 / mine,
        "ratio_to_twin_per_design": theirs / mine,
        "ratio_to_twin_per_valid": theirs / mine / valid if valid else None,
        "twin_peak_mb": twin_mb,
        "rollout_peak_mb": our_mb,
    }


def race_trl(step, model, tokenizer, prompts, turns):
    """TRL's step beside ours on equal token counts."""
    lengths = [len(row) for row in step.roll_out().tokens]
    mean = round(float(np.mean(lengths)))
    options = {"num_rows": NUM_ROWS, "group": GROUP, "num_updates": NUM_UPDATES}
    options |= {"num_steps": turns, "between": step}
    same, even = (
        trl_steps(model, tokenizer, prompts, max_tokens=max(rows), lengths=rows, **options)
        for rows in (lengths, [mean] * NUM_ROWS)
    )
    ours = sum(step.seconds())
    return {
        "unskipped_step_s": ours,
        "trl_step_s": same.seconds,
        "trl_step_at_mean_length_s": even.seconds,
        "ratio_to_trl": same.seconds / ours,
        "ratio_to_trl_at_mean_length": even.seconds / ours,
        "unskipped_step_peak_mb": step.peak_mb,
        "trl_step_peak_mb": same.peak_mb,
    }


def race_trl_on_json(step, twin, prompts, num_updates, turns):
    """TRL's step on the twin beside ours, as both are used."""
    num_rows = num_updates * NUM_ROWS // NUM_UPDATES
    options = {"num_rows": num_rows, "group": GROUP, "num_updates": num_updates}
    options |= {"num_steps": turns, "max_tokens": twin.max_new_tokens, "between": step}
    spent = trl_steps(twin.model, twin.tokenizer, prompts, **options)
    theirs, ours = spent.seconds / num_rows, sum(step.seconds()) / NUM_ROWS
    valid = float(np.mean([twin.valid(text) for text in spent.texts]))
    return {
        "grpo_s_per_design": ours,
        "trl_json_rows": num_rows,
        "trl_json_s_per_design": theirs,
        "trl_json_valid_frac": valid,
        "ratio_to_trl_json_per_design": theirs / ours,
        "ratio_to_trl_json_per_valid": theirs / ours / valid if valid else None,
        "grpo_step_peak_mb": step.peak_mb,
        "trl_json_peak_mb": spent.peak_mb,
    }


def main():
    """Print a table; with --json one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute on 2 cores")
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    options = parser.parse_args()
    quick = options.quick
    repeats, steps, num_pairs, twin_s = (1, 30, 512, 8) if quick else (5, 120, 4096, 90)
    torch.set_num_threads(1)
    torch.manual_seed(0)

    # Train both on the same pairs
    catalogue = Catalogue.load("embedded")
    grammar = Grammar(catalogue)
    texts = [spec.text for spec in draw_prompts("train", 256, KINDS, 0)]
    workflows = draw_workflows(grammar, PriorConfig(), num_pairs, 0)
    prompts = [texts[k % len(texts)] for k in range(num_pairs)]
    policy = Policy(PolicyConfig(), WordTokenizer.fit(texts), grammar.vocabulary.size)
    result = {"params": sum(weight.numel() for weight in policy.parameters())}
    result |= train_briefly(policy, grammar, prompts, workflows, steps)
    twin = JsonTwin(PolicyConfig(), prompts, workflows, catalogue)
    seen, loss = twin.train(twin_s)
    result |= {
        "twin_params": sum(weight.numel() for weight in twin.model.parameters()),
        "twin_cpu_s": twin_s,
        "twin_sequences_per_s": seen / twin_s,
        "twin_nats_per_token": loss,
    }

    # Sample
    groups = texts[:NUM_PROMPTS]
    plain = GRPOStep(policy, grammar, groups, skip_forced=True)
    sampled = plain.roll_out()
    guided_s, _ = seconds(
        lambda: rollout(policy, grammar, groups, GROUP, seed=1, reference=policy, guidance=1.5),
        repeats,
    )
    mean_tokens = sampled.sequences.lengths_B.float().mean().item()
    num_tokens = mean_tokens * NUM_ROWS
    valid = [is_valid(decode(tokens, grammar), catalogue) for tokens in sampled.tokens]
    model, tokenizer = word_llama(policy, texts)
    every = [text for text in groups for _ in range(GROUP)]
    generate_s, _ = seconds(
        generate_as_many(model, tokenizer, every, round(mean_tokens)), max(1, repeats // 2)
    )
    batches = (64,) if quick else (32, 64, 128)
    raced = race_twin(twin, texts, plain.roll_out, batches, 1 if quick else 3)
    result |= {
        "tokens_per_design": mean_tokens,
        "twin_tokens_per_design": twin.mean_tokens(),
        "forced_frac": 1 - sampled.sequences.choice_BT.sum().item() / num_tokens,
        "valid_frac": float(np.mean(valid)),
        "guided_designs_per_s": NUM_ROWS / guided_s,
        "transformers_designs_per_s": NUM_ROWS / generate_s,
        "ratio_to_transformers": generate_s * raced["designs_per_s"] / NUM_ROWS,
        **raced,
    }

    # Step
    unskipped = GRPOStep(policy, grammar, groups, skip_forced=False)
    result |= race_trl(unskipped, model, tokenizer, groups, repeats)
    result |= race_trl_on_json(plain, twin, groups, 1 if quick else 2, 1 if quick else 3)
    result["grpo_rollout_s"], result["grpo_update_s"] = plain.seconds()

    for name, value in result.items():
        print(f"{name:30} " + ("         -" if value is None else f"{value:10.4g}"))
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
