import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests import golden, small, tiny, tiny_classifier
from tests.images import write_folder
from tests.runs import store
from umae_jax.errors import UserError
from umae_jax.multihost import StopSignal
from umae_jax.tasks.classification import Task
from umae_jax.training.run import train
from umae_jax.training.sharding import make_mesh
from umae_jax.training.state import abstract_run, init_state
from umae_jax.training.step import loss_function, make_train_step
from umae_jax.weights.stored_run import read_run

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


def batch_of(count=4, side=64, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    labels = rng.integers(10, size=count).astype(np.int32)
    return {"image": images, "sample_index": np.arange(count, dtype=np.uint32), "label": labels}


def loss_of(config, graph):
    task = Task(config)
    return loss_function(task, graph)


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
    for parts in (1, 4):
        step = make_train_step(
            *(loss_of(config, graph), optimizer, lambda step: 0.1),
            grad_accum_steps=parts,
            group_size=Task(config).group_size,
        )
        state, metrics = jax.jit(step)(init_state(params, optimizer), jax.tree.map(jnp.asarray, batch_of(8)))
        results.append((metrics["loss"], state.params["head"]["kernel"][...]))
    (loss, kernel), (expected_loss, expected_kernel) = results
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    np.testing.assert_allclose(kernel, expected_kernel, atol=1e-5)


def test_the_number_of_classes_comes_from_the_training_data(tmp_path):
    config = tiny_classifier.get_config()
    config.data.source = f"folder:{write_folder(tmp_path, 6, CLASSES[:3])}"
    task = Task(config)
    task.open()
    assert (config.model.classes, task.class_names) == (3, CLASSES[:3])
    config.model.classes = 1000
    with pytest.raises(UserError, match=r"model.classes is 1000.*--config.model.classes=3"):
        Task(config).open()


# Runs.


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 30 images of three classes."""
    return write_folder(tmp_path_factory.mktemp("images"), 30, CLASSES[:3])


def config_for(images, **changes):
    config = tiny_classifier.get_config()
    config.data.source = f"folder:{images}"
    config.update({"total_steps": 4, "log_every": 1, **changes})
    return config


def run(config, workdir):
    with StopSignal() as stop:
        task = Task(config)
        train(task, workdir, stop)
    return task


def test_a_frozen_encoder_stays_bit_equal_without_optimizer_state_and_the_head_trains(images, tmp_path):
    pretrained = tiny.get_config()
    store(tmp_path / "pretrained", pretrained, small.random_model(pretrained)[1])
    init = str(tmp_path / "pretrained")
    config = config_for(images, freeze_encoder=True, init=init, total_steps=2)
    config.optimizer.weight_decay = 0.5
    run(config, tmp_path / "run")
    config.total_steps = 4
    run(config, tmp_path / "run")  # also from a checkpoint
    before = read_run(tmp_path / "pretrained").params["encoder"]
    after = read_run(tmp_path / "run")
    expected = dict(nnx.to_flat_state(before))
    trained = nnx.to_flat_state(after.params["encoder"])
    assert len(trained) > 20
    for path, param in trained:
        np.testing.assert_array_equal(param[...], expected[path][...], err_msg=str(path))
    assert np.abs(after.params["head"]["kernel"][...]).max() > 1e-3
    state = abstract_run(Task(after.config), make_mesh()).state
    head = len(jax.tree.leaves(state.params["head"])) + len(jax.tree.leaves(state.params["head_norm"]))
    assert len([leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.shape]) == 2 * head
    config.freeze_encoder = False
    with pytest.raises(UserError, match=r"freeze_encoder is True, not False"):
        run(config, tmp_path / "run")


def test_held_out_images_do_not_train_and_a_run_keeps_its_split(images, tmp_path, capsys):
    config = config_for(images)
    config.validation.fraction = 0.2
    task = run(config, tmp_path)
    assert len(task.source) == 24
    assert not {*task.source.indices} & {*task.validation.indices}
    assert "6 of 30 images of data.source validate and do not train" in capsys.readouterr().err
    assert task.results.accuracy.images == 6
    assert (tmp_path / "confusion.png").exists() is False  # drawn when the result is asked for
    task.result(tmp_path)
    printed = capsys.readouterr().err
    assert "top-1 per class, last validation" in printed
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
    config.validation.fraction, config.total_steps = 0.5, 5
    continued = run(config, tmp_path)
    assert "validation.fraction stays 0.2" in capsys.readouterr().err
    np.testing.assert_array_equal(continued.validation.indices, task.validation.indices)
    config.seed = 1
    with pytest.raises(UserError, match="seed is 0 in this run"):
        run(config, tmp_path)


def test_a_run_of_a_version_without_the_split_keeps_all_its_images(images, tmp_path, capsys):
    config = config_for(images)
    config.validation.fraction = 0.0
    run(config, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["validation"]["fraction"], stored["early_stop"], stored["freeze_encoder"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    config = config_for(images, total_steps=5)
    assert config.validation.fraction == 0.1
    assert len(run(config, tmp_path).source) == 30
    assert "validation.fraction stays 0" in capsys.readouterr().err


def test_early_stopping_ends_the_run_and_a_resumed_one_says_so(images, tmp_path, capsys):
    config = config_for(images, early_stop=1, total_steps=20)
    config.optimizer.base_learning_rate = 1e-30  # no validation improves on the first one
    config.validation.every_epochs = 1.0
    run(config, tmp_path)
    printed = capsys.readouterr().err
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert steps[-1] < 20
    assert f"ending at step {steps[-1]}: top-1 has not risen above" in printed
    assert f"finished {steps[-1]} steps" in printed
    lines = (tmp_path / "metrics.jsonl").read_bytes()
    run(config, tmp_path)
    assert f"has ended at step {steps[-1]} already: top-1 has not risen" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines
    config.early_stop = None
    run(config, tmp_path)
    assert "finished 20 steps" in capsys.readouterr().err


def test_early_stopping_needs_validations(images, tmp_path):
    config = config_for(images, early_stop=1)
    config.validation.fraction = 0.0
    with pytest.raises(UserError, match=r"^early_stop: there are no validations"):
        run(config, tmp_path)


def test_the_table_of_the_run_names_classes_and_validation_images(images):
    task = Task(config_for(images))
    task.open()
    assert task.overview() == {
        "classes": "3: ant 9, bee 9, cat 9 (imbalance 1.0)",
        "validation": "3 images, held out of data.source (validation.fraction=0.1)",
    }


def test_a_result_below_knn_on_the_first_features_is_named(images, tmp_path, capsys):
    pretrained = tiny.get_config()
    store(tmp_path / "pretrained", pretrained, small.random_model(pretrained)[1])
    config = config_for(images, init=str(tmp_path / "pretrained"), total_steps=2)
    task = run(config, tmp_path / "run")
    assert re.search(
        r"kNN on the features of the encoder as it was loaded: top-1 \d+\.\d\d%\n", capsys.readouterr().err
    )
    file = tmp_path / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["step"] for row in rows if "knn_top1" in row] == [0]
    rows[0]["knn_top1"] = 1.5  # above any accuracy
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task.result(tmp_path / "run")
    assert re.search(r"best top-1, \d+\.\d\d%, is below the 150.00% of kNN", capsys.readouterr().err)
