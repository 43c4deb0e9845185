"""Two people on two processors come to the same verdict: torch's kernels for three instruction sets, on one machine."""

from lab.studies import processors


def test_the_default_is_judged_alike_with_any_kernels():
    """As the demo forgets: a class, and few images; and a tenth of the images, as the suites do."""
    found = processors.compared(1, ["a class", "a tenth of the images", "20 images"], ["default"], processors.KERNELS)
    decisions = {name: {run: decided[:2] for run, decided in by_run.items()} for name, by_run in found.items()}
    assert list(decisions) == ["the machine's own", "AVX2", "SSE 4.1"]
    assert all(passed for passed, _ in decisions["SSE 4.1"].values())
    assert decisions["the machine's own"] == decisions["AVX2"] == decisions["SSE 4.1"]
