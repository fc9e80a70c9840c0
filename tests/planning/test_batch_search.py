import math

import pytest

from umae_jax.planning.batch_search import find_max_batch

MEMORY = 16.0


@pytest.mark.parametrize("reports_memory", [True, False])
@pytest.mark.parametrize("start", [64, 128, 1024, 4096])
@pytest.mark.parametrize(
    ("memory_of_images", "largest"),
    [
        (lambda batch: 0.03 * batch, 500),
        (lambda batch: 0.03 * min(batch, 300) + 0.02 * max(batch - 300, 0), 600),  # less near the limit
        (lambda batch: 0.02 * batch + 0.1 * max(batch - 200, 0), 291),  # more near the limit
        (lambda batch: 2.0 * batch, 7),  # not even the smallest fits
    ],
)
def test_the_largest_batch_is_found_with_few_compilations(memory_of_images, largest, start, reports_memory):
    tried = []

    def required(batch):
        memory = 1 + memory_of_images(batch)
        return memory if memory <= MEMORY or reports_memory else math.inf

    def compile_and_measure(batch):
        tried.append(batch)
        return required(batch)

    known = {start: required(start)}
    known[0] = 1 if known[start] <= MEMORY else 0
    found = find_max_batch(compile_and_measure, MEMORY, start, known)
    assert found <= largest
    assert largest - found <= max(8, found // 8) + 8  # to an eighth, and multiples of 8
    assert len(tried) == len(set(tried))
    assert start not in tried
    if reports_memory and largest > 8:
        assert len(tried) <= 5
    assert found == 0 or found in {start, *tried}
