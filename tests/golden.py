"""Reading the golden files: the reference's numbers on small models, from the folder that UMAE_JAX_GOLDEN names."""

import os
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from umae_jax.masking import UniformMask


def load(name: str) -> dict[str, np.ndarray]:
    """The arrays of one golden file; skips the test where the folder is not known."""
    folder = os.environ.get("UMAE_JAX_GOLDEN")
    if not folder:
        pytest.skip("UMAE_JAX_GOLDEN does not name the folder of golden files")
    with np.load(Path(folder) / f"{name}.npz") as archive:
        return dict(archive)


def mask_of(golden: dict[str, np.ndarray], cells: tuple[int, int]) -> UniformMask:
    """The file's two boolean masks over the unit grid as offsets and hidden units."""

    def by_cell(flags: np.ndarray) -> np.ndarray:
        flags = flags.reshape(-1, cells[0], 2, cells[1], 2).transpose(0, 1, 3, 2, 4)
        return flags.reshape(-1, *cells, 4)

    sampled = by_cell(~golden["mask"])
    assert (sampled.sum(-1) == 1).all()
    hidden = (by_cell(golden["secondary"]) & sampled).any(-1)
    return UniformMask(jnp.asarray(sampled.argmax(-1), jnp.int32), jnp.asarray(hidden))


def _from_torch(path: str, values: np.ndarray) -> np.ndarray:
    """A reference parameter in our layout."""
    if path.endswith("kernel"):
        if values.ndim == 4:  # a convolution [out, in, kh, kw] is patchify and a linear layer [kh * kw * in, out]
            values = values.transpose(2, 3, 1, 0).reshape(-1, values.shape[0])
        else:
            values = values.T
    return values


def _reference_name(path: str, depths: tuple[int, ...]) -> str:
    """Our parameter path -> the reference's name, blocks numbered through all stages."""
    if match := re.fullmatch(r"encoder\.stages\.(\d+)\.(?:blocks\.(\d+)|merge)\.(.*)", path):
        stage, block, rest = match.groups()
        number = sum(depths[: int(stage)]) + int(block or 0)
        path = f"blocks.{number}." + (f"downsample.{rest}" if block is None else rest)
    rules = (
        (r"^encoder\.patch_embed", "patch_embed.proj"),
        (r"^encoder\.patch_norm", "patch_embed.norm"),
        (r"^encoder\.norm", "norm"),
        (r"^mask_token", "vis_mask_token"),
        (r"^decoder_mask_token", "mask_token"),
        (r"^decoder_prediction", "decoder_pred"),
        (r"\.position\.fc1", ".attn.posmlp.0"),
        (r"\.position\.fc2", ".attn.posmlp.2"),
        (r"^((?:decoder_)?blocks\.\d+)\.(qkv|proj)\.", r"\1.attn.\2."),
        (r"\.(kernel|scale)$", ".weight"),
    )
    for pattern, replacement in rules:
        path = re.sub(pattern, replacement, path)
    return path


def parameters(
    state: nnx.State, golden: dict[str, np.ndarray], depths: tuple[int, ...], kind: str = "param"
) -> dict[str, np.ndarray]:
    """The file's parameters (or "grad"ients) by our paths, in our layouts; every one must find its place."""
    found = {}
    used = set()
    for keys, _ in nnx.to_flat_state(state):
        path = ".".join(map(str, keys))
        name = f"{kind}/{_reference_name(path, depths)}"
        found[path] = _from_torch(path, golden[name])
        used.add(name)
    left = {name for name in golden if name.startswith(f"{kind}/")} - used - {"param/decoder_pos_embed"}
    assert not left, left
    return found


def fill(model: nnx.Module, golden: dict[str, np.ndarray], depths: tuple[int, ...]) -> None:
    """Give the model the file's parameters."""
    state = nnx.state(model, nnx.Param)
    values = parameters(state, golden, depths)
    for keys, variable in nnx.to_flat_state(state):
        value = values[".".join(map(str, keys))]
        assert value.shape == variable.shape, (keys, value.shape, variable.shape)
        variable.set_value(jnp.asarray(value))
    nnx.update(model, state)
