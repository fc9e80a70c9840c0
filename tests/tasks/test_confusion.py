import io

import numpy as np
from PIL import Image

from tests.tasks.test_accuracy import results_of
from umae_jax.tasks.confusion import MAX_CLASSES, OTHERS, confusion_matrix, draw_confusion


def test_rows_are_true_and_columns_predicted_classes():
    counts, rows, columns = confusion_matrix(results_of([0, 0, 1, 1, 1], [0, 2, 1, 1, 0]), ("ant", "bee", "cat"))
    assert rows == columns == ["ant", "bee", "cat"]
    np.testing.assert_array_equal(counts, [[1, 0, 1], [1, 2, 0], [0, 0, 0]])


def test_of_many_classes_those_with_most_errors_are_shown():
    labels = np.arange(100).repeat(3)
    predicted = np.where(labels >= 70, 1, labels)
    names = [f"class {number}" for number in range(100)]
    counts, rows, columns = confusion_matrix(results_of(labels, predicted), names)
    assert counts.shape == (MAX_CLASSES, MAX_CLASSES + 1)
    assert {*names[70:]} < {*rows}
    assert columns == [*rows, OTHERS]
    np.testing.assert_array_equal(counts.sum(1), 3)


def test_a_picture_is_drawn_for_any_names_and_number_of_classes():
    for count in (2, 60):
        names = ["caf\udce9 $x_", "東京", *("a very long name of a class " * 2 for _ in range(count - 2))]
        labels = np.arange(count).repeat(2)
        png = draw_confusion(results_of(labels, labels[::-1]), names, "title with 50% and $")
        with Image.open(io.BytesIO(png)) as picture:
            assert min(picture.size) > 300
