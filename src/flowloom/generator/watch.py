"""Looks at held-out prompts during tuning: is it the pictures that improve, or only the reward?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowloom.generator.config import TuneGeneratorConfig
from flowloom.generator.evaluation import draw, noise
from flowloom.generator.prompts import draw_prompts
from flowloom.generator.rollout import Share, raise_together, score
from flowloom.generator.velocity import Generator
from flowloom.processes import Processes
from flowloom.score.build import build_rubric
from flowloom.score.rubric import Rubric

_ENTROPY = 4


class Watch:
    """Judges on the trained score and on another one, keeps the best weights, and says stop."""

    def __init__(self, config: TuneGeneratorConfig, trained: Rubric, processes: Processes):
        """Take `config.watch`; without one nothing is ever due."""
        self.config = config.watch
        self.best: dict[str, Tensor] | None = None
        self.best_score, self.num_worse, self.reason = float("-inf"), 0, ""
        self.looks: list[dict[str, Any]] = []
        if self.config is None:
            return
        watched = build_rubric(self.config.rubric, config.score_timeout_s)
        self.rubrics = {"trained": trained, "watched": watched}
        self.setting, self.rows = config.judging.serve, config.sample_rows
        entropy, K = (config.seed, _ENTROPY), self.config.num_seeds
        prompts = draw_prompts(config.prompts, "holdout", self.config.num_prompts, entropy)
        self.prompts = [prompt for prompt in prompts for _ in range(K)]
        self.entropy = (*entropy, 1)
        self.share = Share(processes, len(prompts), K)

    @property
    def all_prompts(self) -> list[str]:
        """Every prompt that is looked at."""
        return [] if self.config is None else self.prompts

    @property
    def stopped(self) -> bool:
        """Whether tuning should end."""
        return bool(self.reason)

    def is_due(self, epoch: int) -> bool:
        """Whether to look before this epoch."""
        return self.config is not None and epoch % self.config.every == 0

    def look(self, flow: Generator, epoch: int) -> dict[str, float]:
        """Mean scores of held-out prompts as served; decides on the best weights and the stop.

        Raises:
            RuntimeError: Drawing or scoring failed, here or in another process.
        """
        assert self.config is not None, "not due without a configuration"
        served = flow.with_guidance(self.setting.guidance)
        noise_BCHW = noise(flow.shape, len(self.prompts), self.entropy)
        K, own = self.share.num_branches, self.share.prompts
        totals, failure = [], None
        try:
            for first in range(own.start * K, own.stop * K, self.rows):
                rows = slice(first, min(first + self.rows, own.stop * K))
                texts = self.prompts[rows]
                images_BCHW = draw(served, texts, noise_BCHW[rows], self.setting)
                scores = [score(rubric, texts, images_BCHW) for rubric in self.rubrics.values()]
                totals.append(torch.stack([scores_B1[:, 0] for scores_B1 in scores], 1))
        except Exception as error:
            failure = error
        raise_together(self.share.processes, failure, f"watch before epoch {epoch}")
        scores_P2 = self.share.whole(torch.cat(totals)).unflatten(0, (-1, K)).mean(1)
        names = [f"watch/{name}" for name in self.rubrics]
        found = dict(zip(names, scores_P2.mean(0).tolist(), strict=True))
        by_prompt = dict(zip(names, scores_P2.T.tolist(), strict=True))
        self.looks.append({"epoch": epoch, **found, "by_prompt": by_prompt})
        self._decide(flow, found["watch/watched"], epoch)
        return found

    def _decide(self, flow: Generator, watched: float, epoch: int) -> None:
        assert self.config is not None
        if self.config.max_drop is None:
            return
        if watched > self.best_score:
            self.best_score, self.num_worse = watched, 0
            self.best = {name: value.detach().clone() for name, value in flow.state_dict().items()}
            return
        worse = watched < self.best_score - self.config.max_drop
        self.num_worse = self.num_worse + 1 if worse else 0
        if self.num_worse >= self.config.patience:
            name = self.rubrics["watched"].name
            self.reason = (
                f"{name} fell to {watched:.3f} on held-out prompts, more than "
                f"{self.config.max_drop} below its best {self.best_score:.3f}, for "
                f"{self.num_worse} looks"
            )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        names = ("best", "best_score", "num_worse", "looks")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.best, self.best_score = state["best"], state["best_score"]
        self.num_worse, self.looks = state["num_worse"], state["looks"]
