"""Step 4 as a component."""

from kfp import dsl

from components._image import component


@component
def evaluate(
    unlearned: dsl.Input[dsl.Artifact],
    store_uri: str,
    model_line: str,
    run_id: str,
    evidence: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    classification: dsl.Output[dsl.ClassificationMetrics],
    report: dsl.Output[dsl.HTML],
    retrain_reference: bool = False,
    extra_metrics: str = "",
    evaluation_samples: str = "20000",
    processes: str = "1",
) -> None:
    """Measure the model before and after: accuracies, attacks or generated images, and which weights changed.

    Args:
        unlearned: Reference to the model after unlearning, its mask, and the model and forget set before.
        store_uri: The object store that holds the model lines, as s3://bucket/prefix.
        model_line: Name of the model line.
        run_id: Id of the run.
        evidence: Reference to all measurements that the gate reads.
        metrics: The figures that runs are compared by.
        classification: Confusion matrix of the test split and ROC curve of the membership attack, after unlearning.
        report: The figures and plots, without a verdict.
        retrain_reference: Also train a model from scratch without the forget set, and compare with it.
        extra_metrics: Extra metrics, such as lira=16,relearn,probe,decile,seeds=3; with a reference also kl,tow.
        evaluation_samples: Most retained images, and most test images, that are measured; of more, a sample; or all.
        processes: Processes that share the outputs of a classifier, and the training of a reference, in this container.
    """
    from salun_core.pods import steps, summary
    from salun_core.pods.pod import Pod
    from salun_core.pods.reference import write_reference

    pod, measured = Pod(store_uri, model_line, run_id), {"extra_metrics": extra_metrics}
    measured |= {"evaluation_samples": evaluation_samples, "processes": processes}
    made, found = steps.evaluate(pod, unlearned.path, report.path, retrain_reference=retrain_reference, **measured)
    evidence.metadata.update(write_reference(made, evidence.path))
    for name, value in summary.scalar_metrics(found).items():
        metrics.log_metric(name, value)
    if labels_and_counts := summary.confusion(found):
        classification.log_confusion_matrix(*labels_and_counts)
    if points := summary.roc_points(found):
        classification.log_roc_curve(*points)
