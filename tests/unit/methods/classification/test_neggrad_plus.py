"""NegGrad+ against steps by hand."""

import numpy as np
import pytest

from tests.support.by_hand import FORGET, RATE, RETAIN, gradients, linear, losses, pair, run, weights


def test_each_step_decreases_one_loss_and_increases_the_other():
    theta, expected = weights(linear()), []
    for _ in range(2):
        expected.append(0.8 * losses(theta, *RETAIN).mean() - 0.2 * losses(theta, *FORGET).mean())
        theta = theta - RATE * (0.8 * gradients(theta, *RETAIN).mean(0) - 0.2 * gradients(theta, *FORGET).mean(0))
    result = run("neggrad_plus", epochs=2, retain_weight=0.8)
    np.testing.assert_allclose(weights(result.model), theta, atol=2e-6)
    assert [record.losses["paired"] for record in result.history] == pytest.approx(expected, abs=1e-5)
    assert result.passes == 2 * (20 + 7)


@pytest.mark.parametrize(("batch", "forgotten"), [(4, 4 + 3 + 4 + 3 + 4), (6, 6 + 1 + 6 + 1), (20, 7), (7, 21)])
def test_the_forget_set_repeats_in_a_new_order(batch, forgotten):
    seen = []
    model = linear()
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    result = run("neggrad_plus", model, batch_size=batch)
    assert sum(seen[1:]) == 20 + forgotten == result.passes  # the first one image counts the classes


def test_it_forgets_where_both_sets_differ():
    forget, retain = pair(10, 1), pair(40, 2)
    before, after = (
        losses(weights(model), *forget).mean()
        for model in (linear(), run("neggrad_plus", forget=forget, retain=retain, epochs=10, retain_weight=0.7).model)
    )
    assert after > before + 0.1
