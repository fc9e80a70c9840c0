import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from tests import small, tiny_classifier
from tests.images import write_folder
from umae_jax.data.on_device import normalize
from umae_jax.data.sources import open_source
from umae_jax.data.transforms import load_whole
from umae_jax.errors import UserError
from umae_jax.training.evaluation import make_evaluator, open_validation, rank_of
from umae_jax.training.runs import describe

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


def test_ranks_count_what_comes_before():
    logits = jnp.array([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    np.testing.assert_array_equal(rank_of(jnp.array([0, 1, 2]), logits), [0, 2, 1])


def test_of_equal_logits_the_lower_class_comes_first_as_in_argmax():
    np.testing.assert_array_equal(rank_of(jnp.array([0, 1, 2]), jnp.zeros((3, 3))), [0, 1, 2])


def test_what_is_not_a_number_is_never_right():
    logits = jnp.array([[jnp.nan] * 3, [jnp.nan, 1.0, 0.0]])
    np.testing.assert_array_equal(rank_of(jnp.array([0, 0]), logits), [2, 2])


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A configuration, its model and parameters, and a folder of 45 images of which two cannot be read."""
    folder = tmp_path_factory.mktemp("validation")
    write_folder(folder, 45, CLASSES)
    for path in sorted(folder.rglob("*.jpg"))[10:12]:
        path.write_bytes(b"no image")
    config = tiny_classifier.get_config()
    config.model.classes = len(CLASSES)
    config.validation.source = f"folder:{folder}"
    graph, params = small.random_model(config, seed=3)
    return config, graph, params, open_source(config.validation.source)


def mesh_of(devices):
    axes = (AxisType.Auto,) * 2
    return jax.make_mesh((devices, 1), ("data", "fsdp"), axis_types=axes, devices=jax.devices()[:devices])


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 1), (1, 7), (1, 64), (8, 8), (8, 16), (2, 50)])
def test_accuracy_is_exact_on_any_devices_and_for_any_batch_size(case, devices, batch_size):
    config, graph, params, source = case
    # By hand, one image after the other.
    ranks = []
    for place in range(len(source)):
        record = source[place]
        if record.data != b"no image":
            pixels = load_whole(record.data, config.image_size, 3)[None]
            images = normalize(jnp.asarray(pixels), config.data.mean, config.data.std)
            logits = np.asarray(apply(nnx.merge(graph, params), images))[0]
            ranks.append(list(np.argsort(-logits)).index(record.label))
    ranks = np.array(ranks)

    mesh = mesh_of(devices)
    abstract = describe(config, mesh).state.params
    on_devices = jax.device_put(params, jax.tree.map(lambda array: array.sharding, abstract))
    accuracy = make_evaluator(config, graph, abstract, source, mesh, batch_size)(on_devices)
    assert accuracy == (43, (ranks < 1).mean(), (ranks < 5).mean(), 2)
    assert 0 < accuracy.top1 < accuracy.top5 < 1


@jax.jit
def apply(model, images):
    return model(images)


@pytest.mark.parametrize(
    ("training", "validation", "message"),
    [
        ((), ("a", "b"), r"data.source: its images have no labels; put those of each class into a subfolder"),
        (("a", "b"), (), r"validation.source: its images have no labels"),
        (("a",), ("a",), r"data.source: there is one class alone, a; two at least"),
        (("a", "b"), ("a", "c"), r"not those of data.source \(c only in it; b only in data.source\)"),
        (("a", "b", "c"), ("a", "b"), r"not those of data.source \(c only in data.source\)"),
    ],
)
def test_classes_that_do_not_fit_are_told(tmp_path, training, validation, message):
    config = tiny_classifier.get_config()
    config.validation.source = f"folder:{write_folder(tmp_path / 'validation', 4, validation)}"
    source = open_source(f"folder:{write_folder(tmp_path / 'training', 4, training)}")
    with pytest.raises(UserError, match=message) as told:
        open_validation(config, source)
    assert "\n" not in str(told.value)


def test_without_a_source_there_is_no_validation(tmp_path):
    source = open_source(f"folder:{write_folder(tmp_path, 4)}")
    assert open_validation(tiny_classifier.get_config(), source) is None


def test_a_set_of_which_nothing_can_be_read_is_told(case, tmp_path):
    config, graph, params, _ = case
    folder = write_folder(tmp_path, 7, CLASSES)
    for path in folder.rglob("*.jpg"):
        path.write_bytes(b"")
    mesh = mesh_of(1)
    evaluate = make_evaluator(
        config, graph, describe(config, mesh).state.params, open_source(f"folder:{folder}"), mesh, 8
    )
    with pytest.raises(UserError, match="none of its images can be read"):
        evaluate(jax.device_put(params, jax.devices()[0]))
