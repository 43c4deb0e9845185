"""Uploads a compiled pipeline as a version whose name carries its digest, so that the UI offers it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kfp_server_api

from pipelines.client import Api
from pipelines.packages import Package


@dataclass(frozen=True)
class Registered:
    """A version of a pipeline that Kubeflow knows.

    Args:
        pipeline_id: id of the pipeline.
        version_id: id of the version.
        version: its name.
        made: whether it was uploaded now.
    """

    pipeline_id: str
    version_id: str
    version: str
    made: bool

    @property
    def reference(self) -> Any:  # noqa: ANN401 - kfp's model
        """What a run names its pipeline by."""
        return kfp_server_api.V2beta1PipelineVersionReference(
            pipeline_id=self.pipeline_id, pipeline_version_id=self.version_id
        )


def register(api: Api, package: Package) -> Registered:
    """Upload a pipeline, unless a version of the same digest is there.

    Args:
        api: where to.
        package: the compiled pipeline.

    Returns:
        The version.

    Raises:
        RemoteError: Kubeflow fails or refuses.
    """
    pipeline_id = _pipeline(api, package)
    found, made = api.ensure(
        "create pipelines",
        lambda: find_version(api, pipeline_id, package.version),
        lambda **more: _upload(api, package, pipeline_id, **more),
    )
    return Registered(pipeline_id, str(found.pipeline_version_id), package.version, made)


def _pipeline(api: Api, package: Package) -> str:
    """Return the id of the pipeline, which is made where it is missing."""
    service = api.client.pipelines
    kwargs = {"namespace": api.namespace} if api.namespace else {}
    body = kfp_server_api.V2beta1Pipeline(
        display_name=package.name, description=package.description, namespace=api.namespace
    )

    def find() -> Any:  # noqa: ANN401 - kfp's model
        listing = service.pipeline_service_list_pipelines
        return next(api.every("list pipelines", listing, "pipelines", name=package.name, **kwargs), None)

    found, _ = api.ensure(
        "create pipelines", find, lambda **more: service.pipeline_service_create_pipeline(body, **more)
    )
    return str(found.pipeline_id)


def _upload(api: Api, package: Package, pipeline_id: str, **more: object) -> Any:  # noqa: ANN401 - kfp's model
    with tempfile.TemporaryDirectory(prefix="salun-register-") as folder:
        path = Path(folder) / f"{package.name}.yaml"
        path.write_text(package.text, encoding="utf-8")
        return api.client.pipeline_uploads.upload_pipeline_version(
            str(path),
            name=package.version,
            pipelineid=pipeline_id,
            description=f"{package.description} IR sha256:{package.digest}",
            **more,
        )


def find_version(api: Api, pipeline_id: str, name: str) -> Any:  # noqa: ANN401 - kfp's model
    """Return the version of a name, or None."""
    listing = api.client.pipelines.pipeline_service_list_pipeline_versions
    return next(api.every("list pipelines", listing, "pipeline_versions", name=name, pipeline_id=pipeline_id), None)
