"""The data of a plan: those of this machine, or those that the task assumes."""

import pytest

from tests import annotated_images, smallest_detector, tiny_classifier
from tests.images import write_folder
from umae_jax.data import annotations
from umae_jax.errors import UserError
from umae_jax.planning.assembly import count_images


def detector(source):
    config = smallest_detector.get_config()
    config.data.source = source
    return config


def test_annotations_are_read_once_and_complete_the_configuration(tmp_path, monkeypatch):
    reads, read = [], annotations.read_coco
    monkeypatch.setattr(annotations, "read_coco", lambda *arguments: reads.append(1) or read(*arguments))
    config = detector(annotated_images.write(tmp_path, annotated_images.coco()))
    assert count_images(config) == (4, True)
    assert config.model.classes == 2
    assert len(reads) == 1


@pytest.mark.parametrize("source", ["coco:/no/such", "coco:/no/such.json@/no", "tfds:no_such"])
def test_data_that_are_elsewhere_are_assumed(source):
    config = detector(source)
    assert count_images(config) == (117_266, False)
    assert config.model.classes == 80


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("photos", "unknown source 'photos'"),
        ("coco:{}/json", "is not JSON"),
        ("coco:{}/images", "there is neither"),
        ("coco:{}/json/annotations_train.json@{}/nowhere", "there is no folder .*nowhere of images"),
    ],
)
def test_data_that_are_damaged_are_not_assumed(tmp_path, source, message):
    for name in ("json", "json/images", "images"):
        (tmp_path / name).mkdir()
    (tmp_path / "json" / "annotations_train.json").write_text("{")
    with pytest.raises(UserError, match=message):
        count_images(detector(source.replace("{}", str(tmp_path))))


def test_missing_validation_images_are_not_assumed(tmp_path):
    config = tiny_classifier.get_config()
    config.data.source = f"folder:{write_folder(tmp_path, 4, classes=('a', 'b'))}"
    config.validation.source = "folder:/no/such"
    with pytest.raises(UserError, match="there is no folder /no/such"):
        count_images(config)
    config.data.source = "folder:/no/such"
    assert count_images(config) == (1_281_167, False)
