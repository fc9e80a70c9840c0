"""Runs of the smallest detector: stopped and continued, by two processes, and evaluated in several ways."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image

from tests import annotated_images, commands, smallest_detector
from tests.detection import scenes
from tests.stopping_detector import Stops
from umae_jax.detection import box_head, layers
from umae_jax.errors import Preempted
from umae_jax.multihost import StopSignal
from umae_jax.tasks import detecting, evaluation
from umae_jax.tasks.detection import Task
from umae_jax.training import run as run_module
from umae_jax.training.run import train
from umae_jax.training.state import init_state
from umae_jax.training.step import loss_function, make_train_step
from umae_jax.weights.stored_run import read_arrays, read_run

STEPS = 4
SIZES = 6 * ((64, 48), (48, 64), (64, 64))  # of 64 x 64 pixels at most, so that no image is resized
IMAGES = 2 * len(SIZES) - 1  # of validation, that can be read
BROKEN, MIRRORED = 3, 100  # a validation image that cannot be read; added to the ids of mirrored images
OPTIONS = {"total_steps": STEPS, "checkpoint_every": 1, "checkpoint_keep": STEPS, "validation.every_epochs": 1000.0}
OPTIONS |= {"model.semantic_classes": 2, "optimizer.ema_decay": 0.5}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images with a shape, and their semantic maps; those of validation also mirrored, and one of them is broken."""
    drawn, folder = (tmp_path_factory.mktemp(name) for name in ("drawn", "annotated"))
    content = annotated_images.coco(SIZES, objects=1)
    for number, entry in enumerate(content["annotations"]):
        entry["category_id"] = sorted(annotated_images.CLASSES)[number % 2]
    annotated_images.write(drawn, content)
    for name in ("images", "maps"):
        (folder / name).mkdir()
    mirrored = {"images": [], "annotations": []}
    for image, entry in zip(content["images"], content["annotations"], strict=True):
        name, number, (x, y, width, height) = image["file_name"], image["id"] + MIRRORED, entry["bbox"]
        shape = np.asarray(Image.open(drawn / "images" / name))
        rng = np.random.default_rng(image["id"])
        noise = rng.integers(0, 60, shape.shape, np.uint8)  # so that no image is symmetric
        pixels, inside = np.maximum(shape, noise), shape.any(-1).astype(np.uint8)
        for file, array in (("images/", pixels), ("maps/", inside)):
            Image.fromarray(array).save(folder / f"{file}{name}")
        Image.fromarray(pixels[:, ::-1]).save(folder / f"images/mirrored_{name}")
        mirrored["images"].append({**image, "id": number, "file_name": f"mirrored_{name}"})
        bbox = [image["width"] - x - width, y, width, height]
        mirrored["annotations"].append({**entry, "id": entry["id"] + MIRRORED, "image_id": number, "bbox": bbox})
    (folder / "annotations_train.json").write_text(json.dumps(content))
    for entry in content["images"]:
        entry["file_name"] = f"val_{entry['file_name']}"
        (folder / "images" / entry["file_name"]).hardlink_to(folder / "images" / entry["file_name"][4:])
    broken = folder / "images" / f"val_{BROKEN}.png"
    broken.unlink()
    broken.write_bytes(b"no image")
    both = {key: content[key] + mirrored[key] for key in mirrored}
    (folder / "annotations_val.json").write_text(json.dumps(content | both))
    return folder


def options_of(data):
    source = f"coco:{data}"
    return OPTIONS | {"data.source": source, "validation.source": source, "data.semantic": str(data / "maps")}


def config_of(data):
    config = smallest_detector.get_config()
    config.update_from_flattened_dict(options_of(data))
    return config


def flat(tree):
    return {path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(tree)}


def detections(workdir):
    """Return the written detections of each image: rows of category, score, and x y width height."""
    found = {}
    for entry in json.loads((workdir / "detections.json").read_text()):
        found.setdefault(entry["image_id"], []).append([entry["category_id"], entry["score"], *entry["bbox"]])
    return {number: np.array(rows) for number, rows in found.items()}


def assert_same(ours, theirs):
    """Compare the detections of each image, in any order: equal scores have none."""
    assert ours.keys() == theirs.keys()
    for number, rows in ours.items():
        errors = np.abs(rows[:, None] - theirs[number][None]) / [1e-3, 1e-4, *4 * (1e-2,)]
        assert (errors.max(-1) < 1).sum(0).tolist() == len(rows) * [1], number


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Compile the steps of each configuration once for all runs."""
    programs, compile_programs = {}, run_module.compile_programs

    def compile_or_take(task, *arguments):
        key = str(task.config.model) + str(task.config.optimizer)
        if key not in programs:
            programs[key] = compile_programs(task, *arguments)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "compile_programs", compile_or_take)
        yield


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The directory of a run by one process."""
    workdir = tmp_path_factory.mktemp("alone")
    with StopSignal() as stop:
        train(Task(config_of(data)), workdir, stop)
    return workdir


@pytest.fixture(scope="module")
def plain(alone):
    """The metrics and detections of the run in one view, with batches of 8."""
    _, values = evaluation.evaluate_run(evaluation.open_run(alone), batch_size=8)
    return values, detections(alone)


# Runs.


def test_a_run_with_semantic_maps_and_a_moving_average_continues_as_if_never_stopped(alone, data, tmp_path):
    config = config_of(data)
    config.validation.source = None  # so that no evaluation is compiled
    with StopSignal() as stop, pytest.raises(Preempted, match="step 2"):
        train(Stops(config, stop, 2), tmp_path, stop)
    with StopSignal() as stop:
        train(Task(config), tmp_path, stop)
    ours, theirs = commands.lines(tmp_path), commands.lines(alone)[:STEPS]
    assert ours == theirs
    values = [line["semantic"] for line in ours if "loss" in line]
    assert len(values) == STEPS
    assert values[-1] < 0.9 * values[0]
    ours, theirs = (stored(workdir, STEPS) for workdir in (tmp_path, alone))
    for name in ("params", "average"):
        jax.tree.map(np.testing.assert_array_equal, flat(ours[name]), flat(theirs[name]))


def stored(workdir, step):
    """Return the parameters of a checkpoint and their moving average, with the running statistics."""
    params = read_run(workdir).params
    return read_arrays(workdir / "checkpoints" / str(step), {"params": params, "average": params})


def test_the_moving_average_is_evaluated_and_follows_parameters_and_running_statistics(alone, plain):
    before, after = (stored(alone, step) for step in (STEPS - 1, STEPS))
    assert any(isinstance(variable, nnx.BatchStat) for _, variable in nnx.to_flat_state(after["average"]))
    average, params, old = (flat(tree) for tree in (after["average"], after["params"], before["average"]))
    changed = 0
    for path, array in average.items():
        np.testing.assert_allclose(array, (old[path] + params[path]) / 2, rtol=1e-5, atol=1e-7, err_msg=str(path))
        changed += np.abs(array - params[path]).max() > 0
    assert changed > 0.8 * len(average)

    run = evaluation.open_run(alone)
    jax.tree.map(np.testing.assert_array_equal, flat(run.params), average)
    metrics, found = plain
    last = commands.lines(alone)[-1]
    names = [name for name in last if name.startswith("box_")]
    assert {name: metrics[name] for name in names} == pytest.approx({name: last[name] for name in names}, abs=1e-6)
    assert last["box_ap"] > 0
    evaluation.evaluate_run(run._replace(params=after["params"]), batch_size=8)
    with pytest.raises(AssertionError):  # the parameters themselves detect something else
        assert_same(detections(alone), found)


TRAIN_AND_EVALUATE = """
import json, sys
import jax
import umae_jax
from tests import smallest_detector

address, process, options, workdir, alone = sys.argv[1:]
jax.config.update("jax_enable_preemption_service", True)
jax.distributed.initialize(address, 2, int(process))
config = smallest_detector.get_config()
config.update_from_flattened_dict(json.loads(options))
umae_jax.detect(config, workdir)
print(json.dumps(umae_jax.evaluate(alone, batch_size=2)))
"""


def test_two_processes_train_and_evaluate_as_one(alone, plain, data, tmp_path):
    """They share one copy of the parameters, and evaluate by batches of 2; `alone` has eight devices, and batches of 8.

    Both commands run in the same two processes, which compile nothing that they need not.
    """
    options = json.dumps(options_of(data) | {"mesh.fsdp": 2, "validation.source": None})
    environment = {**os.environ, "PYTHONPATH": str(commands.ROOT), "XLA_FLAGS": commands.xla_flags()}
    address, pipe = f"localhost:{commands.free_port()}", subprocess.PIPE
    started = []
    for process in ("0", "1"):
        command = [sys.executable, "-c", TRAIN_AND_EVALUATE, address, process, options, tmp_path / "run", alone]
        started.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
    printed = [json.loads(output.splitlines()[-1]) for output, _ in commands.end(started)]

    ours, theirs = commands.lines(tmp_path / "run"), commands.lines(alone)[:STEPS]
    assert [line["step"] for line in ours] == [*range(1, STEPS + 1)]
    for line, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(list(line.values()), [expected[key] for key in line], rtol=1e-4, atol=1e-6)
    metrics, found = plain
    assert printed == 2 * [pytest.approx(metrics, abs=1e-6)]
    assert metrics["images"] == IMAGES
    assert_same(detections(alone), found)


# Evaluation.


@pytest.fixture
def batches(monkeypatch):
    """The sizes of the batches that detectors are compiled for."""
    sizes, abstract = [], detecting.annotated.abstract_eval_batch

    def spy(config, canvas, mesh, batch_size):
        sizes.append(batch_size)
        return abstract(config, canvas, mesh, batch_size)

    monkeypatch.setattr(detecting.annotated, "abstract_eval_batch", spy)
    return sizes


def test_larger_batches_detect_the_same(alone, plain, batches):
    _, values = evaluation.evaluate_run(evaluation.open_run(alone), batch_size=16)
    assert batches == [16]
    assert values == pytest.approx(plain[0], abs=1e-6)
    assert_same(detections(alone), plain[1])


def test_mirrored_images_have_mirrored_detections_in_mirrored_views(alone, plain, data):
    """Proposals of all views share one NMS, so further views of any kind change the detections."""
    _, values = evaluation.evaluate_run(evaluation.open_run(alone, flip=True), batch_size=8)
    assert values["images"] == IMAGES
    assert values["box_ap"] > 0
    content = json.loads((data / "annotations_val.json").read_text())
    widths = {image["id"]: image["width"] for image in content["images"]}

    def of_both(found):
        """Return the detections in images, and those in their mirror images, mirrored."""
        ours = {number: rows for number, rows in found.items() if number + MIRRORED in found}
        assert len(ours) >= len(SIZES) - 1
        theirs = {number: found[number + MIRRORED].copy() for number in ours}
        for number, rows in theirs.items():
            rows[:, 2] = widths[number] - rows[:, 2] - rows[:, 4]
        return ours, theirs

    assert_same(*of_both(detections(alone)))
    with pytest.raises(AssertionError):
        assert_same(*of_both(plain[1]))


# Gradient accumulation.


def test_two_microbatches_are_one_batch_but_for_batch_norm():
    """Losses are divided by numbers of samples, which are the same in both halves where all samples are drawn.

    BatchNorm norms each half by its own statistics. So the losses of the box head differ, and the running variance
    lacks that between the halves. The running mean, and the losses of the parts without a norm, are equal.
    """
    config = smallest_detector.get_config()
    config.model.update(classes=2, semantic_classes=2)
    task = Task(config)
    graph, params = nnx.split(nnx.eval_shape(lambda: task.build_model(nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jax.numpy.asarray(rng.normal(0, 0.1, x.shape), jax.numpy.float32), params)
    batch = jax.tree.map(jax.numpy.asarray, scenes.draw(config, 4))
    loss, identity, results = loss_function(task, graph), optax.identity(), []

    def constant(params, batch):  # compiles faster than its gradient, which tests of the step compare
        return loss(jax.lax.stop_gradient(params), batch)

    for parts in (1, 2):
        step = make_train_step(constant, identity, lambda _: 1.0, grad_accum_steps=parts)
        state, metrics = jax.jit(step)(init_state(params, identity), batch)
        statistics = nnx.to_flat_state(nnx.state(nnx.merge(graph, state.params), nnx.BatchStat))
        results.append((metrics, {path[-1]: np.asarray(variable[...]) for path, variable in statistics}))
    (whole, statistics), (halves, halved) = results
    for name in ("rpn_class", "rpn_box", "semantic"):
        np.testing.assert_allclose(halves[name], whole[name], rtol=1e-5)
    assert abs(halves["stage_0_class"] - whole["stage_0_class"]) > 1e-5 * whole["stage_0_class"]
    np.testing.assert_allclose(halved["mean"], statistics["mean"], rtol=1e-4, atol=1e-6)
    count = 4 * config.model.roi_samples * box_head.SIDE**2
    old = next(np.asarray(variable[...]) for path, variable in nnx.to_flat_state(params) if path[-1] == "var")
    variance, within = (old + (new["var"] - old) / layers.MOMENTUM for new in (statistics, halved))
    between = variance * (count - 1) - within * (count - 2)
    assert (between > -1e-4 * within.max() * count).all()
    assert between.max() > 1e-3 * within.max() * count
