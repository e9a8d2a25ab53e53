"""Pipelines as they are compiled for each cluster: what their steps ask for."""

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.infra.pods import quantity
from tests.infra.rendered import ROOT

# kfp traces a pipeline at import, so each cluster has a process; forked, they import kfp once.
_COMPILE = """
import multiprocessing, os, sys
from pathlib import Path
import kfp.compiler, kfp.kubernetes, components

def compile(cluster, out):
    os.environ["FLOWLOOM_CLUSTER"] = cluster
    from pipelines.__main__ import compile_to, names
    for name in names():
        compile_to(name, out / f"{cluster}-{name}.yaml")

folder, *clusters = sys.argv[1:]
fork = multiprocessing.get_context("fork")
processes = [fork.Process(target=compile, args=(name, Path(folder))) for name in clusters]
for process in processes:
    process.start()
for process in processes:
    process.join()
sys.exit(any(process.exitcode for process in processes))
"""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step of a compiled pipeline asks of its cluster."""

    name: str
    """Pipeline and step."""
    container: dict[str, Any]
    """Image and resources."""
    kubernetes: dict[str, Any]
    """Secrets, claims, selectors, tolerations, labels, as kfp-kubernetes writes them."""

    @property
    def resources(self) -> dict[str, float]:
        """Cores, bytes of memory and GPUs it may use."""
        asked = self.container["resources"]
        found = {
            "cpu": quantity(asked["resourceCpuLimit"]),
            "memory": quantity(asked["resourceMemoryLimit"]),
        }
        if gpu := asked.get("accelerator"):
            found[gpu["resourceType"]] = quantity(gpu["resourceCount"])
        return found


@functools.cache
def _texts(*clusters: str) -> dict[str, str]:
    """Every compiled pipeline by cluster and name, as `kind-NAME`."""
    # Of this machine, and in place of what a cluster says.
    env = {name: value for name, value in os.environ.items() if name != "FLOWLOOM_LAUNCH"}
    with tempfile.TemporaryDirectory() as folder:
        asked = [sys.executable, "-c", _COMPILE, folder, *clusters]
        ran = subprocess.run(asked, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
        assert ran.returncode == 0, ran.stderr
        return {path.stem: path.read_text() for path in sorted(Path(folder).glob("*.yaml"))}


@functools.cache
def steps(cluster: str) -> tuple[Step, ...]:
    """Every step of every pipeline that is compiled for this cluster."""
    from pipelines.clusters import CLUSTERS

    texts = _texts(*CLUSTERS)
    return tuple(
        step
        for name, text in texts.items()
        if name.startswith(f"{cluster}-")
        for step in _steps(name, text)
    )


def _steps(name: str, text: str) -> Iterator[Step]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    spec, platform = yaml.load_all(text, Loader=loader)
    extra = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for key, executor in spec["deploymentSpec"]["executors"].items():
        yield Step(
            name=f"{name} {key.removeprefix('exec-')}",
            container=executor["container"],
            kubernetes=extra.get(key, {}),
        )
