"""The sizes of the paper and its neighbours (SPEC 10, 11), by name, and the methods they are trained with."""

from typing import Any

ENCODERS = ("swin", "pvt", "vit")
METHODS = {
    "um_mae": "uniform sampling, secondary masking, light decoder",
    "mae": "random sampling, light decoder (ViT)",
    "simmim": "random masking of the whole image, one linear layer",
    "classifier": "1000 classes",
}


def _swin(
    width: int, depth: int, heads: int, *, position_width: int = 32, decoder_depth: int = 2, drop_path: float = 0.1
) -> dict[str, Any]:
    """A Swin of `width` and `heads` in its first stage, both doubling, with `depth` blocks in its third."""
    return {
        "encoder": "swin",
        "patch": 4,
        "widths": tuple(width * 2**stage for stage in range(4)),
        "depths": (2, 2, depth, 2),
        "heads": tuple(heads * 2**stage for stage in range(4)),
        "mlp_ratios": (4, 4, 4, 4),
        "position_width": position_width,
        "decoder_factor": 2,
        "decoder_depth": decoder_depth,
        "drop_path": drop_path,
    }


def _pvt(*depths: int) -> dict[str, Any]:
    return {
        "encoder": "pvt",
        "patch": 4,
        "widths": (64, 128, 320, 512),
        "depths": depths,
        "heads": (1, 2, 5, 8),
        "mlp_ratios": (8, 8, 4, 4),
        "decoder_factor": 2,
        "decoder_depth": 2,
    }


def _vit(width: int, depth: int, heads: int, *, patch: int = 16, decoder_depth: int = 2) -> dict[str, Any]:
    return {
        "encoder": "vit",
        "patch": patch,
        "widths": (width,),
        "depths": (depth,),
        "heads": (heads,),
        "mlp_ratios": (4,),
        "decoder_factor": 1,
        "decoder_depth": decoder_depth,
    }


SIZES = {
    "swin_tiny": _swin(96, 6, 3),
    "swin_small": _swin(96, 18, 3),
    "swin_base": _swin(128, 18, 4),
    "swin_large": _swin(192, 18, 6, position_width=64, decoder_depth=8, drop_path=0.2),
    "pvt_tiny": _pvt(2, 2, 2, 2),
    "pvt_small": _pvt(3, 4, 6, 3),
    "pvt_medium": _pvt(3, 4, 18, 3),
    "pvt_large": _pvt(3, 8, 27, 3),
    "vit_small": _vit(384, 12, 6),
    "vit_base": _vit(768, 12, 12),
    "vit_large": _vit(1024, 24, 16, decoder_depth=8),
    "vit_huge": _vit(1280, 32, 16, patch=14, decoder_depth=8),
}


# Of fine-tuning (SPEC 10); 0.85 for the others.
LAYER_DECAY = {"swin_large": 0.7, "vit_small": 0.8, "vit_base": 0.8, "vit_large": 0.8, "vit_huge": 0.8}


def methods_of(size: str) -> tuple[str, ...]:
    """The methods that a size can be trained with: random sampling leaves no grid for a pyramid."""
    return tuple(method for method in METHODS if method != "mae" or SIZES[size]["encoder"] == "vit")


def image_side(size: str) -> int:
    """Pixels on the side of the paper's images."""
    return 224 if SIZES[size]["encoder"] == "vit" else 256


def settings(size: str, method: str) -> dict[str, Any]:
    """What a preset sets among the keys of a configuration's `model`.

    Raises:
        KeyError: for a name that is not among SIZES.
    """
    return SIZES[size] | {
        "method": method,
        "secondary_ratio": 0.25 if method == "um_mae" else 0.0,
        "norm_pix_loss": method in ("um_mae", "mae"),
        "classes": 1000 if method == "classifier" else None,
    }
