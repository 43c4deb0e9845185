"""The purge of a deletion sweep as a component."""

from components._image import component


@component
def purge_store(store_uri: str, pipeline_root: str = "", dry_run: bool = False, run_id: str = "") -> int:
    """Delete expired forget sets, masks, superseded weights and orphans, and add addenda to the certificates.

    Args:
        store_uri: The object store that holds the model lines and the requests, as s3://bucket/prefix.
        pipeline_root: Where Kubeflow stores artifacts, such as s3://mlpipeline/v2/artifacts, to purge them too.
        dry_run: Count what would be deleted, and delete nothing.
        run_id: Id of the run, for the log.

    Returns:
        How many objects were deleted.

    Raises:
        UsageError: A certificate needs an addendum and the signing key is missing; nothing was deleted.
        IntegrityError: An object is damaged, so it is unknown what is still needed; nothing was deleted.
    """
    from salun_core.certificates.keys import find_signing_key
    from salun_core.steps.purge import purge_store as step

    key = find_signing_key()
    report = step(store_uri, pipeline_root=pipeline_root or None, dry_run=dry_run, signer=key, run=run_id)
    return report.total.keys
