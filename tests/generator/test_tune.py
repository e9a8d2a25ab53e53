"""The loop of `tune_generator` on a tiny random checkpoint, with FDFO.

Facts pinned here:
- Killed with SIGKILL at any step, also while it resumes, and run again, every file of the artifact
  has the bytes of an uninterrupted run; all options at once, and Flow-GRPO.
- Two processes do what one does at the same global batch: rewards to 1e-5, weights to 5e-4.
- What fails in one process (a score that is not finite, breaks down or takes too long) stops both,
  with the epoch and the reason, and nothing is left but the run's log and checkpoints.
- Scoring beside the drawing changes nothing: parts of any size give the same scores to the bit.
- A hard reward that an easy one starves is raised when differences are balanced.
- Each epoch has prompts, noise and an order of its own; what is written is the mean of the weights
  where one is kept.
- Tuning stops when a watched score falls, and keeps the weights of its best look.
"""

import dataclasses
import json
import os
import signal
import socket
import time

import numpy as np
import pytest
import torch
from PIL import Image

from flowloom.generator import tune, watch
from flowloom.generator.config import (
    FDFOConfig,
    FlowGRPOConfig,
    PromptsConfig,
    TuneGeneratorConfig,
    WatchConfig,
)
from flowloom.generator.fdfo import FDFO
from flowloom.generator.judging_config import JudgingConfig, Setting
from flowloom.generator.lora_config import LoRAConfig
from flowloom.generator.prompts import draw_prompts
from flowloom.generator.rollout import Share, roll_out
from flowloom.generator.velocity import ShapesFlow
from flowloom.processes import Processes
from flowloom.runs import Run
from flowloom.score.rubric import Rubric, Term
from flowloom.shapes.model import load
from tests.designer.forked import CONTEXT, count_calls, start
from tests.generator.tiny import brightness, install, tiny_model

CONFIG = TuneGeneratorConfig(
    base="tiny.safetensors",
    name="tiny-tuned.safetensors",
    num_epochs=3,
    images_per_epoch=6,
    num_steps=3,
    num_minibatches=2,
    judging=JudgingConfig(
        num_prompts=2, num_seeds=2, num_grid_prompts=2, serve=Setting(num_steps=2, guidance=2.5)
    ),
    checkpoint_every=1,
)
EVERYTHING = dataclasses.replace(
    CONFIG,
    method=FDFOConfig(num_branches=3),
    guidance=2.0,
    lora=LoRAConfig(rank=2),
    balance_epochs=4.0,
    average_epochs=2.0,
    watch=WatchConfig(every=2, rubric="contrast", num_prompts=2, num_seeds=1, max_drop=0.5),
    sample_rows=3,
    units_per_pass=2,
)
GRPO = dataclasses.replace(CONFIG, method=FlowGRPOConfig(group_size=3))
CONFIGS = {"everything": EVERYTHING, "grpo": GRPO}


def contrast(prompts, images_BCHW, flops):
    return torch.tanh(images_BCHW.flatten(1).std(1)).double().numpy()


RUBRICS = {
    "shapes": Rubric(
        "both", (Term("brightness", brightness, 0.9), Term("contrast", contrast, 0.1)), kind="sum"
    ),
    "contrast": Rubric("contrast", (Term("contrast", contrast),)),
}


def built_from(rubrics):
    return lambda name, timeout_s=None: dataclasses.replace(rubrics[name], timeout_s=timeout_s)


def enter(root, replace, rubrics=RUBRICS):
    install(root, CONFIG.base, replace)
    for module in (tune, watch):
        replace(module, "build_rubric", built_from(rubrics))


@pytest.fixture
def root(tmp_path, monkeypatch):
    enter(tmp_path / "models", monkeypatch.setattr)
    return tmp_path / "models"


def run_in(folder, config):
    run = Run("tune_generator", folder)
    run.begin()
    metrics = tune.tune_generator(config, run)
    return metrics, run.finish(metrics).digest


def run_killed(at, root, folder, config):
    enter(root, setattr)
    count_calls(setattr, at)
    run_in(folder, config)


@pytest.mark.parametrize("name", CONFIGS)
def test_killed_equals_left_alone(name, root, tmp_path, monkeypatch):
    config = CONFIGS[name]
    with monkeypatch.context() as patch:
        count = count_calls(patch.setattr)
        whole = run_in(tmp_path / "whole", config)
    # Somewhere and again soon after it came back; and while it writes what it made.
    late = [(count[0] - 2,)] if name == "everything" else []
    for kill, moments in enumerate([(count[0] // 2, 3), *late]):
        folder = tmp_path / f"killed-{kill}"
        for at in moments:
            process = start(run_killed, at, root, folder, config)
            process.join()
            assert process.exitcode == -signal.SIGKILL
        assert (folder / "work" / "state.pt").is_file()
        assert run_in(folder, config) == whole


def test_resumed_in_the_same_process_equals_left_alone(root, tmp_path, monkeypatch):
    whole = run_in(tmp_path / "whole", EVERYTHING)
    with monkeypatch.context() as patch:
        seen, draw = [], tune.roll_out

        def breaks(*args):
            seen.append(args[-1])
            if args[-1] == 2:
                raise KeyboardInterrupt
            return draw(*args)

        patch.setattr(tune, "roll_out", breaks)
        with pytest.raises(KeyboardInterrupt):
            run_in(tmp_path / "run", EVERYTHING)
    assert seen == [0, 1, 2]
    assert run_in(tmp_path / "run", EVERYTHING) == whole
    # Every second epoch, and what is written at last.
    curve = json.loads((tmp_path / "run" / "out" / "curve.json").read_text())
    assert [look["epoch"] for look in curve["looks"]] == [0, 2, 3]


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def run_joint(rank, num, port, root, folder, config, fails, said):
    """One of `num` processes that torchrun would start."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="localhost")
    torch.set_num_threads(1)
    enter(root, setattr, failing(fails, rank) if fails else RUBRICS)
    run = Run("tune_generator", folder)
    if rank == 0:
        run.begin()
    try:
        metrics = tune.tune_generator(config, run)
    except Exception as error:
        said.put((rank, type(error).__name__, str(error)))
        return
    if rank == 0:
        run.finish(metrics)
    said.put((rank, "", ""))


def failing(how, rank):
    """A rubric whose second batch of an epoch fails in process 1 alone."""
    calls = []

    def scorer(prompts, images_BCHW, flops):
        calls.append(1)
        if rank == 1 and len(calls) == 3:
            if how == "late":
                time.sleep(60)
            if how == "broken":
                raise KeyError("no such thing")
            return np.full(len(images_BCHW), np.nan)
        return brightness(prompts, images_BCHW, flops)

    return {"shapes": Rubric("shaky", (Term("x", scorer),))}


def together(root, folder, config, fails=None):
    port, said = free_port(), CONTEXT.Queue()
    group = [start(run_joint, r, 2, port, root, folder, config, fails, said) for r in range(2)]
    found = sorted(said.get(timeout=120) for _ in group)
    for process in group:
        process.join()
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_do_what_one_does(name, root, tmp_path):
    # Weights are looser: what AdamW makes of a gradient that is 0 up to rounding is arbitrary.
    config = dataclasses.replace(CONFIGS[name], num_epochs=2, images_per_epoch=9)
    run_in(tmp_path / "one", config)
    assert [kind for _, kind, _ in together(root, tmp_path / "two", config)] == ["", ""]
    curves, models = [], []
    for folder in ("one", "two"):
        out = tmp_path / folder / "out"
        curves.append(json.loads((out / "curve.json").read_text())["epochs"])
        models.append(load(out / "models" / "checkpoints" / CONFIG.name).state_dict())
    for one, two in zip(*curves, strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)
        assert one["train/reward"] == pytest.approx(two["train/reward"], abs=1e-5)
    for key, value in models[0].items():
        torch.testing.assert_close(models[1][key], value, rtol=0, atol=5e-4)


@pytest.mark.parametrize(
    ("how", "kind", "reason"),
    [
        ("nan", "FloatingPointError", "shaky: x is not finite"),
        ("broken", "RuntimeError", "shaky: x: broke down"),
        ("late", "RuntimeError", "shaky: x: no values after 1.0 s"),
    ],
)
def test_what_fails_in_one_process_stops_both(how, kind, reason, root, tmp_path):
    config = dataclasses.replace(CONFIG, score_timeout_s=1.0, images_per_epoch=8, sample_rows=4)
    (_, *first), (_, *second) = together(root, tmp_path / "run", config, how)
    assert first[0] == "RuntimeError"
    assert second[0] == kind
    for _, message in (first, second):
        assert message.startswith("epoch 2: process 1: ")
        assert reason in message
    left = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert left == {"log.txt", "metrics.jsonl", "state.pt"}


def test_alone_a_failure_names_the_epoch(root, tmp_path, monkeypatch):
    calls = []

    def breaks(prompts, images_BCHW, flops):
        calls.append(1)
        # Two calls judge the base; the second epoch is the fourth.
        return np.full(len(images_BCHW), np.nan if len(calls) == 4 else 0.5)

    rubrics = {"shapes": Rubric("breaks", (Term("x", breaks),))}
    monkeypatch.setattr(tune, "build_rubric", built_from(rubrics))
    with pytest.raises(FloatingPointError, match=r"^epoch 1: breaks: x is not finite"):
        run_in(tmp_path / "run", CONFIG)
    assert not list((tmp_path / "run" / "out.partial").iterdir())


def test_artifact(root, tmp_path, monkeypatch):
    epochs = [[], [], []]
    for name, places in (("roll_out", {0: 3, 1: 4}), ("update", {2: 7})):
        call = getattr(tune, name)

        def recorded(*args, call=call, places=places):
            for kind, place in places.items():
                epochs[kind].append(np.array(args[place]).tolist())
            return call(*args)

        monkeypatch.setattr(tune, name, recorded)
    metrics, _ = run_in(tmp_path / "run", dataclasses.replace(CONFIG, lora=LoRAConfig(rank=2)))
    # Prompts, noise and the order of the same units are an epoch's own.
    for kind in epochs:
        assert len({str(each) for each in kind}) == 3
    assert len({str(sorted(units)) for units in epochs[2]}) == 1
    out = tmp_path / "run" / "out"
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {
        "README.md",
        "curve.json",
        "judged.json",
        "files.json",
        "grid.png",
        "models/checkpoints/tiny-tuned.safetensors",
        "models/loras/tiny-tuned-lora.safetensors",
    }
    curve = json.loads((out / "curve.json").read_text())
    assert [row["images"] for row in curve["epochs"]] == [6, 12, 18]
    terms = [row["train/term/brightness"] for row in curve["epochs"]]
    total = [row["train/reward"] for row in curve["epochs"]]
    contrasts = [row["train/term/contrast"] for row in curve["epochs"]]
    assert total == pytest.approx(np.dot([0.9, 0.1], [terms, contrasts]).tolist(), abs=1e-5)
    lift = curve["after"]["serve/score"] - curve["before"]["serve/score"]
    assert metrics["generator/lift"] == pytest.approx(lift)
    # Under the prompt, 18 px and a gap of 4, two rows of 64 px and a gap; names left of 60 px.
    pixels = np.asarray(Image.open(out / "grid.png"))[:, 60:]
    assert (pixels[22:86] != pixels[90:154]).any()


def test_the_mean_of_the_weights_is_written(root, tmp_path):
    models, furthest = {}, 0.0
    for reach in (None, 1.0, 2.0):
        config = dataclasses.replace(
            CONFIG, num_epochs=1, lr=1e-2, warmup_steps=0, average_epochs=reach
        )
        out = tmp_path / str(reach) / "out" / "models" / "checkpoints" / CONFIG.name
        run_in(tmp_path / str(reach), config)
        models[reach] = load(out).state_dict()
    for name, base in tiny_model().state_dict().items():
        plain = models[None][name]
        assert torch.equal(models[1.0][name], plain)
        furthest = max(furthest, float((plain - base).abs().max()))
        # One of two parts is the base; files are float16.
        torch.testing.assert_close(models[2.0][name], (base + plain) / 2, rtol=2e-3, atol=2e-4)
    assert furthest > 5e-3


def test_parts_do_not_matter():
    flow = ShapesFlow(tiny_model())
    prompts = draw_prompts(PromptsConfig(), "train", 6, (0, 0))
    method, share = FDFO(FDFOConfig(), [1.0, 0.5, 0.0]), Share(Processes(), 6, 2)
    found = []
    for rows in (4, 6, 12):
        parts, scored, wild = roll_out(
            flow, method, RUBRICS["shapes"], prompts, range(6), share, rows, 0
        )
        assert sum(len(part.prompts) for part in parts) == 6
        found.append(torch.cat([scored, wild[:, None]], 1))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def hard_gain(balance_epochs, tmp_path, monkeypatch):
    """What 12 epochs gain of a reward whose differences are 300 times smaller than another's."""

    def red(prompts, images_BCHW, flops):
        return 0.5 + images_BCHW[:, 0].flatten(1).mean(1).double().numpy() / 4

    def blue(prompts, images_BCHW, flops):
        return 0.5 - images_BCHW.flatten(1).mean(1).double().numpy() / 1200

    terms = (Term("easy", red, 0.5), Term("hard", blue, 0.5))
    rubrics = {"shapes": Rubric("both", terms, kind="sum")}
    monkeypatch.setattr(tune, "build_rubric", built_from(rubrics))
    config = dataclasses.replace(
        CONFIG, num_epochs=12, images_per_epoch=16, lr=3e-3, balance_epochs=balance_epochs,
        method=FDFOConfig(kl_coef=0.0), judging=dataclasses.replace(CONFIG.judging, num_seeds=8),
    )  # fmt: skip
    metrics, _ = run_in(tmp_path / f"run-{balance_epochs}", config)
    name = "generator/tuned_score_both_{}_{}".format
    return [
        metrics[name(term, "after")] - metrics[name(term, "before")] for term in ("easy", "hard")
    ]


def test_balance_feeds_the_hard_reward(root, tmp_path, monkeypatch):
    starved = hard_gain(None, tmp_path, monkeypatch)
    balanced = hard_gain(4.0, tmp_path, monkeypatch)
    assert starved[0] > 0.02
    assert starved[1] < 0 < balanced[1]


def test_watch_stops_and_keeps_the_best(root, tmp_path, monkeypatch):
    def dark(prompts, images_BCHW, flops):
        return 1 - brightness(prompts, images_BCHW, flops)

    rubrics = {**RUBRICS, "dark": Rubric("dark", (Term("dark", dark),))}
    enter(root, monkeypatch.setattr, rubrics)
    config = dataclasses.replace(
        CONFIG, num_epochs=30, images_per_epoch=16, lr=3e-3, lr_schedule="constant",
        method=FDFOConfig(kl_coef=0.0),
        watch=WatchConfig(every=2, rubric="dark", num_prompts=4, max_drop=0.01, patience=2),
    )  # fmt: skip
    run_in(tmp_path / "run", config)
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert any("stopped before epoch" in line and "dark fell to" in line for line in lines)
    curve = json.loads((tmp_path / "run" / "out" / "curve.json").read_text())
    looks = [look["watch/watched"] for look in curve["looks"]]
    best = int(np.argmax(looks))
    assert len(curve["epochs"]) == 2 * (len(looks) - 1) < 30
    assert max(looks[-2:]) < looks[best] - 0.01 <= looks[-3]
    run_in(tmp_path / "best", dataclasses.replace(config, num_epochs=2 * best, watch=None))
    name = f"out/models/checkpoints/{CONFIG.name}"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "best" / name).read_bytes()


def test_reward_rises(root, tmp_path):
    config = dataclasses.replace(
        CONFIG, num_epochs=15, images_per_epoch=16, lr=3e-3, method=FDFOConfig(kl_coef=0.0)
    )
    metrics, _ = run_in(tmp_path / "run", config)
    assert metrics["generator/tuned_score_after"] > metrics["generator/tuned_score_before"] + 0.02


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_epochs": 0}, "num_epochs"),
        ({"images_per_epoch": 7}, "images_per_epoch"),
        ({"guidance": 0.0}, "guidance"),
        ({"score_timeout_s": 0.0}, "score_timeout_s"),
        ({"name": "tiny.safetensors"}, "name"),
    ],
)
def test_bad_fields_are_named(change, field):
    with pytest.raises(ValueError, match=f"^{field}: got"):
        dataclasses.replace(CONFIG, **change)
