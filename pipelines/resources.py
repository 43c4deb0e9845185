"""What each step of a pipeline gets: resources, place, identity, configuration, retries."""

from __future__ import annotations

from typing import Any

from kfp import kubernetes

from pipelines.step_secrets import SECRET

USER = 10001  # of the image; a number, because Kubernetes cannot check that a name is not root
# Key of the Secret or the ConfigMap -> variable of the step. Kubeflow's launcher shares the container and reads AWS_*:
# under our own names it never takes our keys or our address for those of its own store.
SECRET_KEYS = {
    "AWS_ACCESS_KEY_ID": "SALUN_S3_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY": "SALUN_S3_SECRET_ACCESS_KEY",
}
CONFIG_MAP = "salun-config"
CONFIG_KEYS = {
    "AWS_ENDPOINT_URL": "SALUN_S3_ENDPOINT_URL",
    "AWS_REGION": "SALUN_S3_REGION",
    "PUSHGATEWAY_URL": "PUSHGATEWAY_URL",
    "KFP_ENDPOINT": "KFP_ENDPOINT",
    "SALUN_FULL_COPY_EVERY": "SALUN_FULL_COPY_EVERY",
    "SALUN_COMMIT": "SALUN_COMMIT",
    "SALUN_IMAGE_DIGEST": "SALUN_IMAGE_DIGEST",
}
# A step asks for the state of its own run and of another one that holds its line.
FIELDS = {
    "SALUN_WORKFLOW": "metadata.labels['workflows.argoproj.io/workflow']",
    "SALUN_NAMESPACE": "metadata.namespace",
}
SIGNING_SECRET = "salun-signing"  # noqa: S105 - the name of a Secret
SIGNING_FOLDER = "/etc/salun/signing"
ACCELERATOR = "nvidia.com/gpu"
HOUR = 3600


def configure(task: Any, form: Any, *, hours: float, gpu: bool = False, retries: int = 2) -> Any:  # noqa: ANN401 - kfp has no types
    """Set up one task of a pipeline.

    Args:
        task: what a component returns inside a pipeline.
        form: the parameters of the pipeline; those of `PlacementForm` are used.
        hours: after which the pod is stopped.
        gpu: whether the step computes on an accelerator.
        retries: after a failure, with a back-off from half a minute; every step is idempotent.

    Returns:
        The task.
    """
    task.set_caching_options(enable_caching=False)  # a hit could return a model from before the deletion
    task.set_cpu_request(form.cpu).set_cpu_limit(form.cpu)
    task.set_memory_request(form.memory).set_memory_limit(form.memory)
    if gpu:
        # The workers of the data loader share batches in /dev/shm, of which a container has only 64 MB by default.
        task.set_accelerator_type(ACCELERATOR).set_accelerator_limit(form.gpu_count)
        kubernetes.empty_dir_mount(task, "dshm", "/dev/shm", medium="Memory", size_limit="2Gi")  # noqa: S108
    task.set_retry(retries, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration="600s")
    kubernetes.set_timeout(task, int(hours * HOUR))
    kubernetes.add_node_selector_json(task, form.node_selector)
    kubernetes.add_toleration_json(task, form.tolerations)
    kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    kubernetes.use_secret_as_env(task, SECRET, SECRET_KEYS, optional=True)
    kubernetes.use_config_map_as_env(task, CONFIG_MAP, CONFIG_KEYS, optional=True)
    for name, path in FIELDS.items():
        kubernetes.use_field_path_as_env(task, name, path)
    kubernetes.add_pod_label(task, "app.kubernetes.io/part-of", "salun")
    kubernetes.add_pod_label(task, "app.kubernetes.io/component", task.name)
    return task


def with_signing_key(task: Any) -> Any:  # noqa: ANN401 - kfp has no types
    """Mount the key that certificates are signed with, as a file: an environment is inherited and may be logged.

    Args:
        task: of a step that issues certificates.

    Returns:
        The task.
    """
    kubernetes.use_secret_as_volume(task, SIGNING_SECRET, mount_path=SIGNING_FOLDER, optional=True)
    return task.set_env_variable("SALUN_SIGNING_KEY", f"{SIGNING_FOLDER}/key.pem")
