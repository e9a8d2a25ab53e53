"""A step of TRL's `GRPOTrainer`: the peer of `train_grpo`."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
import warnings

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList, PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from benchmarks.memory import Peak

KL_COEF, CLIP = 0.05, 0.2


@dataclasses.dataclass
class Steps:
    """What steps took and wrote."""

    seconds: float
    """Median CPU seconds of a rollout with its updates, without the first one."""
    peak_mb: float
    """Megabytes that a step adds at its peak."""
    texts: list[str]
    """What the last one wrote."""


def trl_steps(
    model,
    tokenizer,
    prompts,
    *,
    num_rows,
    group,
    num_updates,
    max_tokens,
    num_steps,
    lengths=None,
    between=None,
):
    """Run steps of `GRPOTrainer` and measure them.

    Args:
        model: A causal LM; it is not changed.
        tokenizer: Its tokenizer.
        prompts: Texts.
        num_rows: Completions of a step.
        group: Completions per prompt.
        num_updates: Optimizer steps per rollout.
        max_tokens: Longest completion.
        num_steps: Steps after a first one that warms up.
        lengths: Tokens of each row, end included, if they are not the model's own choice.
        between: Called after each step, so that two sides are measured in turn.
    """
    # A peer of the benchmark only: the library knows nothing of it.
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    written = []
    disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)

    def reward(completions, **_):
        written[:] = completions
        return [float(len(text) % 7) for text in completions]

    with tempfile.TemporaryDirectory() as folder:
        # TRL reads its reference from where the model came from.
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model = copy.deepcopy(model)
        model.config._name_or_path = folder
        if lengths is not None:
            _write_exactly(model, lengths)
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=num_rows // num_updates,
            steps_per_generation=num_updates,
            num_generations=group,
            max_completion_length=max_tokens,
            max_steps=(num_steps + 1) * num_updates,
            learning_rate=1e-3,
            beta=KL_COEF,
            epsilon=CLIP,
            scale_rewards="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        clock = _Clock(num_updates, between)
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": list(prompts)}),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return Steps(float(np.median(clock.steps[1:])), clock.peak_mb, written)


class _Clock(TrainerCallback):
    """CPU seconds of rollouts with their updates."""

    def __init__(self, num_updates, between):
        self.num_updates, self.between = num_updates, between
        self.steps, self.updates, self.peak_mb = [], [], 0.0

    def on_step_begin(self, *_, **__):
        if not self.updates:
            self.peak = Peak()
        self.began = time.process_time()

    def on_step_end(self, *_, **__):
        self.updates.append(time.process_time() - self.began)
        if len(self.updates) == self.num_updates:
            self.steps.append(sum(self.updates))
            self.updates = []
            self.peak_mb = max(self.peak_mb, self.peak.mb())
            if self.between is not None:
                self.between()


class _EndAt(LogitsProcessor):
    """Row b ends with its token number `lengths_B[b]`, and not before."""

    def __init__(self, lengths_B, first, end):
        self.lengths_B, self.first, self.end = lengths_B, first, end

    def __call__(self, input_ids, scores):
        ends_B = self.lengths_B == input_ids.shape[1] - self.first + 1
        scores[:, self.end] = -torch.inf
        scores[ends_B] = -torch.inf
        scores[ends_B, self.end] = 0.0
        return scores


def _write_exactly(model, lengths):
    generate = model.generate

    def wrapped(input_ids, **options):
        end = _EndAt(torch.tensor(lengths), input_ids.shape[1], model.config.eos_token_id)
        return generate(input_ids, logits_processor=LogitsProcessorList([end]), **options)

    model.generate = wrapped
