import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import umae_jax
from tests import commands, golden, small, tiny
from tests.runs import store
from tests.weights.test_names import assert_same
from umae_jax.errors import UserError
from umae_jax.tasks.importing import import_weights
from umae_jax.weights.exchange import export_weights
from umae_jax.weights.files import read_weights
from umae_jax.weights.hub import MARKER
from umae_jax.weights.stored_run import CLASSES_FILE, read_run


@pytest.mark.parametrize("kind", ["swin_um_window4_no_secondary", "pvt_um", "vit_um", "simmim_pvt", "vit_classifier"])
def test_an_imported_golden_file_reproduces_the_reference(kind, tmp_path):
    import_weights(golden.write_state_dict(kind, tmp_path / "golden.npz"), tmp_path / "run", golden.config_of(kind))
    stored = read_run(tmp_path / "run")
    assert stored.step == 0
    assert stored.config.to_dict() == golden.config_of(kind).to_dict()
    params = jax.device_get(stored.params)
    assert_same(params, nnx.state(golden.model_of(kind), nnx.Param))
    numbers, model = golden.load(kind), nnx.merge(stored.graph, params)
    if "logits" in numbers:
        np.testing.assert_allclose(jax.jit(lambda m, x: m(x))(model, numbers["images"]), numbers["logits"], atol=1e-4)
    else:
        loss = jax.jit(lambda m, x: m(x, golden.mask_of(numbers, model))[0])(model, numbers["images"])
        assert float(loss) == pytest.approx(float(numbers["loss"]), rel=1e-5)


def test_the_export_and_import_commands_reproduce_the_run(tmp_path):
    config = tiny.get_config()
    config.data.source, config.data.data_dir = "folder:/home/somebody/pictures", "/home/somebody"
    store(tmp_path / "run", config, small.random_model(config)[1])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("# Somebody's own\n")
    output, errors = commands.run("convert", tmp_path / "run", "--output", tmp_path / "out" / "swin.safetensors")
    assert output.split() == [str(tmp_path / "out" / "swin.safetensors")]
    assert "swin.md, umae_backbone.py" in errors
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "swin.safetensors",
        "swin.md",
        "umae_backbone.py",
        "README.md",
    }
    assert (tmp_path / "out" / "README.md").read_text() == "# Somebody's own\n"
    metadata = read_weights(tmp_path / "out" / "swin.safetensors").metadata
    assert metadata["step"] == "7"
    assert json.loads(metadata["config"])["data"]["source"] == "folder:pictures"
    assert "somebody" not in str(metadata) + (tmp_path / "out" / "swin.md").read_text()

    output, errors = commands.run("convert", tmp_path / "out" / "swin.safetensors", "--workdir", tmp_path / "again")
    assert output.split() == [str(tmp_path / "again")]
    assert "a swin with widths (8, 16) and depths (1, 2) (um_mae)" in errors
    exported, imported = (jax.device_get(read_run(tmp_path / name).params) for name in ("run", "again"))
    assert_same(exported, imported)
    # Pre-training continues from it.
    commands.pretrain(tmp_path / "again", "--config.total_steps=2", "--config.data.source=photos")
    assert [step for step, _ in commands.losses(tmp_path / "again")] == [1, 2]


def test_class_names_are_exported_and_imported(tmp_path):
    config = golden.config_of("pvt_classifier")
    store(tmp_path / "run", config, small.random_model(config)[1])
    names = [f"class {number}" for number in range(10)]
    (tmp_path / "run" / CLASSES_FILE).write_text(json.dumps(names))
    export_weights(tmp_path / "run", tmp_path / "pvt.safetensors")
    assert json.loads(read_weights(tmp_path / "pvt.safetensors").metadata["classes"]) == names
    import_weights(tmp_path / "pvt.safetensors", tmp_path / "again")
    assert read_run(tmp_path / "again").classes == tuple(names)


def test_the_model_card_describes_the_model_and_how_to_load_it(tmp_path, monkeypatch):
    config = golden.config_of("pvt_um")
    store(tmp_path / "run", config, small.random_model(config)[1])
    export_weights(tmp_path / "run", tmp_path / "out" / "pvt.safetensors")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: umae_jax\n")
    for part in ("mean (0.485, 0.456, 0.406)", "widths (16, 24, 40, 48)", "7 steps of 4096 images", "128 x 128"):
        assert part in card
    # A card without the marker is kept.
    (tmp_path / "out" / "README.md").write_text(card.replace(MARKER, "Trained on a rainy day."))
    export_weights(tmp_path / "run", tmp_path / "out" / "pvt.safetensors")
    assert "rainy" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "pvt.md").read_text() == card
    # Its first example runs.
    example = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "out")
    names = {"images": np.zeros((1, 64, 64, 3), np.uint8)}
    exec(example, names)
    assert [stage.shape[-1] for stage in names["maps"]] == [16, 24, 40, 48]


@pytest.fixture(scope="module")
def swin(tmp_path_factory):
    """A folder with a run and the weight file exported from it."""
    folder = tmp_path_factory.mktemp("swin")
    config = tiny.get_config()
    store(folder / "run", config, small.random_model(config)[1])
    export_weights(folder / "run", folder / "swin.safetensors", "reference")
    return folder


def test_user_errors_are_one_sentence_and_leave_no_files(swin, tmp_path):
    _, errors = commands.run("convert", swin / "swin.safetensors", "--workdir", swin / "run", status=2)
    assert errors.startswith(f"error: --workdir: {swin / 'run'} is not empty")
    assert errors.count("\n") == 1
    (tmp_path / "cut.safetensors").write_bytes((swin / "swin.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cut.safetensors .*complete safetensors file"):
        import_weights(tmp_path / "cut.safetensors", tmp_path / "run", None)
    np.savez(tmp_path / "resnet.npz", **{"layer1.0.conv1.weight": np.zeros((3, 3))})
    with pytest.raises(UserError, match=r"resnet.npz .*architecture.*layer1.0.conv1.weight"):
        import_weights(tmp_path / "resnet.npz", tmp_path / "run", None)
    with pytest.raises(UserError, match=r"does not fit .*pvt for um_mae.*missing: .*unexpected: "):
        import_weights(swin / "swin.safetensors", tmp_path / "run", golden.config_of("pvt_um"))
    config = tiny.get_config()
    config.model.channels = 1
    with pytest.raises(UserError, match=r"patch_embed.proj.weight is \[8, 3, 4, 4\], not \[8, 1, 4, 4\]"):
        import_weights(swin / "swin.safetensors", tmp_path / "run", config)
    with pytest.raises(UserError, match=r"--layout: .*swin.*um_mae"):
        export_weights(swin / "run", tmp_path / "model.safetensors", "vit")
    with pytest.raises(UserError, match=r"config.json"):
        export_weights(tmp_path, tmp_path / "model.safetensors", "reference")
    assert {path.name for path in tmp_path.iterdir()} == {"cut.safetensors", "resnet.npz"}


def test_files_for_transformers_can_be_imported(tmp_path):
    config = golden.config_of("vit_um")
    store(tmp_path / "run", config, small.random_model(config)[1])
    hub = tmp_path / "hub"
    export_weights(tmp_path / "run", hub / "model.safetensors", "vit_mae")
    config = import_weights(hub / "model.safetensors", tmp_path / "again")
    assert config.model.secondary_ratio == 0  # ViTMAE has no token for hidden units
    exported, imported = (jax.device_get(read_run(tmp_path / name).params) for name in ("run", "again"))
    del exported["mask_token"]
    assert_same(exported, imported)
    export_weights(tmp_path / "run", hub / "model.safetensors", "vit")  # overwrites our own files
    assert json.loads((hub / "config.json").read_text())["architectures"] == ["ViTModel"]
    with pytest.raises(UserError, match=r"model.safetensors holds only an encoder.*umae_jax.load_encoder"):
        import_weights(hub / "model.safetensors", tmp_path / "third")
    (hub / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"--output: .*config.json"):
        export_weights(tmp_path / "run", hub / "model.safetensors", "vit")


def test_the_decoder_of_transformers_needs_square_images(tmp_path):
    config = golden.config_of("vit_um")
    config.image_size = (64, 96)
    store(tmp_path / "run", config, small.random_model(config)[1])
    with pytest.raises(UserError, match=r"--layout: .*\(64, 96\).* vit"):
        export_weights(tmp_path / "run", tmp_path / "hub" / "model.safetensors", "vit_mae")
    export_weights(tmp_path / "run", tmp_path / "hub" / "model.safetensors", "vit")


def test_each_file_in_a_folder_has_its_own_card(swin, tmp_path):
    for name in ("a", "b", "a"):
        export_weights(swin / "run", tmp_path / f"{name}.safetensors")
    assert {path.name for path in tmp_path.glob("*.md")} == {"README.md", "b.md"}
    assert '"a.safetensors"' in (tmp_path / "README.md").read_text()
    assert '"b.safetensors"' in (tmp_path / "b.md").read_text()


def run_limited(command, size=40_000):
    """Run the command with a maximum file size in bytes."""
    code = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); "
        f"sys.argv[1:] = {list(map(str, command))!r}; runpy.run_module('umae_jax.convert', run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=commands.ROOT, capture_output=True, text=True, check=False)


def test_a_full_disk_leaves_no_incomplete_files(swin, tmp_path):
    (tmp_path / "out").mkdir()
    done = run_limited([swin / "run", "--output", tmp_path / "out" / "swin.safetensors"])
    assert (done.returncode, done.stderr.count("error: ")) == (1, 1), done.stderr
    assert not list((tmp_path / "out").iterdir())
    done = run_limited([swin / "swin.safetensors", "--workdir", tmp_path / "run"], size=10_000)
    assert done.returncode == 2, done.stderr
    assert re.search(r"error: --workdir: .*run; make room", done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_directory_behind_a_link_can_be_the_workdir(swin, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "empty" / ".incoming").mkdir()  # left by a killed import
    import_weights(swin / "swin.safetensors", tmp_path / "link")
    assert read_run(tmp_path / "empty").step == 0
    assert {path.name for path in (tmp_path / "empty").iterdir()} == {"checkpoints", "config.json"}


def test_transformers_needs_its_own_file_name_and_folder(tmp_path):
    config = golden.config_of("vit_um")
    store(tmp_path / "run", config, small.random_model(config)[1])
    with pytest.raises(UserError, match=r"--output: .*run/config.json"):
        export_weights(tmp_path / "run", tmp_path / "run" / "model.safetensors", "vit_mae")
    with pytest.raises(UserError, match=r"--output: .*/model.safetensors"):
        export_weights(tmp_path / "run", tmp_path / "vit.safetensors", "vit_mae")
    assert umae_jax.load_encoder(tmp_path / "run").widths == (32,)
