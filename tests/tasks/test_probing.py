import numpy as np
import pytest

from umae_jax.tasks.probing import BLOCK, Labelled, knn_accuracy, linear_accuracy


def clusters(count, classes, width=8, spread=0.3, seed=0):
    """Draw features around one centre per class."""
    centers = np.random.default_rng(9).normal(size=(classes, width))
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count)
    features = centers[labels] + spread * rng.normal(size=(count, width))
    return Labelled(features.astype(np.float32), labels.astype(np.int32))


def reference_knn(training, validation, classes, neighbors, temperature):
    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    similarity = unit(validation.features) @ unit(training.features).T
    correct = 0
    for row, label in zip(similarity, validation.labels, strict=True):
        nearest = np.argsort(-row)[:neighbors]
        votes = np.zeros(classes)
        np.add.at(votes, training.labels[nearest], np.exp(row[nearest] / temperature))
        correct += votes.argmax() == label
    return correct / len(validation.labels)


@pytest.mark.parametrize(("neighbors", "temperature"), [(1, 0.07), (5, 0.07), (20, 1.0)])
def test_knn_is_the_weighted_vote_of_the_nearest_neighbours(neighbors, temperature):
    training, validation = clusters(300, 6, spread=1.5), clusters(200, 6, spread=1.5, seed=1)
    expected = reference_knn(training, validation, 6, neighbors, temperature)
    assert 0.3 < expected < 0.99
    accuracy = knn_accuracy(training, validation, classes=6, neighbors=neighbors, temperature=temperature)
    assert accuracy == pytest.approx(expected, abs=0.006)  # a tie may change one of 200


def test_knn_accepts_more_queries_than_a_block_and_fewer_images_than_neighbours():
    training, validation = clusters(10, 2), clusters(BLOCK + 3, 2, seed=1)
    assert knn_accuracy(training, validation, classes=2, neighbors=20, temperature=0.07) > 0.9


def test_accuracy_with_one_neighbour_does_not_depend_on_the_temperature():
    training, validation = clusters(300, 6, spread=1.5), clusters(200, 6, spread=1.5, seed=1)
    accuracies = {
        knn_accuracy(training, validation, classes=6, neighbors=1, temperature=temperature)
        for temperature in (1.0, 0.07, 1e-4)
    }
    assert len(accuracies) == 1


def test_knn_ignores_the_norm_of_features():
    training, validation = clusters(100, 4, spread=1.0), clusters(100, 4, spread=1.0, seed=1)
    options = {"classes": 4, "neighbors": 5, "temperature": 0.07}
    longer = Labelled(100 * validation.features, validation.labels)
    assert knn_accuracy(training, validation, **options) == knn_accuracy(training, longer, **options)


def test_a_linear_probe_separates_linearly_separable_classes():
    accuracy, _ = linear_accuracy(clusters(400, 5), clusters(300, 5, seed=1), classes=5, seed=0)
    assert accuracy > 0.99


def test_a_linear_probe_selects_the_penalty_on_held_out_features():
    """Use few features in many noisy dimensions, where the smallest penalty fits the noise."""

    def noisy(count, seed):
        rng = np.random.default_rng(seed)
        labels = rng.integers(2, size=count).astype(np.int32)
        features = rng.normal(size=(count, 200)).astype(np.float32)
        features[:, 0] += 2 * labels - 1
        return Labelled(features, labels)

    accuracy, penalty = linear_accuracy(noisy(250, 0), noisy(500, 1), classes=2, seed=0)
    assert penalty >= 1e-2
    assert accuracy > 0.65


def test_random_labels_are_not_learned():
    training, validation = clusters(300, 4), clusters(300, 4, seed=1)
    shuffled = Labelled(training.features, np.random.default_rng(0).permutation(training.labels))
    assert linear_accuracy(shuffled, validation, classes=4, seed=0)[0] < 0.6
    assert knn_accuracy(shuffled, validation, classes=4, neighbors=20, temperature=0.07) < 0.6
