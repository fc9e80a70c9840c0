"""All models: their sizes, dtypes and imports."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import golden
from tests.models.small import build, random_case, run
from umae_jax.errors import UserError


def test_building_models_imports_neither_pallas_nor_data_and_training():
    program = """
import sys
import umae_jax.models.build
above = ("umae_jax.data", "umae_jax.training", "jax.experimental.pallas")
loaded = [name for name in sys.modules if name.startswith(above)]
assert "umae_jax.models.kernels.pallas_tpu" not in sys.modules
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", [name for name in golden.FILES if "classifier" not in name])
def test_bfloat16_follows_float32(name):
    losses = []
    for dtype in ("float32", "bfloat16"):
        model = build(name, dtype=dtype)
        loss, prediction = run(model, *random_case(model))
        assert loss.dtype == prediction.dtype == jnp.float32
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
        losses.append(float(loss))
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert losses[1] != losses[0]


TWO_STAGES = {"patch": 2, "widths": (16, 32), "depths": (2, 2), "heads": (2, 4), "mlp_ratios": (4, 2)}
THREE_STAGES = {"widths": (8, 16, 24), "depths": (1, 2, 1), "heads": (1, 2, 4), "mlp_ratios": (2, 4, 4)}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("swin_um_window8", {"image_size": (64, 256)}),
        ("swin_um_window8", {"image_size": (192, 192), "window": 12}),
        ("swin_um_window8", {"channels": 5, "image_size": (64, 64)}),
        ("swin_um_window8", {**TWO_STAGES, "image_size": (32, 64)}),
        ("swin_um_window8", {**THREE_STAGES, "decoder_factor": 1, "image_size": (64, 64), "window": 8}),
        ("swin_um_window8", {"decoder_factor": 4, "image_size": (64, 64)}),
        ("pvt_um", {"image_size": (64, 256)}),
        ("pvt_um", {"image_size": (192, 192), "channels": 1, "sr_ratios": (6, 2, 2, 1)}),
        ("pvt_um", {**TWO_STAGES, "sr_ratios": (4, 1), "image_size": (32, 64)}),
        ("pvt_um", {**THREE_STAGES, "sr_ratios": (1, 1, 1), "decoder_factor": 4, "image_size": (32, 64)}),
        ("vit_um", {"image_size": (32, 80), "channels": 1}),
        ("vit_um", {"patch": 4, "image_size": (24, 8), "secondary_ratio": 0.5}),
        ("vit_random", {"image_size": (32, 80), "channels": 1}),
        ("vit_random", {"patch": 4, "image_size": (24, 8), "secondary_ratio": 0.5}),
        ("simmim_swin", {"image_size": (96, 160), "channels": 1}),  # grids that windows do not tile
        ("simmim_swin", {"image_size": (64, 64), "decoder_factor": 1}),
        ("simmim_pvt", {"image_size": (96, 32), "sr_ratios": (4, 2, 1, 1), "decoder_factor": 4, "channels": 5}),
        ("simmim_vit", {"image_size": (48, 80)}),
    ],
)
def test_other_shapes_compute(name, changes):
    model = build(name, **changes)
    loss, prediction = run(model, *random_case(model))
    assert np.isfinite(float(loss))
    assert prediction.shape == (2, 3, *model.cells, model.unit**2 * model.encoder.channels)
    assert tuple(2 * cells * model.unit for cells in model.cells) == changes["image_size"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("swin_um_window8", {"method": "mae"}, "model.method.*swin"),
        ("pvt_um", {"method": "mae"}, "model.method.*pvt"),
        ("vit_um", {"reference_order": True}, "model.reference_order"),
        ("vit_random", {"reference_order": True}, "model.reference_order"),
        ("swin_um_window8", {"image_size": (100, 128)}, "image_size.* 100 .*64.*64 or 128$"),
        ("pvt_um", {"image_size": (128, 40)}, "image_size.* 40 .*64.*64$"),
        ("vit_random", {"image_size": (64, 40)}, "image_size.* 40 .*16.*32 or 48$"),
        ("vit_um", {"image_size": (64, 37)}, "image_size.* 37 .*8.*32 or 40$"),
        ("swin_um_window8", {"heads": (1, 3, 4, 8)}, "model.heads.* 3 .* 32 .*stage 2"),
        ("pvt_um", {"heads": (1, 2, 4)}, "model.heads.* 3 .* 4"),
        ("swin_um_window8", {"mlp_ratios": (4,)}, "model.mlp_ratios.* 1 .* 4"),
        ("vit_um", {"widths": (32, 64)}, "model.widths.* 2 .* 1"),
        ("pvt_um", {"depths": (1, 2, 0, 1)}, r"model.depths.*\(1, 2, 0, 1\)"),
        ("pvt_um", {"sr_ratios": (8, 4, 2)}, "model.sr_ratios.* 3 .* 4"),
        (
            "pvt_um",
            {"sr_ratios": (12, 4, 2, 1)},
            r"model.sr_ratios.* 6 .*16 x 16.*\(8, 4, 2, 1\)$",
        ),
        ("pvt_um", {"widths": (18, 24, 40, 48)}, "model.widths.* 18 .*4"),
        (
            "vit_um",
            {"widths": (32, 32), "depths": (1, 1), "heads": (4, 4), "mlp_ratios": (4, 4)},
            r"model.depths.*\(1, 1\)",
        ),
        ("swin_um_window8", {"secondary_ratio": 1.0}, "model.secondary_ratio"),
        ("vit_random", {"secondary_ratio": -0.5}, "model.secondary_ratio"),
        ("swin_um_window8", {"secondary_ratio": 0.99}, "model.secondary_ratio.* 0.99 .*16"),
        ("pvt_um", {"decoder_factor": 3}, "model.decoder_factor.* 3 .* 8"),
        ("vit_um", {"decoder_factor": 2}, "model.decoder_factor.* 2 .* 1"),
        ("vit_um", {"decoder_width": 30}, "model.decoder_width.* 30 .*28 or 32$"),
        ("pvt_um", {"decoder_heads": 5}, "model.decoder_heads.* 5 .*32"),
        ("vit_um", {"decoder_depth": 0}, "model.decoder_depth.* 0"),
        ("swin_um_window8", {"window": 10, "image_size": (192, 192)}, "model.window.* 5 .*24 x 24.*6 or 12$"),
        ("swin_um_window8", {"window": 6, "image_size": (192, 64)}, "model.window.*24 x 8"),
        ("swin_um_window8", {"window": 2}, "model.window.* 2$"),
        ("swin_um_window8", {"window": 9}, "model.window.* 9$"),
        ("simmim_swin", {"image_size": (100, 128)}, "image_size.* 100 .*32.*96 or 128$"),
        ("simmim_swin", {"image_size": (64, 96), "decoder_factor": 1}, "image_size.* 96 .*64.*64 or 128$"),
        ("simmim_vit", {"image_size": (64, 40)}, "image_size.* 40 .*16.*32 or 48$"),
        (
            "simmim_pvt",
            {"image_size": (128, 96), "sr_ratios": (16, 4, 2, 1)},
            r"model.sr_ratios.* 16 .*32 x 24.*\(8, 4, 2, 1\)$",
        ),
        ("simmim_swin", {"decoder_factor": 3}, "model.decoder_factor.* 3 .* 8"),
        ("swin_classifier", {"image_size": (100, 64)}, "image_size.* 100 .*32.*96 or 128$"),
        ("pvt_classifier", {"image_size": (64, 40)}, "image_size.* 40 .*32.*32 or 64$"),
        ("vit_classifier", {"image_size": (64, 44)}, "image_size.* 44 .*8.*40 or 48$"),
        (
            "pvt_classifier",
            {"image_size": (96, 64), "sr_ratios": (16, 4, 2, 1)},
            r"model.sr_ratios.* 16 .*24 x 16.*\(8, 4, 2, 1\)$",
        ),
    ],
)
def test_sizes_that_do_not_fit_raise_an_error_naming_the_key(name, changes, message):
    with pytest.raises(UserError, match=message):
        build(name, **changes)
