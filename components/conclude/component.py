"""The last step of a run as a component."""

from components._image import component


@component
def conclude(store_uri: str, model_line: str, run_id: str) -> None:
    """Print the run's outcome in one line, and fail if it is bad: with 2, 3, 4, 5 or 1.

    It is a step of its own because Kubeflow does not register the artifacts of a step that fails.

    Args:
        store_uri: The object store that holds the model lines, as s3://bucket/prefix.
        model_line: Name of the model line.
        run_id: Id of the run.
    """
    from salun_core.pods import ends
    from salun_core.pods.pod import Pod

    ends.conclude(Pod(store_uri, model_line, run_id))
