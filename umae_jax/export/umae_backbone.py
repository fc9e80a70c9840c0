"""Swin and PVT encoders pre-trained with UM-MAE, as multi-scale PyTorch backbones for detection and segmentation.

This file needs only torch (>= 2.2). Copy it into your project:

    from umae_backbone import load_backbone

    backbone = load_backbone("swin.safetensors", drop_path=0.1)  # in eval mode; train() it for fine-tuning
    images = (images - mean) / std  # [B, C, H, W] in [0, 1], any size; mean and std are backbone.mean, backbone.std
    maps = backbone(images)  # one map per stage, [B, backbone.widths[i], H / strides[i], W / strides[i]], rounded up

Licence: Apache-2.0.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn

ACROSS_REGIONS = -100.0  # attention bias between tokens of a window that belong to different regions
NORM_EPSILON = 1e-6
BLOCK_EPSILON = 1e-5  # of norms inside blocks
NOT_ENCODER = ("decoder_", "mask_token", "vis_mask_token", "head.", "fc_norm.")  # prefixes of other parameters
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _norm(width: int, epsilon: float = NORM_EPSILON) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=epsilon)


class _Convolution(nn.Conv2d):
    """Convolution of a channels-last map: [B, H, W, C] -> [B, h, w, D]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class _WindowAttention(nn.Module):
    """Window attention with a bias that a small MLP computes from relative positions."""

    def __init__(self, width: int, heads: int, window: int, position_width: int, *, shifted: bool) -> None:
        super().__init__()
        self.heads, self.window, self.shifted = heads, window, shifted
        self.posmlp = nn.Sequential(nn.Conv2d(2, position_width, 1), nn.ReLU(), nn.Conv2d(position_width, heads, 1))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def _bias(self, rows: int, columns: int) -> Tensor:
        """Return the bias of every pair of tokens in a window, [heads, N, N]; the MLP runs once per offset."""
        device, dtype = self.qkv.weight.device, self.qkv.weight.dtype
        axes = [torch.arange(1 - side, side, device=device) for side in (rows, columns)]  # key minus query
        offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        scaled = offsets.sign() * offsets.abs().log1p()
        table = self.posmlp(scaled[None].to(dtype))[0]  # [heads, 2 rows - 1, 2 columns - 1]
        row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
        row_offset = (row - row[:, None] + rows - 1)[:, None, :, None]  # [query row, 1, key row, 1]
        column_offset = (column - column[:, None] + columns - 1)[:, None, :]  # [query column, 1, key column]
        pairs = table[:, row_offset, column_offset]  # [heads, rows, columns, rows, columns]
        return pairs.flatten(3).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        grid = x.shape[1:3]
        size = [min(self.window, side) for side in grid]
        shift = [self.window // 2 if self.shifted and side > self.window else 0 for side in grid]
        padded = [side + -side % step for side, step in zip(grid, size, strict=True)]
        # A window can hold padding and, after the shift, tokens of opposite borders: attention stays in a region.
        regions = []
        for side, full, start in zip(grid, padded, shift, strict=True):
            position = torch.arange(full, device=x.device)
            regions.append(((position < start) + 2 * (position >= side)).roll(-start))  # 0 inside, 1 wrapped, 2 padding
        region = (3 * regions[0][:, None] + regions[1])[None, :, :, None]  # [1, H, W, 1]

        def to_windows(x: Tensor) -> Tensor:  # [B, H, W, C] -> [B, windows, N, C]
            x = x.unflatten(2, (-1, size[1])).unflatten(1, (-1, size[0]))
            return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

        x = F.pad(x, (0, 0, 0, padded[1] - grid[1], 0, padded[0] - grid[0])).roll((-shift[0], -shift[1]), (1, 2))
        qkv = self.qkv(to_windows(x)).unflatten(-1, (3, self.heads, -1))  # [B, windows, N, 3, heads, d]
        queries, keys, values = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)  # each [B, windows * heads, N, d]
        window = to_windows(region)[0]  # [windows, N, 1]
        across = (window != window.mT)[:, None] * ACROSS_REGIONS  # [windows, 1, N, N]
        bias = (self._bias(*size) + across).flatten(0, 1).to(queries.dtype)
        x = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias[None])
        x = self.proj(x.unflatten(1, (-1, self.heads)).transpose(2, 3).flatten(3))  # [B, windows, N, C]
        x = x.unflatten(2, tuple(size)).unflatten(1, (padded[0] // size[0], -1))  # [B, rows, columns, h, w, C]
        x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2).roll((shift[0], shift[1]), (1, 2))
        return x[:, : grid[0], : grid[1]]


class _PooledAttention(nn.Module):
    """Attention from every token to the average-pooled map."""

    def __init__(self, width: int, heads: int, sr_ratio: int) -> None:
        super().__init__()
        self.heads, self.sr_ratio = heads, sr_ratio
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.sr = _Convolution(width, width, 1)
        self.norm = _norm(width, BLOCK_EPSILON)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        rows, columns = x.shape[1:3]
        if rows % self.sr_ratio or columns % self.sr_ratio:
            stage = f"a stage of {rows} x {columns} tokens"
            raise ValueError(f"sr_ratios: {self.sr_ratio} does not divide {stage}; choose others or another image size")
        pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), self.sr_ratio).permute(0, 2, 3, 1)
        pooled = self.norm(self.sr(pooled)).flatten(1, 2)  # [B, M, C]
        queries = self.q(x.flatten(1, 2)).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, N, d]
        keys, values = self.kv(pooled).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, M, d]
        x = F.scaled_dot_product_attention(queries, keys, values)
        return self.proj(x.transpose(1, 2).flatten(2)).unflatten(1, (rows, columns))


class _Block(nn.Module):
    """Pre-norm transformer block; the first of a stage begins with downsampling."""

    def __init__(
        self, width: int, mlp_ratio: float, attention: nn.Module, downsample: nn.Module, drop_path: float
    ) -> None:
        super().__init__()
        hidden = int(mlp_ratio * width)
        layers = OrderedDict(fc1=nn.Linear(width, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, width))
        self.downsample = downsample
        self.norm1, self.attn = _norm(width, BLOCK_EPSILON), attention
        self.norm2, self.mlp = _norm(width, BLOCK_EPSILON), nn.Sequential(layers)
        self.drop_path = drop_path

    def _drop(self, x: Tensor) -> Tensor:
        """In training, drop the branch of random images and scale it up for the others (stochastic depth)."""
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(keep) / keep

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]; a downsampling block halves H and W and changes C."""
        x = self.downsample(x)
        x = x + self._drop(self.attn(self.norm1(x)))
        return x + self._drop(self.mlp(self.norm2(x)))


class _Backbone(nn.Module):
    """Base class of both pyramid encoders."""

    def __init__(
        self,
        channels: int,
        patch: int,
        widths: Sequence[int],
        mlp_ratios: Sequence[float],
        attentions: Sequence[Sequence[nn.Module]],
        normed: bool,
        final_norm: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.widths = tuple(widths)  # channels of each stage's map
        self.strides = tuple(patch * 2**stage for stage in range(len(widths)))  # pixels per token along a side
        self.mean: tuple[float, ...] = ()  # normalisation of each image channel, which `load_backbone` sets
        self.std: tuple[float, ...] = ()
        norm = _norm if normed else nn.Identity  # of patches and before downsampling
        embed = _Convolution(channels, widths[0], patch, patch)
        self.patch_embed = nn.Sequential(OrderedDict(proj=embed, norm=norm(widths[0])))
        self.blocks = nn.ModuleList()
        self._ends = []  # index of the last block of each stage
        last = max(sum(map(len, attentions)) - 1, 1)
        for stage, (width, mlp_ratio, layers) in enumerate(zip(widths, mlp_ratios, attentions, strict=True)):
            for index, attention in enumerate(layers):
                downsample = nn.Sequential()
                if stage > 0 and index == 0:
                    halve = _Convolution(widths[stage - 1], width, 2, 2)
                    downsample = nn.Sequential(OrderedDict(norm=norm(widths[stage - 1]), proj=halve))
                rate = drop_path * len(self.blocks) / last
                self.blocks.append(_Block(width, mlp_ratio, attention, downsample, rate))
            self._ends.append(len(self.blocks) - 1)
        self.norm = _norm(widths[-1]) if final_norm else nn.Identity()

    def _add_positions(self, x: Tensor) -> Tensor:
        """Add absolute position embeddings, if any: [B, H, W, C] -> [B, H, W, C]."""
        return x

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the feature map of every stage, [B, width, ceil(H / stride), ceil(W / stride)].

        Args:
            images: [B, channels, H, W], normalised; padded with zeros below and at the right to whole tokens.
        """
        height, width = images.shape[-2:]
        x = F.pad(images, (0, -width % self.strides[-1], 0, -height % self.strides[-1]))
        x = self._add_positions(self.patch_embed(x.permute(0, 2, 3, 1)))
        maps = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self._ends:
                maps.append(x)
        maps[-1] = self.norm(maps[-1])
        return tuple(
            x[:, : -(-height // stride), : -(-width // stride)].permute(0, 3, 1, 2).contiguous()
            for x, stride in zip(maps, self.strides, strict=True)
        )


class SwinBackbone(_Backbone):
    """Swin of UM-MAE for whole images, with random weights; `load_backbone` loads trained ones.

    Args:
        channels: image channels.
        patch: pixels per token of the first stage, along a side.
        widths, depths, heads: channels, blocks and attention heads of each stage.
        mlp_ratios: hidden width of each stage's MLPs per channel.
        window: tokens along a side of a window; every second block of a stage shifts by half of it.
        position_width: hidden width of the MLP that computes the position bias.
        final_norm: normalise the last map; true for pre-trained models, false for fine-tuned classifiers.
        drop_path: rate of stochastic depth in training, rising linearly from 0 in the first block to it in the last.
    """

    def __init__(
        self,
        channels: int = 3,
        patch: int = 4,
        widths: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        window: int = 16,
        position_width: int = 32,
        *,
        final_norm: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        if window < 2:
            raise ValueError(f"window must be at least 2 tokens, not {window}")
        attentions = [
            [_WindowAttention(width, head, window, position_width, shifted=block % 2 == 1) for block in range(depth)]
            for width, depth, head in zip(widths, depths, heads, strict=True)
        ]
        super().__init__(channels, patch, widths, mlp_ratios, attentions, True, final_norm, drop_path)


class PvtBackbone(_Backbone):
    """PVT of UM-MAE for whole images, with random weights; `load_backbone` loads trained ones.

    Args:
        channels, patch, widths, depths, heads, mlp_ratios, final_norm, drop_path: see `SwinBackbone`.
        sr_ratios: tokens along a side that each stage pools into one key and value.
        grid: rows and columns of the position embedding, which is interpolated for images of other sizes.
    """

    def __init__(
        self,
        channels: int = 3,
        patch: int = 4,
        widths: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 4, 6, 3),
        heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        grid: tuple[int, int] = (64, 64),
        *,
        final_norm: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        attentions = [
            [_PooledAttention(width, head, sr_ratio) for _ in range(depth)]
            for width, depth, head, sr_ratio in zip(widths, depths, heads, sr_ratios, strict=True)
        ]
        super().__init__(channels, patch, widths, mlp_ratios, attentions, False, final_norm, drop_path)
        self.grid = grid
        self.pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1], widths[0]))

    def _add_positions(self, x: Tensor) -> Tensor:
        table = self.pos_embed.unflatten(1, self.grid)  # [1, H, W, C]
        if x.shape[1:3] != self.grid:
            table = table.float().permute(0, 3, 1, 2)
            table = F.interpolate(table, x.shape[1:3], mode="bicubic", align_corners=False, antialias=True)
            table = table.permute(0, 2, 3, 1)
        return x + table.to(x.dtype)


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file."""
    data = memoryview(file.read_bytes())
    start, size, tensors = 8 + int.from_bytes(data[:8], "little"), 0, {}
    try:
        header = json.loads(bytes(data[8:start]))
        metadata = header.pop("__metadata__", {})
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            values = bytearray(data[start + begin : start + end])
            tensors[name] = torch.frombuffer(values, dtype=DTYPES[entry["dtype"]]).reshape(entry["shape"])
            size += len(values)
        if start + size != len(data):
            raise ValueError(f"its tensors take {size} of {len(data) - start} bytes")
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a complete safetensors file of {', '.join(DTYPES)}: {error!r}") from error
    return tensors, metadata


def _read_pth(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file that torch wrote; run no code from it."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        return dict(content["model"]), dict(content["metadata"])
    except OSError:
        raise
    except Exception as error:  # a damaged file makes torch raise errors of many types
        raise ValueError(f"{file} holds no dict with 'model' and 'metadata': {error!r}") from error


def load_backbone(file: str | os.PathLike[str], **changes: Any) -> SwinBackbone | PvtBackbone:  # noqa: ANN401
    """Load the encoder of an exported weight file, in eval mode.

    Args:
        file: a `.safetensors` or `.pth` file with the configuration in its metadata ("config", JSON).
        **changes: arguments of `SwinBackbone` or `PvtBackbone` that override the configuration, such as window=8.

    Raises:
        ValueError: if the file is damaged, holds no configuration or a ViT, or its tensors do not fit the encoder.
    """
    file = Path(file)
    readers = {".safetensors": _read_safetensors, ".pth": _read_pth}
    if file.suffix not in readers:
        raise ValueError(f"{file} must end in .safetensors or .pth")
    tensors, metadata = readers[file.suffix](file)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(NOT_ENCODER)}
    try:
        config = json.loads(metadata["config"])
        model, encoder = config["model"], config["model"]["encoder"]
        names = ["channels", "patch", "widths", "depths", "heads", "mlp_ratios"]
        names += ["window", "position_width"] if encoder == "swin" else []
        arguments = {name: model[name] for name in names}
        if encoder == "pvt":
            arguments["sr_ratios"] = model["sr_ratios"] if "sr_ratios" in model else model["reductions"]  # its old name
            arguments["grid"] = tuple(side // model["patch"] for side in config["image_size"])
        mean, std = tuple(config["data"]["mean"]), tuple(config["data"]["std"])
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{file} holds no valid configuration in its metadata: {error!r}") from error
    if encoder not in ("swin", "pvt"):
        raise ValueError(f"{file} holds the encoder {encoder!r}, not a pyramid; export ViTs for transformers instead")
    arguments["final_norm"] = "norm.weight" in tensors
    arguments |= changes
    try:
        backbone = SwinBackbone(**arguments) if encoder == "swin" else PvtBackbone(**arguments)
        backbone.load_state_dict(tensors)
    except (AttributeError, RuntimeError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{file} does not fit an encoder with {arguments}: {' '.join(str(error).split())}") from error
    backbone.mean, backbone.std = mean, std
    return backbone.eval()
