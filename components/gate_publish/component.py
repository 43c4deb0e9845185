"""Step 5 as a component."""

from kfp import dsl

from components._image import component


@component
def gate_publish(
    before: dsl.Input[dsl.Model],
    after: dsl.Input[dsl.Model],
    mask: dsl.Input[dsl.Artifact],
    evidence: dsl.Input[dsl.Artifact],
    forget_manifest_uri: str,
    store_uri: str,
    model_line: str,
    parent: str,
    decision: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    policy_uri: str = "auto",
    run_id: str = "",
) -> str:
    """Apply the policy to the evidence and publish the model if it passes; a refusal fails the step.

    Args:
        before: The model before unlearning.
        after: The model after unlearning.
        mask: The mask that was used.
        evidence: What the evaluation measured.
        forget_manifest_uri: Address of the forget set.
        store_uri: The object store that holds the model lines, as s3://bucket/prefix.
        model_line: Name of the model line.
        parent: Digest of the version that the run started from.
        decision: The gate's decision with a verdict for each rule, as JSON.
        report: The report with the verdict.
        policy_uri: The gate policy: auto (by the kind of model), a shipped policy's name, a file, or s3://.
        run_id: Id of the run; a refused one keeps its evidence, decision and report under runs/ in the store.

    Returns:
        Digest of the version that is HEAD now.

    Raises:
        GateRefusedError: The gate refused; nothing was published.
        ConflictError: Another version was published meanwhile.
        IntegrityError: The model before unlearning is not the parent version.
    """
    from pathlib import Path

    from salun_core.steps.context import RunContext
    from salun_core.steps.publishing import gate_and_publish, write_decision

    context = RunContext(Path(before.path), forget_manifest_uri, model_line, store_uri, run_id)
    paths, used = (Path(after.path), Path(evidence.path), Path(report.path)), Path(mask.path)
    published = gate_and_publish(context, *paths, parent=parent, policy_uri=policy_uri, mask=used)
    write_decision(Path(decision.path), published.decision)
    return published.version
