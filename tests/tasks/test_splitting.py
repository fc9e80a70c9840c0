import pickle

import numpy as np
import pytest

from tests.images import write_folder
from umae_jax.data.sources import ImageFiles, TfdsImages, open_folder
from umae_jax.tasks.splitting import known_labels, split, summarize_classes


def files(counts, root="/images"):
    """Return image files that need not exist: a class and a number of images for each entry."""
    names = [f"{name}/{number:05}.jpg" for name, count in counts.items() for number in range(count)]
    return ImageFiles(root, names, np.repeat(np.arange(len(counts)), [*counts.values()]), tuple(counts))


def names(subset):
    return {subset.source.names[index].decode() for index in subset.indices}


def test_every_image_is_in_one_part_and_each_class_gives_its_fraction():
    counts = {"ant": 100, "bee": 20, "cat": 3, "dog": 2, "eel": 1}
    source = files(counts)
    training, validation = split(source, 0.1, seed=0)
    assert sorted([*training.indices, *validation.indices]) == list(range(len(source)))
    np.testing.assert_array_equal(np.bincount(known_labels(validation), minlength=5), [10, 2, 1, 1, 0])
    np.testing.assert_array_equal(np.bincount(known_labels(training), minlength=5), [90, 18, 2, 1, 1])
    assert training.classes == validation.classes == tuple(counts)


def test_a_class_keeps_an_image_to_train():
    training, validation = split(files({"ant": 2, "bee": 5}), 0.99, seed=0)
    np.testing.assert_array_equal(np.bincount(known_labels(training)), [1, 1])
    np.testing.assert_array_equal(np.bincount(known_labels(validation)), [1, 4])


def test_the_split_depends_on_seed_and_names_only():
    counts = {"ant": 60, "bee": 40}
    first = names(split(files(counts), 0.2, seed=0)[1])
    assert names(split(files(counts), 0.2, seed=0)[1]) == first
    assert names(split(files(counts, "/other/place"), 0.2, seed=0)[1]) == first
    assert names(split(files(counts), 0.2, seed=1)[1]) != first


def test_few_images_change_sides_when_images_are_added():
    before = names(split(files({"ant": 1000, "bee": 1000}), 0.1, seed=0)[1])
    after = names(split(files({"ant": 1100, "bee": 1000}), 0.1, seed=0)[1])
    old = {name for name in after if name.startswith("bee") or int(name[-9:-4]) < 1000}
    assert len(before ^ old) <= 20


def test_records_are_those_of_the_source_also_in_a_worker(tmp_path):
    source = open_folder(str(write_folder(tmp_path, 12, ("ant", "bee"))))
    _, validation = split(source, 0.25, seed=3)
    copy = pickle.loads(pickle.dumps(validation))
    assert len(copy) == 4
    for place, index in enumerate(validation.indices):
        assert copy[place] == source[int(index)]


def test_a_tfds_data_set_is_split_without_reading_it():
    source = TfdsImages(range(50), "image", "label", ("ant", "bee"))
    training, validation = split(source, 0.1, seed=0)
    assert (len(training), len(validation)) == (45, 5)
    assert known_labels(validation) is None


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (files({"cat": 20, "cup": 20, "rock": 5}), "3: cat 20, cup 20, rock 5 (imbalance 4.0)"),
        (files({f"c{n:02}": 1000 + n for n in range(40)}), "40: from c00 1,000 to c39 1,039 (imbalance 1.0)"),
        (TfdsImages(range(50), "image", "label", ("ant", "bee")), "2"),
        (files({"caf\udce9": 2, "cup": 2}), r"2: caf\xe9 2, cup 2 (imbalance 1.0)"),
    ],
)
def test_classes_are_summarised(source, expected):
    assert summarize_classes(source) == expected
