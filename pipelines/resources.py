"""What steps ask of a cluster. The local runner ignores all of it."""

from kfp import kubernetes as k8s
from kfp.dsl import PipelineTask

GPU_LABEL = "flowloom/pool"
GPU_POOL = "gpu"
GPU_RESOURCE = "nvidia.com/gpu"
TRACKING_SECRET = "flowloom-tracking"
STORE_SECRET = "flowloom-store"

TRACKING_KEYS = {
    "MLFLOW_TRACKING_URI": "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_TOKEN": "MLFLOW_TRACKING_TOKEN",
}
STORE_KEYS = {
    "AWS_ACCESS_KEY_ID": "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY": "AWS_SECRET_ACCESS_KEY",
    "AWS_ENDPOINT_URL": "AWS_ENDPOINT_URL",
}


def cpu_step(task: PipelineTask, cpu: str = "1", memory: str = "2Gi") -> PipelineTask:
    """A step without an accelerator: limits, no cache of the engine's, secrets by name."""
    # Run folders are the cache: they know code and data, which the engine's does not.
    task.set_caching_options(False)
    task.set_cpu_limit(cpu).set_memory_limit(memory)
    task.set_env_variable("OMP_WAIT_POLICY", "passive")
    k8s.use_secret_as_env(
        task, secret_name=TRACKING_SECRET, secret_key_to_env=TRACKING_KEYS, optional=True
    )
    k8s.use_secret_as_env(
        task, secret_name=STORE_SECRET, secret_key_to_env=STORE_KEYS, optional=True
    )
    return task


def gpu_step(task: PipelineTask, cpu: str = "4", memory: str = "16Gi") -> PipelineTask:
    """A step on one GPU of the GPU node pool, which keeps other pods away by a taint."""
    cpu_step(task, cpu, memory)
    task.set_accelerator_type(GPU_RESOURCE).set_accelerator_limit(1)
    k8s.add_node_selector(task, label_key=GPU_LABEL, label_value=GPU_POOL)
    k8s.add_toleration(task, key=GPU_RESOURCE, operator="Exists", effect="NoSchedule")
    # Data loaders share tensors through it; the default is 64 MiB.
    k8s.empty_dir_mount(
        task, volume_name="shm", mount_path="/dev/shm", medium="Memory", size_limit="2Gi"
    )
    return task
