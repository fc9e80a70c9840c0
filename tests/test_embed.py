"""Features of files, as `preprocess` and `embed` of an encoder give them."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import umae_jax
import umae_jax.features
from tests import golden, small
from tests.images import picture, write_folder
from tests.runs import store
from umae_jax.data.sources import open_source
from umae_jax.errors import UserError
from umae_jax.tasks.probing import FeatureReader
from umae_jax.training.sharding import make_mesh


@pytest.fixture(scope="module")
def config():
    config = golden.config_of("pvt_um").unlock()
    config.validation.crop = 0.875
    return config


@pytest.fixture(scope="module")
def encoder(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    store(folder / "run", config, small.random_model(config)[1])
    return umae_jax.load_encoder(folder / "run")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("images"), 5, ("a", "b"), 300, 400)
    return sorted(folder.rglob("*.jpg"))


@pytest.mark.parametrize("stage", [0, -1])
def test_files_have_the_features_that_a_probe_reads(config, encoder, files, stage):
    config.probe.stage = stage
    graph, params = small.random_model(config)
    source = open_source(f"folder:{files[0].parents[1]}")
    read = FeatureReader(config, graph, params, make_mesh(1), batch_size=8)
    expected = read(params, source, "data.source").features
    ours = encoder.embed(files, stage, batch_size=2)
    assert ours.shape == (5, encoder.widths[stage])
    assert ours.dtype == np.float32
    order = [source[index].name for index in range(len(source))]
    ours = ours[[files.index(path) for path in sorted(files, key=lambda path: order.index(str(path)))]]
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_features_are_means_of_maps_and_do_not_depend_on_the_batch(encoder):
    images = np.stack([picture(seed, 96, 64) for seed in range(5)])
    expected = np.asarray(encoder(images)[1]).mean((1, 2))
    for batch_size in (1, 3, 32):
        np.testing.assert_allclose(encoder.embed(images, 1, batch_size), expected, atol=1e-5)
    np.testing.assert_allclose(encoder.embed(jnp.asarray(images), 1), expected, atol=1e-5)
    normalised = ((images / 255 - encoder.mean) / encoder.std).astype(np.float32)
    np.testing.assert_allclose(encoder.embed(normalised, 1), expected, atol=1e-3)


def test_paths_pillow_images_and_arrays_have_the_same_pixels(encoder, tmp_path):
    array = picture(1, 70, 90)
    Image.fromarray(array).save(tmp_path / "image.png")
    path, (height, width) = tmp_path / "image.png", encoder.config.image_size
    pixels = encoder.preprocess(path)
    assert pixels.shape == (1, height, width, 3)
    assert pixels.dtype == np.uint8
    for image in (str(path), Image.open(path), array, array[None], jnp.asarray(array), [array], (path,)):
        np.testing.assert_array_equal(encoder.preprocess(image), pixels)
    assert encoder.preprocess([path, array], size=32).shape == (2, 32, 32, 3)
    assert encoder.preprocess(path, size=(32, 96)).shape == (1, 32, 96, 3)
    np.testing.assert_array_equal(encoder.embed(path), encoder.embed(pixels))


def test_orientation_and_channels_are_those_of_evaluation(encoder, tmp_path):
    image = Image.fromarray(picture(2, 300, 200))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    turned = encoder.preprocess(tmp_path / "turned.jpg", size=128)
    np.testing.assert_array_equal(encoder.preprocess(Image.open(tmp_path / "turned.jpg"), size=128), turned)
    upright = encoder.preprocess(np.rot90(np.asarray(image), -1), size=128)
    assert np.abs(upright.astype(int) - turned).mean() < 3
    gray = picture(3)[..., 0]
    expected = np.stack([gray] * 3, -1)
    for image in (gray, gray[..., None], np.concatenate([expected, np.full_like(expected[..., :1], 255)], -1)):
        np.testing.assert_array_equal(encoder.preprocess(image), encoder.preprocess(expected))


def test_what_is_no_image_is_rejected(encoder, tmp_path):
    (tmp_path / "text.jpg").write_text("text")
    with pytest.raises(UserError, match=r"text.jpg is not an image"):
        encoder.preprocess(tmp_path / "text.jpg")
    with pytest.raises(UserError, match=r"nowhere.jpg cannot be read"):
        encoder.preprocess(tmp_path / "nowhere.jpg")
    with pytest.raises(UserError, match=r"float64, is no image"):
        encoder.preprocess(picture() / 255)
    with pytest.raises(UserError, match=r"\[60, 80, 2\]"):
        encoder.preprocess(picture()[..., :2])
    with pytest.raises(UserError, match="empty"):
        encoder.preprocess([])
    with pytest.raises(UserError, match="stage must be -4 to 3, not 4"):
        encoder.embed(picture(), stage=4)
    with pytest.raises(UserError, match="batch_size"):
        encoder.embed(picture(), batch_size=0)


def test_completion_shows_only_public_names(encoder):
    def public(thing):
        return [name for name in dir(thing) if not name.startswith("__")]

    assert public(umae_jax) == sorted(umae_jax.__all__)
    assert public(umae_jax.features) == ["PretrainedEncoder", "load_encoder", "read_encoder"]
    names = ["config", "embed", "mean", "module", "preprocess", "std", "strides", "widths"]
    assert public(encoder) == names
