"""What every pipeline and each of its steps get: resources, place, identity, configuration, retries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kfp import dsl, kubernetes

from pipelines.step_secrets import SECRET

USER = 10001  # of the image; a number, because Kubernetes cannot check that a name is not root
SECRET_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
CONFIG_MAP = "salun-config"
CONFIG_KEYS = (
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "PUSHGATEWAY_URL",
    "SALUN_FULL_COPY_EVERY",
    "SALUN_COMMIT",
    "SALUN_IMAGE_DIGEST",
)
SIGNING_SECRET = "salun-signing"  # noqa: S105 - the name of a Secret
SIGNING_FOLDER = "/etc/salun/signing"
ACCELERATOR = "nvidia.com/gpu"
HOUR = 3600


@dataclass(frozen=True)
class Placement:
    """The run form's parameters for the resources and the node of a step; each is an input of the pipeline.

    Args:
        cpu: request and limit of processor cores.
        memory: request and limit of memory.
        gpu_count: limit of accelerators, for the steps that compute.
        node_selector: labels that the node must have.
        tolerations: taints of nodes that the pod tolerates.
    """

    cpu: Any
    memory: Any
    gpu_count: Any
    node_selector: Any
    tolerations: Any


def pipeline(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Return the decorator that turns a function into a pipeline; the run form shows the function's docstring."""
    decorate: Callable[[Callable[..., Any]], Any] = dsl.pipeline(name=name)
    return decorate


def configure(task: Any, place: Placement, *, hours: float, gpu: bool = False, retries: int = 2) -> Any:  # noqa: ANN401 - kfp has no types
    """Set up one task of a pipeline.

    Args:
        task: what a component returns inside a pipeline.
        place: resources and place, from the pipeline's inputs.
        hours: after which the pod is stopped.
        gpu: whether the step computes on an accelerator.
        retries: after a failure, with a back-off from half a minute; every step is idempotent.

    Returns:
        The task.
    """
    task.set_caching_options(enable_caching=False)  # a hit could return a model from before the deletion
    task.set_cpu_request(place.cpu).set_cpu_limit(place.cpu)
    task.set_memory_request(place.memory).set_memory_limit(place.memory)
    if gpu:
        # The workers of the data loader share batches in /dev/shm, of which a container has only 64 MB by default.
        task.set_accelerator_type(ACCELERATOR).set_accelerator_limit(place.gpu_count)
        kubernetes.empty_dir_mount(task, "dshm", "/dev/shm", medium="Memory", size_limit="2Gi")  # noqa: S108
    task.set_retry(retries, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration="600s")
    kubernetes.set_timeout(task, int(hours * HOUR))
    kubernetes.add_node_selector_json(task, place.node_selector)
    kubernetes.add_toleration_json(task, place.tolerations)
    kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    kubernetes.use_secret_as_env(task, SECRET, {key: key for key in SECRET_KEYS}, optional=True)
    kubernetes.use_config_map_as_env(task, CONFIG_MAP, {key: key for key in CONFIG_KEYS}, optional=True)
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
