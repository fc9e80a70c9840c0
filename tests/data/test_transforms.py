import random

import numpy as np
import pytest
import scipy.stats

from tests.images import central_pixels, write_folder
from umae_jax.data.sources import NO_LABEL, open_source
from umae_jax.data.transforms import (
    READ_TRIES,
    LoadCentralCrop,
    LoadCrop,
    central_crop,
    first_readable,
    random_crop,
)
from umae_jax.errors import UserError


def test_random_crops_follow_the_recipe():
    rng = random.Random(0)
    width, height = 500, 375
    areas, ratios = [], []
    for _ in range(2000):
        left, upper, right, lower = random_crop(rng, width, height, (256, 256), 0.2)
        assert 0 <= left < right <= width
        assert 0 <= upper < lower <= height
        areas.append((right - left) * (lower - upper) / (width * height))
        ratios.append((right - left) / (lower - upper))
    assert 0.195 < min(areas) < 0.22
    assert max(areas) > 0.95
    assert 0.74 < min(ratios) < 0.77
    assert 1.3 < max(ratios) < 1.35
    # Small crops always fit, so their area is uniform.
    small = [area for area in areas if area < 0.5]
    assert scipy.stats.kstest(small, scipy.stats.uniform(0.2, 0.3).cdf).pvalue > 1e-4


def test_crops_have_the_aspect_ratio_of_the_output():
    rng = random.Random(0)
    boxes = [random_crop(rng, 1000, 1000, (64, 128), 0.2) for _ in range(500)]
    ratios = [(right - left) / (lower - upper) for left, upper, right, lower in boxes]
    assert min(ratios) > 2 * 3 / 4 * 0.98
    assert max(ratios) < 2 * 4 / 3 * 1.02
    assert central_crop(100, 100, (64, 128)) == (0, 25, 100, 75)


def test_central_crops_lie_inside_images_of_any_size():
    assert min(central_crop(1019, 1319, (224, 224))) >= 0
    sizes = [(width, height) for width in range(1, 400, 3) for height in (1, 7, 101, 399)]
    for width, height in sizes:
        left, upper, right, lower = central_crop(width, height, (224, 160))
        assert 0 <= left < right <= width + 1e-9
        assert 0 <= upper < lower <= height + 1e-9


def test_extreme_aspect_ratios_fall_back_to_the_central_crop():
    assert random_crop(random.Random(0), 1000, 2, (64, 64), 0.9) == central_crop(1000, 2, (64, 64))


CLASSES = ("ant", "bee")
SIZE = (16, 24)


def labelled(folder, count=4):
    return open_source(f"folder:{write_folder(folder, count, CLASSES)}")


def test_whole_images_are_loaded_with_their_labels(tmp_path):
    source = labelled(tmp_path)
    load = LoadCentralCrop(source, SIZE, 3, labels=(2, "validation.source"))
    for index in range(4):
        arrays, unreadable = load(index)
        np.testing.assert_array_equal(arrays["image"], central_pixels(source[index].data, SIZE))
        assert (arrays["label"], arrays["label"].dtype, arrays["label"].shape) == (index // 2, np.int32, ())
        assert not unreadable


def test_blanks_are_black_and_have_no_label(tmp_path):
    arrays, unreadable = LoadCentralCrop(labelled(tmp_path), SIZE, 3, labels=(2, "validation.source"))(-1)
    assert arrays["image"].shape == (*SIZE, 3)
    assert not arrays["image"].any()
    assert arrays["label"] == NO_LABEL
    assert not unreadable


def test_without_labels_there_is_only_the_image(tmp_path):
    source = labelled(tmp_path)
    whole, crop = LoadCentralCrop(source, SIZE, 1), LoadCrop(source, 0, SIZE, 1, 0.2)
    for arrays, _ in (whole(0), whole(-1), crop(0, 0)):
        assert {name: array.shape for name, array in arrays.items()} == {"image": (*SIZE, 1)}


def test_a_crop_depends_on_the_seed_the_sample_and_the_record_alone(tmp_path):
    source = labelled(tmp_path)
    load = LoadCrop(source, 1, SIZE, 3, 0.2)
    image = load(5, 2).arrays["image"]
    np.testing.assert_array_equal(image, load(5, 2).arrays["image"])
    for other in (load(6, 2), load(5, 3), LoadCrop(source, 2, SIZE, 3, 0.2)(5, 2)):
        assert (other.arrays["image"] != image).any()


def test_augmentation_draws_from_the_generator_of_the_sample(tmp_path):
    source = labelled(tmp_path)
    plain, augmented = LoadCrop(source, 1, SIZE, 3, 0.2), LoadCrop(source, 1, SIZE, 3, 0.2, shift)
    offset = int(augmented(5, 2).arrays["image"][0, 0, 0]) - int(plain(5, 2).arrays["image"][0, 0, 0])
    np.testing.assert_array_equal(augmented(5, 2).arrays["image"], plain(5, 2).arrays["image"] + np.uint8(offset % 256))


def shift(pixels, rng):
    return pixels + np.uint8(rng.randrange(1, 256))


def test_another_record_replaces_an_unreadable_one(tmp_path):
    source = labelled(tmp_path)
    broken = tmp_path / "ant" / "000.jpg"
    broken.unlink()
    broken.symlink_to(tmp_path / "missing.jpg")
    arrays, unreadable = LoadCrop(source, 0, SIZE, 3, 0.2)(0, 0)
    assert arrays["image"].any()
    assert {record.name for record in unreadable} == {str(broken)}
    assert LoadCentralCrop(source, SIZE, 3)(0).unreadable == unreadable[:1]


def test_a_sample_gives_up_after_many_unreadable_records(tmp_path):
    source = labelled(tmp_path)
    for path in tmp_path.rglob("*.jpg"):
        path.write_bytes(b"not an image")
    arrays, unreadable = LoadCrop(source, 0, SIZE, 3, 0.2)(0, 0)
    assert len(unreadable) == READ_TRIES
    assert not arrays["image"].any()


@pytest.mark.parametrize("label", [NO_LABEL, 2])
def test_labels_outside_the_classes_raise(tmp_path, label):
    source = Relabelled(labelled(tmp_path), label)
    value = "no label" if label == NO_LABEL else "label 2"
    with pytest.raises(UserError, match=f"data.source.*{value}.*0..1"):
        LoadCrop(source, 0, SIZE, 3, 0.2, labels=(2, "data.source"))(0, 0)
    with pytest.raises(UserError, match=f"validation.source.*{value}.*0..1"):
        LoadCentralCrop(source, SIZE, 3, labels=(2, "validation.source"))(0)


class Relabelled:
    """A source whose records all have one label."""

    classes = CLASSES

    def __init__(self, source, label):
        self.source, self.label = source, label

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source[index]._replace(label=self.label)


def test_the_first_readable_images_are_loaded(tmp_path, caplog):
    source = labelled(tmp_path)
    (tmp_path / "ant" / "000.jpg").write_bytes(b"not an image")
    images = first_readable(source, 2, SIZE, 3)
    np.testing.assert_array_equal(images, [central_pixels(source[index].data, SIZE) for index in (1, 2)])
    assert caplog.text.count("000.jpg") == 1
    for path in tmp_path.rglob("*.jpg"):
        path.write_bytes(b"not an image")
    with pytest.raises(UserError, match="of the first 4 images"):
        first_readable(source, 2, SIZE, 3)
