import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

from tests import golden, small, tiny_classifier
from tests.images import central_pixels, write_folder
from umae_jax.data.sources import open_source
from umae_jax.errors import UserError
from umae_jax.models.positions_table import resize_positions
from umae_jax.positions import sincos_table
from umae_jax.tasks.accuracy import make_evaluator, rank_of
from umae_jax.tasks.classification import Task
from umae_jax.tasks.initialization import adapt_pretrained
from umae_jax.tasks.labelled import open_matching_validation
from umae_jax.training.state import abstract_run, init_state
from umae_jax.training.step import make_train_step

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


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


@pytest.mark.parametrize(
    ("training", "validation", "message"),
    [
        ((), ("a", "b"), r"^data.source.* no labels"),
        (("a", "b"), (), r"^validation.source.* no labels"),
        (("a",), ("a",), r"^data.source.* one class, a"),
        (("a", "b"), ("a", "c"), r"^validation.source.*\(c only in it; b only in data.source\)"),
        (("a", "b", "c"), ("a", "b"), r"^validation.source.*\(c only in data.source\)"),
    ],
)
def test_classes_that_do_not_match_are_rejected(tmp_path, training, validation, message):
    config = tiny_classifier.get_config()
    config.validation.source = f"folder:{write_folder(tmp_path / 'validation', 4, validation)}"
    source = open_source(f"folder:{write_folder(tmp_path / 'training', 4, training)}")
    with pytest.raises(UserError, match=message) as error:
        open_matching_validation(config, source)
    assert "\n" not in str(error.value)


def test_validation_is_none_without_a_source(tmp_path):
    source = open_source(f"folder:{write_folder(tmp_path, 4)}")
    assert open_matching_validation(tiny_classifier.get_config(), source) is None


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


# The loss, and initialisation from a pre-trained encoder.

PAIRS = {"swin_um_window4_no_secondary": "swin_classifier", "pvt_um": "pvt_classifier", "vit_um": "vit_classifier"}


def batch_of(count=4, side=64, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    labels = rng.integers(10, size=count).astype(np.int32)
    return {"image": images, "sample_index": np.arange(count, dtype=np.uint32), "label": labels}


def loss_of(config, graph):
    task = Task(config)
    return lambda params, batch: task.loss(nnx.merge(graph, params), batch)


def replace_params(params, new):
    """Return `params` with those in `new` replaced."""
    return nnx.from_flat_state({**dict(nnx.to_flat_state(params)), **dict(nnx.to_flat_state(new))})


@pytest.mark.parametrize("pretrained", PAIRS)
def test_a_classifier_gets_the_pretrained_encoder_and_keeps_its_own_head(pretrained):
    source, config = golden.config_of(pretrained), golden.config_of(PAIRS[pretrained])
    graph, theirs = small.random_model(source)
    classifier, ours = small.random_model(config, seed=1)
    filled = replace_params(ours, adapt_pretrained(config, ours["encoder"], source, theirs["encoder"]))
    images = jax.random.normal(jax.random.key(0), (1, *config.image_size, 3))

    @jax.jit
    def feature(model, images):
        return model.encoder(model.encoder.embed(images)).maps[0]

    # The encoders differ only in the final norm, which maps of earlier stages do not pass through.
    ours_first, theirs_first = (feature(nnx.merge(*parts), images) for parts in ((classifier, filled), (graph, theirs)))
    if len(config.model.depths) > 1:
        np.testing.assert_allclose(ours_first, theirs_first, atol=1e-5)
    else:
        norm = nnx.merge(graph, theirs).encoder.norm
        np.testing.assert_allclose(norm(ours_first), theirs_first, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, filled["head"], ours["head"])
    jax.tree.map(np.testing.assert_array_equal, filled["head_norm"], ours["head_norm"])


@pytest.mark.parametrize(("pretrained", "leading"), [("pvt_um", 0), ("vit_um", 1)])
def test_position_tables_are_resized_to_another_image_size(pretrained, leading):
    source, config = golden.config_of(pretrained), golden.config_of(PAIRS[pretrained])
    config.image_size = tuple(2 * size for size in source.image_size)
    initial = small.random_model(config)[1]["encoder"]
    adapted = adapt_pretrained(config, initial, source, small.random_model(source)[1]["encoder"])
    table = np.asarray(adapted["encoder"]["positions"]["table"][...])
    old, new = ([size // source.model.patch for size in image] for image in (source.image_size, config.image_size))
    width = source.model.widths[0]
    assert table.shape == (1, leading + new[0] * new[1], width)
    np.testing.assert_array_equal(table[:, :leading], 0)
    # Each old position lies between four new ones, whose mean is close to its embedding.
    means = table[0, leading:].reshape(old[0], 2, old[1], 2, width).mean((1, 3))
    inner = slice(1, -1)
    np.testing.assert_allclose(means[inner, inner], sincos_table(width, old)[inner, inner], atol=0.08)


def test_a_position_table_of_the_same_grid_is_unchanged():
    table = jax.random.normal(jax.random.key(0), (1, 13, 8))
    assert resize_positions(table, (3, 4), (3, 4), leading=1) is table


@pytest.mark.parametrize(
    ("key", "value"),
    [("widths", (16, 32, 64, 64)), ("depths", (2, 2, 1, 2)), ("heads", (2, 2, 4, 8)), ("position_width", 4)],
)
def test_encoder_sizes_that_do_not_match_are_named(key, value):
    source, config = golden.config_of("swin_um_window8"), golden.config_of("swin_classifier")
    params = small.random_model(source)[1]["encoder"]
    config.model[key], config.init = value, "DIR"
    with pytest.raises(UserError, match=rf"init: DIR holds an encoder of other sizes \(model.{key} is") as error:
        adapt_pretrained(config, params, source, params)
    assert f"{source.model[key]}, not {value}" in str(error.value)


def without_augmentation(config):
    config.augment.update(operations=0, erase=0.0, mixup=0.0, cutmix=0.0, label_smoothing=0.0)
    return config


def test_without_augmentation_the_loss_is_cross_entropy_of_flipped_images():
    config = without_augmentation(golden.config_of("vit_classifier"))
    config.model.drop_path = 0.0
    graph, params = small.random_model(config)
    batch = batch_of()
    model = nnx.merge(graph, params)

    @jax.jit
    def losses(images):
        logits = model(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])

    straight, flipped = losses(batch["image"]), losses(batch["image"][:, :, ::-1])
    measured = float(jax.jit(loss_of(config, graph))(params, batch)[0])
    means = {
        float(jnp.where(np.array([bool(number >> place & 1) for place in range(4)]), flipped, straight).mean())
        for number in range(16)
    }
    assert min(abs(measured - mean) for mean in means) < 1e-5


def test_the_default_augmentation_gives_a_finite_loss_and_every_parameter_a_gradient():
    config = golden.config_of("vit_classifier")
    assert config.augment.to_dict() == {
        "operations": 2,
        "magnitude": 9.0,
        "magnitude_std": 0.5,
        "erase": 0.25,
        "mixup": 0.8,
        "cutmix": 1.0,
        "label_smoothing": 0.1,
    }
    graph, params = small.random_model(config)
    (loss, _), gradient = jax.jit(jax.value_and_grad(loss_of(config, graph), has_aux=True))(params, batch_of())
    assert np.isfinite(loss)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_accumulated_parts_mix_the_same_pairs():
    config = golden.config_of("vit_classifier")
    graph, params = small.random_model(config)
    optimizer = optax.identity()
    results = []
    for parts in (1, 2, 4):
        step = make_train_step(
            *(loss_of(config, graph), optimizer, lambda step: 0.1),
            grad_accum_steps=parts,
            group_size=Task(config).group_size,
        )
        state, metrics = jax.jit(step)(init_state(params, optimizer), jax.tree.map(jnp.asarray, batch_of(8)))
        results.append((metrics["loss"], state.params["head"]["kernel"][...]))
    for loss, kernel in results[1:]:
        np.testing.assert_allclose(loss, results[0][0], rtol=1e-5)
        np.testing.assert_allclose(kernel, results[0][1], atol=1e-5)


def test_the_number_of_classes_comes_from_the_training_data(tmp_path):
    config = tiny_classifier.get_config()
    config.data.source = f"folder:{write_folder(tmp_path, 6, CLASSES[:3])}"
    task = Task(config)
    task.open()
    assert (config.model.classes, task.class_names) == (3, CLASSES[:3])
    config.model.classes = 1000
    with pytest.raises(UserError, match=r"model.classes is 1000.*--config.model.classes=3"):
        Task(config).open()
