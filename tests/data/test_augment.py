"""RandAugment, compared with timm's."""

import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.images import picture
from umae_jax.data.augment import OPERATIONS, Operation, RandAugment

FILL = (124, 116, 104)
# timm's names that differ from ours.
TIMM = {
    **{name: f"{name}Increasing" for name in ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")},
    **{name: f"{name}Rel" for name in ("TranslateX", "TranslateY")},
}
WITHOUT_STRENGTH = ("AutoContrast", "Equalize", "Invert")


@pytest.fixture(scope="module")
def timm():
    """Import timm's module of augmentations from its file: importing the package needs torchvision."""
    package = importlib.util.find_spec("timm")
    if package is None:
        pytest.skip("timm is not installed")
    path = Path(package.origin).parent / "data" / "auto_augment.py"
    spec = importlib.util.spec_from_file_location("timm_auto_augment", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_operations_have_the_names_of_timm(timm):
    assert [TIMM.get(name, name) for name in OPERATIONS] == timm._RAND_INCREASING_TRANSFORMS


@pytest.mark.parametrize("magnitude", [0.0, 2.6, 5.0, 9.0, 9.9])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_those_of_timm(timm, name, magnitude):
    """Compare the sets of both signs' outputs, since timm draws the sign itself."""
    image = Image.fromarray(picture(1))
    options = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
    operation = timm.AugmentOp(TIMM.get(name, name), prob=1.0, magnitude=magnitude, hparams=options)
    ours = set()
    for sign in (-1.0, 1.0):
        argument = OPERATIONS[name].argument(magnitude / 10, sign)
        ours.add(np.asarray(OPERATIONS[name].apply(image, argument, FILL)).tobytes())
    theirs = set()
    for seed in range(12):
        random.seed(seed)
        theirs.add(np.asarray(operation(image)).tobytes())
    assert ours == theirs


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_keep_size_and_mode_at_every_strength(name, channels):
    image = Image.fromarray(picture(2) if channels == 3 else picture(2)[..., 0])
    for strength in (0.0, 0.5, 1.0):
        for sign in (-1.0, 1.0):
            argument = OPERATIONS[name].argument(strength, sign)
            changed = OPERATIONS[name].apply(image, argument, FILL if channels == 3 else FILL[0])
            assert (changed.size, changed.mode) == (image.size, image.mode)


def test_strength_zero_changes_nothing():
    image = Image.fromarray(picture(3))
    for name in set(OPERATIONS) - {*WITHOUT_STRENGTH, "Posterize"}:
        operation = OPERATIONS[name]
        changed = np.asarray(operation.apply(image, operation.argument(0.0, 1.0), FILL))
        np.testing.assert_array_equal(changed, np.asarray(image), err_msg=name)


def test_draws_depend_on_the_generator_alone():
    augment = RandAugment(2, 9.0, 0.5, FILL)
    pixels = picture(4)
    once, again = (augment(pixels, random.Random(seed)) for seed in (5, 5))
    np.testing.assert_array_equal(once, again)
    others = [augment(pixels, random.Random(seed)) for seed in range(40)]
    assert all(other.shape == pixels.shape and other.dtype == np.uint8 for other in others)
    # Each of two operations is applied with probability 0.5, so about a quarter of the images is unchanged.
    same = sum(np.array_equal(other, pixels) for other in others)
    assert 3 <= same <= 20


def test_magnitudes_follow_a_clipped_normal_distribution(monkeypatch):
    """As timm's m9-mstd0.5: mean 9, standard deviation 0.5, at most 10."""
    strengths = []

    def spy(strength, sign):
        strengths.append(sign * strength)
        return 0.0

    monkeypatch.setattr(
        "umae_jax.data.augment.OPERATIONS", {"spy": Operation(lambda image, argument, fill: image, spy)}
    )
    augment = RandAugment(2, 9.0, 0.5, FILL)
    for seed in range(1000):
        augment(picture(4, 8, 8), random.Random(seed))
    assert abs(len(strengths) - 1000) < 120  # each of 2000 with probability one half
    size = np.abs(strengths)
    assert size.max() == 1
    assert abs(size.mean() - 0.9) < 0.01
    assert abs(size[size < 1].std() - 0.045) < 0.01
    assert abs(np.mean(np.sign(strengths))) < 0.1


def test_grayscale_images_keep_one_channel():
    augment = RandAugment(4, 9.0, 0.5, (128,))
    pixels = picture(4)[..., :1]
    for seed in range(30):
        assert augment(pixels, random.Random(seed)).shape == pixels.shape
