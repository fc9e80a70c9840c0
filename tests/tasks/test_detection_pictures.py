"""Predictions of a detector for image files, with detections in place of a model's."""

import json

import numpy as np
import pytest

from tests import smallest_detector
from tests.images import write_folder
from umae_jax.errors import UserError
from umae_jax.tasks import detection_pictures
from umae_jax.tasks.detecting import ImageDetections
from umae_jax.tasks.detection_pictures import picture_names, predict_objects
from umae_jax.training.sharding import make_mesh
from umae_jax.weights.stored_run import StoredRun


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose detector finds one object in every image."""

    class Finder:
        def __init__(self, config, graph, params, source, mesh, batch_size):
            self.source = source

        def __call__(self, params):
            for index in range(len(self.source)):
                boxes = np.array([[1, 2, 3, 4.0]], np.float32)
                scores, labels = np.array([0.75], np.float32), np.array([index % 2])
                yield self.source, ImageDetections(index, (40, 60), boxes, scores, labels, None)

    monkeypatch.setattr(detection_pictures, "Finder", Finder)
    config = smallest_detector.get_config()
    return StoredRun(config, None, None, 7, ("cat", "dog"), tmp_path)


def predict(run, path, folder):
    return list(predict_objects(run, path, make_mesh(), 8, folder))


def test_every_image_has_a_picture_of_its_own(run, tmp_path):
    folder = write_folder(tmp_path / "images", 4, classes=("a", "b"), height=40, width=60)
    (name, *_) = sorted(path.name for path in (folder / "a").iterdir())
    (folder / f"a_{name}").write_bytes((folder / "a" / name).read_bytes())
    predictions = predict(run, folder, tmp_path / "out")
    assert len(predictions) == 5
    pictures = {values["picture"] for _, values in predictions}
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        picture.rpartition("/")[2] for picture in pictures
    }
    assert len(pictures) == 5
    assert json.loads((tmp_path / "out" / "detections.json").read_text()) == [values for _, values in predictions]
    assert [line.partition(": ")[2] for line, _ in predictions[:2]] == ["cat 75.0%", "dog 75.0%"]


def test_names_of_pictures_are_unique():
    names = ["a/b.png", "a_b.png", "A_b.png", "a_b.png_2", "c.png"]
    assert picture_names(names) == ["a_b.png.png", "a_b.png_2.png", "A_b.png_3.png", "a_b.png_2_2.png", "c.png.png"]


def test_several_processes_print_the_detections_of_all(run, tmp_path, monkeypatch):
    """Each detects in its own images; all are listed in the order of the images."""
    folder = write_folder(tmp_path / "images", 2, height=40, width=60)
    alone = predict(run, folder, tmp_path / "out")
    monkeypatch.setattr(detection_pictures.jax, "process_count", lambda: 2)
    monkeypatch.setattr(detection_pictures, "all_gather_json", lambda rows: [rows[1:], rows[:1]])
    assert predict(run, folder, tmp_path / "out") == alone


@pytest.mark.parametrize("name", ["file", "table.csv"])
def test_the_output_is_a_folder(run, tmp_path, monkeypatch, name):
    """It is checked before the detector is compiled."""
    monkeypatch.setattr(detection_pictures, "Finder", None)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"^--output: .*{name} is a file; write a folder"):
        predict(run, tmp_path / "images", tmp_path / name)
