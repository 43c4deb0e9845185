"""The purge of a deletion sweep as a component."""

from typing import NamedTuple

from components._image import component


@component
def purge_store(store_uri: str, dry_run: bool = False, run_id: str = "") -> NamedTuple(  # type: ignore[valid-type]
    "Outputs", [("deleted", int), ("problem", str)]
):
    """Delete expired forget sets, masks, superseded weights and orphans, and add addenda to the certificates.

    Args:
        store_uri: The object store that holds the model lines and the requests, as s3://bucket/prefix.
        dry_run: Count what would be deleted, and delete nothing.
        run_id: Id of the run, for the log.

    Returns:
        deleted: How many objects were deleted.
        problem: Why nothing was deleted, in one line; empty if all is well. It does not stop the sweep.
    """
    from salun_core.pods import ends

    return tuple(ends.purge(store_uri, run_id, dry_run=dry_run))
