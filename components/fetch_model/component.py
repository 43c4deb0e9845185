"""Step 1 as a component."""

from kfp import dsl

from components._image import component


@component
def fetch_model(
    store_uri: str, model_line: str, forget_manifest_uri: str, model: dsl.Output[dsl.Model], run_id: str = ""
) -> str:
    """Fetch the HEAD of a model line and check that the forget set fits its data.

    Args:
        store_uri: The object store that holds the model lines, as s3://bucket/prefix.
        model_line: Name of the model line.
        forget_manifest_uri: Address of the forget set: a frozen manifest, a forget target or a list of targets.
        model: The model before unlearning: weights, card and split manifest in one folder.
        run_id: Id of the run, for the log.

    Returns:
        Digest of the version that was HEAD: the parent of the version that this run publishes.

    Raises:
        UsageError: The line does not exist, or a target does not fit the data.
        DataError: The forget set or the retain set is empty.
        IntegrityError: A stored file or the data do not match their digests.
    """
    from pathlib import Path

    from salun_core.steps.context import RunContext
    from salun_core.steps.fetch import fetch_model as step

    fetched = step(RunContext(Path(model.path), forget_manifest_uri, model_line, store_uri, run_id))
    model.metadata.update(model_line=model_line, version=fetched.version)
    return fetched.version
