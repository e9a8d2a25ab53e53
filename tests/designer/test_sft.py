"""Facts: the loss falls; a run that is killed and started again ends with the same bytes as one
that is not; every sampled design is valid; a non-finite loss stops the run with its step."""

import json

import pytest
import torch

from flowloom.designer import sft
from flowloom.designer.config import SFTConfig
from flowloom.designer.policy import Policy
from flowloom.designer.sft import train_sft
from flowloom.runs import Run
from tests.designer.tiny import TINY

CONFIG = SFTConfig(
    policy=TINY, prior_steps=10, best_steps=4, batch_size=32, checkpoint_every=3, num_samples=16
)


def _train(folder, inputs, config=CONFIG):
    run = Run("train_sft", folder)
    run.work.mkdir(parents=True, exist_ok=True)
    run.begin()
    metrics = train_sft(config, run, **inputs)
    return metrics, run.finish(metrics).digest


def test_learns_and_samples_validly(tmp_path, inputs):
    metrics, _ = _train(tmp_path / "run", inputs)
    assert metrics["sft/valid_frac"] == 1.0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])["sft/prior_loss"]
    assert 0 < metrics["sft/best_loss"] < metrics["sft/prior_loss"] < first
    out = tmp_path / "run" / "out"
    names = {path.name for path in out.iterdir()}
    assert names == {"model.safetensors", "model.json", "vocabulary.json", "tokenizer.json"}
    assert Policy.load(out).config == TINY


def test_resumed_equals_uninterrupted(tmp_path, inputs, monkeypatch):
    whole = _train(tmp_path / "whole", inputs)
    plain = sft.choice_logprobs
    for die_at in (5, 8):
        calls = []

        def dying(*args, die_at=die_at, calls=calls):
            calls.append(0)
            if len(calls) == die_at:
                raise KeyboardInterrupt
            return plain(*args)

        monkeypatch.setattr(sft, "choice_logprobs", dying)
        with pytest.raises(KeyboardInterrupt):
            _train(tmp_path / "broken", inputs)
    monkeypatch.setattr(sft, "choice_logprobs", plain)
    assert _train(tmp_path / "broken", inputs) == whole


def test_a_non_finite_loss_names_its_step(tmp_path, inputs, monkeypatch):
    plain, calls = sft.choice_logprobs, []

    def breaking(*args):
        calls.append(0)
        every, chosen = plain(*args)
        return every, (chosen * torch.nan if len(calls) == 3 else chosen)

    monkeypatch.setattr(sft, "choice_logprobs", breaking)
    with pytest.raises(FloatingPointError, match="train_sft: step 2: loss is nan"):
        _train(tmp_path / "run", inputs)
