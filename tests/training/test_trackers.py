"""Real trackers without a server: W&B offline, and MLflow with a local database."""

import json

import pytest
from PIL import Image

from tests import tiny
from tests.images import encode
from umae_jax.config import flat
from umae_jax.errors import UserError
from umae_jax.training import metrics, trackers
from umae_jax.training.metrics import METRICS_FILE, Report

VALUES = {"loss": 0.5, "learning_rate": 1e-3, "images_per_second": 100.0, "data_wait": 0.25}
VALUES |= {"skipped_images": 0, "skipped_updates": 0}
PICTURE = encode(Image.new("RGB", (6, 4), "red"))

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other packages are not ours to fix


def report_twice(name, workdir):
    """Report a run that is interrupted after step 3 and continues from step 2 with another length."""
    config = tiny.get_config()
    config.tracker = name
    workdir.mkdir()
    for first, last in ((0, 3), (2, 4)):
        config.total_steps = 100 + last
        report = Report(config, workdir, first, 4, steps_per_epoch=1)
        for step in range(first + 1, last + 1):
            report.training(step, VALUES | {"loss": 1 / step}, seconds_per_step=1)
        report.show(last, "reconstructions", PICTURE)
        report.evaluation(last, {"knn_top1": last / 10})
        if last == 4:
            report.finish()
        report.close()
    return config, json.loads((workdir / trackers.TRACKERS_FILE).read_bytes())[name]


def test_mlflow_continues_the_same_run(tmp_path, monkeypatch, capfd):
    mlflow = pytest.importorskip("mlflow", reason="the mlflow extra is not installed")  # part of the test extra
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)  # for artifacts
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    config, run_id = report_twice("mlflow", tmp_path / "run")
    errors = capfd.readouterr().err.splitlines()
    assert errors[0] == f"tracking with mlflow: run {run_id} in {address}"
    assert {line.split()[0] for line in errors} == {"tracking", "step"}  # MLflow prints nothing
    client = mlflow.MlflowClient(address)
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (run_id, "run", "FINISHED")
    losses = {metric.step: metric.value for metric in client.get_metric_history(run_id, "loss")}
    assert losses == {step: 1 / step for step in (1, 2, 3, 4)}
    assert run.data.metrics["knn_top1"] == 0.4
    assert run.data.params["total_steps"] == "103"
    assert run.data.params.keys() == flat(config).keys()
    assert json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/config.json"))["total_steps"] == 104
    shown = [file.path for file in client.list_artifacts(run_id, "images")]
    assert {path.split("+step+")[1][0] for path in shown} == {"3", "4"}


def test_wandb_continues_the_same_run(tmp_path, monkeypatch, capfd):
    pytest.importorskip("wandb", reason="the wandb extra is not installed")  # part of the test extra
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    _, run_id = report_twice("wandb", tmp_path / "run")
    folders = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}*"))
    assert folders
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == len(folders)
    assert sum(len(list(folder.rglob("reconstructions_*.png"))) for folder in folders) == 2
    logged = b"".join(path.read_bytes() for folder in folders for path in folder.glob("*.wandb"))
    for name in (b"learning_rate", b"knn_top1", b"model.window", b"reconstructions"):
        assert name in logged
    errors = capfd.readouterr().err.splitlines()
    assert errors[0].startswith(f"tracking with wandb: {tmp_path / 'run' / 'wandb'}")
    assert {line.split()[0] for line in errors} == {"tracking", "step"}  # W&B prints nothing


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named(monkeypatch, name):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    trackers.check_installed("none")
    with pytest.raises(UserError, match=rf'^tracker: {name} is not installed; .* "umae_jax\[{name}\]"'):
        trackers.check_installed(name)


class Broken:
    """A tracker whose server is lost."""

    def __init__(self, config, workdir, run_id):
        self.id, self.place = "1", "nowhere"
        if run_id:
            raise ConnectionError("no such run")

    def log(self, step, values):
        raise ConnectionError("server is gone")


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(trackers._TRACKERS, "mlflow", Broken)
    config = tiny.get_config()
    config.tracker = "mlflow"
    report = Report(config, tmp_path, 0, 10, steps_per_epoch=1)
    for step in (1, 2):
        report.training(step, VALUES, seconds_per_step=1)
    report.close()
    assert capsys.readouterr().err.count("warning: tracker: it failed (ConnectionError: server is gone)") == 1
    assert len((tmp_path / METRICS_FILE).read_bytes().splitlines()) == 2
    with pytest.raises(UserError, match=r"cannot start \(ConnectionError: no such run\).*remove .*trackers.json"):
        metrics.open_tracker(config, tmp_path)
