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
    traced = ("designer", "generator", "turn", *names())
    for module in list(sys.modules):
        if module.startswith("pipelines.") and module.split(".")[1] in traced:
            patch.delitem(sys.modules, module)
    patch.setattr(clusters, "OVERLAYS", overlays)
    # It only checks, but walks the call stack, which is deep in a test: a minute in all.
    patch.setattr(dsl.PipelineTask, "_ensure_container_spec_exists", lambda task: None)
