"""Keys and preset sizes of the encoders: those of the paper and their neighbours (SPEC 10, 11)."""

from typing import Any

from umae_jax.config.base import ENCODERS, Encoder, Key, integer, sequence
from umae_jax.config.common import MAX_WIDTH


def _swin(width: int, depth: int, heads: int, *, position_width: int = 32) -> dict[str, Any]:
    """Return a Swin of `width` and `heads` in its first stage, both doubling, with `depth` blocks in its third."""
    return {
        "patch": 4,
        "widths": tuple(width * 2**stage for stage in range(4)),
        "depths": (2, 2, depth, 2),
        "heads": tuple(heads * 2**stage for stage in range(4)),
        "mlp_ratios": (4, 4, 4, 4),
        "position_width": position_width,
    }


def _pvt(*depths: int) -> dict[str, Any]:
    stages = {"widths": (64, 128, 320, 512), "depths": depths, "heads": (1, 2, 5, 8), "mlp_ratios": (8, 8, 4, 4)}
    return {"patch": 4, **stages}


def _vit(width: int, depth: int, heads: int, *, patch: int = 16) -> dict[str, Any]:
    return {"patch": patch, "widths": (width,), "depths": (depth,), "heads": (heads,), "mlp_ratios": (4,)}


ENCODERS["swin"] = Encoder(
    name="Swin",
    keys={
        "model.window": Key(
            16, "side of a window in tokens on a whole image; half of it on the compact grid", integer(1, 256)
        ),
        "model.position_width": Key(32, "hidden width of the position MLP; 64 in `swin_large`", integer(1, MAX_WIDTH)),
    },
    sizes={
        "swin_tiny": _swin(96, 6, 3),
        "swin_small": _swin(96, 18, 3),
        "swin_base": _swin(128, 18, 4),
        "swin_large": _swin(192, 18, 6, position_width=64),
    },
    image_side=256,
)
ENCODERS["pvt"] = Encoder(
    name="PVT",
    keys={
        "model.sr_ratios": Key(
            (8, 4, 2, 1),
            "side in tokens of the squares that keys and values are pooled over, per stage; half on the compact grid",
            sequence(integer(1, 1024), (8, 4)),
        ),
    },
    sizes={
        "pvt_tiny": _pvt(2, 2, 2, 2),
        "pvt_small": _pvt(3, 4, 6, 3),
        "pvt_medium": _pvt(3, 4, 18, 3),
        "pvt_large": _pvt(3, 8, 27, 3),
    },
    image_side=256,
)
ENCODERS["vit"] = Encoder(
    name="ViT",
    keys={},
    sizes={
        "vit_small": _vit(384, 12, 6),
        "vit_base": _vit(768, 12, 12),
        "vit_large": _vit(1024, 24, 16),
        "vit_huge": _vit(1280, 32, 16, patch=14),
    },
    image_side=224,
    eval_crop=0.875,
    decoder_factor=1,
)
