from pathlib import Path

import pytest

from lab.studies import readme_tables, scale
from salun_core.data.readers import read_table
from salun_core.data.spec import DataSpec


def cost(seconds):
    return {"cpu_s": seconds, "wall_s": 9.0, "peak_mb": 500.0, "read_mb": 3.4}


def test_growth_is_that_of_the_last_two_sizes_and_absent_without_both():
    steps = {"fetch": cost(4.0), "mask": cost(5.0)}
    rows = [
        {"rows": 100, "forgotten": 10, "costs": steps},
        {"rows": 1000, "forgotten": 10, "costs": steps},
        {"rows": 10000, "forgotten": 10, "costs": {"fetch": cost(6.0)}},
        {"rows": 10000, "forgotten": 0, "costs": {"imports": cost(3.0)}},
    ]
    lines = readme_tables.scale_table({"rows": rows}).splitlines()
    assert lines[2].startswith("| fetch | 10 | 4.0 | 4.0 | 6.0 | 1.5 x | 500 |")
    assert lines[3].startswith("| mask | 10 | 5.0 | 5.0 | – | – | 500 |")
    assert readme_tables.scale_whole({"rows": rows}).splitlines()[-1].startswith("| 10,000 | 3.0 | 500 | 3.4 | – |")


def test_every_size_trains_on_as_many_retained_images():
    for size, forgotten in ((10_000, 10), (100_000, 1_000), (1_000_000, 0.1)):
        case = scale.Case(size, forgotten, "run-1", Path())
        kept = 0.72 * size - (forgotten if forgotten >= 1 else forgotten * 0.72 * size)
        assert case.config["retain_fraction"] * kept == pytest.approx(scale.RETAINED)


def test_generated_rows_are_read_as_images(tmp_path):
    scale.generate(200, tmp_path / "data")
    table = read_table(DataSpec(source="s3://salun/data"), tmp_path / "data", train=True)
    assert len(table) == 200
    assert bytes(table.payloads[0]).startswith(b"BM")
    assert set(table.labels) == set(range(scale.CLASSES))
