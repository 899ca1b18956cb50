"""The attention layer of Deformable DETR around the function: four linear layers.

Reading order: MSDeformAttn.forward -> sampling_locations -> level_sizes -> reset_parameters -> reference_points.

Shapes: B batch, Q queries, C width, M heads, L levels, P points of a level, S = sum of h * w over levels.
"""
import math

import torch
from torch import Tensor, nn

from .ops import ms_deform_attn
from .reference import Shapes


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention (Deformable DETR, section 4.1; official: ops/modules/ms_deform_attn.py,
    MSDeformAttn); no residual, norm or dropout inside.

    `value_ratio` narrows the values: ViT-Adapter samples maps of half the width.
    """

    def __init__(self, dim: int, num_heads: int, num_levels: int, num_points: int, value_ratio: float = 1.0):
        super().__init__()
        value_dim = int(dim * value_ratio)
        if value_dim % num_heads:
            raise ValueError(f"MSDeformAttn: {value_dim} value channels do not split into {num_heads} heads")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(dim, value_dim)
        self.output_proj = nn.Linear(value_dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Head m starts looking in direction m of a ring, its point p at p + 1 pixels, all with equal weight."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2.0 * math.pi / self.num_heads)
        ring = torch.stack((angles.cos(), angles.sin()), dim=-1)
        ring = ring / ring.abs().amax(-1, keepdim=True)  # onto the square of side 2: (M, 2)
        steps = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        bias = (ring[:, None, None] * steps[:, None]).expand(-1, self.num_levels, -1, -1)  # (M, L, P, 2)
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.flatten())
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, reference_points: Tensor, value: Tensor, shapes: Shapes) -> Tensor:
        """query (B, Q, C); reference_points (Q, 2) as (x, y) in [0, 1]; value (B, S, C) -> (B, Q, C).

        The reference points serve all images and levels; `shapes` are the (h, w) of the levels, S their areas' sum.
        """
        M, L, P = self.num_heads, self.num_levels, self.num_points
        offsets, scores = self.offsets_and_scores(query)
        locations = sampling_locations(reference_points, offsets.unflatten(-1, (M, L, P, 2)), shapes)
        weights = scores.unflatten(-1, (M, L * P)).softmax(-1).unflatten(-1, (L, P))  # over levels and points jointly
        values = self.value_proj(value).unflatten(-1, (M, -1))  # (B, S, M, D)
        return self.output_proj(ms_deform_attn(values, shapes, locations, weights))

    def offsets_and_scores(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Where to look, in pixels, and how much it counts: (B, Q, C) -> (B, Q, M L P 2), (B, Q, M L P), float32."""
        offsets, scores = self.sampling_offsets(query), self.attention_weights(query)
        # A float32 island under autocast: with 8 bits of mantissa a location of 480 pixels is 2 pixels coarse.
        return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in (offsets, scores))


def sampling_locations(points: Tensor, offsets: Tensor, shapes: Shapes) -> Tensor:
    """points (Q, 2) in [0, 1] + offsets (B, Q, M, L, P, 2) in pixels / (w, h) of each level -> (B, Q, M, L, P, 2)."""
    *_, L, P, _ = offsets.shape
    # Rows of L * P * 2 numbers, since broadcasting over a last axis of 2 takes seven times as long on a CPU.
    points = points.to(offsets.dtype).repeat(1, L * P)[:, None]  # (Q, 1, L * P * 2)
    return (points + offsets.flatten(3) / level_sizes(shapes, P, like=offsets)).view_as(offsets)


def level_sizes(shapes: Shapes, num_points: int, like: Tensor) -> Tensor:
    """(w, h) of each level, for each of its points: (L * P * 2,), on the device of `like` and of its type."""
    sizes = like.new_empty(len(shapes), num_points, 2)
    for size, (h, w) in zip(sizes, shapes, strict=True):  # on the device: `torch.tensor(shapes)` would copy, and wait
        size[:, 0], size[:, 1] = w, h
    return sizes.flatten()


def reference_points(shapes: Shapes, like: Tensor) -> Tensor:
    """Pixel centres of all levels as (x, y) in [0, 1], (sum of h * w, 2), at least float32, on the device of `like`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    levels = []
    for h, w in shapes:
        y = (torch.arange(h, device=like.device, dtype=dtype) + 0.5) / h
        x = (torch.arange(w, device=like.device, dtype=dtype) + 0.5) / w
        levels.append(torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=-1).flatten(0, 1))
    return torch.cat(levels)
