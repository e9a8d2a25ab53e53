"""What steps ask of a cluster. The local runner ignores all of it but the steps' names."""

from kfp import kubernetes as k8s
from kfp.dsl import PipelineTask

GPU_LABEL = "flowloom/pool"
GPU_POOL = "gpu"
GPU_RESOURCE = "nvidia.com/gpu"
TRACKING_SECRET = "flowloom-tracking"
STORE_SECRET = "flowloom-store"
HOME_CLAIM = "flowloom-home"
HOME = "/var/lib/flowloom"
"""`FLOWLOOM_HOME` of the images."""
RUN_ID = "metadata.labels['pipeline/runid']"
"""Where a pod of Kubeflow Pipelines says which run it belongs to."""
RETRIES = 2

TRACKING_KEYS = {
    "MLFLOW_TRACKING_URI": "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_TOKEN": "MLFLOW_TRACKING_TOKEN",
}
STORE_KEYS = {
    "AWS_ACCESS_KEY_ID": "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY": "AWS_SECRET_ACCESS_KEY",
    "AWS_ENDPOINT_URL": "AWS_ENDPOINT_URL",
}


def cpu_step(
    task: PipelineTask,
    cpu: str = "1",
    memory: str = "2Gi",
    repeat: int = 1,
    retries: int = RETRIES,
) -> PipelineTask:
    """A step without an accelerator: name, limits, cache, retries, home, secrets by name.

    Args:
        task: The step.
        cpu: Cores it may use.
        memory: Memory it may use.
        repeat: Which of the component's steps in the pipeline it is; from the second on, its name
            says so.
        retries: How often it is tried again; a stage goes on from its checkpoints.
    """
    _name(task, repeat)
    # What such a step makes is decided by its inputs, for the digests of code and data are among
    # them; so a hit spares a pod, and on the GPU pool perhaps a node. Others ask the registry, or
    # change it, or are a matter of seconds.
    task.set_caching_options("sources" in (task.component_spec.inputs or {}))
    task.set_cpu_limit(cpu).set_memory_limit(memory)
    task.set_env_variable("OMP_WAIT_POLICY", "passive")
    if retries:
        task.set_retry(
            retries, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration="600s"
        )
    # Run folders outlive pods there: a retried stage finds its checkpoints.
    k8s.mount_pvc(task, pvc_name=HOME_CLAIM, mount_path=HOME)
    k8s.use_field_path_as_env(task, env_name="FLOWLOOM_TURN", field_path=RUN_ID)
    k8s.use_secret_as_env(
        task, secret_name=TRACKING_SECRET, secret_key_to_env=TRACKING_KEYS, optional=True
    )
    k8s.use_secret_as_env(
        task, secret_name=STORE_SECRET, secret_key_to_env=STORE_KEYS, optional=True
    )
    return task


def gpu_step(
    task: PipelineTask, cpu: str = "4", memory: str = "16Gi", repeat: int = 1
) -> PipelineTask:
    """A step on one GPU of the GPU node pool, which keeps other pods away by a taint."""
    cpu_step(task, cpu, memory, repeat)
    task.set_accelerator_type(GPU_RESOURCE).set_accelerator_limit(1)
    k8s.add_node_selector(task, label_key=GPU_LABEL, label_value=GPU_POOL)
    k8s.add_toleration(task, key=GPU_RESOURCE, operator="Exists", effect="NoSchedule")
    # Data loaders share tensors through it; the default is 64 MiB.
    k8s.empty_dir_mount(
        task, volume_name="shm", mount_path="/dev/shm", medium="Memory", size_limit="2Gi"
    )
    return task


def _name(task: PipelineTask, repeat: int) -> None:
    """Tell the step its name: the compiler numbers names that occur again, in any sub-pipeline."""
    name = task.component_spec.name
    if repeat > 1:
        name = f"{name}-round-{repeat}"
        task.set_display_name(name)
    task.set_env_variable("FLOWLOOM_STEP", name.replace("-", "_"))
