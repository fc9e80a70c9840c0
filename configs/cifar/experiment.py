"""UM-MAE, SimMIM and no pre-training, side by side on CIFAR-10: the paper's comparison, in hours on two cores.

    python configs/cifar/experiment.py --zip cifar10.zip --workdir DIR [--seeds 3]

Every method pre-trains for the same number of epochs on all 50,000 training images without their labels, and is then
fine-tuned on the same few labelled images. Accuracy is measured on the 10,000 test images with the last checkpoint; no
choice depends on it.

Learning rates are tuned first, with the same budget for every method, by top-1 on held-out training images:
pre-training tries RATES for a fraction of its epochs, each followed by a short fine-tuning at the configuration's rate;
fine-tuning then tries RATES from the best of these. UM-MAE's variants use UM-MAE's rates. Every run is a umae_jax
command with its own directory in DIR, so the same command continues after an interruption. The results are
DIR/table.json and DIR/table.png.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.figure
from absl import app, flags

HERE = Path(__file__).parent
RATES = (0.3, 1.0, 3.0)  # multiples of the configuration's rate
UM_MAE = "um_mae"
SCRATCH = "from scratch"

_ZIP = flags.DEFINE_string(
    "zip", None, "CIFAR-10 as JPEG files, train/CLASS/*.jpg and test/CLASS/*.jpg.", required=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of all runs and results.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs per method.", lower_bound=1)
_LABELLED = flags.DEFINE_integer("labelled", 200, "Labelled images per class to fine-tune on.", lower_bound=1)
_HELD_OUT = flags.DEFINE_integer("held_out", 200, "Held-out images per class to tune learning rates on.", lower_bound=1)
_PRETRAIN_EPOCHS = flags.DEFINE_float("pretrain_epochs", 5.0, "Epochs of pre-training on all training images.")
_FINETUNE_EPOCHS = flags.DEFINE_float("finetune_epochs", 40.0, "Epochs of fine-tuning on the labelled images.")
_TUNING = flags.DEFINE_float("tuning", 0.3, "Fraction of these epochs in the tuning of learning rates.")
_PRETRAIN = flags.DEFINE_multi_string("pretrain", [], "Overrides of pre-training, such as --config.dtype=bfloat16.")
_FINETUNE = flags.DEFINE_multi_string("finetune", [], "Overrides of fine-tuning.")
_BOTH = flags.DEFINE_multi_string("both", [], "Overrides of both, such as --config.model.widths=(64,128,256).")
SETTINGS = (_LABELLED, _HELD_OUT, _PRETRAIN_EPOCHS, _FINETUNE_EPOCHS, _TUNING, _PRETRAIN, _FINETUNE, _BOTH)


class Method(NamedTuple):
    """A row of the table.

    Attributes:
        name: method of configs/cifar/pretrain.py, whose learning rates the row uses; "" for no pre-training.
        overrides: flags for pre-training.
    """

    name: str
    overrides: tuple[str, ...] = ()


METHODS = {
    SCRATCH: Method(""),
    "SimMIM": Method("simmim"),
    "UM-MAE": Method(UM_MAE),
    "UM-MAE, no secondary masking": Method(UM_MAE, ("--config.model.secondary_ratio=0.0",)),
    "UM-MAE, the reference's position fault": Method(UM_MAE, ("--config.model.reference_order=True",)),
    "UM-MAE, 15% hidden": Method(UM_MAE, ("--config.model.secondary_ratio=0.15",)),
    "UM-MAE, 35% hidden": Method(UM_MAE, ("--config.model.secondary_ratio=0.35",)),
}


class Result(NamedTuple):
    """Measurements of a finished command.

    Attributes:
        metrics: last value of every metric in metrics.jsonl.
        seconds: duration of the training steps, from the logged images per second.
        processor_seconds: CPU time of the command on all cores, if it was not interrupted.
        memory: peak resident memory of the process, in MiB.
    """

    metrics: dict[str, float]
    seconds: float
    processor_seconds: float
    memory: float


def unpack(archive: Path, folder: Path, labelled: int, held_out: int) -> None:
    """Unpack train/ and test/, and link the first training images of each class as labelled/, the last as held_out/."""
    if folder.exists():
        return
    part = folder.with_name(f".{folder.name}.part")  # takes its name when it is whole
    shutil.rmtree(part, ignore_errors=True)
    with zipfile.ZipFile(archive) as file:
        file.extractall(part)
    for place in sorted((part / "train").iterdir()):
        files = sorted(place.iterdir())
        if labelled + held_out > len(files):
            sys.exit(f"--labelled and --held_out: {place.name} has {len(files)} images; ask for no more than these")
        for name, chosen in (("labelled", files[:labelled]), ("held_out", files[len(files) - held_out :])):
            (part / name / place.name).mkdir(parents=True)
            for path in chosen:
                (part / name / place.name / path.name).hardlink_to(path)
    part.replace(folder)


def keep_settings(workdir: Path) -> dict[str, Any]:
    """Return the flags other than the number of seeds, and check that they are those the directory was started with."""
    settings = {flag.name: flag.value for flag in SETTINGS}
    path = workdir / "settings.json"
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=2) + "\n")
    before = json.loads(path.read_text())
    if changed := [name for name, value in settings.items() if before.get(name) != value]:
        sys.exit(
            f"{workdir} was started with another --{', --'.join(changed)}; see {path}, or choose another --workdir"
        )
    return settings


def run(command: str, config: str, workdir: Path, overrides: tuple[str, ...]) -> Result:
    """Run a training command to its end, unless it has finished before, and read its metrics."""
    done = workdir / "result.json"
    if not done.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        arguments = ["--config", f"{HERE / config}", "--workdir", str(workdir), *overrides, *_BOTH.value]
        with (workdir / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"umae_jax.{command}", *arguments], stdout=log, stderr=log
            )
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{command} in {workdir} failed; see {workdir / 'log.txt'}")
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        batch_size = json.loads((workdir / "config.json").read_text())["batch_size"]
        steps = [line for line in lines if "images_per_second" in line]
        before = [0, *(line["step"] for line in steps)]
        seconds = sum(
            (line["step"] - last) * batch_size / line["images_per_second"]
            for last, line in zip(before, steps, strict=False)
        )
        metrics = {key: value for line in lines for key, value in line.items()}
        result = Result(metrics, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)
        done.write_text(json.dumps(result._asdict(), indent=2))
    return Result(**json.loads(done.read_text()))


class Experiment:
    """The runs in one directory."""

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir
        self.data = workdir / "data"

    def pretrain(self, workdir: Path, method: Method, rate: float, epochs: float, seed: int) -> Result:
        """Pre-train on all training images."""
        overrides = (
            f"--config.data.source=folder:{self.data / 'train'}",
            *schedule(epochs, rate * base_rate("pretrain.py")),
            f"--config.seed={seed}",
            *method.overrides,
            *_PRETRAIN.value,
        )
        return run("pretrain", f"pretrain.py:{method.name}", workdir, overrides)

    def neighbors(self, workdir: Path) -> float:
        """Return the kNN accuracy of a pre-trained run on the test images, given the labelled ones."""
        done = workdir / "knn.json"
        if not done.exists():
            sources = ("--source", f"folder:{self.data / 'labelled'}", "--validation", f"folder:{self.data / 'test'}")
            command = [sys.executable, "-m", "umae_jax.evaluate", "--workdir", str(workdir), "--probe", "knn", "--json"]
            done.write_bytes(subprocess.run([*command, *sources], stdout=subprocess.PIPE, check=True).stdout)
        return json.loads(done.read_text())["top1"]

    def finetune(
        self, workdir: Path, init: Path | None, rate: float, epochs: float, seed: int, validation: str
    ) -> Result:
        """Fine-tune on the labelled images; measure accuracy on the images of `validation` once, at the end."""
        overrides = (
            f"--config.data.source=folder:{self.data / 'labelled'}",
            f"--config.validation.source=folder:{self.data / validation}",
            f"--config.validation.every_epochs={epochs}",
            *schedule(epochs, rate * base_rate("finetune.py")),
            f"--config.seed={seed}",
            *(() if init is None else (f"--config.init={init}",)),
            *_FINETUNE.value,
        )
        return run("finetune", "finetune.py", workdir, overrides)

    def tune(self, name: str) -> dict[str, float]:
        """Return the learning rates, of pre-training and fine-tuning, that are best on held-out images."""
        folder = self.workdir / "tuning" / (name or "scratch")
        epochs = {
            "pretrain": _TUNING.value * _PRETRAIN_EPOCHS.value,
            "finetune": _TUNING.value * _FINETUNE_EPOCHS.value,
        }

        def finetuned(init: Path | None, rate: float) -> float:
            workdir = folder / f"{'scratch' if init is None else init.name}_finetune_{rate}"
            result = self.finetune(workdir, init, rate, epochs["finetune"], 0, "held_out")
            return result.metrics["validation_top1"]

        tried: dict[str, dict[float, float]] = {}
        init = None
        if name:
            for rate in RATES:
                self.pretrain(folder / f"pretrain_{rate}", Method(name), rate, epochs["pretrain"], 0)
            tried["pretrain"] = {rate: finetuned(folder / f"pretrain_{rate}", 1.0) for rate in RATES}
            init = folder / f"pretrain_{_best(tried['pretrain'])}"
        tried["finetune"] = {rate: finetuned(init, rate) for rate in RATES}
        say(f"{name or SCRATCH}: accuracy by learning rate {tried}")
        return {part: _best(accuracies) for part, accuracies in tried.items()}

    def row(self, title: str, method: Method, rates: dict[str, float], seed: int) -> dict[str, float]:
        """Pre-train and fine-tune once."""
        folder = self.workdir / f"seed{seed}" / "".join(c if c.isalnum() else "_" for c in title)
        measured: dict[str, float] = {}
        init = None
        if method.name:
            init = folder / "pretrain"
            result = self.pretrain(init, method, rates["pretrain"], _PRETRAIN_EPOCHS.value, seed)
            measured |= {
                "pretrain_seconds": result.seconds,
                "pretrain_processor_seconds": result.processor_seconds,
                "pretrain_memory": result.memory,
            }
            measured["knn_top1"] = self.neighbors(init)
        result = self.finetune(folder / "finetune", init, rates["finetune"], _FINETUNE_EPOCHS.value, seed, "test")
        return measured | {"top1": result.metrics["validation_top1"], "finetune_seconds": result.seconds}


def schedule(epochs: float, rate: float) -> tuple[str, ...]:
    """Return overrides of length and learning rate; a tenth of the length is warm-up."""
    return (
        f"--config.total_epochs={epochs}",
        f"--config.optimizer.warmup_epochs={epochs / 10}",
        f"--config.optimizer.base_learning_rate={rate}",
    )


def base_rate(config: str) -> float:
    """Return the base learning rate, for a batch of 256, of a configuration in this folder."""
    names: dict[str, Any] = {}
    exec((HERE / config).read_text(), names)
    return names["get_config"]().optimizer.base_learning_rate


def _best(accuracies: dict[float, float]) -> float:
    return max(accuracies, key=lambda rate: accuracies[rate])


def say(line: str) -> None:
    """Print a line."""
    print(line, flush=True)  # noqa: T201


def summarize(rows: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Return mean and sample standard deviation of every number over the seeds."""

    def spread(values: list[float]) -> dict[str, Any]:
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return {"mean": statistics.mean(values), "std": deviation, "values": values}

    return {title: {key: spread([run[key] for run in runs]) for key in runs[0]} for title, runs in rows.items()}


def draw(table: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot accuracy after fine-tuning over the CPU time of pre-training, with error bars of one standard deviation."""
    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for title, row in table.items():
        minutes = row.get("pretrain_processor_seconds", {"mean": 0, "std": None})
        axes.errorbar(
            minutes["mean"] / 60,
            100 * row["top1"]["mean"],
            xerr=(minutes["std"] or 0) / 60,
            yerr=100 * (row["top1"]["std"] or 0),
            fmt="o",
            capsize=3,
            label=title,
        )
    axes.set_xlabel("pre-training, minutes of CPU time")
    axes.set_ylabel("top-1 on the test images, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main(_: list[str]) -> None:
    """Tune, run all rows for every seed, and write the table after each run."""
    start = time.monotonic()
    experiment = Experiment(Path(_WORKDIR.value).expanduser().absolute())
    settings = keep_settings(experiment.workdir)
    archive = Path(_ZIP.value).expanduser()
    if not archive.is_file():
        sys.exit(f"--zip: there is no file {archive}")
    unpack(archive, experiment.data, _LABELLED.value, _HELD_OUT.value)
    rates = {name: experiment.tune(name) for name in dict.fromkeys(method.name for method in METHODS.values())}
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in range(_SEEDS.value):
        for title, method in METHODS.items():
            measured = experiment.row(title, method, rates[method.name], seed)
            rows.setdefault(title, []).append(measured)
            line = ", ".join(f"{key} {value:.4g}" for key, value in measured.items())
            say(f"seed {seed}, {title}: {line} ({(time.monotonic() - start) / 60:.0f} min)")
            table = summarize(rows)
            content = {"rows": table, "learning_rates": rates, "settings": settings}
            (experiment.workdir / "table.json").write_text(json.dumps(content, indent=2) + "\n")
            draw(table, experiment.workdir / "table.png")
    width = max(map(len, table))
    say(f"\n{'':{width}}  " + "  ".join(f"{title:>16}" for title in COLUMNS))
    for title, row in table.items():
        cells = [_cell(row.get(key), scale, unit) for key, scale, unit in COLUMNS.values()]
        say(f"{title:{width}}  " + "  ".join(f"{cell:>16}" for cell in cells))


# Printed columns: key, scale, unit.
COLUMNS = {
    "kNN": ("knn_top1", 100.0, "%"),
    "fine-tuned": ("top1", 100.0, "%"),
    "pre-training": ("pretrain_seconds", 1 / 60, " min"),
    "CPU time": ("pretrain_processor_seconds", 1 / 60, " min"),
    "memory": ("pretrain_memory", 1.0, " MiB"),
}


def _cell(value: dict[str, Any] | None, scale: float, unit: str) -> str:
    if value is None:
        return ""
    spread = "" if value["std"] is None else f" ± {scale * value['std']:.1f}"
    return f"{scale * value['mean']:.1f}{spread}{unit}"


if __name__ == "__main__":
    app.run(main)
