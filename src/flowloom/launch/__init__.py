"""A stage where it should run: in this process, under torchrun, or as a job of a cluster.

`run` is `stages.run` with one word more. All ways leave the same run folder: what a stage's result
is, `result.json` there says, whoever wrote it.

- `process`: here.
- `torchrun:N`: N processes of this machine.
- `trainjob:NODESxPROCESSES`: a `TrainJob` of Kubeflow Trainer, a GPU per process; with `/cpu` at
  its end, without one. The home folder must be on storage that its pods share.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

from flowloom import stages
from flowloom.runs import StageResult

PROCESS = "process"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launcher:
    """How many processes, and whose."""

    kind: str
    """`process`, `torchrun` or `trainjob`."""
    num_nodes: int = 1
    """Machines."""
    num_processes: int = 1
    """Processes on each machine."""
    device: str = "gpu"
    """What a job's processes compute on: `gpu` or `cpu`, the end of its runtime's name."""


def parse(text: str) -> Launcher:
    """A launcher from its one word.

    Raises:
        ValueError: It is none of the forms.
    """
    found = re.fullmatch(
        r"(?P<one>process)|torchrun:(?P<num>\d+)|"
        r"trainjob:(?P<nodes>\d+)x(?P<each>\d+)(?:/(?P<device>cpu|gpu))?",
        text,
    )
    counts = [int(n) for n in found.group("num", "nodes", "each") if n] if found else [0]
    if found is None or 0 in counts:
        raise ValueError(
            f"launch: got {text!r}, expected process, torchrun:N or trainjob:NODESxPROCESSES[/cpu]"
        )
    if found["one"]:
        return Launcher(kind=PROCESS)
    if found["num"]:
        return Launcher(kind="torchrun", num_processes=counts[0])
    nodes, each = counts
    return Launcher(
        kind="trainjob", num_nodes=nodes, num_processes=each, device=found["device"] or "gpu"
    )


def run(
    stage: str, config: Any, inputs: Mapping[str, stages.Input] | None = None,
    launcher: str = PROCESS,
) -> StageResult:  # fmt: skip
    """Run a stage by a launcher, or return its result if the same run was finished before.

    Args:
        stage: Name of the stage.
        config: Its configuration.
        inputs: Input name to the folder (or list of folders) an earlier stage wrote.
        launcher: `process`, `torchrun:N` or `trainjob:NODESxPROCESSES[/cpu]`.

    Raises:
        ValueError: On what `stages.run` refuses, an unknown launcher, or one for several processes
            where the stage is one process's work, or within torchrun.
        LaunchError: The processes failed, or the cluster could not be reached.
    """
    way = parse(launcher)
    if way.kind == PROCESS:
        return stages.run(stage, config, inputs)
    stage_run, paths = stages.opened(stage, config, inputs)
    if not stages.STAGES[stage].joint:
        raise ValueError(f"{stage}: launch: got {launcher!r}, expected process: it is one's work")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{stage}: launch: got {launcher!r} within torchrun, expected process")
    if stage_run.done:
        return stages.run(stage, config, inputs)

    from flowloom.launch import request, torchrun, trainjob
    from flowloom.launch.errors import LaunchError

    if way.kind == "torchrun":
        torchrun.run(stage, request.write(stage_run, config, paths), way.num_processes)
    else:
        shared = {
            name: [request.share(one) for one in path]
            if isinstance(path, list)
            else request.share(path)
            for name, path in paths.items()
        }
        trainjob.run(stage_run, request.write(stage_run, config, shared), way)
    if not stage_run.done:
        raise LaunchError(f"{stage}: {launcher} ended well, but {stage_run.dir} holds no result")
    # It is finished: what remains is to link it to this step, and what its end left undone.
    return dataclasses.replace(stages.run(stage, config, inputs), cached=False)
