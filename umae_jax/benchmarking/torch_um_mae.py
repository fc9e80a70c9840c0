"""UM-MAE with a Swin in plain PyTorch (SPEC 2, 3, 6, 9), to time our step against.

Parameters have the reference's names and layouts (SPEC 13), so that both can use the same weights. The easy savings are
made: only sampled patches are embedded, coordinate differences are computed once per stage instead of once per block,
and only the units in the loss are predicted. The relative position bias follows the definition: each block's MLP runs
over every pair of tokens of every window of every image.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from ml_collections import ConfigDict
from torch import Tensor, nn

from umae_jax.masking import visible_count
from umae_jax.models.autoencoder import DECODER_MLP_RATIO
from umae_jax.models.layers import NORM_EPSILON, PYRAMID_EPSILON, TOKEN_STD
from umae_jax.models.windows import MASK_VALUE
from umae_jax.positions import sincos_table


class TorchMask(NamedTuple):
    """A uniform mask: `umae_jax.masking.UniformMask` in PyTorch.

    Attributes:
        offset: int64 [B, cell rows, cell columns], the sampled unit of each cell, 0..3.
        hidden: bool [B, cell rows, cell columns], whether secondary masking hides it.
    """

    offset: Tensor
    hidden: Tensor


class Layout(NamedTuple):
    """The windows of a stage, with or without a shift.

    Attributes:
        window: rows and columns of tokens in a window.
        shift: rows and columns to roll the grid by before it is cut.
        differences: float32 [B * windows, 2, N, N], log-scaled differences of coordinates, key minus query.
        mask: float32 [windows, 1, N, N], 0 or MASK_VALUE; None without a shift.
    """

    window: tuple[int, int]
    shift: tuple[int, int]
    differences: Tensor
    mask: Tensor | None


def cut_windows(x: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Cut a grid [B, H, W, C] into windows [B * windows, N, C]."""
    batch, height, width, channels = x.shape
    if any(shift):
        x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
    x = x.view(batch, height // window[0], window[0], width // window[1], window[1], channels)
    return x.transpose(2, 3).reshape(-1, window[0] * window[1], channels)


def join_windows(x: Tensor, grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Invert `cut_windows`: [B * windows, N, C] -> [B, H, W, C]."""
    height, width = grid
    x = x.view(-1, height // window[0], width // window[1], *window, x.shape[-1])
    x = x.transpose(2, 3).reshape(-1, height, width, x.shape[-1])
    return torch.roll(x, shift, (1, 2)) if any(shift) else x


def lay_windows(coordinates: Tensor, side: int, *, shifted: bool) -> Layout:
    """Lay out windows of side x side tokens over a grid.

    Args:
        coordinates: of the tokens, float32 [B, H, W, 2].
        side: tokens per side of a window; smaller grids are one window.
        shifted: whether to shift the windows by half a side.
    """
    grid = (coordinates.shape[1], coordinates.shape[2])
    window = (min(side, grid[0]), min(side, grid[1]))
    shift = (
        side // 2 if shifted and grid[0] > side else 0,
        side // 2 if shifted and grid[1] > side else 0,
    )
    places = cut_windows(coordinates, window, shift).transpose(1, 2)  # [B * windows, 2, N]
    differences = places[:, :, None, :] - places[:, :, :, None]
    differences = differences.sign() * differences.abs().log1p()
    mask = None
    if any(shift):
        region = torch.zeros(1, *grid, 1, device=coordinates.device)
        region[:, : shift[0]] += 1  # rows and columns that the roll moves to the other border
        region[:, :, : shift[1]] += 2
        region = cut_windows(region, window, shift).squeeze(-1)
        mask = MASK_VALUE * (region[:, None, :] != region[:, :, None]).float()[:, None]
    return Layout(window, shift, differences, mask)


class Attention(nn.Module):
    """Attention within a window or over all tokens: [B, N, C] -> [B, N, C].

    Args:
        width: C.
        heads: number of heads.
        position_width: hidden width of the position MLP; None for attention without a bias.
    """

    def __init__(self, width: int, heads: int, position_width: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        if position_width is not None:
            self.posmlp = nn.Sequential(
                nn.Conv2d(2, position_width, 1), nn.ReLU(inplace=True), nn.Conv2d(position_width, heads, 1)
            )

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """Attend; with a layout the tokens are those of windows and the bias is added."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        bias = None if layout is None else self.bias(layout)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))

    def bias(self, layout: Layout) -> Tensor:
        """Return the bias of every pair of tokens of every window, [B * windows, heads, N, N]."""
        bias = self.posmlp(layout.differences)
        if layout.mask is not None:
            windows, _, tokens, _ = layout.mask.shape
            bias = bias.view(-1, windows, self.heads, tokens, tokens) + layout.mask
            bias = bias.view(-1, self.heads, tokens, tokens)
        return bias


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., C] -> [..., C]."""
        return self.fc2(self.act(self.fc1(x)))


class Merge(nn.Module):
    """Layer norm and a 2 x 2 convolution of stride 2: [B, H, W, C] -> [B, H / 2, W / 2, C']."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs, eps=NORM_EPSILON)
        self.proj = nn.Conv2d(inputs, outputs, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return self.proj(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SwinBlock(nn.Module):
    """A merge if the block is the first of a later stage, then x + W-MSA(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, inputs: int | None, width: int, heads: int, mlp_ratio: int, position_width: int) -> None:
        super().__init__()
        self.downsample = None if inputs is None else Merge(inputs, width)
        self.norm1 = nn.LayerNorm(width, eps=PYRAMID_EPSILON)
        self.attn = Attention(width, heads, position_width)
        self.norm2 = nn.LayerNorm(width, eps=PYRAMID_EPSILON)
        self.mlp = Mlp(width, mlp_ratio * width)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Apply the block: [B, H, W, C] -> [B, H, W, C], or [B, H / 2, W / 2, C'] after a merge."""
        if self.downsample is not None:
            x = self.downsample(x)
        attended = self.attn(cut_windows(self.norm1(x), layout.window, layout.shift), layout)
        x = x + join_windows(attended, (x.shape[1], x.shape[2]), layout.window, layout.shift)
        return x + self.mlp(self.norm2(x))


class DecoderBlock(nn.Module):
    """A pre-norm ViT block: [B, N, C] -> [B, N, C]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.mlp = Mlp(width, DECODER_MLP_RATIO * width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """A p x p convolution of stride p, replacement of hidden patches, and a layer norm."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)
        self.norm = nn.LayerNorm(width, eps=NORM_EPSILON)

    def forward(self, pixels: Tensor, hidden: Tensor, mask_token: Tensor | None) -> Tensor:
        """Embed pixels [B, C, H, W] with hidden patches, bool [B, H / p, W / p] -> [B, H / p, W / p, width]."""
        x = self.proj(pixels).permute(0, 2, 3, 1)
        if mask_token is not None:
            x = torch.where(hidden[..., None], mask_token[None].to(x.dtype), x)
        return self.norm(x)


class TorchUmMae(nn.Module):
    """UM-MAE with the Swin of a configuration, with random parameters (SPEC 9)."""

    decoder_pos_embed: Tensor

    def __init__(self, config: ConfigDict) -> None:
        super().__init__()
        model = config.model
        self.patch, self.factor, self.side = model.patch, model.decoder_factor, model.window // 2
        self.unit = model.patch * 2 ** (len(model.depths) - 1) // model.decoder_factor
        self.cells = (config.image_size[0] // (2 * self.unit), config.image_size[1] // (2 * self.unit))
        self.visible = visible_count(self.cells, model.secondary_ratio)
        self.depths, self.norm_pix_loss = model.depths, model.norm_pix_loss
        width, decoder_width = model.widths[0], model.decoder_width
        self.patch_embed = PatchEmbed(model.channels, model.patch, width)
        self.vis_mask_token = _token(width) if model.secondary_ratio else None
        self.blocks = nn.ModuleList(
            SwinBlock(
                model.widths[stage - 1] if stage and not block else None,
                model.widths[stage],
                model.heads[stage],
                model.mlp_ratios[stage],
                model.position_width,
            )
            for stage, depth in enumerate(model.depths)
            for block in range(depth)
        )
        self.norm = nn.LayerNorm(model.widths[-1], eps=NORM_EPSILON)
        self.decoder_embed = nn.Linear(model.widths[-1], model.decoder_factor**2 * decoder_width)
        self.mask_token = _token(decoder_width)
        table = torch.from_numpy(sincos_table(decoder_width, (2 * self.cells[0], 2 * self.cells[1])))
        self.register_buffer("decoder_pos_embed", table.reshape(1, -1, decoder_width))
        self.decoder_blocks = nn.ModuleList(
            DecoderBlock(decoder_width, model.decoder_heads) for _ in range(model.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=NORM_EPSILON)
        self.decoder_pred = nn.Linear(decoder_width, self.unit**2 * model.channels)
        self.apply(_initialize)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.view(width, -1))

    def sample_mask(self, batch: int) -> TorchMask:
        """Draw one mask per image, on the device."""
        device, cells = self.mask_token.device, (batch, *self.cells)
        rank = torch.rand(batch, math.prod(self.cells), device=device).argsort(1).argsort(1)
        return TorchMask(torch.randint(4, cells, device=device), (rank >= self.visible).view(cells))

    def forward(self, images: Tensor, mask: TorchMask) -> Tensor:
        """Return the loss of normalised images, float32 [B, C, H, W]."""
        (sampled, masked), units = self.unit_indices(mask), self.cut_units(images)
        latent = self.encode(_take(units, sampled), mask)
        prediction = self.decode(latent, sampled, masked)
        target = _take(units, masked)
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(target, -1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        return F.mse_loss(prediction.float(), target)

    def unit_indices(self, mask: TorchMask) -> tuple[Tensor, Tensor]:
        """Return the row-major indices of sampled units [B, n] and of masked units [B, 3 n]."""
        rows, columns = self.cells
        device = mask.offset.device
        row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
        offset = torch.stack([(mask.offset + number) % 4 for number in range(4)], 1)  # [B, 4, rows, columns]
        index = (2 * row[:, None] + offset // 2) * 2 * columns + 2 * column + offset % 2
        return index[:, 0].flatten(1), index[:, 1:].flatten(1)

    def cut_units(self, images: Tensor) -> Tensor:
        """Cut images [B, C, H, W] into units [B, units, unit * unit * C], pixels ordered (row, column, channel)."""
        batch, channels = images.shape[:2]
        x = images.view(batch, channels, 2 * self.cells[0], self.unit, 2 * self.cells[1], self.unit)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, self.unit**2 * channels)

    def encode(self, units: Tensor, mask: TorchMask) -> Tensor:
        """Encode the sampled units [B, n, unit * unit * C] to tokens [B, rows, columns, C]."""
        batch, (rows, columns), side = len(units), self.cells, self.unit // self.patch
        pixels = units.view(batch, rows, columns, self.unit, self.unit, -1).permute(0, 5, 1, 3, 2, 4)
        pixels = pixels.reshape(batch, -1, rows * self.unit, columns * self.unit)
        hidden = mask.hidden.repeat_interleave(side, 1).repeat_interleave(side, 2)
        x = self.patch_embed(pixels, hidden, self.vis_mask_token)
        coordinates, blocks = self.coordinates(mask.offset, side), iter(self.blocks)
        for stage, depth in enumerate(self.depths):
            if stage:
                coordinates = coordinates[:, ::2, ::2] / 2
            layouts = [lay_windows(coordinates, self.side, shifted=shifted) for shifted in (False, True)[:depth]]
            for number in range(depth):
                x = next(blocks)(x, layouts[number % 2])
        return self.norm(x)

    def coordinates(self, offset: Tensor, side: int) -> Tensor:
        """Return the row and column in the full image of each patch of the compact grid.

        Args:
            offset: of the mask, [B, rows, columns].
            side: patches per side of a unit.

        Returns:
            float32 [B, rows * side, columns * side, 2].
        """
        offset = offset.repeat_interleave(side, 1).repeat_interleave(side, 2)
        row, column = (torch.arange(size, device=offset.device) for size in offset.shape[1:])
        row = (2 * (row // side)[:, None] + offset // 2) * side + (row % side)[:, None]
        column = (2 * (column // side) + offset % 2) * side + column % side
        return torch.stack([row, column], -1).float()

    def decode(self, latent: Tensor, sampled: Tensor, masked: Tensor) -> Tensor:
        """Predict the masked units [B, 3 n, unit * unit * C] from tokens [B, rows, columns, C]."""
        x = F.pixel_shuffle(self.decoder_embed(latent).permute(0, 3, 1, 2), self.factor).flatten(2).transpose(1, 2)
        positions = self.decoder_pos_embed.expand(len(x), -1, -1)
        x = torch.cat([x + _take(positions, sampled), self.mask_token + _take(positions, masked)], 1)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, sampled.shape[1] :]))


def _take(x: Tensor, indices: Tensor) -> Tensor:
    """Select rows: x [B, N, C] at indices [B, n] -> [B, n, C]."""
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))


def _token(width: int) -> nn.Parameter:
    return nn.Parameter(TOKEN_STD * torch.randn(1, 1, width))


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d) and module.bias is not None:
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.zeros_(module.bias)
