"""Two segmentation heads on four feature maps, Hungarian matching, and the losses, as in the papers.

Reading order for UperNet: UperNet -> FCN -> upernet_losses.
Reading order for Mask2Former: PixelDecoder -> DecoderLayer -> Mask2Former -> semantic_scores -> Target -> match ->
class_loss, mask_losses -> mask2former_losses; loss_normalizers last, for images that are part of a larger batch.

Both heads take the adapter's maps (f4, f8, f16, f32), (B, D, H/s, W/s) at stride s. Modules only predict; matching and
losses are free functions of predictions and labels.

Shapes: B batch, C head width, K classes, Q queries, P points, S tokens of three levels, Y decoder outputs (before the
first layer and after each), T target masks of one image, M matched masks of all images. Labels are (B, H, W) with
255 = ignore. "Official" names the file and class of the released code.
"""
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from adapter import resize, to_map
from common import IGNORE
from msda_cuda import MSDeformAttn, reference_points


def full_precision(x: Tensor) -> Tensor:
    """float16 and bfloat16 to float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ------------------------------------------------------------------------------------------------------------ UperNet


class ConvNormReLU(nn.Sequential):
    """1x1 or 3x3 convolution without bias, batch norm, ReLU: (B, in, h, w) -> (B, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


def classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """The 1x1 convolution that ends both UperNet heads, with their start: normal 0.01, bias 0."""
    layer = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


class UperNet(nn.Module):
    """Pyramid pooling on the coarsest map, a feature pyramid over all, fused at stride 4 (Xiao et al., ECCV 2018).
    Official: mmseg, uper_head.py, UPerHead, and psp_head.py, PPM."""

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

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Four maps -> logits (B, K, H/4, W/4)."""
        *finer, f32 = features
        levels = [lateral(f) for lateral, f in zip(self.laterals, finer, strict=True)] + [self.pyramid_pooling(f32)]
        for i in (2, 1, 0):  # top-down: each level receives the coarser one
            levels[i] = levels[i] + resize(levels[i + 1], levels[i].shape[2:])
        levels[:3] = [conv(level) for conv, level in zip(self.outputs, levels[:3], strict=True)]
        return self.classifier(self.dropout(self.fuse_levels(levels)))

    def pyramid_pooling(self, f32: Tensor) -> Tensor:
        """Averages over 1, 4, 9 and 36 regions, enlarged again and joined with the map itself: f32 -> (B, C, h, w)."""
        sized = zip(self.POOL_SIZES, self.pools, strict=True)
        pooled = [resize(conv(F.adaptive_avg_pool2d(f32, size)), f32.shape[2:]) for size, conv in sized]
        return self.bottleneck(torch.cat([f32, *pooled], dim=1))

    def fuse_levels(self, levels: Sequence[Tensor]) -> Tensor:
        """Four maps of C channels, resized to the finest and convolved together: (B, C, H/4, W/4)."""
        size = levels[0].shape[2:]
        return self.fuse(torch.cat([levels[0], *(resize(level, size) for level in levels[1:])], dim=1))


class FCN(nn.Module):
    """One 3x3 convolution and a classifier on f16: the auxiliary head that only training uses.
    Official: mmseg, fcn_head.py, FCNHead."""

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


def upernet_losses(prediction: tuple[Tensor, Tensor], labels: Tensor, _normalizers: object = None) -> dict[str, Tensor]:
    """Losses by name, of the logits (B, K, h, w) of UperNet and of the auxiliary head, which weighs 0.4."""
    logits, auxiliary_logits = prediction
    auxiliary = pixel_cross_entropy(auxiliary_logits, labels)
    return {"pixel": pixel_cross_entropy(logits, labels), "auxiliary": 0.4 * auxiliary}


# -------------------------------------------------------------------------------------------------------- Mask2Former


class Prediction(NamedTuple):
    """What Q queries predict after each of Y decoder layers."""

    class_logits: Tensor  # (Y, B, Q, K + 1), the last class is "no object"
    mask_embeds: Tensor  # (Y, B, Q, C); times the features of every pixel they are the logits of the queries' masks
    mask_features: Tensor  # (B, C, H/4, W/4)


def sine_positions(h: int, w: int, channels: int, like: Tensor) -> Tensor:
    """Sine position encoding of an h x w grid, (h*w, channels): half the channels for y, half for x (DETR, A.4).
    Official: positional_encoding.py, SinePositionalEncoding.

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


class PixelDecoderLayer(nn.Module):
    """Deformable self-attention over three levels, then feed-forward; both post-norm (Zhu et al., ICLR 2021).
    Official: mmcv, BaseTransformerLayer."""

    def __init__(self, channels: int, hidden: int, num_heads: int):
        super().__init__()
        self.attention = MSDeformAttn(channels, num_heads, num_levels=3, num_points=4)
        self.norm1 = nn.LayerNorm(channels)
        self.ffn = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.norm2 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, positions: Tensor, points: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Tokens (B, S, C), their positions (S, C) and reference points (S, 2), the levels' (h, w) -> (B, S, C)."""
        x = self.norm1(x + self.attention(x + positions, points, x, grids))
        return self.norm2(x + self.ffn(x))


class PixelDecoder(nn.Module):
    """A deformable-attention encoder over f32, f16, f8 and a pyramid step to stride 4 (Mask2Former, section 3.2.2).
    Official: msdeformattn_pixel_decoder.py, MSDeformAttnPixelDecoder."""

    def __init__(self, dim: int, channels: int, hidden: int, num_layers: int, num_heads: int):
        super().__init__()
        self.inputs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, channels, 1), nn.GroupNorm(32, channels)) for _ in range(3)
        )
        self.level_embed = nn.Parameter(torch.empty(3, channels))
        self.layers = nn.ModuleList(PixelDecoderLayer(channels, hidden, num_heads) for _ in range(num_layers))
        self.lateral = nn.Sequential(nn.Conv2d(dim, channels, 1, bias=False), nn.GroupNorm(32, channels))
        self.output = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.GroupNorm(32, channels), nn.ReLU(inplace=True)
        )
        self.mask_features = nn.Conv2d(channels, channels, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.level_embed)
        for conv, _ in self.inputs:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
        for conv in (self.lateral[0], self.output[0], self.mask_features):
            nn.init.kaiming_uniform_(conv.weight, a=1)  # "caffe2 Xavier": the fan-in alone
        nn.init.zeros_(self.mask_features.bias)
        xavier_normal_matrices(self.layers)
        for layer in self.layers:
            layer.attention.reset_parameters()

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Four maps -> mask features (B, C, H/4, W/4), and memory [(B, C, h, w)] at strides 32, 16, 8."""
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
        memory = [to_map(level, grid) for level, grid in levels]
        f4 = self.output(self.lateral(f4) + resize(memory[-1], f4.shape[2:]))
        return self.mask_features(f4), memory


class MultiheadAttention(nn.Module):
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
    """Masked cross-attention first, then self-attention, then feed-forward; all post-norm (Mask2Former, 3.2.1).
    Official: transformer.py, DetrTransformerDecoderLayer."""

    def __init__(self, channels: int, hidden: int, num_heads: int):
        super().__init__()
        self.cross_attention = MultiheadAttention(channels, num_heads)
        self.norm1 = nn.LayerNorm(channels)
        self.self_attention = MultiheadAttention(channels, num_heads)
        self.norm2 = nn.LayerNorm(channels)
        self.ffn = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, query_embed: Tensor, memory: Tensor, positions: Tensor, attend: Tensor) -> Tensor:
        """x, query_embed (B, Q, C); memory, positions (B, S, C), (S, C); attend (B, Q, S) -> (B, Q, C)."""
        x = self.norm1(x + self.cross_attention(x + query_embed, memory + positions, memory, attend))
        x = self.norm2(x + self.self_attention(x + query_embed, x + query_embed, x))
        return self.norm3(x + self.ffn(x))


class Mask2Former(nn.Module):
    """Queries that look where they last saw their mask (Cheng et al., CVPR 2022).
    Official: mask2former_head.py, Mask2FormerHead."""

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

    def forward(self, features: Sequence[Tensor]) -> Prediction:
        """Four maps -> Y predictions: one before the first decoder layer and one after each."""
        mask_features, maps = self.pixel_decoder(features)
        memory = [m.flatten(2).transpose(1, 2) + e for m, e in zip(maps, self.level_embed, strict=True)]
        positions = [sine_positions(m.shape[2], m.shape[3], m.shape[1], like=m) for m in maps]
        # Masks are linear in the mask features: resizing these once a level spares resizing Q masks in every layer.
        level_features = [resize(mask_features.detach(), m.shape[2:]).flatten(2) for m in maps]  # (B, C, h*w)

        x = self.query_feat.expand(mask_features.shape[0], -1, -1)  # (Q, C) -> (B, Q, C)
        query_embed = self.query_embed.expand_as(x)
        outputs = [self.norm(x)]
        mask_embeds = [self.mask_embed(outputs[0])]
        for i, layer in enumerate(self.layers):
            level = i % 3  # the three levels in turn, low resolution first
            attend = where_to_look(mask_embeds[-1].detach(), level_features[level])
            x = layer(x, query_embed, memory[level], positions[level], attend)
            outputs.append(self.norm(x))
            mask_embeds.append(self.mask_embed(outputs[-1]))
        return Prediction(self.class_embed(torch.stack(outputs)), torch.stack(mask_embeds), mask_features)


def where_to_look(mask_embed: Tensor, level_features: Tensor) -> Tensor:
    """(B, Q, C), (B, C, S) -> bool (B, Q, S): the pixels in a query's mask, or all where its mask is empty.
    Official: Mask2FormerHead.forward_head."""
    attend = mask_embed @ level_features >= 0  # sigmoid >= 0.5
    return attend | ~attend.any(dim=2, keepdim=True)  # a row with nothing to attend to would softmax to NaN


def xavier_normal_matrices(module: nn.Module) -> None:
    """Mask2Former's start of its two transformers: every matrix Xavier normal, vectors as their layers made them."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_normal_(parameter)


def semantic_scores(prediction: Prediction) -> Tensor:
    """The last layer's queries -> (B, K, H/4, W/4): class probabilities weigh mask probabilities, "no object" left out
    (MaskFormer, Cheng et al., NeurIPS 2021, section 3.4). Official: Mask2FormerHead.forward_test."""
    class_logits, mask_embeds, mask_features = prediction
    classes = full_precision(class_logits[-1]).softmax(dim=2)[..., :-1]
    masks = full_precision(torch.einsum("bqc,bchw->bqhw", mask_embeds[-1], mask_features)).sigmoid()
    with torch.autocast(masks.device.type, enabled=False):  # the product too: bfloat16 would decide ties by chance
        return torch.einsum("bqk,bqhw->bkhw", classes, masks)


# ------------------------------------------------------------------------------------------ Mask2Former: what it learns

CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT = 2.0, 5.0, 5.0  # in the matching cost and in the loss
NO_OBJECT_WEIGHT = 0.1
OVERSAMPLE, IMPORTANT = 3, 0.75  # PointRend: of 3 P candidates the most uncertain make 75 % of the P points


class Target(NamedTuple):
    """What one image shows: classes (T,), and for each its binary mask (T, H, W). An ignored pixel is in no mask."""

    classes: Tensor
    masks: Tensor


def targets_of(labels: Tensor, num_classes: int) -> list[Target]:
    """(B, H, W) labels -> one Target an image, with a mask for every class that the image shows."""
    targets = []
    for image in labels:
        classes = image.unique()
        classes = classes[classes < num_classes]
        targets.append(Target(classes, (image == classes[:, None, None]).float()))
    return targets


def point_sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps (N, C, h, w) at points (N, P, 2), (x, y) in [0, 1] -> (N, C, P); outside is 0."""
    return F.grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False)[..., 0]


def dice_loss(overlap: Tensor, areas: Tensor) -> Tensor:
    """1 - twice the overlap of two masks over the sum of their areas (official: dice_loss.py, DiceLoss)."""
    return 1 - (2 * overlap + 1) / (areas + 1)  # areas in first powers, 1 added to both, as released


def mask_costs(logits: Tensor, targets: Tensor) -> Tensor:
    """What it costs to match each mask with each target, compared at points: (..., Q, P), (..., T, P) -> (..., Q, T).
    Official: match_costs.py, CrossEntropyLossCost and DiceCost."""
    # Binary cross-entropy: softplus(-x) t + softplus(x) (1 - t) = softplus(x) - x t
    cross_entropy = (F.softplus(logits).sum(dim=-1, keepdim=True) - logits @ targets.mT) / logits.shape[-1]
    probabilities = logits.sigmoid()
    areas = probabilities.sum(dim=-1, keepdim=True) + targets.sum(dim=-1)[..., None, :]
    return MASK_WEIGHT * cross_entropy + DICE_WEIGHT * dice_loss(probabilities @ targets.mT, areas)


@torch.no_grad()
def match(class_logits: Tensor, mask_logits: Tensor, target: Target, num_points: int) -> tuple[Tensor, Tensor]:
    """Hungarian matching for one image, as in DETR, at sampled points (section 3.3).
    Official: assigner.py, MaskHungarianAssigner.

    class_logits (Q, K + 1), mask_logits (Q, h, w) -> matched queries and their targets, both (min(Q, T),), such that
    the total cost is least. Masks are compared at P fresh random points.
    """
    points = torch.rand(1, num_points, 2, device=mask_logits.device, dtype=mask_logits.dtype)
    logits = point_sample(mask_logits[None], points)[0]  # (Q, P)
    masks = point_sample(target.masks[None].to(logits.dtype), points)[0]  # (T, P)
    class_cost = -class_logits.softmax(dim=1)[:, target.classes]
    cost = CLASS_WEIGHT * class_cost + mask_costs(logits, masks)
    pairs = linear_sum_assignment(cost.nan_to_num(1e6, 1e6, -1e6).cpu().numpy())  # SciPy refuses non-finite costs
    return tuple(torch.from_numpy(index).to(cost.device) for index in pairs)


def class_loss(class_logits: Tensor, target_classes: Tensor, divisor: Tensor | None = None) -> Tensor:
    """Weighted cross-entropy of all queries, summed over images: (..., B, Q, K + 1) and (..., B, Q) -> (...).

    `divisor`, (B,), is what each image's sum is divided by; by default the weights of all these images' queries.
    """
    weight = class_logits.new_ones(class_logits.shape[-1])
    weight[-1].fill_(NO_OBJECT_WEIGHT)  # an assignment would copy the number from the host, and wait
    if divisor is None:
        divisor = weight[target_classes].sum(dim=(-2, -1))[..., None]
    per_query = F.cross_entropy(class_logits.flatten(0, -2), target_classes.flatten(), weight, reduction="none")
    return (per_query.view_as(target_classes).sum(dim=-1) / divisor).sum(dim=-1)


@torch.no_grad()
def uncertain_points(mask_logits: Tensor, num_points: int) -> Tensor:
    """Where the losses look at masks (M, h, w) -> (M, P, 2): most points near logit 0, a quarter anywhere (section 3.3,
    from PointRend)."""
    candidates = torch.rand(len(mask_logits), OVERSAMPLE * num_points, 2, device=mask_logits.device,
                            dtype=mask_logits.dtype)
    num_uncertain = int(IMPORTANT * num_points)
    certainty = point_sample(mask_logits[:, None], candidates)[:, 0].abs()
    index = certainty.topk(num_uncertain, dim=1, largest=False, sorted=False).indices
    uncertain = candidates.gather(1, index[..., None].expand(-1, -1, 2))
    uniform = torch.rand(len(mask_logits), num_points - num_uncertain, 2, device=mask_logits.device,
                         dtype=mask_logits.dtype)
    return torch.cat([uncertain, uniform], dim=1)


def mask_losses(mask_logits: Tensor, masks: Tensor, num_points: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy and dice loss, each (M,), of matched masks (M, h, w) with their targets (M, H, W)."""
    points = uncertain_points(mask_logits, num_points)
    return point_losses(*(point_sample(x[:, None].to(mask_logits.dtype), points)[:, 0] for x in (mask_logits, masks)))


def point_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and dice loss, each (M,), of masks and targets that are sampled at points, (M, P)."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)
    probabilities = logits.sigmoid()
    areas = probabilities.sum(dim=1) + targets.sum(dim=1)
    return cross_entropy, dice_loss((probabilities * targets).sum(dim=1), areas)


class Normalizers(NamedTuple):
    """What the losses of some images are divided by when they are part of a larger batch."""

    class_divisor: Tensor  # (B,)
    num_masks: Tensor  # ()


def mask2former_losses(prediction: Prediction, labels: Tensor, normalizers: Normalizers | None = None, *,
                       num_points: int) -> dict[str, Tensor]:
    """Class, mask and dice losses of every decoder output, weighted, by name: "class/0" is that before the first layer.
    Official: Mask2FormerHead.loss_single, for one decoder output.

    Args:
        prediction: the head's.
        labels: long (B, H, W). Every class that an image shows makes one target mask.
        normalizers: what to divide by; by default the class weights and the number of masks of these images.
        num_points: P, points at which masks are compared (12,544 in the released models).
    """
    losses = {}
    with torch.autocast(labels.device.type, enabled=False):  # matching and losses stay in float32
        class_logits = full_precision(prediction.class_logits)
        num_queries, no_object = class_logits.shape[2], class_logits.shape[3] - 1
        targets = targets_of(labels, no_object)
        divisor, num_masks = normalizers or (None, max(sum(min(len(t.classes), num_queries) for t in targets), 1))
        for i, (classes, embeds) in enumerate(zip(class_logits, prediction.mask_embeds, strict=True)):
            masks = full_precision(torch.einsum("bqc,bchw->bqhw", embeds, prediction.mask_features))
            target_classes = labels.new_full(classes.shape[:2], no_object)  # a query without a match learns "no object"
            matched_logits, matched_masks = [], []
            for image, target in enumerate(targets):
                queries, index = match(classes[image], masks[image], target, num_points)
                target_classes[image, queries] = target.classes[index]
                matched_logits.append(masks[image, queries])
                matched_masks.append(target.masks[index])
            mask, dice = mask_losses(torch.cat(matched_logits), torch.cat(matched_masks), num_points)
            losses[f"class/{i}"] = CLASS_WEIGHT * class_loss(classes, target_classes, divisor)
            # Without a single match these two are 0, and still reach every parameter with a gradient of 0, for DDP.
            losses[f"mask/{i}"] = MASK_WEIGHT * mask.sum() / num_masks
            losses[f"dice/{i}"] = DICE_WEIGHT * dice.sum() / num_masks
    return losses


def classes_present(labels: Tensor, num_classes: int) -> Tensor:
    """Which classes each image shows, (B, H, W) -> bool (B, K), without waiting for the device."""
    present = torch.zeros(len(labels), IGNORE + 1, dtype=torch.bool, device=labels.device)
    return present.scatter_(1, labels.flatten(1).long(), True)[:, :num_classes]


def loss_normalizers(num_masks: Tensor, mine: slice, num_queries: int) -> Normalizers:
    """What the losses of the images `mine` are divided by, so that any layout of devices makes the same step.

    The official runs have two images on each of eight devices. There a class loss is divided by the class weights of a
    device's two images, and mask losses by the number of masks on a device, averaged over devices, at least 1. So the
    unit is a *pair* of images, wherever its images are; the mean over calls of equal size is the official loss.
    `num_masks`: (N,) target masks of each image of the global batch; images 2i and 2i + 1 are a pair.
    """
    matched = num_masks.clamp(max=num_queries)
    weight = matched + NO_OBJECT_WEIGHT * (num_queries - matched).double()
    pair_weight = F.pad(weight, (0, len(weight) % 2)).view(-1, 2).sum(dim=1)  # an odd image is a pair of its own
    pairs = len(pair_weight) * len(num_masks[mine]) / len(num_masks)  # in this call
    class_divisor = pairs * pair_weight.repeat_interleave(2, output_size=2 * len(pair_weight))[mine]
    return Normalizers(class_divisor, pairs * (matched.sum() / len(pair_weight)).clamp(min=1))
