import csv
import io
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tests import small, tiny_classifier
from tests.images import central_pixels, encode, picture, write_folder
from umae_jax.data.sources import open_images
from umae_jax.errors import UserError
from umae_jax.tasks.predicting import NUM_PREDICTED, predict_images, write_csv
from umae_jax.training.sharding import make_mesh, replicated
from umae_jax.weights.stored_run import StoredRun

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


@pytest.fixture(scope="module")
def run():
    config = tiny_classifier.get_config()
    config.model.classes = len(CLASSES)
    graph, params = small.random_model(config, seed=3)
    return StoredRun(config, graph, jax.device_put(params, replicated(make_mesh())), 7, CLASSES, Path("DIR"))


def test_each_image_gets_its_most_probable_classes_for_any_batch_size(run, tmp_path):
    source = open_images(write_folder(tmp_path, 11))
    model = nnx.merge(run.graph, jax.device_get(run.params))
    pixels = np.stack([central_pixels(source[place].data, run.config.image_size) for place in range(11)])
    expected = np.asarray(jax.jit(lambda images: jax.nn.softmax(model(images)))(jnp.asarray(pixels)))
    for batch_size in (8, 64):
        predictions = list(predict_images(run, source, make_mesh(), batch_size))
        assert [values["image"] for _, values in predictions] == [source.name(place) for place in range(11)]
        for (line, values), row in zip(predictions, expected, strict=True):
            top = np.argsort(-row)[:NUM_PREDICTED]
            assert [*values["classes"]] == [CLASSES[number] for number in top]
            np.testing.assert_allclose([*values["classes"].values()], row[top], rtol=1e-4)
            assert line.startswith(f"{values['image']}: {CLASSES[top[0]]} {row[top[0]]:.1%}, ")


def test_bad_files_are_named_and_counted_and_the_others_are_written(run, tmp_path, capsys, caplog):
    folder = write_folder(tmp_path / "images", 5)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (folder / "vanished.jpg").write_bytes(b"")
    name = os.fsencode(folder) + b'/caf\xe9, "x".png'
    with open(name, "wb") as file:
        file.write(encode(Image.fromarray(picture())))
    source = open_images(folder)
    (folder / "vanished.jpg").unlink()
    line, values = write_csv(predict_images(run, source, make_mesh(), 8), tmp_path / "out.csv")
    assert line == f"6 images in {tmp_path / 'out.csv'}"
    header, *rows = csv.reader(io.StringIO((tmp_path / "out.csv").read_text(encoding="utf-8")))
    assert header[:5] == ["image", "class", "probability", "class_2", "probability_2"]
    assert len(header) == 1 + 2 * NUM_PREDICTED
    assert len(rows) == values["images"] == 6
    assert [row[0] for row in rows] == [
        *(f"{folder}/{place:03}.jpg" for place in range(5)),
        rf'{folder}/caf\xe9, "x".png',
    ]
    for row in rows:
        probabilities = [float(cell) for cell in row[2::2]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert {*row[1::2]} <= {*CLASSES}
    errors = capsys.readouterr().err
    assert "3 of 9 images cannot be read and are left out" in errors
    assert "classified 6 images" in errors
    for file in ("broken.png", "dangling.jpg", "vanished.jpg"):
        assert file in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_left_out(run, tmp_path, caplog):
    folder = write_folder(tmp_path, 3)
    (folder / "001.jpg").chmod(0)
    assert len(list(predict_images(run, open_images(folder), make_mesh(), 8))) == 2
    assert "Permission denied" in caplog.text


def test_no_table_is_written_if_no_image_can_be_read(run, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the images can be read"):
        write_csv(predict_images(run, open_images(tmp_path), make_mesh(), 8), tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()
