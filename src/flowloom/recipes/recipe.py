"""What a recipe is: the configuration of every stage of one turn."""

from __future__ import annotations

# The defaults are frozen, so that instances may share them.
# ruff: noqa: RUF009
import dataclasses

from flowloom.dataset.config import BuildPairsConfig, BuildTripletsConfig
from flowloom.designer.config import GRPOConfig, SFTConfig
from flowloom.evaluation.config import EvaluateConfig, ReportConfig
from flowloom.generator.config import PublishGeneratorConfig, TuneGeneratorConfig
from flowloom.lifecycle.config import GateConfig
from flowloom.reward.config import CalibrationConfig, RewardConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One field per stage, named like it."""

    tune_generator: TuneGeneratorConfig = TuneGeneratorConfig()
    """Reward tuning of one generator."""
    publish_generator: PublishGeneratorConfig = PublishGeneratorConfig()
    """What was tuned joins the catalogue."""
    build_pairs: BuildPairsConfig = BuildPairsConfig()
    """Prompts with valid workflows."""
    build_triplets: BuildTripletsConfig = BuildTripletsConfig()
    """Prompts, workflows and rendered scores."""
    train_sft: SFTConfig = SFTConfig()
    """The designer by maximum likelihood."""
    train_reward: RewardConfig = RewardConfig()
    """One member of the reward ensemble."""
    calibrate_reward: CalibrationConfig = CalibrationConfig()
    """Scale, caution and intervals of the ensemble."""
    train_grpo: GRPOConfig = GRPOConfig()
    """The designer against the ensemble."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Policies compared by rendering."""
    promote: GateConfig = GateConfig()
    """What a candidate must show to become champion."""
    report: ReportConfig = ReportConfig()
    """The page a person reads."""
