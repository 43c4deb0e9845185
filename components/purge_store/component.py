"""What a sweep deletes for good, as a component."""

from components._image import component


@component
def purge_store(store_uri: str, pipeline_root: str = "", dry_run: bool = False, run_id: str = "") -> int:
    """Delete what is past its time: forget data, masks, superseded weights, orphans; and add it to the certificates.

    Args:
        store_uri: The object store that holds the model lines and the requests, as s3://bucket/prefix.
        pipeline_root: Where Kubeflow keeps files of the runs, such as s3://mlpipeline/v2/artifacts, to purge it too.
        dry_run: Count what would go, and touch nothing.
        run_id: Id of the run, for the log.

    Returns:
        How many objects were deleted.

    Raises:
        UsageError: Certificates must be added to, and there is no signing key: nothing was touched.
        IntegrityError: Something is damaged, so that nobody can tell what is needed: nothing was touched.
    """
    from salun_core.certificates.keys import find_signing_key
    from salun_core.retention.purge import purge as step
    from salun_core.steps.observe import RunRef

    key, run = find_signing_key(), RunRef(store_uri, run_id)
    report = step(store_uri, pipeline_root=pipeline_root or None, dry_run=dry_run, signer=key, run=run)
    return report.total.keys
