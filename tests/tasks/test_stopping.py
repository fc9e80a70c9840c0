import pytest

from umae_jax.tasks.stopping import stop_reason


@pytest.mark.parametrize(
    ("scores", "patience", "stops"),
    [
        ([0.5, 0.4], 2, False),
        ([0.5, 0.4, 0.5], 2, True),  # an equal score is no improvement
        ([0.5, 0.4, 0.6], 2, False),
        ([0.5, 0.4, 0.6, 0.6], 1, True),
        ([0.5, 0.4, 0.4, 0.4], 2, False),  # made to go on after the third
        ([0.5, 0.4, 0.4, 0.4, 0.4], 2, True),
        ([], 1, False),
    ],
)
def test_a_run_stops_after_scores_without_improvement(scores, patience, stops):
    by_step = {0: 0.9} | {10 * number: score for number, score in enumerate(scores, 1)}
    reason = stop_reason(by_step, patience)
    assert (reason is not None) == stops
    if stops:
        assert f"not risen above {max(scores):.2%}" in reason
        assert f"early_stop={patience}" in reason
