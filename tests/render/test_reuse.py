"""Pins: equal sub-workflows of a call are computed once, pictures and counted costs stay those of
each workflow alone; workflows that differ behind the sampler share its run and its sort key."""

import numpy as np
import pytest

from flowloom.render import batch
from flowloom.render.engine import Engine, RenderJob, batch_key
from flowloom.render.models import ModelStore
from tests.render.tiny import CHECKPOINTS, flow, write_world

TOLERANCE = 1e-5
PROMPT = "a red circle"
BLUR = ("ImageBlur", {"blur_radius": 2, "sigma": 0.5})
SHARPEN = ("ImageSharpen", {"sharpen_radius": 1, "sigma": 1.0, "alpha": 0.5})


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return Engine(ModelStore.open(write_world(tmp_path_factory.mktemp("world"), contrast=0.1)))


@pytest.fixture
def rows(monkeypatch):
    """Rows of the batches that are run."""
    sizes, run = [], batch.run
    monkeypatch.setattr(
        batch, "run", lambda model, tasks: sizes.append(len(tasks)) or run(model, tasks)
    )
    return sizes


def jobs_of(*workflows, seed=3):
    return [RenderJob(w.fill(PROMPT, seed=seed), str(k)) for k, w in enumerate(workflows)]


def test_variants_behind_the_sampler_share_its_run(engine, rows):
    jobs = jobs_of(flow(), flow(image_nodes=(BLUR,)), flow(image_nodes=(SHARPEN, BLUR)))
    together = engine.render(jobs)
    assert rows == [1]
    for job, result in zip(jobs, together, strict=True):
        (alone,) = engine.render([job])
        assert alone.image.tobytes() == result.image.tobytes()
        assert alone.flops == result.flops > 0


def test_a_second_pass_shares_the_first(engine, rows):
    jobs = jobs_of(flow(), flow(second_pass={"denoise": 0.5}), flow(second_pass={"denoise": 0.7}))
    results = engine.render(jobs)
    assert rows == [1, 2]
    assert results[1].flops > results[0].flops


@pytest.mark.parametrize(
    "other",
    [
        flow(cfg=3.0),
        flow(steps=4),
        flow(CHECKPOINTS[1]),
        flow(zero_negative=True),
        flow(lora=(1.0, 1.0)),
        flow(size=48),
    ],
)
def test_other_literals_are_other_runs(engine, rows, other):
    first, second = engine.render(jobs_of(flow(), other))
    assert sum(rows) == 2
    if first.image.shape == second.image.shape:
        assert np.abs(first.image - second.image).max() > 1e-3


def test_ids_key_order_and_unused_nodes_do_not_matter(engine, rows):
    api = flow().fill(PROMPT, seed=3).to_api()
    renamed = {
        f"n{i}": {
            "class_type": node["class_type"],
            "inputs": {
                name: [f"n{value[0]}", value[1]] if isinstance(value, list) else value
                for name, value in reversed(node["inputs"].items())
            },
        }
        for i, node in reversed(api.items())
    }
    renamed["spare"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 10**9}}
    workflow = type(flow()).from_api(renamed)
    first, second = engine.render([*jobs_of(flow()), RenderJob(workflow, "renamed")])
    assert rows == [1]
    assert first.image.tobytes() == second.image.tobytes()


def test_seeds_and_prompts_are_other_runs(engine, rows):
    workflow = flow()
    jobs = [RenderJob(workflow.fill(text, seed=s), "x") for text in ("a", "b") for s in (1, 2)]
    results = engine.render(jobs)
    assert sum(rows) == 4
    assert len({result.image.tobytes() for result in results}) == 4


def test_sort_keys_ignore_what_is_behind_the_sampler():
    variants = [flow(), flow(image_nodes=(BLUR,)), flow(image_nodes=(SHARPEN,))]
    assert len({batch_key(w) for w in variants}) == 1
    assert len({batch_key(w.fill(PROMPT, seed=1)) for w in variants}) == 1
    others = [
        flow(CHECKPOINTS[1]),
        flow(steps=5),
        flow(sampler="heun"),
        flow(lora=(1.0, 0.0)),
        flow(size=48),
        flow(second_pass={"steps": 2}),
    ]
    keys = [batch_key(w) for w in (flow(), *others)]
    assert len(set(keys)) == len(keys)
    assert sorted(keys)


def test_sorted_jobs_that_can_share_a_batch_lie_together():
    flows = [flow(CHECKPOINTS[k % 2], steps=2 + k % 3, cfg=1.0 + k) for k in range(12)]
    flows.sort(key=batch_key)
    names = [w.nodes["1"].inputs["ckpt_name"] for w in flows]
    assert names == sorted(names)
