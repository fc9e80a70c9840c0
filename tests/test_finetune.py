"""Fine-tuning and evaluation as a user starts, stops and continues them."""

import json
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import umae_jax
from tests import commands, tiny, tiny_classifier
from tests.images import write_folder
from umae_jax.config import read_config
from umae_jax.errors import UserError
from umae_jax.weights.stored_run import best_checkpoint

CLASSES = ("cat", "dog", "owl")
EVERY_4_STEPS = ("--config.validation.every_epochs=2",)  # 36 images in batches of 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Options of a command: 36 labelled training images, 21 validation images, one of them unreadable."""
    root = tmp_path_factory.mktemp("images")
    write_folder(root / "training", 36, CLASSES)
    write_folder(root / "validation", 21, CLASSES)
    (root / "validation" / "dog" / "010.jpg").write_bytes(b"no image")
    return (
        f"--config.data.source=folder:{root / 'training'}",
        f"--config.validation.source=folder:{root / 'validation'}",
    )


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, folders):
    workdir = tmp_path_factory.mktemp("pretrained")
    commands.pretrain(workdir, *folders, *EVERY_4_STEPS)
    return workdir


@pytest.fixture(scope="module")
def finished(tmp_path_factory, folders, pretrained):
    """An uninterrupted run: its directory, standard output and standard error."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, *commands.finetune(workdir, *folders, *EVERY_4_STEPS, f"--config.init={pretrained}")


def configure(*options):
    """Return tests/tiny_classifier.py with options of a command whose values are strings."""
    config = tiny_classifier.get_config()
    config.update_from_flattened_dict(dict(option.removeprefix("--config.").split("=") for option in options))
    return config


def test_pretraining_measures_knn_accuracy(pretrained):
    measured = {line["step"]: line["knn_top1"] for line in commands.lines(pretrained) if "knn_top1" in line}
    assert list(measured) == [0, 4, 8, 12]
    assert measured[12] > 0.6  # chance is about 1/3


def test_a_run_writes_its_accuracy_and_its_best_and_last_checkpoints(finished):
    workdir, output, errors = finished
    lines = commands.lines(workdir)
    validated = {line["step"]: line for line in lines if "validation_top1" in line}
    assert list(validated) == [0, 4, 8, 12]
    for line in validated.values():
        assert (line["validation_images"], line["validation_unreadable"]) == (20, 1)
        assert round(20 * line["validation_top1"], 6).is_integer()
        assert line["validation_top5"] == 1  # of three classes
    best = max(line["validation_top1"] for step, line in validated.items() if step)
    first = min(step for step, line in validated.items() if step and line["validation_top1"] == best)
    assert {first, 12} <= {int(path.name) for path in (workdir / "checkpoints").iterdir()}
    assert output.strip() == f"best top-1 {best:.2%}, in {workdir / 'checkpoints' / str(first)}"
    assert f"step 12/12 | validation_top1 {validated[12]['validation_top1']:.2%}" in errors
    assert re.search(
        r"init: loaded \d+ tensors of the encoder from .*, step 12 \(um_mae\); new: head, head_norm", errors
    )
    assert f"kNN on the features of the encoder as it was loaded: top-1 {validated[0]['knn_top1']:.2%}" in errors
    assert "top-1 per class, last validation" in errors
    assert (workdir / "confusion.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["classes"] == 3
    assert json.loads((workdir / "classes.json").read_text()) == list(CLASSES)
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    peak = 5e-2 * 16 / 256
    cosine = [1e-6 + (peak - 1e-6) * (1 + np.cos(np.pi * (step - 2) / 10)) / 2 for step in range(2, 12)]
    np.testing.assert_allclose(rates, [0, peak / 2, *cosine], rtol=1e-4, atol=1e-12)


def test_a_run_killed_twice_ends_with_the_same_metrics(finished, folders, pretrained, tmp_path):
    rng = random.Random(1)
    overrides = (*folders, *EVERY_4_STEPS, f"--config.init={pretrained}", "--config.checkpoint_every=3")
    for last in (3, 8):
        arguments = ("--config", "tests/tiny_classifier.py", "--workdir", tmp_path, *overrides)
        with commands.start("finetune", *arguments) as process:
            for line in process.stderr:
                if line.startswith("step ") and int(re.match(r"step (\d+)", line)[1]) >= last:
                    break
            time.sleep(rng.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
    commands.finetune(tmp_path, *overrides)
    assert commands.lines(tmp_path) == commands.lines(finished[0])
    best = [best_checkpoint(workdir) for workdir in (tmp_path, finished[0])]
    assert (best[0].value, best[0].folder.name) == (best[1].value, best[1].folder.name)


def test_a_run_stopped_in_its_last_validation_repeats_it_when_continued(folders, tmp_path):
    """The run keeps an EMA of the parameters and validates it."""
    options = [f"{folders[1]}_more", "--config.optimizer.ema_decay=0.5", "--config.total_steps=4", *EVERY_4_STEPS]
    validation = folders[1].partition(":")[2]
    for path in Path(validation).rglob("*.jpg"):
        for copy in range(30):
            target = Path(f"{validation}_more", path.parent.name, f"{path.stem}_{copy}.jpg")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    arguments = ("--config", "tests/tiny_classifier.py", "--workdir", tmp_path, folders[0], *options)
    with commands.start("finetune", *arguments) as process:
        for line in process.stderr:
            if line.startswith("step 4/4 | epoch"):
                break
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM at step 4" in errors
    validated = [line["step"] for line in commands.lines(tmp_path) if "validation_top1" in line]
    assert validated == [0]
    umae_jax.finetune(read_config(tmp_path / "config.json"), tmp_path)
    line = commands.lines(tmp_path)[-1]
    assert (line["step"], line["validation_images"]) == (4, 600)
    assert umae_jax.evaluate(tmp_path)["top1"] == line["validation_top1"]


def test_losses_do_not_depend_on_the_number_of_devices(finished, folders, pretrained, tmp_path):
    commands.finetune(tmp_path, *folders, *EVERY_4_STEPS, f"--config.init={pretrained}", devices=2)
    np.testing.assert_allclose(commands.losses(tmp_path), commands.losses(finished[0]), rtol=1e-5)


def test_evaluation_agrees_with_the_run_for_any_number_of_devices_and_batch_size(finished):
    workdir = finished[0]
    last = next(line for line in reversed(commands.lines(workdir)) if "validation_top1" in line)
    output, _ = commands.run("evaluate", "--workdir", workdir, "--json", "--batch_size=3", devices=1)
    for values in (json.loads(output), umae_jax.evaluate(workdir, batch_size=64)):  # here with 8 devices
        classes = values.pop("classes")
        assert {name: counts["images"] for name, counts in classes.items()} == {"cat": 7, "dog": 6, "owl": 7}
        correct = sum(counts["images"] * counts["top1"] for counts in classes.values())
        assert correct / 20 == pytest.approx(values["top1"])
        assert values == {
            "step": 12,
            "images": 20,
            "unreadable": 1,
            "top1": last["validation_top1"],
            "top5": last["validation_top5"],
        }


def test_evaluate_prints_class_probabilities_per_image(finished, folders, tmp_path):
    write_folder(tmp_path, 2)
    (tmp_path / "broken.png").write_bytes(b"")
    output, errors = commands.run("evaluate", "--workdir", finished[0], "--images", tmp_path, "--best")
    lines = output.splitlines()
    assert len(lines) == 2
    for line, name in zip(lines, ("000.jpg", "001.jpg"), strict=True):
        path, rest = line.split(": ")
        assert Path(path).name == name
        probabilities = dict(part.rsplit(" ", 1) for part in rest.split(", "))
        assert probabilities.keys() == set(CLASSES)
        assert sum(float(value.removesuffix("%")) for value in probabilities.values()) == pytest.approx(100, abs=0.3)
    assert "broken.png (" in errors
    assert "1 of 3 images cannot be read" in errors
    table = tmp_path / "table.csv"
    printed, _ = commands.run("evaluate", "--workdir", finished[0], "--images", tmp_path, "--best", "--output", table)
    assert printed.strip() == f"2 images in {table}"
    assert [row.split(",")[0] for row in table.read_text().splitlines()[1:]] == [line.split(": ")[0] for line in lines]


def test_any_stage_of_any_run_can_be_probed(pretrained):
    values = umae_jax.evaluate(pretrained, probe="knn")
    assert (values["training_images"], values["images"], values["unreadable"], values["neighbors"]) == (36, 20, 1, 20)
    measured = [line["knn_top1"] for line in commands.lines(pretrained) if "knn_top1" in line]
    assert values["top1"] == pytest.approx(measured[-1])
    output, _ = commands.run("evaluate", "--workdir", pretrained, "--probe", "linear", "--stage", "0")
    assert re.fullmatch(
        r"linear top-1 \d+\.\d\d% of 20 images, from 36 \(penalty [\de.-]+\); 1 unreadable .*\n", output
    )


def error_line(module, *arguments):
    _, errors = commands.run(module, *arguments, status=2)
    assert "Traceback" not in errors
    return errors.splitlines()[-1]


def test_errors_of_the_commands_are_one_line(finished, folders, tmp_path):
    config = ("--config", "tests/tiny_classifier.py", "--workdir", tmp_path / "run")
    assert "there is no file or directory nowhere" in error_line("finetune", *config, *folders, "--config.init=nowhere")
    assert "--output belongs to --images" in error_line("evaluate", "--workdir", finished[0], "--output", "a.csv")
    assert "--source and --stage" in error_line("evaluate", "--workdir", finished[0], "--stage", "0")


def test_every_user_error_names_what_is_wrong(finished, folders, pretrained, tmp_path):
    def raises(message):
        return pytest.raises(UserError, match=re.escape(message))

    config = configure(*folders, f"--config.init={pretrained}")
    config.model.heads = (2, 2)
    with raises("other sizes (model.heads is (1, 2), not (2, 2))"):
        umae_jax.finetune(config, tmp_path / "run")
    with raises("model.method: um_mae"):
        umae_jax.finetune(tiny.get_config(), tmp_path / "run")
    with raises("choose knn or linear"):
        umae_jax.evaluate(pretrained)
    with raises("holds no best checkpoint"):
        umae_jax.evaluate(pretrained, probe="knn", best=True)
    before = sorted(path.name for path in pretrained.iterdir())
    with raises("another model (model.method is um_mae, not classifier)"):
        umae_jax.finetune(configure(*folders), pretrained)
    assert sorted(path.name for path in pretrained.iterdir()) == before
    other = write_folder(tmp_path / "others", 4, ("cat", "dog", "emu"))
    with raises("was not trained on these classes"):
        umae_jax.evaluate(finished[0], validation=f"folder:{other}")
