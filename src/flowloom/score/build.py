"""Rubrics from their configurations."""

from __future__ import annotations

import dataclasses

from flowloom.score.aesthetics import AestheticsScorer
from flowloom.score.clip import ClipScorer
from flowloom.score.config import (
    AestheticsConfig,
    DetectorConfig,
    RubricConfig,
    ScorerConfig,
    ShapesConfig,
    TermConfig,
    VLMConfig,
)
from flowloom.score.detection import DetectorScorer
from flowloom.score.models import ModelScorer
from flowloom.score.rubric import Rubric, Term, get_rubric, shapes_rubric
from flowloom.score.vlm import VLMScorer


def build_rubric(config: str | RubricConfig, timeout_s: float | None = None) -> Rubric:
    """The rubric of a configuration; its models are loaded by the first pictures scored.

    Args:
        config: Name of one of `flowloom.score.rubric.RUBRICS`, or all of it.
        timeout_s: Seconds that a term may take for a batch, where the configuration leaves it open.

    Raises:
        ValueError: There is no rubric of this name, or a field does not fit.
    """
    rubric = get_rubric(config) if isinstance(config, str) else _rubric(config)
    if rubric.timeout_s is None:
        return dataclasses.replace(rubric, timeout_s=timeout_s)
    return rubric


def _rubric(config: RubricConfig) -> Rubric:
    return Rubric(
        config.name,
        tuple(_term(term) for term in config.terms),
        batch_size=config.batch_size,
        kind=config.kind,
        timeout_s=config.timeout_s,
    )


def _term(config: TermConfig) -> Term:
    scorer = config.scorer
    name = config.name or scorer.kind
    if isinstance(scorer, ShapesConfig):
        own = {term.name: term.scorer for term in shapes_rubric().terms}[scorer.kind]
        return Term(name, own, config.weight, low=config.low, high=config.high)
    return Term(
        name, _scorer(scorer), config.weight, low=config.low, high=config.high, native=False
    )


def _scorer(config: ScorerConfig) -> ModelScorer:
    if isinstance(config, AestheticsConfig):
        return AestheticsScorer(config)
    if isinstance(config, DetectorConfig):
        return DetectorScorer(config)
    if isinstance(config, VLMConfig):
        return VLMScorer(config)
    assert not isinstance(config, ShapesConfig)
    return ClipScorer(config)
