import argparse
import os
import pathlib
import pickle

import numpy as np
import pytest

from umae_jax.errors import UserError
from umae_jax.weights.files import Weights, check_output, read_weights, write_weights


class Trap:
    """Pickled, it makes a file when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_the_arguments_of_a_training_run_do_not_stop_the_weights(tmp_path):
    torch = pytest.importorskip("torch")
    arguments = argparse.Namespace(
        lr=1e-3, output_dir=pathlib.Path("/x"), best=np.float64(3), betas=np.zeros(2), device=torch.device("cpu")
    )
    state = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    path = tmp_path / "reference.pth"
    torch.save({"model": state, "args": arguments, "optimizer": {"state": {0: torch.zeros(1)}}, "epoch": 3}, path)
    tensors, metadata = read_weights(path)
    np.testing.assert_array_equal(tensors["a.weight"], np.arange(6, dtype=np.float32).reshape(2, 3), strict=True)
    assert tensors["b"].dtype == np.float32
    assert tensors.keys() == {"a.weight", "b"}
    assert metadata == {}


@pytest.mark.parametrize("beside", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(tmp_path, beside):
    torch = pytest.importorskip("torch")
    trap = Trap(tmp_path / "sprung")
    path = tmp_path / "evil.pth"
    if beside:
        torch.save({"model": {"a": torch.zeros(1)}, "args": trap}, path)
    else:
        with path.open("wb") as file:
            pickle.dump({"model": trap}, file, protocol=2)
    with pytest.raises(
        UserError, match=r"evil.pth would run .*mkdir, .*nothing was run|no whole file .*nothing"
    ) as told:
        read_weights(path)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "sprung").exists()


def test_an_archive_with_objects_is_refused_and_nothing_runs(tmp_path):
    path = tmp_path / "evil.npz"
    np.savez(path, weights=np.array([Trap(tmp_path / "sprung")], dtype=object))
    with pytest.raises(UserError, match=r"evil.npz is no whole .npz archive of plain arrays"):
        read_weights(path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz"])
@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "flipped"])
def test_a_damaged_file_is_told_in_one_sentence(tmp_path, suffix, damage):
    if suffix == ".pth":
        pytest.importorskip("torch")
    path = tmp_path / f"weights{suffix}"
    weights = {"a": np.zeros((64, 64), np.float32), "b": np.ones(100, np.float32)}
    if suffix == ".npz":
        np.savez_compressed(path, **weights)
    else:
        write_weights(path, Weights(weights, {}))
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "cut": whole[: len(whole) // 2],
            "noise": np.random.default_rng(0).bytes(5000),
            "flipped": bytes([whole[0] ^ 255]) + whole[1:],
        }[damage]
    )
    with pytest.raises(UserError, match=f"weights{suffix}") as told:
        read_weights(path)
    assert "\n" not in str(told.value)


def test_an_archive_of_more_than_weights_gives_those_called_param(tmp_path):
    np.savez(tmp_path / "golden.npz", **{"param/a": np.ones(2), "images": np.zeros(5)})
    assert read_weights(tmp_path / "golden.npz").tensors.keys() == {"a"}


def test_what_is_no_dictionary_of_tensors_is_told(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds no dictionary of tensors"):
        read_weights(tmp_path / "list.pth")


@pytest.mark.parametrize(("name", "message"), [("x.bin", r"ends in .safetensors, .pth, .npz"), ("x.pth", "no file")])
def test_a_wrong_name_is_told(tmp_path, name, message):
    (tmp_path / "x.bin").write_bytes(b"1")
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / name)


def test_a_wrong_output_is_told(tmp_path):
    with pytest.raises(UserError, match=r"end .*x.onnx in .safetensors or .pth"):
        check_output(tmp_path / "x.onnx")
