"""What steps ask of a cluster, by role. The local runner ignores all of it but their names."""

from typing import Optional

from kfp import kubernetes as k8s
from kfp.dsl import PipelineTask

from components.images import CPU_IMAGE
from flowloom import launch as launching
from pipelines import clusters

POOL_LABEL = "flowloom/pool"
GPU_RESOURCE = "nvidia.com/gpu"
LABELS = {"app.kubernetes.io/part-of": "flowloom", "flowloom/role": "step"}
"""By which network policies and quotas know a step's pod."""
USER = 1000
"""Of the images."""
TRACKING_SECRET = "flowloom-tracking"
STORE_SECRET = "flowloom-store"
WEBHOOK_SECRET = "flowloom-webhook"
HOME_CLAIM = "flowloom-home"
HOME = "/var/lib/flowloom"
"""`FLOWLOOM_HOME` of the images."""
RUN_ID = "metadata.labels['pipeline/runid']"
"""Where a pod of Kubeflow Pipelines says which run it belongs to."""
LIGHT_CPU, LIGHT_MEMORY = "1", "2Gi"
"""Of a step without an accelerator."""
RETRIES = 2

TRACKING_KEYS = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN")
STORE_KEYS = ("FLOWLOOM_STORE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL")
WEBHOOK_KEYS = ("FLOWLOOM_WEBHOOK_URL",)


def cpu_step(task: PipelineTask, retries: int = RETRIES) -> PipelineTask:
    """A step without an accelerator, on any node.

    Args:
        task: The step.
        retries: How often it is tried again; a stage goes on from its checkpoints.
    """
    return _step(task, LIGHT_CPU, LIGHT_MEMORY, retries=retries)


def tell_step(task: PipelineTask, retries: int = RETRIES) -> PipelineTask:
    """A step like that which tells the webhook, whose address no other step is given."""
    _secret(cpu_step(task, retries), WEBHOOK_SECRET, WEBHOOK_KEYS)
    return task


def render_step(task: PipelineTask, repeat: int = 1) -> PipelineTask:
    """A step that renders, on the cluster's pool for it."""
    cluster = clusters.current()
    return _heavy_step(task, cluster.rendering_pool, repeat)


def train_step(task: PipelineTask, repeat: int = 1) -> PipelineTask:
    """A step that trains, on the cluster's pool for it.

    One that takes `launch` is given the cluster's, see below. If that is a TrainJob, the step only
    starts and follows it, so that it asks for no GPU; under torchrun it has room for each process.
    """
    cluster = clusters.current()
    if "launch" not in (task.component_spec.inputs or {}):
        return _heavy_step(task, cluster.training_pool, repeat)
    launcher = launching.parse(cluster.launch)
    if launcher.kind == "trainjob":
        return _step(task, LIGHT_CPU, LIGHT_MEMORY, repeat, image=CPU_IMAGE)
    return _heavy_step(task, cluster.training_pool, repeat, launcher.num_processes)


def launch() -> str:
    """How training steps run their stage: their argument of that name."""
    return clusters.current().launch


def _heavy_step(
    task: PipelineTask, pool: Optional[str], repeat: int, num_processes: int = 1
) -> PipelineTask:
    """A step on the GPUs of a pool, which keeps other pods away by a taint."""
    cluster = clusters.current()
    cpu, memory = f"{cluster.num_cpus * num_processes}", f"{cluster.memory_gib * num_processes}Gi"
    if not cluster.num_gpus:
        return _step(task, cpu, memory, repeat, image=CPU_IMAGE)
    _step(task, cpu, memory, repeat)
    num_gpus = cluster.num_gpus * num_processes
    task.set_accelerator_type(GPU_RESOURCE).set_accelerator_limit(num_gpus)
    if pool:
        k8s.add_node_selector(task, label_key=POOL_LABEL, label_value=pool)
    k8s.add_toleration(task, key=GPU_RESOURCE, operator="Exists", effect="NoSchedule")
    # Data loaders share tensors through it; the default is 64 MiB.
    k8s.empty_dir_mount(
        task, volume_name="shm", mount_path="/dev/shm", medium="Memory", size_limit="2Gi"
    )
    return task


def _step(
    task: PipelineTask,
    cpu: str,
    memory: str,
    repeat: int = 1,
    retries: int = RETRIES,
    image: Optional[str] = None,
) -> PipelineTask:
    """What every step has: name, image, limits, cache, retries, home, labels, secrets by name."""
    container = task.container_spec
    # Set here, as each of the setters of kfp 2.17 walks the whole call stack: 20 ms.
    container.image = clusters.image_of(clusters.current(), image or container.image)
    container.env = {"FLOWLOOM_STEP": _name(task, repeat), "OMP_WAIT_POLICY": "passive"}
    # What such a step makes is decided by its inputs, for the digests of code and data are among
    # them; so a hit spares a pod, and on the GPU pool perhaps a node. Others ask the registry, or
    # change it, or are a matter of seconds.
    task.set_caching_options("sources" in (task.component_spec.inputs or {}))
    task.set_cpu_limit(cpu).set_memory_limit(memory)
    if retries:
        task.set_retry(
            retries, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration="600s"
        )
    for key, value in LABELS.items():
        k8s.add_pod_label(task, label_key=key, label_value=value)
    # The rest of what a namespace with pod security `restricted` asks for, Kubeflow Pipelines sets
    # itself; it has no setting for a read-only root file system, but steps would live with one.
    k8s.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    k8s.empty_dir_mount(task, volume_name="tmp", mount_path="/tmp")
    # Run folders outlive pods there: a retried stage finds its checkpoints.
    k8s.mount_pvc(task, pvc_name=HOME_CLAIM, mount_path=HOME)
    k8s.use_field_path_as_env(task, env_name="FLOWLOOM_TURN", field_path=RUN_ID)
    _secret(task, TRACKING_SECRET, TRACKING_KEYS)
    _secret(task, STORE_SECRET, STORE_KEYS)
    return task


def _secret(task: PipelineTask, name: str, keys: tuple[str, ...]) -> None:
    """Give the step these keys of the secret, as variables; a cluster may do without."""
    variables = {key: key for key in keys}
    k8s.use_secret_as_env(task, secret_name=name, secret_key_to_env=variables, optional=True)


def _name(task: PipelineTask, repeat: int) -> str:
    """The name that the step is told: kfp numbers those that occur again, in any sub-pipeline."""
    name = task.component_spec.name
    if "part" in task.inputs:
        name = f"{name}-part"
    if repeat > 1:
        name = f"{name}-round-{repeat}"
    if name != task.component_spec.name:
        task.set_display_name(name)
    return name.replace("-", "_")
