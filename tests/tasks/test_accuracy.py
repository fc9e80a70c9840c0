import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from tests import small, tiny_classifier
from tests.images import central_pixels, write_folder
from umae_jax.data.sources import open_source
from umae_jax.errors import UserError
from umae_jax.tasks.accuracy import MAX_ROWS, Results, make_evaluator, rank_of
from umae_jax.tasks.classification import Task
from umae_jax.training.state import abstract_run

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


def results_of(labels, predicted):
    """Return results in which a wrong class is the only one ranked before the true one."""
    labels, predicted = np.array(labels, np.int32), np.array(predicted, np.int32)
    return Results(labels, predicted, (labels != predicted).astype(np.int32), 0)


def test_accuracy_per_class_counts_only_the_images_of_the_class():
    results = results_of([0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 2, 2, 2, 2])
    assert results.per_class(("ant", "bee", "cat", "dog")) == {
        "ant": {"images": 4, "top1": 0.75},
        "bee": {"images": 2, "top1": 0.0},
        "cat": {"images": 1, "top1": 1.0},
    }
    header, ant, bee, cat = results.table(("ant", "bee", "cat", "dog")).splitlines()
    assert header.split() == ["class", "images", "top-1", "most", "often", "taken", "for"]
    assert (ant.split(), bee.split()) == (["ant", "4", "75.00%", "cat", "(1)"], ["bee", "2", "0.00%", "cat", "(2)"])
    assert cat.split() == ["cat", "1", "100.00%"]


def test_the_table_of_many_classes_shows_the_worst_ones():
    labels = np.arange(100)
    predicted = np.where(labels >= 95, 0, labels)
    rows = results_of(labels, predicted).table([f"c{number:02}" for number in labels]).splitlines()
    assert [row.split()[0] for row in rows[1:6]] == ["c95", "c96", "c97", "c98", "c99"]
    assert len(rows) == MAX_ROWS + 2
    assert rows[-1] == "  and 80 more classes, which are better"


def test_ranks_count_the_classes_before_the_true_one():
    logits = jnp.array([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    np.testing.assert_array_equal(rank_of(jnp.array([0, 1, 2]), logits), [0, 2, 1])


def test_the_lower_of_two_classes_with_equal_logits_ranks_first_as_in_argmax():
    np.testing.assert_array_equal(rank_of(jnp.array([0, 1, 2]), jnp.zeros((3, 3))), [0, 1, 2])


def test_nan_logits_never_rank_the_true_class_first():
    logits = jnp.array([[jnp.nan] * 3, [jnp.nan, 1.0, 0.0]])
    np.testing.assert_array_equal(rank_of(jnp.array([0, 0]), logits), [2, 2])


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A configuration, its model graph and parameters, and a source of 45 images, two of them unreadable."""
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
    # Rank one image at a time with NumPy.
    ranks = []
    for place in range(len(source)):
        record = source[place]
        if record.data != b"no image":
            pixels = central_pixels(record.data, config.image_size)[None]
            logits = np.asarray(apply(nnx.merge(graph, params), jnp.asarray(pixels)))[0]
            ranks.append(list(np.argsort(-logits)).index(record.label))
    ranks = np.array(ranks)

    mesh = mesh_of(devices)
    abstract = abstract_run(Task(config), mesh).state.params
    on_devices = jax.device_put(params, jax.tree.map(lambda array: array.sharding, abstract))
    accuracy = make_evaluator(config, graph, abstract, source, mesh, batch_size)(on_devices).accuracy
    assert accuracy == (43, (ranks < 1).mean(), (ranks < 5).mean(), 2)
    assert 0 < accuracy.top1 < accuracy.top5 < 1


@jax.jit
def apply(model, images):
    return model(images)


def test_a_data_set_without_a_readable_image_is_rejected(case, tmp_path):
    config, graph, params, _ = case
    folder = write_folder(tmp_path, 7, CLASSES)
    for path in folder.rglob("*.jpg"):
        path.write_bytes(b"")
    mesh = mesh_of(1)
    evaluate = make_evaluator(
        config, graph, abstract_run(Task(config), mesh).state.params, open_source(f"folder:{folder}"), mesh, 8
    )
    with pytest.raises(UserError, match="none of its images can be read"):
        evaluate(jax.device_put(params, jax.devices()[0]))
