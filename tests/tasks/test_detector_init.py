"""The first parameters of a detector, and the weight files that it exports."""

import jax
import numpy as np
import pytest
from flax import nnx

from tests import small, tiny, tiny_detector
from tests.rngs import ConstantRngs
from tests.runs import store
from umae_jax import load_encoder
from umae_jax.detection.mmdet import to_tensors
from umae_jax.errors import UserError
from umae_jax.tasks import state_dict
from umae_jax.tasks.detection import Task
from umae_jax.tasks.importing import import_weights
from umae_jax.weights.encoder_file import encode_encoder
from umae_jax.weights.exchange import export_weights
from umae_jax.weights.files import Weights, encode_weights, read_weights
from umae_jax.weights.names import to_reference

ENCODER = ("backbone", "encoder")


def config_of(init=None, **model):
    config = tiny_detector.get_config()
    config.init = None if init is None else str(init)
    config.model.update({"classes": 2, "masks": True, **model})
    return config


def shapes_of(config):
    model = nnx.eval_shape(lambda: Task(config).build_model(ConstantRngs()))
    return nnx.state(model, (nnx.Param, nnx.BatchStat))


def drawn(config, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes_of(config))


def initial(config):
    """Return the parameters that `init` gives, by their path."""
    return {keys: variable[...] for keys, variable in nnx.to_flat_state(Task(config).initial_params(shapes_of(config)))}


def paths(config):
    return {keys for keys, _ in nnx.to_flat_state(shapes_of(config))}


def assert_taken(loaded, params, keys):
    """Test that exactly these parameters are those of the other model."""
    assert loaded.keys() == keys
    theirs = dict(nnx.to_flat_state(params))
    for path in keys:
        np.testing.assert_array_equal(loaded[path], theirs[path][...], err_msg=str(path))


def encoder_paths(config):
    return {keys for keys in paths(config) if keys[:2] == ENCODER}


def of_classes(config):
    """The paths of layers that depend on the number of classes."""
    return {keys for keys in paths(config) if keys[-2] in ("classify", "logits") and keys[0] == "roi_heads"}


# From a pre-trained encoder.


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A UM-MAE run of the encoder's sizes, and its parameters."""
    ours, config = tiny_detector.get_config(), tiny.get_config()
    config.image_size = (64, 64)
    for key in ("widths", "depths", "heads", "mlp_ratios", "position_width"):
        config.model[key] = ours.model[key]
    params = small.random_model(config)[1]
    workdir = tmp_path_factory.mktemp("pretrained") / "run"
    store(workdir, config, params)
    return workdir, config, params


def test_without_init_all_is_new(capsys):
    config = config_of()
    assert Task(config).initial_params(shapes_of(config)) is None
    assert "training from scratch" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["run", "encoder", "model"])
def test_a_pretrained_encoder_is_taken_from_a_run_and_from_files(pretrained, tmp_path, kind, capsys):
    workdir, config, params = pretrained
    init = tmp_path / "weights.safetensors"
    if kind == "run":
        init = workdir
    elif kind == "encoder":
        init.write_bytes(encode_encoder(config, params["encoder"], 7))
    else:
        export_weights(workdir, init)
    target = config_of(init)
    loaded = initial(target)
    assert_taken(loaded, nnx.State({"backbone": {"encoder": params["encoder"]}}), encoder_paths(target))
    printed = capsys.readouterr().err
    assert f"init: loaded {len(loaded)} tensors of the encoder from {init}" in printed
    assert "new: global_block" in printed
    assert "model.window changed from 8 to 4" in printed


def test_an_encoder_of_other_sizes_is_rejected(pretrained):
    config = config_of(pretrained[0], widths=(8, 16, 16, 32))
    with pytest.raises(
        UserError, match=r"^init: .*other sizes \(model.widths is \(8, 16, 16, 16\), not \(8, 16, 16, 32\)"
    ):
        initial(config)


@pytest.mark.parametrize(
    ("init", "message"), [("nowhere", "^init: there is no file or directory nowhere|^init.*nowhere")]
)
def test_missing_weights_are_named(init, message):
    with pytest.raises(UserError, match=message):
        initial(config_of(init))


# From another detector.


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A stored detector of two classes: its directory, its exported file, its parameters."""
    folder = tmp_path_factory.mktemp("detector")
    config = config_of()
    config.data.semantic = "/secret/maps"
    config.data.source = "coco:/secret/annotated"
    params = drawn(config)
    store(folder / "run", config, params)
    file = folder / "export" / "detector.safetensors"
    written = export_weights(folder / "run", file, state_dict=state_dict)
    assert [path.name for path in written] == ["detector.safetensors", "README.md"]
    return folder / "run", file, params


@pytest.mark.parametrize("kind", ["run", "file"])
@pytest.mark.parametrize("classes", [2, 5])
def test_a_detector_is_taken_where_shapes_agree(detector, kind, classes, capsys):
    run, file, params = detector
    config = config_of({"run": run, "file": file}[kind], classes=classes)
    expected = paths(config) - (of_classes(config) if classes != 2 else set())
    assert len(of_classes(config)) == 8  # stages; weight and bias; boxes and masks
    assert_taken(initial(config), params, expected)
    printed = capsys.readouterr().err
    new = "nothing" if classes == 2 else "roi_heads.box_heads.0.classify, roi_heads.box_heads.1.classify, "
    assert f"of a detector beside its encoder; new: {new}" in printed
    assert ("not used: " in printed) == (classes != 2)


@pytest.mark.parametrize("kind", ["run", "file"])
def test_a_cascade_gives_its_first_stage_to_a_detector_of_one_without_masks(detector, kind):
    run, file, params = detector
    config = config_of({"run": run, "file": file}[kind], stages=1, masks=False)
    assert_taken(initial(config), params, paths(config))


def test_a_detector_of_one_stage_gives_a_cascade_its_first(tmp_path):
    short = config_of(stages=1)
    params = drawn(short)
    store(tmp_path / "run", short, params)
    export_weights(tmp_path / "run", tmp_path / "one.safetensors", state_dict=state_dict)
    for init in ("run", "one.safetensors"):
        assert_taken(initial(config_of(tmp_path / init)), params, paths(short))


def test_a_detector_of_another_encoder_is_rejected(detector):
    for init in detector[:2]:
        with pytest.raises(
            UserError, match=r"^init: .*other sizes \(model.depths is \(1, 1, 1, 1\), not \(1, 1, 2, 1\)"
        ):
            initial(config_of(init, depths=(1, 1, 2, 1)))


def write_mmdet(path, backbone, params):
    """Write a detector of mmdet with some backbone, whose counters our files lack."""
    config = config_of()
    tensors = {key: array for key, array in to_tensors(config, params).items() if key.startswith(("neck", "r"))}
    tensors["roi_head.bbox_head.0.shared_convs.0.bn.num_batches_tracked"] = np.array(3.0, np.float32)
    path.write_bytes(encode_weights(path.suffix, Weights(tensors | backbone, {})))
    return path


def test_heads_of_mmdet_are_taken_without_their_backbone(detector, tmp_path, capsys):
    params = detector[2]
    file = write_mmdet(
        tmp_path / "htc.safetensors", {"backbone.conv1.weight": np.ones((4, 3, 7, 7), np.float32)}, params
    )
    config = config_of(file)
    assert_taken(initial(config), params, {keys for keys in paths(config) if keys[0] != "backbone"})
    assert "init: the file's backbone is no encoder of this project, so the encoder is new" in capsys.readouterr().err


def test_heads_that_are_not_finite_are_rejected(detector, tmp_path):
    file = write_mmdet(
        tmp_path / "htc.safetensors", {"rpn_head.rpn_cls.bias": np.full(3, np.nan, np.float32)}, detector[2]
    )
    with pytest.raises(UserError, match=r"^init: .*not finite \(rpn_head.rpn_cls.bias\)"):
        initial(config_of(file))


# Files.


def test_an_exported_detector_has_all_parameters_and_no_paths(detector):
    _, file, params = detector
    tensors, metadata = read_weights(file)
    expected = to_tensors(config_of(), params)
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name], array, err_msg=name)
    assert len(expected) == len(paths(config_of()))
    assert "secret" not in "".join(metadata.values())
    assert "secret" not in (file.parent / "README.md").read_text()


def test_the_card_of_a_detector(detector):
    _, file, params = detector
    card = (file.parent / "README.md").read_text()
    assert "pipeline_tag: image-segmentation\n" in card
    assert "| classes | 2 |" in card
    assert f"| parameters | {sum(leaf.size for leaf in jax.tree.leaves(params)):,} |" in card
    assert "--config.init=detector.safetensors" in card
    assert "parameter names of mmdet" in card
    assert "umae_backbone" not in card


def test_the_encoder_of_an_exported_detector_loads(detector, tmp_path):
    run, file, params = detector
    images = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), dtype=np.uint8)
    encoder = load_encoder(file)
    assert encoder.widths == (8, 16, 16, 16)
    for ours, theirs in zip(encoder(images), load_encoder(run)(images), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    reference = to_reference(config_of(), nnx.State({"encoder": params["backbone"]["encoder"]}))
    assert {f"backbone.{name}" for name in reference} <= read_weights(file).tensors.keys()


def test_a_detector_is_not_imported_as_a_run(detector, tmp_path):
    with pytest.raises(UserError, match=r"^FILE: .*holds a detector.*--config.init="):
        import_weights(detector[1], tmp_path / "run")
    assert not (tmp_path / "run").exists()
