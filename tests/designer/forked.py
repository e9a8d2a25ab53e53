"""Stages in processes of their own, which cost a fork and no import."""

import multiprocessing
import os
import signal

import torch

from flowloom.runs import Run

CONTEXT = multiprocessing.get_context("forkserver")
# Nothing is trained there, so that what is forked has no threads of torch.
CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "accelerate",
        "flowloom.designer.grpo",
        "flowloom.designer.sft",
        "flowloom.reward.member",
    ]
)


def run_stage(function, folder, config, inputs):
    """Call a stage's function as `stages.run` does."""
    run = Run(function.__name__, folder)
    run.begin()
    metrics = function(config, run, **inputs)
    return metrics, run.finish(metrics).digest


def start(target, *args):
    """Start a process."""
    process = CONTEXT.Process(target=target, args=args)
    process.start()
    return process


def count_calls(replace, at=None):
    """Count calls of what a training step does, before and after each; at the `at`-th, kill -9.

    Args:
        replace: Puts a function in a place, as `setattr`.
        at: Which one kills this process: before an update, its log or the rename of a checkpoint,
            or right after it.

    Returns:
        A list that holds the number of calls so far.
    """
    count = [0]

    def tick():
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(call):
        def counting(*args, **kwargs):
            tick()
            result = call(*args, **kwargs)
            tick()
            return result

        return counting

    for owner, name in ((os, "replace"), (Run, "metric"), (torch.optim.AdamW, "step")):
        replace(owner, name, counted(getattr(owner, name)))
    return count


def run_killed(at, function, folder, config, inputs):
    """A stage that is killed."""
    count_calls(setattr, at)
    run_stage(function, folder, config, inputs)


def run_joint(rank, num, port, function, folder, config, inputs):
    """One of `num` processes that torchrun would start; only the first finishes the run."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="localhost")
    run = Run(function.__name__, folder)
    if rank == 0:
        run.begin()
    metrics = function(config, run, **inputs)
    if rank == 0:
        run.finish(metrics)
