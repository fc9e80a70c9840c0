import math

import pytest

from tests import tiny
from umae_jax import targets
from umae_jax.planning.compiled import CompiledStats

GIB = 2**30
TARGET = targets.Target("a slice", (None,) * 4, None, 16 * GIB)


def told(peak):
    return CompiledStats(GIB, peak - GIB, peak, 0.0, None, None, {}, {}, (), {})


@pytest.mark.parametrize("refusals_tell", [True, False])
@pytest.mark.parametrize("own", [64, 128, 1024, 4096])
@pytest.mark.parametrize(
    ("grows", "largest"),
    [
        (lambda batch: 0.03 * batch, 500),
        (lambda batch: 0.03 * min(batch, 300) + 0.02 * max(batch - 300, 0), 600),  # less near the limit
        (lambda batch: 0.02 * batch + 0.1 * max(batch - 200, 0), 291),  # more
        (lambda batch: 2.0 * batch, 7),  # not even the smallest fits
    ],
)
def test_the_largest_batch_is_found_with_few_compilations(monkeypatch, grows, largest, own, refusals_tell):
    tried = []

    def compile_for(batch, target):
        peak = GIB * (1 + grows(batch))
        if peak > target.memory:
            raise targets.DoesNotFit(peak if refusals_tell else math.inf)
        return told(peak)

    def lower_for(config, target):
        tried.append(config.batch_size // 4)
        return tried[-1]

    monkeypatch.setattr(targets, "compile_for", compile_for)
    monkeypatch.setattr(targets, "lower_for", lower_for)
    config = tiny.get_config().unlock()
    config.batch_size = 4 * own
    try:
        first = compile_for(own, TARGET)
    except targets.DoesNotFit as answer:
        first = answer
    said = []
    found = targets.largest_batch(config, TARGET, first, said.append)
    assert found <= largest
    assert largest - found <= max(8, found // 8) + 8  # to an eighth, and multiples of 8
    assert len(tried) == len(set(tried)) == len(said)
    if refusals_tell and largest > 8:
        assert len(tried) <= 5
    if found:
        assert f"a slice: {found} images a chip fit" in said or found == own


def test_without_a_word_from_the_compiler():
    assert str(targets.DoesNotFit(math.inf)) == "does not fit"
    assert str(targets.DoesNotFit(20.5 * GIB)) == "needs 20.50 GiB"
