import argparse
import contextlib
import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest

from umae_jax.errors import UserError
from umae_jax.weights.files import Weights, check_output, encode_weights, read_weights


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


@pytest.mark.parametrize("form", ["beside the weights", 2, 4])
def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(tmp_path, form):
    torch = pytest.importorskip("torch")
    trap = Trap(tmp_path / "sprung")
    path = tmp_path / "evil.pth"
    if form == "beside the weights":
        torch.save({"model": {"a": torch.zeros(1)}, "args": trap}, path)
    else:
        with path.open("wb") as file:
            pickle.dump({"model": trap}, file, protocol=form)
    # Torch does not get as far as the name where the protocol is one it does not write.
    expected = r"asks for more than .* nothing in it" if form == 4 else r"evil.pth would run .*mkdir, .*nothing was run"
    with pytest.raises(UserError, match=expected) as told:
        read_weights(path)
    assert "\n" not in str(told.value)
    assert "weights_only" not in str(told.value)  # torch's advice to do without the guard
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("kind", ["PosixPath", "WindowsPath"])
def test_paths_come_from_any_system_and_python(tmp_path, module, kind):
    torch = pytest.importorskip("torch")
    path = tmp_path / "reference.pth"
    torch.save({"model": {"a": torch.ones(2)}, "args": pathlib.PurePosixPath("/x")}, path, pickle_protocol=2)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in parts if name.endswith("data.pkl"))
    here = f"c{pathlib.PurePosixPath.__module__}\nPurePosixPath\n".encode()
    assert here in parts[name]
    parts[name] = parts[name].replace(here, f"c{module}\n{kind}\n".encode())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for part, data in parts.items():
            archive.writestr(part, data)
    np.testing.assert_array_equal(read_weights(path).tensors["a"], np.ones(2, np.float32))


def test_an_archive_damaged_in_its_midst_is_told(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez_compressed(path, a=np.random.default_rng(0).normal(size=(64, 64)))
    whole = path.read_bytes()
    for place in range(100, len(whole), len(whole) // 60):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with contextlib.suppress(UserError):  # or is read, where the byte says nothing
            read_weights(path)


@pytest.mark.parametrize("values", [np.ones(2, np.complex64), np.array(["a"])])
def test_what_is_no_real_number_is_told(tmp_path, values):
    np.savez(tmp_path / "odd.npz", a=values)
    with pytest.raises(UserError, match=r"odd.npz: a is no array of real numbers"):
        read_weights(tmp_path / "odd.npz")


def test_an_archive_of_other_files_is_told(tmp_path):
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(UserError, match=r"zip.npz: hello.txt is no array of real numbers"):
        read_weights(tmp_path / "zip.npz")


@pytest.mark.parametrize("kind", ["meta", "sparse", "complex"])
def test_tensors_without_plain_values_are_told(tmp_path, kind):
    torch = pytest.importorskip("torch")
    made = {
        "meta": lambda: torch.ones(3, device="meta"),
        "sparse": lambda: torch.eye(3).to_sparse(),
        "complex": lambda: torch.ones(3, dtype=torch.complex64),
    }
    torch.save({"model": {"a": made[kind]()}}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"odd.pth.* a"):
        read_weights(tmp_path / "odd.pth")


def test_an_archive_with_objects_is_refused_and_nothing_runs(tmp_path):
    path = tmp_path / "evil.npz"
    np.savez(path, weights=np.array([Trap(tmp_path / "sprung")], dtype=object))
    with pytest.raises(UserError, match=r"evil.npz is no whole .npz archive of plain arrays"):
        read_weights(path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz"])
@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "flipped", "text"])
def test_a_damaged_file_is_told_in_one_sentence(tmp_path, suffix, damage):
    if suffix == ".pth":
        pytest.importorskip("torch")
    path = tmp_path / f"weights{suffix}"
    weights = {"a": np.zeros((64, 64), np.float32), "b": np.ones(100, np.float32)}
    if suffix == ".npz":
        np.savez_compressed(path, **weights)
    else:
        path.write_bytes(encode_weights(suffix, Weights(weights, {})))
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "cut": whole[: len(whole) // 2],
            "noise": np.random.default_rng(0).bytes(5000),
            "flipped": bytes([whole[0] ^ 255]) + whole[1:],
            "text": b"not a file of weights at all",
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
