"""Tracing pipelines anew: for another cluster or other overlays than when first imported."""

import sys

from kfp import dsl

from pipelines import clusters
from pipelines.__main__ import names


def trace_anew(patch, overlays):
    """Have the next import of a pipeline trace it, without settings of this machine's.

    Args:
        patch: Undoes it all.
        overlays: Folder in place of `infra/overlays`.
    """
    for name in (clusters.CLUSTER, clusters.LAUNCH):
        patch.setenv(name, "unset")  # so that what a command sets is undone
        patch.delenv(name)
    traced = ["designer", "generator", "turn", *names(), *(f"{name}.pipeline" for name in names())]
    for module in traced:
        patch.setitem(sys.modules, f"pipelines.{module}", None)  # so that the import is undone
        del sys.modules[f"pipelines.{module}"]
    patch.setattr(clusters, "OVERLAYS", overlays)
    trace_fast(patch)


def trace_fast(patch):
    """Spare kfp a check for which it walks the call stack, deep in a test: 15 s for a pipeline."""
    patch.setattr(dsl.PipelineTask, "_ensure_container_spec_exists", lambda task: None)
