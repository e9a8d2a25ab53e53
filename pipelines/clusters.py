"""What each cluster offers to the steps of a pipeline; `infra/overlays/NAME` makes it so.

kfp traces a pipeline when its module is imported. So a command names the cluster in the environment
(`FLOWLOOM_CLUSTER`, and `FLOWLOOM_LAUNCH` in place of its `launch`) before it imports one.
"""

import dataclasses
import os
from pathlib import Path
from typing import Optional

from flowloom import launch as launching

OVERLAYS = Path(__file__).parents[1] / "infra" / "overlays"
DEFAULT = "dev"
CLUSTER = "FLOWLOOM_CLUSTER"
LAUNCH = "FLOWLOOM_LAUNCH"
NOT_BUILT = "sha256:" + 64 * "0"
"""The digest of a committed overlay, in place of one that `make images` writes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a cluster offers to the steps of a pipeline."""

    name: str
    """That of its overlay."""
    namespace: str = "flowloom"
    """Where steps run."""
    service_account: str = "flowloom-steps"
    """What steps run as."""
    training_pool: Optional[str] = None
    """Label `flowloom/pool` of the nodes for training; None for any node."""
    rendering_pool: Optional[str] = None
    """Label `flowloom/pool` of the nodes for rendering; None for any node."""
    num_gpus: int = 1
    """GPUs of a step that trains or renders."""
    num_parts: int = 1
    """Steps that render at the same time, each its part of the triplets' shards."""
    num_cpus: int = 4
    """Cores of a step that trains or renders; under torchrun, of each of its processes."""
    memory_gib: int = 16
    """Memory of such a step, or of each such process."""
    launch: str = "process"
    """How a training step runs its stage, as in `flowloom.launch`; a TrainJob has nodes of its own,
    so that the step asks for no GPU."""
    cron: str = "0 0 3 * * *"
    """When a scheduled turn starts, seconds first."""
    time_zone: str = "UTC"
    """Of `cron`; the cluster's schedule controller must have the same."""


CLUSTERS = {
    cluster.name: cluster
    for cluster in (
        Cluster(name="kind", num_gpus=0, num_cpus=1, memory_gib=3),
        Cluster(name="dev", training_pool="gpu", rendering_pool="gpu"),
        Cluster(
            name="prod",
            training_pool="training",
            rendering_pool="rendering",
            num_parts=4,
            launch="trainjob:2x4",
        ),
    )
}


def choose(name: Optional[str] = None, launch: Optional[str] = None) -> Cluster:
    """Have pipelines that are imported from now on be traced for that cluster.

    Args:
        name: Its name; None for what the environment says.
        launch: In place of the cluster's; None for what the environment says.

    Raises:
        ValueError: If there is no such cluster, or no such launcher.
    """
    given = {CLUSTER: name, LAUNCH: launch}
    os.environ.update({key: value for key, value in given.items() if value is not None})
    return current()


def choose_none() -> None:
    """Have pipelines be traced for this machine: whatever the environment says of clusters."""
    for key in (CLUSTER, LAUNCH):
        os.environ.pop(key, None)


def current() -> Cluster:
    """The cluster that pipelines are traced for.

    Raises:
        ValueError: If there is none of that name, or if it cannot launch like that.
    """
    name = os.environ.get(CLUSTER, DEFAULT)
    if name not in CLUSTERS:
        raise ValueError(f"{CLUSTER}: got {name!r}, expected one of {', '.join(CLUSTERS)}")
    cluster = CLUSTERS[name]
    cluster = dataclasses.replace(cluster, launch=os.environ.get(LAUNCH, cluster.launch))
    launcher = launching.parse(cluster.launch)
    if launcher.kind == "trainjob" and launcher.device == "gpu" and not cluster.num_gpus:
        raise ValueError(
            f"launch: got {cluster.launch} for {name}, which has no GPU; expected /cpu at its end"
        )
    return cluster


def image_of(cluster: Cluster, image: str) -> str:
    """What the cluster's overlay has in place of the image; without an overlay, the image itself.

    Args:
        cluster: Where a step is to run.
        image: Name and tag, as in `components.images`.
    """
    import yaml

    path = _images_file(cluster)
    name, _, tag = image.rpartition(":")
    listed = yaml.safe_load(path.read_text())["images"] if path.is_file() else []
    for entry in listed:
        if entry["name"] == name:
            name = entry.get("newName", name)
            if "digest" in entry:
                return f"{name}@{entry['digest']}"
            return f"{name}:{entry.get('newTag', tag)}"
    return image


def check_images(cluster: Cluster, package: str) -> None:
    """Whether the cluster can pull what a compiled pipeline names.

    Raises:
        ValueError: If its overlay does not say which images it has.
    """
    path = _images_file(cluster)
    expected = f"expected digests or tags from `make images CLUSTER={cluster.name}`"
    if not path.is_file():
        raise ValueError(f"images of {cluster.name}: got no {path}; {expected}")
    if NOT_BUILT in package:
        raise ValueError(f"images of {cluster.name}: got a digest of zeros in {path}; {expected}")


def _images_file(cluster: Cluster) -> Path:
    """Where the overlay lists its images."""
    return OVERLAYS / cluster.name / "images" / "kustomization.yaml"
