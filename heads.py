"""Two segmentation heads on four feature maps, and their losses.

Read for UperNet: UperNet -> FCN -> upernet_losses.
Read for Mask2Former: PixelDecoder -> DecoderLayer -> Mask2Former -> semantic_scores -> match -> mask2former_losses.

Both heads take the adapter's maps (f4, f8, f16, f32), (B, D, H/s, W/s) at stride s. Modules only predict; matching and
losses are free functions of predictions and labels.

Shapes: B batch, C head width, K classes, Q queries, P points, Y decoder outputs (before the first layer and after
each), S tokens of three levels, M matched masks. Labels are (B, H, W) with 255 = ignore.
"""
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from fast.convolutions import Conv3x3, conv3x3, conv3x3_of_enlarged
from fast.memory import recomputed
from msda_cuda import MSDeformAttn, reference_points

IGNORE = 255


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, (B, C, h, w) -> (B, C, *size), the one way in which this code resizes feature and score maps."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def full_precision(x: Tensor) -> Tensor:
    """float16 and bfloat16 to float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Mixed precision off for what runs inside, on the device of `x`; "meta", which only counts, has none to switch."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


# ------------------------------------------------------------------------------------------------------------ UperNet


class ConvNormReLU(nn.Sequential):
    """1x1 or 3x3 convolution without bias, batch norm, ReLU: (B, in, h, w) -> (B, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        if kernel_size == 3:
            conv = Conv3x3(in_channels, out_channels)
        else:
            conv = nn.Conv2d(in_channels, out_channels, kernel_size, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))
        nn.init.kaiming_normal_(self[0].weight, mode="fan_out", nonlinearity="relu")


def classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """The 1x1 convolution that ends both UperNet heads, with their start: normal 0.01, bias 0."""
    layer = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


class UperNet(nn.Module):
    """Pyramid pooling on the coarsest map, a feature pyramid over all, fused at stride 4 (Xiao et al., ECCV 2018)."""

    POOL_SIZES = (1, 2, 3, 6)

    def __init__(self, dim: int, channels: int, num_classes: int, dropout: float):
        super().__init__()
        self.pools = nn.ModuleList(ConvNormReLU(dim, channels, 1) for _ in self.POOL_SIZES)
        self.bottleneck = ConvNormReLU(dim + len(self.POOL_SIZES) * channels, channels, 3)
        self.laterals = nn.ModuleList(ConvNormReLU(dim, channels, 1) for _ in range(3))
        self.outputs = nn.ModuleList(ConvNormReLU(channels, channels, 3) for _ in range(3))
        self.fuse = ConvNormReLU(4 * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = classifier(channels, num_classes)

    @property
    def lateral_of_f4(self) -> nn.Conv2d:
        """The 1x1 convolution through which alone f4 is looked at."""
        return self.laterals[0][0]

    def pyramid_pooling(self, f32: Tensor) -> Tensor:
        sized = zip(self.POOL_SIZES, self.pools, strict=True)
        pooled = [resize(conv(F.adaptive_avg_pool2d(f32, size)), f32.shape[2:]) for size, conv in sized]
        return self.bottleneck(torch.cat([f32, *pooled], dim=1))

    def forward(self, features: Sequence[Tensor], lateral_done: bool = False) -> Tensor:
        """Four maps, of which f4 may be past `lateral_of_f4` already -> logits (B, K, H/4, W/4)."""
        *finer, f32 = features
        top = self.pyramid_pooling(f32)
        levels = [lateral(f) for lateral, f in zip(self.laterals[lateral_done:], finer[lateral_done:], strict=True)]
        if lateral_done:
            _, norm, relu = self.laterals[0]
            levels.insert(0, relu(norm(finer[0])))
        levels.append(top)
        for i in (2, 1, 0):  # top-down: each level receives the coarser one
            levels[i] = levels[i] + resize(levels[i + 1], levels[i].shape[2:])
        levels = [conv(level) for conv, level in zip(self.outputs, levels[:3], strict=True)] + [top]
        return self.classifier(self.dropout(self.fuse_levels(levels)))

    def fuse_levels(self, levels: Sequence[Tensor]) -> Tensor:
        """`self.fuse` of all levels, resized to the finest and concatenated; in fact each is convolved at its own
        resolution and added, a third of the arithmetic."""
        conv, norm, relu = self.fuse
        finest, *coarser = levels
        kernel, *kernels = conv.weight.split(finest.shape[1], dim=1)
        x = conv3x3(finest, kernel)
        for level, kernel in zip(coarser, kernels, strict=True):
            x = x + conv3x3_of_enlarged(level, kernel, finest.shape[2:])
        return relu(norm(x))


class FCN(nn.Module):
    """One 3x3 convolution and a classifier on f16: the auxiliary head that only training uses."""

    def __init__(self, dim: int, channels: int, num_classes: int, dropout: float):
        super().__init__()
        self.conv = ConvNormReLU(dim, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = classifier(channels, num_classes)

    def forward(self, f16: Tensor) -> Tensor:
        """(B, D, H/16, W/16) -> logits (B, K, H/16, W/16)."""
        return self.classifier(self.dropout(self.conv(f16)))


def pixel_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of up-sampled logits, averaged over *all* pixels of (B, H, W) labels."""
    logits = resize(full_precision(logits), labels.shape[1:])
    # As in the released runs, ignored pixels add nothing to the sum but do count in the denominator.
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / labels.numel()


def upernet_losses(logits: Tensor, auxiliary_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Losses by name; the auxiliary head weighs 0.4."""
    auxiliary = pixel_cross_entropy(auxiliary_logits, labels)
    return {"pixel": pixel_cross_entropy(logits, labels), "auxiliary": 0.4 * auxiliary}


# -------------------------------------------------------------------------------------------------------- Mask2Former


class Prediction(NamedTuple):
    """What Q queries say after each of Y decoder layers."""

    class_logits: Tensor  # (Y, B, Q, K + 1), the last class is "no object"
    mask_embeds: Tensor  # (Y, B, Q, C + 1)
    mask_features: Tensor  # (B, C + 1, H/4, W/4), the last channel is 1

    @property
    def mask_logits(self) -> Tensor:
        """(Y, B, Q, H/4, W/4): every query's embedding times the features of every pixel. Training never needs them all
        at once: matching takes them output by output, losses only those of matched queries."""
        return torch.einsum("ybqc,bchw->ybqhw", self.mask_embeds, self.mask_features)


def sine_positions(h: int, w: int, channels: int, like: Tensor) -> Tensor:
    """Sine position encoding of an h x w grid, (h*w, channels): half the channels for y, half for x (DETR, A.4).

    Coordinates run from 1/h to 1 (not from pixel centres), times 2 pi; the temperature is 10,000.
    """
    def encode(n: int) -> Tensor:
        position = torch.arange(1, n + 1, device=like.device, dtype=dtype) / (n + 1e-6) * (2 * math.pi)
        pairs = torch.arange(channels // 4, device=like.device, dtype=dtype)
        angles = position[:, None] / 10000 ** (pairs * 4 / channels)
        return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)  # sin and cos alternate: (n, channels / 2)

    dtype = torch.float32  # as in the released code, whatever the model's precision
    y = encode(h)[:, None].expand(h, w, -1)
    x = encode(w)[None, :].expand(h, w, -1)
    return torch.cat([y, x], dim=2).flatten(0, 1).to(like.dtype)


class FeedForward(nn.Sequential):
    """Two linear layers with a ReLU between, (B, S, C) -> (B, S, C)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))


class PixelDecoderLayer(nn.Module):
    """Deformable self-attention over three levels, then feed-forward; both post-norm (Zhu et al., ICLR 2021)."""

    def __init__(self, channels: int, hidden: int, num_heads: int):
        super().__init__()
        self.attention = MSDeformAttn(channels, num_heads, num_levels=3, num_points=4)
        self.norm1 = nn.LayerNorm(channels)
        self.ffn = FeedForward(channels, hidden)
        self.norm2 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, positions: Tensor, points: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        x, hidden = recomputed(self.norm_and_widen, x + self.attention(x + positions, points, x, grids))
        _, relu, narrow = self.ffn
        return self.norm2(x + narrow(relu(hidden)))

    def norm_and_widen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised x and the first layer of the feed-forward: for the backward pass x alone is kept."""
        x = self.norm1(x)
        return x, self.ffn[0](x)


class PixelDecoder(nn.Module):
    """A deformable-attention encoder over f32, f16, f8 and a pyramid step to stride 4 (Mask2Former, section 3.2.2)."""

    def __init__(self, dim: int, channels: int, hidden: int, num_layers: int, num_heads: int):
        super().__init__()
        self.inputs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, channels, 1), nn.GroupNorm(32, channels)) for _ in range(3)
        )
        self.level_embed = nn.Parameter(torch.empty(3, channels))
        self.layers = nn.ModuleList(PixelDecoderLayer(channels, hidden, num_heads) for _ in range(num_layers))
        self.lateral = nn.Sequential(nn.Conv2d(dim, channels, 1, bias=False), nn.GroupNorm(32, channels))
        self.output = nn.Sequential(
            Conv3x3(channels, channels), nn.GroupNorm(32, channels), nn.ReLU(inplace=True)
        )
        self.mask_features = nn.Conv2d(channels, channels, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.level_embed)
        for conv, _ in self.inputs:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
        for conv in (self.lateral[0], self.output[0], self.mask_features):
            nn.init.kaiming_uniform_(conv.weight, a=1)  # "caffe2 xavier": the fan-in alone
        nn.init.zeros_(self.mask_features.bias)
        xavier_normal_matrices(self.layers)
        for layer in self.layers:
            layer.attention.reset_parameters()

    def forward(self, features: Sequence[Tensor], lateral_done: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Four maps, of which f4 may be past `lateral[0]` already -> a map (B, C, H/4, W/4), which still has
        `mask_features` ahead of it, and memory [(B, C, h, w)] at strides 32, 16, 8."""
        f4, *coarser = features
        maps = [project(f) for project, f in zip(self.inputs, reversed(coarser), strict=True)]  # low resolution first
        grids = [(m.shape[2], m.shape[3]) for m in maps]
        x = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)  # (B, C, h, w) -> (B, S, C)
        levels = zip(grids, self.level_embed, strict=True)
        positions = torch.cat([sine_positions(*grid, x.shape[2], like=x) + embed for grid, embed in levels])
        points = reference_points(grids, like=x)
        for layer in self.layers:
            x = layer(x, positions, points, grids)
        levels = zip(x.split([h * w for h, w in grids], dim=1), grids, strict=True)
        memory = [level.unflatten(1, grid).permute(0, 3, 1, 2) for level, grid in levels]  # (B, h*w, C) -> (B, C, h, w)
        f4 = (self.lateral[1:] if lateral_done else self.lateral)(f4)
        return self.output(f4 + resize(memory[-1], f4.shape[2:])), memory


class Attention(nn.Module):
    """Multi-head attention whose keys may be masked; `in_proj` stacks the query, key and value projections."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj = nn.Linear(channels, 3 * channels)
        self.out_proj = nn.Linear(channels, channels)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attend: Tensor | None = None) -> Tensor:
        """query (B, Q, C), key and value (B, S, C), attend (B, Q, S) true where a query may look -> (B, Q, C)."""
        projections = zip((query, key, value), self.in_proj.weight.chunk(3), self.in_proj.bias.chunk(3), strict=True)
        q, k, v = (F.linear(x, w, b).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x, w, b in projections)
        mask = None if attend is None else attend[:, None]  # one mask for all heads
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # (B, heads, Q, c) -> (B, Q, C)


class DecoderLayer(nn.Module):
    """Masked cross-attention first, then self-attention, then feed-forward; all post-norm (Mask2Former, 3.2.1)."""

    def __init__(self, channels: int, hidden: int, num_heads: int):
        super().__init__()
        self.cross_attention = Attention(channels, num_heads)
        self.norm1 = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, num_heads)
        self.norm2 = nn.LayerNorm(channels)
        self.ffn = FeedForward(channels, hidden)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, query_embed: Tensor, memory: Tensor, positions: Tensor, attend: Tensor) -> Tensor:
        """x, query_embed (B, Q, C); memory, positions (B, S, C), (S, C); attend (B, Q, S) -> (B, Q, C)."""
        x = self.norm1(x + self.cross_attention(x + query_embed, memory + positions, memory, attend))
        x = self.norm2(x + self.self_attention(x + query_embed, x + query_embed, x))
        return self.norm3(x + self.ffn(x))


class Mask2Former(nn.Module):
    """Queries that look where they last saw their mask (Cheng et al., CVPR 2022)."""

    def __init__(self, dim: int, channels: int, num_classes: int, num_queries: int, num_heads: int, decoder_layers: int,
                 decoder_ffn: int, encoder_layers: int, encoder_ffn: int):
        super().__init__()
        self.pixel_decoder = PixelDecoder(dim, channels, encoder_ffn, encoder_layers, num_heads)
        self.query_feat = nn.Parameter(torch.empty(num_queries, channels))
        self.query_embed = nn.Parameter(torch.empty(num_queries, channels))
        self.level_embed = nn.Parameter(torch.empty(3, channels))
        self.layers = nn.ModuleList(DecoderLayer(channels, decoder_ffn, num_heads) for _ in range(decoder_layers))
        self.norm = nn.LayerNorm(channels)
        self.class_embed = nn.Linear(channels, num_classes + 1)
        self.mask_embed = nn.Sequential(
            nn.Linear(channels, channels), nn.ReLU(),
            nn.Linear(channels, channels), nn.ReLU(),
            nn.Linear(channels, channels),
        )
        xavier_normal_matrices(self.layers)
        for embedding in (self.query_feat, self.query_embed, self.level_embed):
            nn.init.normal_(embedding)

    @property
    def lateral_of_f4(self) -> nn.Conv2d:
        """The 1x1 convolution through which alone f4 is looked at."""
        return self.pixel_decoder.lateral[0]

    def forward(self, features: Sequence[Tensor], every_layer: bool, lateral_done: bool = False) -> Prediction:
        """Four maps -> the last prediction (Y = 1); with `every_layer` those before the first layer and after each.
        With `lateral_done` f4 is past `lateral_of_f4` already."""
        finest, memory_maps = self.pixel_decoder(features, lateral_done)
        mask_features = F.pad(finest, (0, 0, 0, 0, 0, 1), value=1.0)  # a channel of ones, for the bias
        # A mask's logit at a pixel f is e (W f + b) = (e W, e b) (f, 1): multiply Q embeddings, not all pixels, by W.
        last = self.pixel_decoder.mask_features
        to_pixels = torch.cat([last.weight.flatten(1), last.bias[:, None]], dim=1)  # (C, C + 1)
        memory = [m.flatten(2).transpose(1, 2) + e for m, e in zip(memory_maps, self.level_embed, strict=True)]
        positions = [sine_positions(m.shape[2], m.shape[3], m.shape[1], like=m) for m in memory_maps]
        # Masks are linear in the mask features: resizing these once a level spares resizing Q masks in every layer.
        level_features = [resize(mask_features.detach(), m.shape[2:]).flatten(2) for m in memory_maps]

        x = self.query_feat.expand(mask_features.shape[0], -1, -1)
        query_embed = self.query_embed.expand_as(x)
        normed, mask_embeds = [], []
        for i, layer in enumerate([*self.layers, None]):
            normed.append(self.norm(x))
            mask_embeds.append(self.mask_embed(normed[-1]) @ to_pixels)
            if layer is not None:
                level = i % 3
                attend = where_to_look(mask_embeds[-1].detach(), level_features[level])
                x = layer(x, query_embed, memory[level], positions[level], attend)
        said = slice(None) if every_layer else slice(-1, None)
        mask_embeds = torch.stack(mask_embeds[said])
        return Prediction(self.class_embed(torch.stack(normed[said])), mask_embeds, mask_features.to(mask_embeds.dtype))


def where_to_look(mask_embed: Tensor, level_features: Tensor) -> Tensor:
    """(B, Q, C + 1), (B, C + 1, S) -> bool (B, Q, S): the pixels in a query's mask, or all where its mask is empty."""
    attend = mask_embed @ level_features >= 0  # sigmoid >= 0.5
    return attend | ~attend.any(dim=2, keepdim=True)  # a row with nothing to attend to would softmax to NaN


def xavier_normal_matrices(module: nn.Module) -> None:
    """Mask2Former's start of its two transformers: every matrix Xavier normal, vectors as their layers made them."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_normal_(parameter)


def semantic_scores(prediction: Prediction) -> Tensor:
    """The last layer's queries -> (B, K, H/4, W/4): class probabilities weigh mask probabilities, "no object" left out
    (section 3.4)."""
    classes = full_precision(prediction.class_logits[-1]).softmax(dim=2)[..., :-1]
    masks = full_precision(prediction.mask_logits[-1]).sigmoid()
    with no_autocast(masks):  # the product too: bfloat16 would decide near ties by chance
        return torch.einsum("bqk,bqhw->bkhw", classes, masks)


# ------------------------------------------------------------------------------------------- Mask2Former: what to learn

CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT = 2.0, 5.0, 5.0  # in the matching cost and in the loss
NO_OBJECT_WEIGHT = 0.1
OVERSAMPLE, IMPORTANT = 3, 0.75  # PointRend's sampling: of 3 P candidates, the most uncertain make 75 % of the P points


class LossUnits(NamedTuple):
    """What the losses of some images are divided by. The official runs have two images on each device, so a *pair* of
    images is the unit; `loss_units` works it out for any layout of devices, batches and accumulation."""

    class_weight: Tensor  # (B,) the summed class weights of each image's pair
    masks: Tensor  # () target masks in a pair, averaged over the global batch, at least 1
    pairs: float  # pairs of images in this call


def mask_counts(labels: Tensor, num_classes: int) -> Tensor:
    """Number of classes present in each image, (B, H, W) -> (B,)."""
    return classes_present(labels, num_classes).sum(dim=1)


def classes_present(labels: Tensor, num_classes: int) -> Tensor:
    """(B, H, W) -> bool (B, K), without waiting for the device."""
    present = torch.zeros(len(labels), IGNORE + 1, dtype=torch.bool, device=labels.device)
    return present.scatter_(1, labels.flatten(1).long(), True)[:, :num_classes]


def loss_units(counts: Tensor, mine: slice, num_queries: int) -> LossUnits:
    """Units for the images `mine` of a global batch.

    Averaged over calls of equal size, losses in these units are the official ones: a class loss divided by the class
    weights of each pair, mask losses divided by the mean number of masks of a pair.

    Args:
        counts: (N,) target masks of every image of the global batch, in order; images 2i and 2i + 1 are a pair.
        mine: the images that the call holds.
    """
    matched = counts.clamp(max=num_queries)
    pair = torch.arange(len(counts), device=counts.device) // 2
    num_pairs = (len(counts) + 1) // 2
    precise = torch.float32 if counts.device.type == "mps" else torch.float64  # MPS has no float64
    weight = matched + NO_OBJECT_WEIGHT * (num_queries - matched).to(precise)
    pair_weight = weight.new_zeros(num_pairs).index_add_(0, pair, weight)
    masks = (matched.sum() / num_pairs).clamp(min=1)
    return LossUnits(pair_weight[pair][mine], masks, len(counts[mine]) / len(counts) * num_pairs)


def cells(points: Tensor, h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
    """Between which four pixels each point lies, in an image with a border of one pixel, which stands for all outside.

    points (..., 2) as (x, y) in [0, 1] over h x w -> three of (...): the flat index into (h + 2) x (w + 2) of the pixel
    to the upper left, and how far the point is from there to the right and down, in [0, 1).
    """
    x, y = points[..., 0] * w + 0.5, points[..., 1] * h + 0.5  # pixel centres are at 1, 2, ...
    left, above = x.floor(), y.floor()
    return above.long() * (w + 2) + left.long(), x - left, y - above


def corners(points: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """The four pixels of each point's cell and their bilinear weights: (..., B, P, 2) -> two of (..., B, P, 4), with
    indices that count on from image to image."""
    first, right, down = cells(points, h, w)
    first = first + first_pixels(points.shape[-3], h, w, points.device)[:, None]
    left, up = 1 - right, 1 - down
    index = torch.stack([first, first + 1, first + (w + 2), first + (w + 3)], dim=-1)
    return index, torch.stack([up * left, up * right, down * left, down * right], dim=-1)


def first_pixels(images: int, h: int, w: int, device: torch.device) -> Tensor:
    """The flat index of each image's first pixel, border included: (B,)."""
    return torch.arange(images, device=device) * ((h + 2) * (w + 2))


def bordered(x: Tensor, value: float) -> Tensor:
    """One pixel of `value` around the last two axes."""
    return F.pad(x, (1, 1, 1, 1), value=value)


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of (N, C, h, w) maps at (N, P, 2) points in [0, 1] -> (N, C, P); outside is 0."""
    return F.grid_sample(maps, points[:, :, None].mul(2).sub_(1), align_corners=False)[..., 0]


def sample_pixels(pixels: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """`sample` for inference, of maps that keep what they say of one pixel together, at `corners` of points.

    pixels (B, (h + 2)(w + 2), C), index and weight (B, P, 4) -> (B, P, C). On a CPU ten times as fast.
    """
    rows = F.embedding_bag(
        index.flatten(0, 1), pixels.flatten(0, 1), mode="sum", per_sample_weights=weight.flatten(0, 1))
    return rows.unflatten(0, index.shape[:2])


def sample_targets(classes: Tensor, index: Tensor, weight: Tensor, num_classes: int) -> Tensor:
    """Every class's binary mask at `corners` of points, without building masks.

    classes (B, H + 2, W + 2), in which K stands for none and fills the border, index, weight (B, P, 4) -> (B, P, K).
    """
    targets = weight.new_zeros(*weight.shape[:2], num_classes + 1)
    return targets.scatter_add_(2, classes.take(index), weight)[..., :num_classes]


def sample_class_targets(labels: Tensor, image: Tensor, category: Tensor, points: Tensor) -> Tensor:
    """The binary masks of chosen classes of chosen images: image, category (M,), points (M, P, 2) -> (M, P)."""
    h, w = labels.shape[1:]
    first, right, down = cells(points, h, w)
    first += first_pixels(len(labels), h, w, labels.device)[image][:, None]
    flat = bordered(labels.to(torch.uint8), IGNORE).flatten()  # an eighth of the memory to look things up in
    above, above_right, below, below_right = (
        (flat[offset:].take(first) == category[:, None]).to(right.dtype) for offset in (0, 1, w + 2, w + 3))
    return torch.lerp(torch.lerp(above, above_right, right), torch.lerp(below, below_right, right), down)


@torch.no_grad()
def matching_costs(prediction: Prediction, labels: Tensor, num_points: int) -> Tensor:
    """Cost of each query for each class's mask, (Y, B, Q, K), at fresh random points of every output and image.

    *All* K binary masks are compared, absent classes included: cheaper than going image by image. As in the released
    code ignored pixels are negatives of every mask.
    """
    class_logits, mask_embeds, mask_features = prediction
    num_classes = class_logits.shape[3] - 1
    points = torch.rand(*class_logits.shape[:2], num_points, 2, device=class_logits.device, dtype=class_logits.dtype)
    in_maps, in_labels = corners(points, *mask_features.shape[2:]), corners(points, *labels.shape[1:])
    pixels = bordered(mask_features, 0).flatten(2).mT  # (B, C + 1, h, w) -> (B, (h + 2)(w + 2), C + 1)
    classes = bordered(labels.clamp(max=num_classes), num_classes)  # 255 -> K
    sums = []
    for embeds, *where in zip(mask_embeds, *in_maps, *in_labels, strict=True):  # little memory at a time
        masks = full_precision(pixels @ embeds.mT.contiguous())  # (B, (h + 2)(w + 2), Q)
        sums.append(mask_sums(sample_pixels(masks, *where[:2]), sample_targets(classes, *where[2:], num_classes)))
    surprise, overlap, area = (torch.stack(each) for each in zip(*sums, strict=True))
    mask_cost = surprise / num_points
    dice_cost = 1 - (2 * overlap + 1) / (area + 1)
    class_cost = -class_logits.softmax(dim=3)[..., :-1]
    return CLASS_WEIGHT * class_cost + MASK_WEIGHT * mask_cost + DICE_WEIGHT * dice_cost


def mask_sums(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, overlap and areas of each mask with each target, summed over the points: (B, P, Q), (B, P, K) ->
    three of (B, Q, K). `logits` is used up."""
    # softplus(-x) t + softplus(x) (1 - t) = softplus(x) - x t
    surprise = F.softplus(logits).sum(dim=1)[:, :, None] - logits.mT @ targets
    probabilities = logits.sigmoid_()
    area = probabilities.sum(dim=1)[:, :, None] + targets.sum(dim=1, keepdim=True)
    return surprise, probabilities.mT @ targets, area


class Matches(NamedTuple):
    """Matched pairs of query and class over all outputs and images, image by image: four fields (M,) and a count."""

    output: Tensor
    image: Tensor
    query: Tensor
    category: Tensor
    of_image: list[int]  # B numbers, which add up to M: known on the host, where the matching was done


def match(costs: Tensor, present: Tensor) -> Matches:
    """Hungarian matching of queries to the classes present: costs (Y, B, Q, K), present bool (B, K).

    One copy to the host for all outputs and images, one copy back.
    """
    flags = present.to(costs.dtype)[None, :, None].expand(len(costs), -1, 1, -1)
    host = torch.cat([costs, flags], dim=2).cpu()
    costs_host = host[:, :, :-1].nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6).numpy()  # SciPy refuses non-finite costs
    rows, of_image = [], []
    for image in range(costs.shape[1]):
        categories, before = host[0, image, -1].nonzero()[:, 0].numpy(), len(rows)
        for output in range(costs.shape[0]):
            queries, columns = linear_sum_assignment(costs_host[output, image][:, categories])
            rows += [(output, image, q, categories[c]) for q, c in zip(queries, columns, strict=True)]
        of_image.append(len(rows) - before)
    pairs = torch.tensor(rows, dtype=torch.long).view(-1, 4).t().contiguous()
    return Matches(*pairs.to(costs.device, non_blocking=True), of_image)  # a few kB go along with the command


@torch.no_grad()
def uncertain_points(masks: Tensor, num_points: int) -> Tensor:
    """Points for the mask losses of (M, 1, h, w) logits -> (M, P, 2): most near logit 0, some anywhere (PointRend)."""
    candidates = torch.rand(len(masks), OVERSAMPLE * num_points, 2, device=masks.device, dtype=masks.dtype)
    num_important = int(IMPORTANT * num_points)
    uncertainty = sample(masks, candidates)[:, 0].abs()
    nearest = uncertainty.topk(num_important, dim=1, largest=False, sorted=False).indices
    important = candidates.gather(1, nearest[..., None].expand(-1, -1, 2))
    anywhere = torch.rand(len(masks), num_points - num_important, 2, device=masks.device, dtype=masks.dtype)
    return torch.cat([important, anywhere], dim=1)


def class_losses(class_logits: Tensor, matches: Matches, units: LossUnits) -> Tensor:
    """Weighted cross-entropy of every query, unmatched ones learning "no object": (Y, B, Q, K + 1) -> (Y,)."""
    no_object = class_logits.shape[3] - 1
    target = torch.full(class_logits.shape[:3], no_object, device=class_logits.device)
    target[matches.output, matches.image, matches.query] = matches.category
    weight = class_logits.new_ones(no_object + 1)
    weight[no_object].fill_(NO_OBJECT_WEIGHT)  # an assignment would copy the number from the host, and wait
    per_query = F.cross_entropy(class_logits.flatten(0, 2), target.flatten(), weight, reduction="none").view_as(target)
    return (per_query.sum(dim=2) / units.class_weight.to(per_query.dtype)).sum(dim=1) / units.pairs


def matched_masks(prediction: Prediction, matches: Matches) -> Tensor:
    """The mask logits of matched queries, (M, h, w)."""
    embeds = prediction.mask_embeds[matches.output, matches.image, matches.query]  # (M, C + 1)
    images = zip(embeds.split(matches.of_image), prediction.mask_features.flatten(2).unbind(), strict=True)
    masks = torch.cat([embeds @ features for embeds, features in images])  # (M, h * w)
    return full_precision(masks).unflatten(1, prediction.mask_features.shape[2:])


def mask_losses(prediction: Prediction, labels: Tensor, matches: Matches, units: LossUnits,
                num_points: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy and dice losses of the matched masks at sampled points, each (Y,).

    Without a single match both are 0, and still reach every parameter with a gradient of 0, as DDP demands.
    """
    masks = matched_masks(prediction, matches)[:, None]
    points = uncertain_points(masks, num_points)
    logits = sample(masks, points)[:, 0]  # (M, P)
    targets = sample_class_targets(labels, matches.image, matches.category, points)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)
    probabilities = logits.sigmoid()
    overlap, area = (probabilities * targets).sum(dim=1), probabilities.sum(dim=1) + targets.sum(dim=1)
    dice = 1 - (2 * overlap + 1) / (area + 1)  # first powers in the denominator, 1 added to both
    total = cross_entropy.new_zeros(len(prediction.mask_embeds))
    scale = (units.masks * units.pairs).to(total.dtype)
    return total.index_add(0, matches.output, cross_entropy) / scale, total.index_add(0, matches.output, dice) / scale


def mask2former_losses(prediction: Prediction, labels: Tensor, num_points: int,
                       units: LossUnits | None = None) -> dict[str, Tensor]:
    """Class, mask and dice losses of every decoder output, weighted, by name: "class/0" is that before the first layer.

    Args:
        prediction: the head's, with `every_layer`.
        labels: long (B, H, W), 255 = ignore. Every class present makes one target mask.
        num_points: P, points at which masks are compared (12,544 in the released models).
        units: what to divide by; by default that of these images alone.
    """
    with no_autocast(labels):  # matching and losses stay in float32
        prediction = prediction._replace(class_logits=full_precision(prediction.class_logits))
        class_logits = prediction.class_logits
        num_queries, num_classes = class_logits.shape[2], class_logits.shape[3] - 1
        if units is None:
            units = loss_units(mask_counts(labels, num_classes), slice(None), num_queries)
        costs = matching_costs(prediction, labels, num_points)
        matches = match(costs, classes_present(labels, num_classes))
        mask, dice = mask_losses(prediction, labels, matches, units, num_points)
        terms = {
            "class": CLASS_WEIGHT * class_losses(class_logits, matches, units),
            "mask": MASK_WEIGHT * mask,
            "dice": DICE_WEIGHT * dice,
        }
    return {f"{name}/{i}": value[i] for name, value in terms.items() for i in range(len(class_logits))}
