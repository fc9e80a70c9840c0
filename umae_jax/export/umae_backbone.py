"""Swin and PVT encoders pre-trained with UM-MAE, as multi-scale PyTorch backbones for detection and segmentation.

This one file needs nothing but torch (>= 2.2): copy it beside your toolbox, and

    from umae_backbone import load_backbone

    backbone = load_backbone("swin.safetensors", drop_path=0.1)  # in eval mode; train() it for fine-tuning
    images = (images - mean) / std  # images in [0, 1], [B, C, H, W] of any size; backbone.mean and backbone.std
    maps = backbone(images)  # of every stage: maps[i] is [B, backbone.widths[i], H / strides[i], W / strides[i]]

Sizes are rounded up where `backbone.strides` do not divide the image. Licence: Apache-2.0.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

ACROSS_REGIONS = -100.0  # added to the attention between tokens that are no neighbours in the image
NORM_EPSILON = 1e-6
BLOCK_EPSILON = 1e-5  # of the norms inside blocks
SKIPPED = ("decoder_", "mask_token", "vis_mask_token", "head.", "fc_norm.")  # in checkpoints beside the encoder
ARGUMENTS = ("channels", "patch", "widths", "depths", "heads", "mlp_ratios")  # that both encoders take
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _norm(width: int, epsilon: float = NORM_EPSILON) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=epsilon)


def _convolve(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a convolution to a map whose channels are last: [B, H, W, C] -> [B, h, w, D]."""
    return convolution(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class _PatchEmbedding(nn.Module):
    """A convolution of one step a patch, then perhaps a norm: [B, C, H, W] -> [B, h, w, D]."""

    def __init__(self, channels: int, width: int, patch: int, *, normed: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)
        self.norm = _norm(width) if normed else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class _Downsampling(nn.Module):
    """Perhaps a norm, then a 2 x 2 convolution of stride 2: [B, H, W, C] -> [B, H / 2, W / 2, D]."""

    def __init__(self, inputs: int, width: int, *, normed: bool) -> None:
        super().__init__()
        self.norm = _norm(inputs) if normed else nn.Identity()
        self.proj = nn.Conv2d(inputs, width, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return _convolve(self.proj, self.norm(x))


class _WindowAttention(nn.Module):
    """Attention inside windows, with a bias that a small MLP makes of the tokens' relative places."""

    def __init__(self, width: int, heads: int, window: int, position_width: int, *, shifted: bool) -> None:
        super().__init__()
        self.heads, self.window, self.shifted = heads, window, shifted
        self.posmlp = nn.Sequential(nn.Conv2d(2, position_width, 1), nn.ReLU(), nn.Conv2d(position_width, heads, 1))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def _bias(self, rows: int, columns: int) -> Tensor:
        """The bias of every pair of tokens in a window, [heads, N, N]; the MLP sees each difference of places once."""
        device, dtype = self.qkv.weight.device, self.qkv.weight.dtype
        steps = [torch.arange(1 - side, side, device=device) for side in (rows, columns)]  # key minus query
        differences = torch.stack(torch.meshgrid(*steps, indexing="ij"))
        scaled = differences.sign() * differences.abs().log1p()
        table = self.posmlp(scaled[None].to(dtype))[0]  # [heads, 2 rows - 1, 2 columns - 1]
        row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
        row_step = (row - row[:, None] + rows - 1)[:, None, :, None]  # [query row, 1, key row, 1]
        column_step = (column - column[:, None] + columns - 1)[:, None, :]  # [query column, 1, key column]
        pairs = table[:, row_step, column_step]  # [heads, rows, columns, rows, columns]
        return pairs.flatten(3).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        grid = x.shape[1:3]
        size = [min(self.window, side) for side in grid]
        shift = [self.window // 2 if self.shifted and side > self.window else 0 for side in grid]
        padded = [side + -side % step for side, step in zip(grid, size, strict=True)]
        # Windows may be filled up with padding, and the shift brings together opposite borders: each its own region.
        regions = []
        for side, full, start in zip(grid, padded, shift, strict=True):
            place = torch.arange(full, device=x.device)
            regions.append(((place < start) + 2 * (place >= side)).roll(-start))  # 0 inside, 1 came around, 2 padding
        region = (3 * regions[0][:, None] + regions[1])[None, :, :, None]  # [1, H, W, 1]

        def cut(x: Tensor) -> Tensor:  # [B, H, W, C] -> [B, windows, N, C]
            x = x.unflatten(2, (-1, size[1])).unflatten(1, (-1, size[0]))
            return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

        x = F.pad(x, (0, 0, 0, padded[1] - grid[1], 0, padded[0] - grid[0])).roll((-shift[0], -shift[1]), (1, 2))
        qkv = self.qkv(cut(x)).unflatten(-1, (3, self.heads, -1))  # [B, windows, N, 3, heads, d]
        queries, keys, values = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)  # each [B, windows * heads, N, d]
        window = cut(region)[0]  # [windows, N, 1]
        across = (window != window.mT)[:, None] * ACROSS_REGIONS  # [windows, 1, N, N]
        bias = (self._bias(*size) + across).flatten(0, 1).to(queries.dtype)
        x = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias[None])
        x = self.proj(x.unflatten(1, (-1, self.heads)).transpose(2, 3).flatten(3))  # [B, windows, N, C]
        x = x.unflatten(2, tuple(size)).unflatten(1, (padded[0] // size[0], -1))  # [B, rows, columns, h, w, C]
        x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2).roll((shift[0], shift[1]), (1, 2))
        return x[:, : grid[0], : grid[1]]


class _PooledAttention(nn.Module):
    """Attention of every token to the average-pooled map."""

    def __init__(self, width: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads, self.reduction = heads, reduction
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.sr = nn.Conv2d(width, width, 1)
        self.norm = _norm(width, BLOCK_EPSILON)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        rows, columns = x.shape[1:3]
        if rows % self.reduction or columns % self.reduction:
            raise ValueError(
                f"a reduction of {self.reduction} does not divide a stage of {rows} x {columns} tokens; "
                "choose sr_ratios that do, such as 8, 4, 2, 1, or another image size"
            )
        pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), self.reduction).permute(0, 2, 3, 1)
        pooled = self.norm(_convolve(self.sr, pooled)).flatten(1, 2)  # [B, M, C]
        queries = self.q(x.flatten(1, 2)).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, N, d]
        keys, values = self.kv(pooled).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, M, d]
        x = F.scaled_dot_product_attention(queries, keys, values)
        return self.proj(x.transpose(1, 2).flatten(2)).unflatten(1, (rows, columns))


class _Block(nn.Module):
    """A pre-norm transformer block, behind a downsampling where a stage begins."""

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
        """In training, forget the whole branch of some images, and scale it up for the others."""
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(keep) / keep

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C], or half of H and W where a stage begins."""
        x = self.downsample(x)
        x = x + self._drop(self.attn(self.norm1(x)))
        return x + self._drop(self.mlp(self.norm2(x)))


class _Backbone(nn.Module):
    """What both pyramids have in common.

    Attributes:
        widths: channels of each stage's map.
        strides: pixels along a side of each stage's tokens.
        mean, std: what each channel of the images is normalised by; empty until `load_backbone` sets them.
    """

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
        self.widths = tuple(widths)
        self.strides = tuple(patch * 2**stage for stage in range(len(widths)))
        self.mean: tuple[float, ...] = ()
        self.std: tuple[float, ...] = ()
        self.patch_embed = _PatchEmbedding(channels, widths[0], patch, normed=normed)
        self.blocks = nn.ModuleList()
        self._ends = []  # the last block of each stage
        last = max(sum(map(len, attentions)) - 1, 1)
        for stage, (width, mlp_ratio, layers) in enumerate(zip(widths, mlp_ratios, attentions, strict=True)):
            for place, attention in enumerate(layers):
                begins = stage > 0 and place == 0
                downsample = _Downsampling(widths[stage - 1], width, normed=normed) if begins else nn.Identity()
                rate = drop_path * len(self.blocks) / last
                self.blocks.append(_Block(width, mlp_ratio, attention, downsample, rate))
            self._ends.append(len(self.blocks) - 1)
        self.norm = _norm(widths[-1]) if final_norm else nn.Identity()

    def _place(self, x: Tensor) -> Tensor:
        """Add the absolute position embedding, if there is one: [B, H, W, C] -> [B, H, W, C]."""
        return x

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The feature maps of every stage, each [B, width, ceil(H / stride), ceil(W / stride)].

        Args:
            images: [B, channels, H, W], normalised; zeros are added below and at the right where strides do not divide.
        """
        height, width = images.shape[-2:]
        x = F.pad(images, (0, -width % self.strides[-1], 0, -height % self.strides[-1]))
        x = self._place(self.patch_embed(x))
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
    """The Swin of UM-MAE on whole images. It gets its weights from `load_backbone`.

    Args:
        channels: of the images.
        patch: pixels along a side of a token of the first stage.
        widths, depths, heads, mlp_ratios: channels, blocks, attention heads and hidden width of each stage.
        window: tokens along a side of a window; odd blocks of a stage shift by half of it.
        position_width: hidden width of the MLP that makes the position bias.
        final_norm: whether the last map is normalised, as in pre-training; fine-tuned classifiers do not.
        drop_path: rate of stochastic depth in the last block, rising from 0 in the first; only in training.
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
    """The PVT of UM-MAE on whole images. It gets its weights from `load_backbone`.

    Args:
        channels, patch, widths, depths, heads, mlp_ratios, final_norm, drop_path: see `SwinBackbone`.
        sr_ratios: how much each stage pools keys and values along a side.
        grid: rows and columns of patches that the position embedding is for; it is interpolated to others.
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
            [_PooledAttention(width, head, reduction) for _ in range(depth)]
            for width, depth, head, reduction in zip(widths, depths, heads, sr_ratios, strict=True)
        ]
        super().__init__(channels, patch, widths, mlp_ratios, attentions, False, final_norm, drop_path)
        self.grid = grid
        self.pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1], widths[0]))

    def _place(self, x: Tensor) -> Tensor:
        table = self.pos_embed.unflatten(1, self.grid)  # [1, H, W, C]
        if x.shape[1:3] != self.grid:
            table = table.float().permute(0, 3, 1, 2)
            table = F.interpolate(table, x.shape[1:3], mode="bicubic", align_corners=False, antialias=True)
            table = table.permute(0, 2, 3, 1)
        return x + table.to(x.dtype)


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    data = memoryview(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    if len(data) < max(start, 8):
        raise ValueError(f"{file} is no whole safetensors file: it ends at byte {len(data)}, inside its header")
    body, tensors, seen = data[start:], {}, 0
    try:
        header = json.loads(bytes(data[8:start]))
        metadata = header.pop("__metadata__", {})
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{name} has the dtype {entry['dtype']}, not one of {', '.join(DTYPES)}")
            if not 0 <= begin < end <= len(body):
                raise ValueError(f"{name} lies at bytes {begin} to {end} of {len(body)}")
            tensor = torch.frombuffer(bytearray(body[begin:end]), dtype=DTYPES[entry["dtype"]])
            tensors[name] = tensor.reshape(entry["shape"])
            seen += end - begin
    except (AttributeError, KeyError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no whole safetensors file: {error}") from error
    if seen != len(body):
        raise ValueError(f"{file} is no whole safetensors file: its tensors take {seen} of {len(body)} bytes")
    return tensors, metadata


def _read_pth(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file that torch wrote; runs no code of it."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        tensors, metadata = dict(content["model"]), dict(content["metadata"])
    except OSError:
        raise
    except Exception as error:  # whatever a broken file makes torch raise
        raise ValueError(f"{file} holds no dictionary with 'model' and 'metadata': {error!r}") from error
    if others := [str(name) for name, tensor in tensors.items() if not isinstance(tensor, Tensor)]:
        raise ValueError(f"{file} holds in its 'model' what is no tensor: {', '.join(others)}")
    return tensors, metadata


def load_backbone(file: str | os.PathLike[str], **changes: Any) -> SwinBackbone | PvtBackbone:  # noqa: ANN401 - see Args
    """The encoder of an exported checkpoint, in eval mode.

    Args:
        file: a `.safetensors` or `.pth` file whose metadata hold the configuration ("config", JSON).
        **changes: arguments of `SwinBackbone` or `PvtBackbone` that shall differ from it, such as window=8.

    Raises:
        ValueError: if the file is damaged, no such checkpoint or of a ViT, or its tensors do not fit the encoder.
    """
    file = Path(file)
    readers = {".safetensors": _read_safetensors, ".pth": _read_pth}
    if file.suffix not in readers:
        raise ValueError(f"{file} ends neither in .safetensors nor in .pth")
    tensors, metadata = readers[file.suffix](file)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(SKIPPED)}
    classes: dict[str, type[SwinBackbone | PvtBackbone]] = {"swin": SwinBackbone, "pvt": PvtBackbone}
    own = {"swin": ("window", "position_width"), "pvt": ("sr_ratios",)}
    try:
        config = json.loads(metadata["config"])
        model, encoder = config["model"], config["model"]["encoder"]
        mean, std = tuple(config["data"]["mean"]), tuple(config["data"]["std"])
        arguments = {name: model[name] for name in ARGUMENTS + own[encoder]} if encoder in own else {}
        if encoder == "pvt":
            height, width = config["image_size"]
            arguments["grid"] = height // model["patch"], width // model["patch"]
    except (KeyError, TypeError, ValueError, ZeroDivisionError, RecursionError) as error:
        raise ValueError(f"{file} holds no usable configuration in its metadata: {error!r}") from error
    if encoder not in classes:
        raise ValueError(f"{file} holds the encoder {encoder!r}, no pyramid; export a ViT for transformers instead")
    arguments["final_norm"] = any(name.startswith("norm.") for name in tensors)
    try:
        backbone = classes[encoder](**arguments | changes)
    except (TypeError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"{file}: no encoder can be made of {arguments | changes}: {error}") from error

    found, wanted = ({name: tuple(x.shape) for name, x in part.items()} for part in (tensors, backbone.state_dict()))
    wrong = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    wrong += [f"{name} is unexpected" for name in found.keys() - wanted.keys()]
    both = wanted.keys() & found.keys()
    wrong += [f"{name} is {found[name]} instead of {wanted[name]}" for name in both if found[name] != wanted[name]]
    if wrong:
        raise ValueError(f"{file} does not fit the encoder: {'; '.join(sorted(wrong))}")
    backbone.load_state_dict(tensors)
    backbone.mean, backbone.std = mean, std
    return backbone.eval()
