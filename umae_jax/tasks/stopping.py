"""Early stopping."""

from collections.abc import Mapping


def stop_reason(scores: Mapping[int, float], patience: int) -> str | None:
    """Return why a run stops after its newest score, None if it goes on.

    It stops after `patience` scores in a row that are not higher than the best one before them and, if it is then made
    to go on, after as many again. The score before the first step does not count.

    Args:
        scores: by step, ascending.
        patience: number of scores, at least 1.
    """
    steps = [step for step in scores if step > 0]
    if not steps:
        return None
    best = max(steps, key=lambda step: (scores[step], -step))
    waited = sum(step > best for step in steps)
    if waited == 0 or waited % patience:
        return None
    return (
        f"top-1 has not risen above {scores[best]:.2%}, of step {best}, in {waited} validations "
        f"(early_stop={patience}); raise early_stop or change total_steps to go on"
    )
