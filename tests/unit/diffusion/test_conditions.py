"""The table of conditions."""

import pytest
import torch

from salun_core.diffusion.conditions import ConditionTable
from salun_core.errors import DataError, UsageError
from tests.support.tiny_diffusion import LENGTH, NULL, class_table, text_table


def test_rows_are_looked_up_by_index_and_by_name():
    table = text_table()
    taken = table.take(torch.tensor([2, 0, 2]))["encoder_hidden_states"]
    rows = table.rows["encoder_hidden_states"]
    assert torch.equal(taken, torch.stack([rows[2], rows[0], rows[2]]))
    assert torch.equal(table.nulls(2)["encoder_hidden_states"], torch.stack([rows[NULL]] * 2))
    assert (table.row("two"), table.row(""), len(table)) == (2, NULL, 4)
    with pytest.raises(UsageError, match="no condition 'three'"):
        table.row("three")


def test_a_model_without_a_null_condition_cannot_be_guided():
    with pytest.raises(UsageError, match="null condition"):
        ConditionTable(["a"], {"class_labels": torch.arange(1)}).nulls(1)


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (["a", "b"], {"class_labels": torch.arange(3)}),
        (["a"], {}),
        (["a"], {"encoder_hidden_states": torch.tensor([[[float("nan")]]])}),
    ],
)
def test_bad_tables_are_refused(names, rows):
    with pytest.raises(DataError):
        ConditionTable(names, rows)


def test_tokens_of_a_concept_default_to_all_but_the_first():
    marks = text_table(tokens=[[2], [1, 3], [], []]).own_tokens()
    assert [row.nonzero()[:, 0].tolist() for row in marks] == [[2], [1, 3], [1, 2, 3, 4], [1, 2, 3, 4]]
    assert torch.equal(text_table().own_tokens(), torch.arange(LENGTH).expand(4, LENGTH) > 0)
    single = ConditionTable(["a"], {"encoder_hidden_states": torch.zeros(1, 1, 2)})
    assert single.own_tokens().tolist() == [[True]]


@pytest.mark.parametrize("tokens", [[[1]], [[LENGTH], [], [], []], [[-1], [], [], []]])
def test_token_positions_must_fit(tokens):
    with pytest.raises(DataError, match="token positions"):
        text_table(tokens)


def test_classes_have_no_tokens():
    with pytest.raises(UsageError, match="no tokens"):
        class_table().own_tokens()


def test_a_table_on_a_device_is_the_same_table():
    table = text_table(tokens=[[2], [1], [1], []])
    moved = table.to("meta")
    assert (moved.tokens, moved.null, moved.names) == (table.tokens, table.null, table.names)
    assert moved.rows["encoder_hidden_states"].device.type == "meta"
