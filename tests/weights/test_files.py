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
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_weights_beside_training_arguments_are_read(tmp_path):
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
def test_a_pickle_that_would_run_code_is_rejected_and_runs_nothing(tmp_path, form):
    torch = pytest.importorskip("torch")
    trap = Trap(tmp_path / "made")
    path = tmp_path / "evil.pth"
    if form == "beside the weights":
        torch.save({"model": {"a": torch.zeros(1)}, "args": trap}, path)
    else:
        with path.open("wb") as file:
            pickle.dump({"model": trap}, file, protocol=form)
    # Torch rejects a protocol that it does not write before it reads the function's name.
    expected = r"evil.pth.*nothing was run" if form == 4 else r"evil.pth.*mkdir.*nothing was run"
    with pytest.raises(UserError, match=expected) as raised:
        read_weights(path)
    assert "\n" not in str(raised.value)
    assert "weights_only" not in str(raised.value)  # torch's advice to read without protection
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("kind", ["PosixPath", "WindowsPath"])
def test_paths_pickled_by_other_systems_and_python_versions_are_read(tmp_path, module, kind):
    torch = pytest.importorskip("torch")
    path = tmp_path / "reference.pth"
    torch.save({"model": {"a": torch.ones(2)}, "args": pathlib.PurePosixPath("/x")}, path, pickle_protocol=2)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in parts if name.endswith("data.pkl"))
    opcode = f"c{pathlib.PurePosixPath.__module__}\nPurePosixPath\n".encode()
    assert opcode in parts[name]
    parts[name] = parts[name].replace(opcode, f"c{module}\n{kind}\n".encode())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for part, data in parts.items():
            archive.writestr(part, data)
    np.testing.assert_array_equal(read_weights(path).tensors["a"], np.ones(2, np.float32))


def test_an_archive_with_any_damaged_byte_is_read_or_raises_a_user_error(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez_compressed(path, a=np.random.default_rng(0).normal(size=(64, 64)))
    whole = path.read_bytes()
    for offset in range(100, len(whole), len(whole) // 60):
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 255]) + whole[offset + 1 :])
        with contextlib.suppress(UserError):  # some bytes do not matter
            read_weights(path)


@pytest.mark.parametrize("values", [np.ones(2, np.complex64), np.array(["a"])])
def test_arrays_that_are_not_real_numbers_are_rejected(tmp_path, values):
    np.savez(tmp_path / "odd.npz", a=values)
    with pytest.raises(UserError, match=r"odd.npz: a "):
        read_weights(tmp_path / "odd.npz")


def test_an_archive_of_other_files_is_rejected(tmp_path):
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(UserError, match=r"zip.npz: hello.txt "):
        read_weights(tmp_path / "zip.npz")


@pytest.mark.parametrize("kind", ["meta", "sparse", "complex"])
def test_tensors_without_plain_values_are_rejected(tmp_path, kind):
    torch = pytest.importorskip("torch")
    made = {
        "meta": lambda: torch.ones(3, device="meta"),
        "sparse": lambda: torch.eye(3).to_sparse(),
        "complex": lambda: torch.ones(3, dtype=torch.complex64),
    }
    torch.save({"model": {"a": made[kind]()}}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"odd.pth: a "):
        read_weights(tmp_path / "odd.pth")


def test_an_archive_of_objects_is_rejected_and_runs_nothing(tmp_path):
    path = tmp_path / "evil.npz"
    np.savez(path, weights=np.array([Trap(tmp_path / "made")], dtype=object))
    with pytest.raises(UserError, match=r"evil.npz .*\.npz archive"):
        read_weights(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz"])
@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "flipped", "text"])
def test_a_damaged_file_raises_one_sentence(tmp_path, suffix, damage):
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
            "text": b"no weight file",
        }[damage]
    )
    with pytest.raises(UserError, match=f"weights{suffix}") as raised:
        read_weights(path)
    assert "\n" not in str(raised.value)


def test_only_arrays_named_param_are_read_from_golden_numbers(tmp_path):
    np.savez(tmp_path / "golden.npz", **{"param/a": np.ones(2), "images": np.zeros(5)})
    assert read_weights(tmp_path / "golden.npz").tensors.keys() == {"a"}


@pytest.mark.parametrize("key", ["model", "state_dict", "teacher", "params", "ema", "net", "module.model"])
def test_a_state_dict_is_found_under_any_key(tmp_path, key):
    torch = pytest.importorskip("torch")
    content = {"a": torch.ones(3), "b": torch.zeros(2), "step": 3}
    for part in reversed(key.split(".")):
        content = {part: content, "epoch": torch.tensor(3), "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}
    torch.save(content, tmp_path / "nested.pth")
    assert read_weights(tmp_path / "nested.pth").tensors.keys() == {"a", "b"}


@pytest.mark.parametrize("keys", [("model", "ema"), ("teacher", "student"), ("state_dict", "state_dict_ema")])
def test_one_of_several_state_dicts_is_read_and_the_others_are_named(tmp_path, keys, capsys):
    torch = pytest.importorskip("torch")
    torch.save({key: {"a": torch.full((2,), float(key == keys[0]))} for key in sorted(keys)}, tmp_path / "two.pth")
    assert read_weights(tmp_path / "two.pth").tensors["a"].tolist() == [1, 1]
    assert f"under '{keys[0]}', not those under '{keys[1]}'" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "float32", "int8", "bool"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_every_dtype_is_read_as_float32(tmp_path, dtype, suffix):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    state = {"a": torch.tensor([[0.0, 1.0], [1.0, 0.0]]).to(getattr(torch, dtype)), "b": torch.tensor(1.0)}
    path = tmp_path / f"typed{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    tensors = read_weights(path).tensors
    np.testing.assert_array_equal(tensors["a"], np.float32([[0, 1], [1, 0]]), strict=True)
    assert tensors["b"].shape == ()


def test_float64_beyond_float32_becomes_infinite(tmp_path):
    np.savez(tmp_path / "wide.npz", a=np.array([1e300, 1.0]))
    assert read_weights(tmp_path / "wide.npz").tensors["a"].tolist() == [np.inf, 1]


def test_a_file_without_a_dict_of_tensors_is_rejected(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"list.pth .*dict of tensors"):
        read_weights(tmp_path / "list.pth")


@pytest.mark.parametrize(
    ("name", "message"), [("x.bin", r"x.bin.* \.safetensors, \.pth, \.npz"), ("x.pth", "no file .*x.pth")]
)
def test_an_unknown_suffix_and_a_missing_file_are_rejected(tmp_path, name, message):
    (tmp_path / "x.bin").write_bytes(b"1")
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / name)


def test_an_output_with_an_unknown_suffix_is_rejected(tmp_path):
    with pytest.raises(UserError, match=r"--output: .*x.onnx in \.safetensors or \.pth"):
        check_output(tmp_path / "x.onnx")
