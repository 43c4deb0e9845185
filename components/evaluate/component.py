"""Step 4 as a component."""

from kfp import dsl

from components._image import component


@component
def evaluate(
    before: dsl.Input[dsl.Model],
    after: dsl.Input[dsl.Model],
    mask: dsl.Input[dsl.Artifact],
    forget_manifest_uri: str,
    evidence: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    classification: dsl.Output[dsl.ClassificationMetrics],
    report: dsl.Output[dsl.HTML],
    retrain_reference: bool = False,
    model_line: str = "local",
    store_uri: str = "",
    run_id: str = "",
    extra_metrics: str = "",
    also: str = "",
) -> None:
    """Measure the model before and after: accuracies, attacks or generated images, and which weights changed.

    Args:
        before: The model before unlearning.
        after: The model after unlearning.
        mask: The mask; weights outside it are compared bit by bit.
        forget_manifest_uri: Address of the forget set.
        evidence: All measurements that the gate reads, as JSON.
        metrics: The figures that runs are compared by.
        classification: Confusion matrix of the test split and ROC curve of the membership attack, after unlearning.
        report: The figures and plots, without a verdict.
        retrain_reference: Also train a model from scratch without the forget set, and compare with it.
        model_line: Name of the model line, for the metrics and the report.
        store_uri: The object store of the deletion ledger, as s3://bucket/prefix; empty without a ledger.
        run_id: Id of the run, to record its progress in the ledger.
        extra_metrics: Extra metrics, such as lira=16,relearn,probe,decile,seeds=3; with a reference also kl,tow.
        also: Former name of extra_metrics, for recurring runs; the next release drops it.

    Raises:
        ModelError: The two models differ in architecture or split.
        ConflictError: The run has ended: another run settled it.
    """
    from pathlib import Path

    from salun_core.steps.context import RunContext
    from salun_core.steps.evaluation import evaluate as step
    from salun_core.steps.summary import confusion, roc_points, scalar_metrics

    context = RunContext(Path(before.path), forget_manifest_uri, model_line, store_uri, run_id)
    paths, used = (Path(after.path), Path(evidence.path), Path(report.path)), Path(mask.path)
    found = step(context, *paths, mask=used, retrain_reference=retrain_reference, extra_metrics=extra_metrics or also)
    for name, value in scalar_metrics(found).items():
        metrics.log_metric(name, value)
    if labels_and_counts := confusion(found):
        classification.log_confusion_matrix(*labels_and_counts)
    if points := roc_points(found):
        classification.log_roc_curve(*points)
