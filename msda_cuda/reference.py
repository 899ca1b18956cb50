"""Multi-scale deformable attention in plain PyTorch: the text to read first.

The operator in csrc/ is tested against this text.

Shapes: B batch, Q queries, M heads, D channels of a head, L levels, P points of a level, S = sum of h * w over levels.
"""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = Sequence[tuple[int, int]]


def ms_deform_attn_torch(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Each query reads L * P points of L feature maps, bilinearly, and adds them with its weights.

    Source: Deformable DETR (Zhu et al., 2021), equation 3. Arguments as in `ms_deform_attn`.
    """
    B, _, M, D = value.shape
    Q, P = locations.shape[1], locations.shape[4]
    precise = torch.promote_types(value.dtype, torch.float32)  # a 16-bit location would miss its pixel
    maps = value.to(precise).permute(0, 2, 3, 1).flatten(0, 1)  # (B, S, M, D) -> (B*M, D, S)
    grids = (2 * locations.to(precise) - 1).transpose(1, 2).flatten(0, 1)  # [0, 1] -> [-1, 1]; (B*M, Q, L, P, 2)
    samples = []
    for level, (map_, (h, w)) in enumerate(zip(maps.split([h * w for h, w in shapes], dim=2), shapes, strict=True)):
        map_ = map_.unflatten(2, (h, w))  # (B*M, D, h, w)
        # align_corners=False: pixel centres lie at (i + 1/2) / w; outside the map everything is zero.
        samples.append(F.grid_sample(map_, grids[:, :, level], mode="bilinear", align_corners=False))  # (B*M, D, Q, P)
    attention = weights.to(precise).transpose(1, 2).reshape(B * M, 1, Q, len(shapes) * P)
    output = (torch.cat(samples, dim=-1) * attention).sum(-1)  # (B*M, D, Q)
    return output.view(B, M * D, Q).transpose(1, 2).to(value.dtype)  # (B, Q, M*D)
