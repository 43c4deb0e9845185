"""A whole deletion sweep in one container."""

from kfp import dsl

from components._image import component


@component
def sweep_compact(
    store_uri: str,
    model_line: str,
    run_id: str,
    metrics: dsl.Output[dsl.Metrics],
    classification: dsl.Output[dsl.ClassificationMetrics],
    report: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Markdown],
    method: str = "default",
    density: float = 0.5,
    policy_uri: str = "auto",
    method_config: str = "{}",
    seed: int = 0,
    retrain_reference: bool = False,
    tune: bool = False,
    tune_budget: str = "20e",
    extra_metrics: str = "",
    evaluation_samples: str = "20000",
    min_requests: int = 16,
    max_requests: int = 64,
    max_wait_hours: float = 24.0,
    max_forget_fraction: float = 0.2,
    dry_run: bool = False,
) -> int:
    """Claim the due deletion requests, unlearn, evaluate, gate, publish and settle, in one process.

    Args:
        store_uri: The object store that holds the model lines, as s3://bucket/prefix.
        model_line: Name of the model line.
        run_id: Id of the run.
        metrics: The figures that runs are compared by.
        classification: Confusion matrix of the test split and ROC curve of the membership attack, after unlearning.
        report: The report with the verdict.
        summary: What was asked, what was done, the verdict, and where to look.
        method: The unlearning method of the first recipe; after a refusal the cause decides which comes next.
        density: Share of the weights that the first recipe may change.
        policy_uri: The gate policy of the run: equal work that it refused is not tried again.
        method_config: Settings that replace the method's defaults, as JSON text.
        seed: Seed of the run.
        retrain_reference: Whether the evaluation also trains a model without the forget set.
        tune: Whether settings and density are searched for.
        tune_budget: Budget of the search.
        extra_metrics: Extra metrics of the evaluation.
        evaluation_samples: Most retained and most test images that the evaluation measures, or all.
        min_requests: A batch of this many requests is due at once.
        max_requests: Maximum number of requests in one run.
        max_wait_hours: A batch is due when its oldest request has waited for this many hours.
        max_forget_fraction: Maximum share of the training data that one run forgets.
        dry_run: Report what would be claimed, and write nothing.

    Returns:
        0, or the exit code of the run's outcome.
    """
    given = dict(locals())
    from salun_core.pods import steps
    from salun_core.pods.pod import Pod
    from salun_core.pods.summary import confusion, roc_points, scalar_metrics

    pod = Pod(store_uri, model_line, run_id)
    code, found = steps.sweep_compact(pod, given, report.path, summary.path)
    for name, value in scalar_metrics(found).items():
        metrics.log_metric(name, value)
    if labels_and_counts := confusion(found):
        classification.log_confusion_matrix(*labels_and_counts)
    if points := roc_points(found):
        classification.log_roc_curve(*points)
    return code
