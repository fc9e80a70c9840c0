"""Launch scripts, checked by the commands that they print with --dry-run; only the notebook is executed."""

import os
import shlex
import shutil
import subprocess
import tomllib

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from tests.commands import ROOT, xla_flags

LAUNCH = ROOT / "launch"
RUN = ("umae_jax.pretrain", "--config", "configs/quickstart.py", "--workdir", "/shared/my run")


def launch(script, *arguments, status=0, **settings):
    result = subprocess.run(
        [LAUNCH / script, *arguments],
        env={**os.environ, "HOME": "/home/me", **settings},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == status, result
    return result.stdout if status == 0 else result.stderr


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sh")))
def test_scripts_pass_shellcheck(script):
    result = subprocess.run(["shellcheck", LAUNCH / script], capture_output=True, text=True, check=False)
    assert not result.returncode, result.stdout


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sh")))
def test_scripts_print_their_usage(script):
    assert f"launch/{script} [--dry-run]" in launch(script, status=2)


def test_a_pod_is_created_set_up_used_and_deleted():
    printed = launch("tpu_pod.sh", "--dry-run", "all", "--", *RUN, NAME="pod", PROJECT="p", ZONE="z", SPOT="1")
    commands = [shlex.split(line) for line in printed.splitlines()]
    verbs = [command[4] for command in commands if command[0] == "gcloud"]
    assert verbs == ["create", "ssh", "scp", "ssh", "ssh", "scp", "delete"]
    assert all({"--zone=z", "--project=p"} <= set(command) for command in commands if command[0] == "gcloud")
    assert {"pod", "--node-id=pod", "--accelerator-type=v5litepod-16", "--spot"} <= set(commands[0])
    (worker_option,) = (part for part in commands[4] if part.startswith("--command="))
    assert shlex.split(worker_option.partition("python -m ")[2].partition(" 2>&1")[0]) == list(RUN)
    assert "--worker=all" in commands[4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("run",), "write the command after --"), (("up", "--", "now"), "up takes no command")],
)
def test_wrong_arguments_give_a_one_line_error(arguments, message):
    errors = launch("tpu_pod.sh", "--dry-run", *arguments, status=2)
    assert errors.startswith(f"error: {message}")
    assert errors.count("\n") == 1


def test_a_gpu_node_installs_the_package_runs_the_doctor_and_trains():
    commands = [shlex.split(line) for line in launch("gpu_node.sh", "--dry-run", *RUN).splitlines()]
    assert [command[1:3] for command in commands] == [
        ["-m", "venv"],
        ["install", "--quiet"],
        ["-m", "umae_jax.doctor"],
        ["-m", "umae_jax.pretrain"],
    ]
    assert commands[-1][2:] == list(RUN)


def test_a_slurm_job_has_one_process_per_gpu_and_is_requeued_after_saving():
    job = launch("slurm.sh", "--dry-run", *RUN, NODES="4", GPUS="2", PARTITION="gpu")
    options = [line.removeprefix("#SBATCH --") for line in job.splitlines() if line.startswith("#SBATCH")]
    expected = {"nodes=4", "ntasks-per-node=2", "gpus-per-node=2", "partition=gpu", "requeue", "signal=TERM@120"}
    assert expected <= set(options)
    (line,) = (line for line in job.splitlines() if line.startswith("srun"))
    assert shlex.split(line.partition("-m ")[2].partition(" ||")[0]) == list(RUN)
    assert 'if [ "$status" = 143 ]; then scontrol requeue' in job
    checked = subprocess.run(["bash", "-n"], input=job, text=True, capture_output=True, check=False)
    assert not checked.returncode, checked.stderr


def test_the_files_named_in_the_dockerfile_and_the_skypilot_task_exist():
    for line in (LAUNCH / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            assert all((ROOT / name).exists() for name in line.split()[1:-1])
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert (ROOT / task["envs"]["CONFIG"]).is_file()
    assert "umae_jax.pretrain" in task["run"]


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(LAUNCH / "colab.ipynb", 4)


def test_the_notebook_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    for folder in ("configs", "launch"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", xla_flags())
    notebook = notebook.copy()
    (settings,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    settings.source += "\nSIDE, PRETRAIN_STEPS, CROPS, FINETUNE_EPOCHS = 64, 2, 2, 1"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path / "launch")}}).execute()
    written = tmp_path / "umae_colab"
    assert (written / "pretrained" / "reconstructions" / "0000002.png").is_file()
    assert (written / "finetuned" / "checkpoints").is_dir()
    assert {"encoder.safetensors", "umae_backbone.py", "README.md"} <= {
        path.name for path in (written / "export").iterdir()
    }


def test_the_notebook_is_stored_with_its_outputs_and_pictures(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    pictures = [output for output in outputs if {"image/png", "image/jpeg"} & set(output.get("data", ()))]
    assert len(pictures) >= 5
    assert all(cell.execution_count for cell in cells)


def test_the_pod_script_and_the_dockerfile_copy_every_package_folder():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {"umae_jax", *project["tool"]["hatch"]["build"]["targets"]["wheel"]["sources"]}
    for name in ("tpu_pod.sh", "Dockerfile"):
        lines = [line for line in (LAUNCH / name).read_text().splitlines() if "scp" in line or line.startswith("COPY")]
        assert folders <= set(shlex.split(" ".join(lines))), name
