"""Step 5 as a component."""

from kfp import dsl

from components._image import component


@component
def gate_publish(
    evidence: dsl.Input[dsl.Artifact],
    store_uri: str,
    model_line: str,
    run_id: str,
    decision: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Markdown],
    policy_uri: str = "auto",
) -> None:
    """Apply the policy, publish the model if it passes, and settle the run: certificates, requests, lease.

    A refusal is a result: the step succeeds, and the last step fails the run.

    Args:
        evidence: Reference to what the evaluation measured, and to all that it was measured on.
        store_uri: The object store that holds the model lines, as s3://bucket/prefix.
        model_line: Name of the model line.
        run_id: Id of the run.
        decision: Reference to the gate's decision.
        report: The report with the verdict.
        summary: What was asked, what was done, the verdict, and where to look.
        policy_uri: The gate policy: auto (by the kind of model), a shipped policy's name, a file, or s3://.
    """
    from salun_core.pods import steps
    from salun_core.pods.pod import Pod
    from salun_core.pods.reference import write_reference

    pod = Pod(store_uri, model_line, run_id)
    made = steps.gate_publish(pod, evidence.path, policy_uri, report.path, summary.path)
    decision.metadata.update(write_reference(made, decision.path))
