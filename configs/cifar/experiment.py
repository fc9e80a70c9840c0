"""Compare UM-MAE, SimMIM and no pre-training on CIFAR-10: the paper's comparison, in hours on two CPU cores.

    python configs/cifar/experiment.py --zip cifar10.zip --workdir DIR [--seeds 3]

Every method pre-trains for the same number of epochs on all 50,000 training images without labels, and is fine-tuned on
the same few labelled images. Accuracy is top-1 of the last checkpoint on the 10,000 test images; no choice uses them.

Learning rates are tuned first, with equal effort for each method, by top-1 on held-out training images: pre-training
tries RATES for a share of its epochs, and each result is fine-tuned at its configuration's rate for a share of its
epochs; then fine-tuning tries RATES on the best of them. The variants of UM-MAE use the rates of UM-MAE. Every run is a
command with its own directory below DIR, so the same command continues; the results are DIR/table.json and
DIR/table.png.
"""

import json
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

from umae_jax.benchmarking import experiments

HERE = Path(__file__).parent
RATES = (0.3, 1.0, 3.0)  # factors of the configuration's learning rate
UM_MAE = "um_mae"
SCRATCH = "from scratch"

_ZIP = flags.DEFINE_string(
    "zip", None, "CIFAR-10 as JPEG files, train/CLASS/*.jpg and test/CLASS/*.jpg.", required=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the experiment.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs per method.", lower_bound=1)
_LABELLED = flags.DEFINE_integer("labelled", 200, "Labelled images per class for fine-tuning.", lower_bound=1)
_HELD_OUT = flags.DEFINE_integer("held_out", 200, "Images per class for tuning learning rates.", lower_bound=1)
_PRETRAIN_EPOCHS = flags.DEFINE_float("pretrain_epochs", 5.0, "Epochs of pre-training on all training images.")
_FINETUNE_EPOCHS = flags.DEFINE_float("finetune_epochs", 40.0, "Epochs of fine-tuning on the labelled images.")
_TUNING = flags.DEFINE_float("tuning", 0.3, "Share of these epochs for which a learning rate is tried.")
_PRETRAIN = flags.DEFINE_multi_string("pretrain", [], "Overrides for pre-training, such as --config.dtype=bfloat16.")
_FINETUNE = flags.DEFINE_multi_string("finetune", [], "Overrides for fine-tuning.")
_BOTH = flags.DEFINE_multi_string("both", [], "Overrides for both, such as --config.model.widths=(64,128,256).")
SETTINGS = (_LABELLED, _HELD_OUT, _PRETRAIN_EPOCHS, _FINETUNE_EPOCHS, _TUNING, _PRETRAIN, _FINETUNE, _BOTH)


class Method(NamedTuple):
    """A row of the table.

    Attributes:
        name: method of configs/cifar/pretrain.py, whose tuned learning rates the row uses; "" for no pre-training.
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
        metrics: last value of each metric in metrics.jsonl.
        seconds: wall time of the training steps, from the logged images per second.
        processor_seconds: processor time of the command on all cores; valid if it ran without interruption.
        memory: peak memory of the process in MiB.
    """

    metrics: dict[str, float]
    seconds: float
    processor_seconds: float
    memory: float


def unpack(archive: Path, folder: Path, labelled: int, held_out: int) -> None:
    """Unpack train/ and test/; link the first training images per class as labelled/ and the last as held_out/."""
    if folder.exists():
        return
    part = folder.with_name(f".{folder.name}.part")  # renamed when complete
    shutil.rmtree(part, ignore_errors=True)
    with zipfile.ZipFile(archive) as file:
        file.extractall(part)
    for place in sorted((part / "train").iterdir()):
        files = sorted(place.iterdir())
        if labelled + held_out > len(files):
            sys.exit(f"--labelled and --held_out: {place.name} has {len(files)} images; use no more")
        for name, chosen in (("labelled", files[:labelled]), ("held_out", files[len(files) - held_out :])):
            (part / name / place.name).mkdir(parents=True)
            for path in chosen:
                (part / name / place.name / path.name).hardlink_to(path)
    part.replace(folder)


def keep_settings(workdir: Path) -> dict[str, Any]:
    """Return the settings given by flags, except the number of seeds; exit if DIR was started with other settings."""
    return experiments.keep_settings(workdir, SETTINGS)


def run(command: str, config: str, workdir: Path, overrides: tuple[str, ...]) -> Result:
    """Run a training command unless it has finished already, and return its measurements."""
    done = workdir / "result.json"
    if not done.exists():
        arguments = ["--config", f"{HERE / config}", *overrides, *_BOTH.value]
        usage = experiments.run_training(command, arguments, workdir)
        lines = experiments.read_metrics(workdir)
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
    """Start the runs of the experiment, each in its own directory below `workdir`."""

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

    def knn(self, workdir: Path) -> float:
        """Return the kNN accuracy of a pre-trained run on the test images, with the labelled images as neighbours."""
        done = workdir / "knn.json"
        if not done.exists():
            sources = ("--source", f"folder:{self.data / 'labelled'}", "--validation", f"folder:{self.data / 'test'}")
            command = [sys.executable, "-m", "umae_jax.evaluate", "--workdir", str(workdir), "--probe", "knn", "--json"]
            done.write_bytes(subprocess.run([*command, *sources], stdout=subprocess.PIPE, check=True).stdout)
        return json.loads(done.read_text())["top1"]

    def finetune(self, workdir: Path, init: Path | None, rate: float, epochs: float, seed: int, test: str) -> Result:
        """Fine-tune on the labelled images, and evaluate once, at the end, on the images of folder `test`."""
        overrides = (
            f"--config.data.source=folder:{self.data / 'labelled'}",
            f"--config.validation.source=folder:{self.data / test}",
            f"--config.validation.every_epochs={epochs}",
            *schedule(epochs, rate * base_rate("finetune.py")),
            f"--config.seed={seed}",
            *(() if init is None else (f"--config.init={init}",)),
            *_FINETUNE.value,
        )
        return run("finetune", "finetune.py", workdir, overrides)

    def tune(self, name: str) -> dict[str, float]:
        """Return the factors of the learning rates of both parts that do best on the held-out images."""
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
        """Pre-train, probe and fine-tune with one seed; return the numbers of a row."""
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
            measured["knn_top1"] = self.knn(init)
        result = self.finetune(folder / "finetune", init, rates["finetune"], _FINETUNE_EPOCHS.value, seed, "test")
        return measured | {"top1": result.metrics["validation_top1"], "finetune_seconds": result.seconds}


def schedule(epochs: float, rate: float) -> tuple[str, ...]:
    """Return overrides of duration and learning rate; the warm-up is a tenth of the duration."""
    return (
        f"--config.total_epochs={epochs}",
        f"--config.optimizer.warmup_epochs={epochs / 10}",
        f"--config.optimizer.base_learning_rate={rate}",
    )


def base_rate(config: str) -> float:
    """Return the base learning rate of a configuration in this folder."""
    names: dict[str, Any] = {}
    exec((HERE / config).read_text(), names)
    return names["get_config"]().optimizer.base_learning_rate


def _best(accuracies: dict[float, float]) -> float:
    return max(accuracies, key=lambda rate: accuracies[rate])


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, flush=True)  # noqa: T201


def summarize(rows: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Return mean, sample standard deviation and values of each number over the seeds."""

    def spread(values: list[float]) -> dict[str, Any]:
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return {"mean": statistics.mean(values), "std": deviation, "values": values}

    return {title: {key: spread([run[key] for run in runs]) for key in runs[0]} for title, runs in rows.items()}


def draw(table: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw top-1 against processor time of pre-training, with bars of one standard deviation.

    Processor time of all cores does not grow with other programs on the machine.
    """
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
    axes.set_xlabel("pre-training, CPU minutes")
    axes.set_ylabel("top-1 on the test images, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main(_: list[str]) -> None:
    """Tune, run every row with every seed, and write the table after each run."""
    start = time.monotonic()
    experiment = Experiment(Path(_WORKDIR.value).expanduser().absolute())
    settings = keep_settings(experiment.workdir)
    archive = Path(_ZIP.value).expanduser()
    if not archive.is_file():
        sys.exit(f"--zip: {archive} does not exist")
    unpack(archive, experiment.data, _LABELLED.value, _HELD_OUT.value)
    rates = {name: experiment.tune(name) for name in dict.fromkeys(method.name for method in METHODS.values())}
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in range(_SEEDS.value):
        for title, method in METHODS.items():
            measured = experiment.row(title, method, rates[method.name], seed)
            rows.setdefault(title, []).append(measured)
            numbers = ", ".join(f"{key} {value:.4g}" for key, value in measured.items())
            say(f"seed {seed}, {title}: {numbers} ({(time.monotonic() - start) / 60:.0f} min)")
            table = summarize(rows)
            content = {"rows": table, "learning_rates": rates, "settings": settings}
            (experiment.workdir / "table.json").write_text(json.dumps(content, indent=2) + "\n")
            draw(table, experiment.workdir / "table.png")
    say(f"\n{markdown(table)}")


# Columns of the printed table: heading -> key and scale.
COLUMNS = {
    "kNN, %": ("knn_top1", 100.0),
    "fine-tuned, %": ("top1", 100.0),
    "pre-training, CPU minutes": ("pretrain_processor_seconds", 1 / 60),
    "memory, MiB": ("pretrain_memory", 1.0),
}


def markdown(table: dict[str, dict[str, Any]]) -> str:
    """Format the rows as a Markdown table: mean and standard deviation."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for title, row in table.items():
        cells = [_cell(row.get(key), scale) for key, scale in COLUMNS.values()]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: dict[str, Any] | None, scale: float) -> str:
    if value is None:
        return ""
    spread = "" if value["std"] is None else f" ± {scale * value['std']:.1f}"
    return f"{scale * value['mean']:.1f}{spread}"


if __name__ == "__main__":
    app.run(main)
