"""Reward hacking watched: a few designs rendered while a policy is tuned on predicted scores.

A policy that learns the ensemble's mistakes shows as a predicted score that leaves the true one
behind. What is seen here is logged and goes nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flowloom.designer.config import GRPOConfig
from flowloom.designer.policy import Policy
from flowloom.designer.rollout import rollout
from flowloom.reward.ensemble import Ensemble
from flowloom.workflow import Grammar, decode

STREAM = 1 << 31
"""Added to a step's seed: the looks draw from streams of their own."""


class Watch:
    """Samples, renders and scores designs; only where there is one the renderer is loaded."""

    def __init__(
        self, config: GRPOConfig, catalogue_dir: Path, ensemble: Ensemble, prompts: Sequence[str]
    ):
        """Take what to watch with.

        Args:
            config: How many designs, which rubric.
            catalogue_dir: Folder with the catalogue and its models.
            ensemble: The reward that is optimised.
            prompts: Texts to draw from.

        Raises:
            ValueError: There is no such rubric, or no catalogue.
        """
        from flowloom.render.engine import Engine
        from flowloom.render.models import ModelStore
        from flowloom.score.rubric import get_rubric

        self._config, self._ensemble, self._prompts = config, ensemble, prompts
        self._engine = Engine(ModelStore.open(catalogue_dir))
        self._rubric = get_rubric(config.watch_rubric)

    def is_due(self, step: int) -> bool:
        """Whether to look after this step."""
        every = self._config.watch_every
        return every is not None and (step + 1) % every == 0

    def look(self, policy: Policy, grammar: Grammar, step: int) -> dict[str, float]:
        """Mean true and predicted score of designs for prompts that step and seed choose.

        Returns:
            `grpo/true`, `grpo/predicted` and their difference `grpo/gap`, in rubric units.

        Raises:
            FloatingPointError: A picture or a score is not finite.
        """
        from flowloom.render.engine import RenderJob

        num, seed = self._config.watch_prompts, self._config.seed
        rng = np.random.default_rng([seed, step, STREAM])
        repeated = num > len(self._prompts)
        drawn: list[int] = rng.choice(len(self._prompts), num, replace=repeated).tolist()
        prompts = [self._prompts[i] for i in drawn]
        sampled = rollout(policy, grammar, prompts, seed=(seed << 32) + STREAM + step)
        designs = [decode(row, grammar) for row in sampled.tokens]
        # Not `predict`: it remembers, and the tuning would meet predictions of other batches.
        standardised_KB = self._ensemble.predict_workflows(prompts, designs)
        predicted = self._ensemble.to_rubric(standardised_KB.mean(0)).mean()
        jobs = [
            RenderJob(design.fill(prompt, seed=int(rng.integers(2**31))), f"watch {step}.{i}")
            for i, (prompt, design) in enumerate(zip(prompts, designs, strict=True))
        ]
        rendered = self._engine.render(jobs)
        rows = self._rubric.score(
            prompts, [result.image for result in rendered], [result.flops for result in rendered]
        )
        true = np.mean([row["score"] for row in rows])
        seen = {"true": true, "predicted": predicted, "gap": predicted - true}
        return {f"grpo/{name}": float(value) for name, value in seen.items()}
