"""Compare detectors from scratch, from SimMIM and from UM-MAE on nuclei and blood cells, in hours on two CPU cores.

    python configs/small_detection/experiment.py --archives FOLDER --workdir DIR [--seeds 3]

FOLDER holds nuclei150_instances.zip and bccd364_boxes.zip (images/, annotations_train.json and annotations_val.json in
COCO's layout) and imagenet_sample.zip (photographs). For each of the two data sets, both methods pre-train on its
training images without labels and on the photographs: UM-MAE for --pretrain_steps, SimMIM for as many steps as take the
same processor time. Processor time of all cores does not grow with other programs on the machine. The detectors of a
data set differ by their start alone. AP is that of the last checkpoint on the validation images.

Every run is a command with its own directory below DIR, so the same command continues. The results, DIR/table.json and
DIR/table.png, are written after each run.
"""

import json
import shutil
import statistics
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.figure
from absl import app, flags

from umae_jax.benchmarking import experiments

HERE = Path(__file__).parent
DATA = {"nuclei": "nuclei150_instances", "cells": "bccd364_boxes"}  # argument of detect.py -> archive
PHOTOGRAPHS = "imagenet_sample"
SCRATCH, SIMMIM, UM_MAE = "from scratch", "SimMIM", "UM-MAE"
METHODS = {SIMMIM: "simmim", UM_MAE: "um_mae"}  # start -> argument of pretrain.py
STARTS = (SCRATCH, SIMMIM, UM_MAE)
CURVE = ("step", "box_ap", "mask_ap")  # numbers of each validation
TIMED = (20, 120)  # steps of the two runs whose difference is the time of a step

_ARCHIVES = flags.DEFINE_string("archives", None, "Folder of the three archives.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the experiment.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs per start.", lower_bound=1)
_PRETRAIN_STEPS = flags.DEFINE_integer("pretrain_steps", 1500, "Steps of pre-training by UM-MAE.", lower_bound=1)
_PRETRAIN = flags.DEFINE_multi_string("pretrain", [], "Overrides for pre-training, such as --config.batch_size=16.")
_DETECT = flags.DEFINE_multi_string("detect", [], "Overrides for the detectors.")
_BOTH = flags.DEFINE_multi_string("both", [], "Overrides for both, such as --config.model.widths=(32,64,128,256).")
SETTINGS = (_PRETRAIN_STEPS, _PRETRAIN, _DETECT, _BOTH)


class Result(NamedTuple):
    """Measurements of a finished command.

    Attributes:
        validations: metrics of each validation, the last one last.
        steps: number of training steps.
        processor_seconds: processor time of the command on all cores; None if it was interrupted and continued.
    """

    validations: list[dict[str, float]]
    steps: int
    processor_seconds: float | None


def unpack(archives: Path, folder: Path) -> None:
    """Unpack the archives; link the training images of each data set, and the photographs, in one folder."""
    for name in (*DATA.values(), PHOTOGRAPHS):
        if not (archive := archives / f"{name}.zip").is_file():
            sys.exit(f"--archives: {archive} does not exist")
        if not (folder / name).exists():
            part = folder / f".{name}.part"  # renamed when complete
            with zipfile.ZipFile(archive) as file:
                file.extractall(part)
            part.replace(folder / name)
    for name in DATA.values():
        training = json.loads((folder / name / "annotations_train.json").read_text())["images"]
        images = [folder / name / "images" / image["file_name"] for image in training]
        (folder / "unlabelled" / name).mkdir(parents=True, exist_ok=True)
        for path in (*images, *(folder / PHOTOGRAPHS).iterdir()):
            target = folder / "unlabelled" / name / path.name
            if not target.exists():
                target.hardlink_to(path)


def keep_settings(workdir: Path) -> dict[str, Any]:
    """Return the settings given by flags, except the number of seeds; exit if DIR was started with other settings."""
    return experiments.keep_settings(workdir, SETTINGS)


def run(command: str, config: str, workdir: Path, overrides: tuple[str, ...]) -> Result:
    """Run a training command unless it has finished already, and return its measurements."""
    done = workdir / "result.json"
    if not done.exists():
        continued = (workdir / "metrics.jsonl").exists()
        arguments = ["--config", f"{HERE / config}", *overrides, *_BOTH.value]
        usage = experiments.run_training(command, arguments, workdir)
        lines = experiments.read_metrics(workdir)
        validations = [line for line in lines if "box_ap" in line]
        seconds = None if continued else usage.ru_utime + usage.ru_stime
        result = Result(validations, lines[-1]["step"], seconds)
        done.write_text(json.dumps(result._asdict(), indent=2))
    return Result(**json.loads(done.read_text()))


class Experiment:
    """Start the runs of the experiment, each in its own directory below `workdir`."""

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir
        self.data = workdir / "data"

    def pretrain(self, workdir: Path, start: str, data: str, steps: int, seed: int) -> Result:
        """Pre-train on the unlabelled images of a data set and the photographs."""
        overrides = (
            f"--config.data.source=folder:{self.data / 'unlabelled' / DATA[data]}",
            f"--config.total_steps={steps}",
            f"--config.seed={seed}",
            *_PRETRAIN.value,
        )
        return run("pretrain", f"pretrain.py:{METHODS[start]}", workdir, overrides)

    def detect(self, workdir: Path, init: Path | None, data: str, seed: int) -> Result:
        """Train a detector, from a pre-trained encoder or from scratch."""
        source = f"coco:{self.data / DATA[data]}"
        overrides = (
            f"--config.data.source={source}",
            f"--config.validation.source={source}",
            f"--config.seed={seed}",
            *(() if init is None else (f"--config.init={init}",)),
            *_DETECT.value,
        )
        return run("detect", f"detect.py:{data}", workdir, overrides)

    def pretrain_steps(self, start: str) -> int:
        """Return the steps of pre-training that take as much processor time as those of UM-MAE, without compilation."""
        steps = _PRETRAIN_STEPS.value
        return steps if start == UM_MAE else max(1, round(steps * self.step_time(UM_MAE) / self.step_time(start)))

    def step_time(self, start: str) -> float:
        """Return the processor seconds of a step of pre-training: start and compilation cancel out."""
        seconds = []
        for steps in TIMED:
            folder = self.workdir / "timing" / f"{METHODS[start]}_{steps}"
            if not (folder / "result.json").exists():
                shutil.rmtree(folder, ignore_errors=True)  # a continued run has no time
            seconds.append(self.pretrain(folder, start, next(iter(DATA)), steps, seed=0).processor_seconds)
        return (seconds[1] - seconds[0]) / (TIMED[1] - TIMED[0])

    def row(self, start: str, data: str, seed: int) -> dict[str, Any]:
        """Pre-train and train a detector with one seed; return its numbers."""
        folder = self.workdir / f"seed{seed}" / data / start.replace(" ", "_")
        measured: dict[str, Any] = {}
        init = None
        if start in METHODS:
            init = folder / "pretrain"
            result = self.pretrain(init, start, data, self.pretrain_steps(start), seed)
            measured |= {"pretrain_steps": result.steps, "pretrain_processor_seconds": result.processor_seconds}
        result = self.detect(folder / "detect", init, data, seed)
        last = result.validations[-1]
        measured |= {name: last[name] for name in ("box_ap", "box_ap50", "mask_ap", "mask_ap50") if name in last}
        measured["detect_processor_seconds"] = result.processor_seconds
        return measured | {
            "curve": {name: [line[name] for line in result.validations if name in line] for name in CURVE}
        }


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, flush=True)  # noqa: T201


def summarize(rows: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return mean, sample standard deviation and values of each number over the seeds, and the curves."""

    def spread(values: list[float | None]) -> dict[str, Any]:
        known = [value for value in values if value is not None]
        mean = statistics.mean(known) if known else None
        return {"mean": mean, "std": statistics.stdev(known) if len(known) > 1 else None, "values": values}

    return {
        start: {
            key: [run[key] for run in runs] if key == "curve" else spread([run[key] for run in runs]) for key in runs[0]
        }
        for start, runs in rows.items()
    }


CAPTION = (
    "A small Swin on two CPU cores: 0.8 million parameters, the detector 1.1 million. AP in percent, mean and sample "
    "standard deviation over the seeds; CPU minutes are processor time of both cores, with start and compilation."
)
# Columns of the printed table: heading -> key and scale.
COLUMNS = {
    "box AP": ("box_ap", 100.0),
    "box AP50": ("box_ap50", 100.0),
    "mask AP": ("mask_ap", 100.0),
    "mask AP50": ("mask_ap50", 100.0),
    "pre-training, steps": ("pretrain_steps", 1.0),
    "pre-training, CPU minutes": ("pretrain_processor_seconds", 1 / 60),
    "detector, CPU minutes": ("detect_processor_seconds", 1 / 60),
}


def markdown(tables: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Format the tables of all data sets as one in Markdown, below its caption."""
    lines = [CAPTION, "", f"| data | start | seeds | {' | '.join(COLUMNS)} |", "|---" * (3 + len(COLUMNS)) + "|"]
    for data, table in tables.items():
        for start, row in table.items():
            cells = [_cell(row.get(key), scale) for key, scale in COLUMNS.values()]
            lines.append(f"| {data} | {start} | {len(row['curve'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: dict[str, Any] | None, scale: float) -> str:
    if value is None or value["mean"] is None:
        return ""
    if isinstance(value["values"][0], int):
        return f"{scale * value['mean']:.0f}"
    spread = "" if value["std"] is None else f" ± {scale * value['std']:.1f}"
    return f"{scale * value['mean']:.1f}{spread}"


def draw(tables: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Draw AP against the steps of the detector, a panel per data set: mean, and range over the seeds."""
    figure = matplotlib.figure.Figure(figsize=(5 * len(tables), 4.5), layout="constrained")
    for axes, (data, table) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        for start, row in table.items():
            name = "mask_ap" if "mask_ap" in row else "box_ap"
            steps = row["curve"][0]["step"]
            runs = zip(*(curve[name] for curve in row["curve"]), strict=True)
            points = [[100 * value for value in values] for values in runs]
            axes.plot(steps, [statistics.mean(values) for values in points], marker="o", label=start)
            axes.fill_between(steps, *([end(values) for values in points] for end in (min, max)), alpha=0.2)
            axes.set_ylabel(f"{name.partition('_')[0]} AP on the validation images, %")
        axes.set_title(data)
        axes.set_xlabel("steps of training the detector")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle("A small Swin on two CPU cores: mean and range over the seeds", fontsize="medium")
    figure.savefig(path, dpi=150)


def main(_: list[str]) -> None:
    """Run every start with every seed, and write the table after each run."""
    experiment = Experiment(Path(_WORKDIR.value).expanduser().absolute())
    settings = keep_settings(experiment.workdir)
    unpack(Path(_ARCHIVES.value).expanduser(), experiment.data)
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for seed in range(_SEEDS.value):
        for data in DATA:
            for start in STARTS:
                measured = experiment.row(start, data, seed)
                rows.setdefault(data, {}).setdefault(start, []).append(measured)
                known = {key: value for key, value in measured.items() if key != "curve" and value is not None}
                numbers = ", ".join(f"{key} {value:.4g}" for key, value in known.items())
                say(f"seed {seed}, {data}, {start}: {numbers}")
                tables = {name: summarize(runs) for name, runs in rows.items()}
                content = {"tables": tables, "settings": settings}
                (experiment.workdir / "table.json").write_text(json.dumps(content, indent=2) + "\n")
                draw(tables, experiment.workdir / "table.png")
    say(f"\n{markdown(tables)}")


if __name__ == "__main__":
    app.run(main)
