"""What each step of a pipeline gets: resources, place, identity, configuration, retries."""

from __future__ import annotations

from enum import Enum
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
HOUR = 3600
SMALL_MEMORY = "4Gi"  # of a step that moves documents: it asks for 512Mi, and a large split may need more
BACK_OFF = "30s"


class Size(Enum):
    """How much a step needs."""

    SMALL = "small"
    """It moves documents: little, whatever the form says, so that it starts on any node."""
    LARGE = "large"
    """It holds a model: what the form says."""
    GPU = "gpu"
    """It computes: what the form says, and its accelerators."""


def configure(task: Any, form: Any, *, hours: float, size: Size = Size.LARGE, retries: int = 2) -> Any:  # noqa: ANN401 - kfp has no types
    """Set up one task of a pipeline, by those parameters of the form that `PlacementForm` has, and return it.

    The pod is stopped after `hours`. If it is lost it is started again, `retries` times; every step may run again from
    its start.
    """
    task.set_caching_options(enable_caching=False)  # a hit could return a model from before the deletion
    if size is Size.SMALL:
        task.set_cpu_request("100m").set_cpu_limit("1").set_memory_request("512Mi").set_memory_limit(SMALL_MEMORY)
    else:
        task.set_cpu_request(form.cpu).set_cpu_limit(form.cpu)
        task.set_memory_request(form.memory).set_memory_limit(form.memory)
    if size is Size.GPU:
        # The workers of the data loader share batches in /dev/shm, of which a container has only 64 MB by default.
        # It counts as the container's memory. Without a limit of its own it may take all of that.
        task.set_accelerator_type(form.accelerator).set_accelerator_limit(form.gpu_count)
        kubernetes.empty_dir_mount(task, "dshm", "/dev/shm", medium="Memory")  # noqa: S108
    if retries:
        task.set_retry(retries, BACK_OFF, 2.0, f"{retry_window(int(hours * HOUR), retries)}s")
    kubernetes.set_timeout(task, int(hours * HOUR))
    if size is not Size.SMALL:
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


def retry_window(timeout: int, retries: int) -> int:
    """Return the seconds within which all attempts of a step must begin; `timeout` stops each attempt.

    Argo counts them from the start of the first attempt, so that a shorter window would forbid the second one. The
    pauses between them double, from half a minute.
    """
    pauses = 30 * ((1 << retries) - 1)
    return (retries + 1) * timeout + pauses


def with_signing_key(task: Any) -> Any:  # noqa: ANN401 - kfp has no types
    """Mount the key that certificates are signed with, as a file: an environment is inherited and may be logged."""
    kubernetes.use_secret_as_volume(task, SIGNING_SECRET, mount_path=SIGNING_FOLDER, optional=True)
    return task.set_env_variable("SALUN_SIGNING_KEY", f"{SIGNING_FOLDER}/key.pem")
