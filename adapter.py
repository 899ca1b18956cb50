"""ViT-Adapter: a convolutional pyramid and a plain ViT exchange features (Chen et al., ICLR 2023, section 3).

Reading order: SpatialPrior (the pyramid) -> Injector (pyramid into ViT) -> Extractor (ViT into pyramid) -> Interaction
(one exchange around a quarter of the ViT's blocks) -> ViTAdapter (all of it, and four feature maps by stride).

The ViT itself stays outside: the adapter is given its patch tokens and four callables, each a quarter of its blocks.

Shapes: B batch, D width, (h, w) the ViT's grid at stride 16, L = h * w patch tokens,
S = (2h * 2w) + (h * w) + (h/2 * w/2) = 21 L / 4 pyramid tokens at strides 8, 16 and 32, in this order. "official" names
the file and class of the released code.
"""
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from msda_cuda import MSDeformAttn, reference_points

NUM_INTERACTIONS = 4
NUM_POINTS = 4  # points that each head of a deformable attention samples on each level
VALUE_RATIO, FFN_RATIO = 0.5, 0.25  # widths of sampled values and of the ConvFFN's hidden layer, over the ViT's


class FeatureMaps(NamedTuple):
    """Four maps (B, D, H/s, W/s), named by their stride s."""

    f4: Tensor
    f8: Tensor
    f16: Tensor
    f32: Tensor


class TokenLayout(NamedTuple):
    """Where the tokens of one image size lie: grids as (height, width), positions as (x, y) in [0, 1]."""

    vit_grid: tuple[int, int]
    pyramid_grids: tuple[tuple[int, int], ...]  # strides 8, 16, 32
    vit_points: Tensor  # (L, 2)
    pyramid_points: Tensor  # (S, 2)


def token_layout(h: int, w: int, like: Tensor) -> TokenLayout:
    """The layout for a ViT grid of h x w; both must be even, so that stride 32 exists.
    Official: adapter_modules.py, deform_inputs."""
    grids = ((2 * h, 2 * w), (h, w), (h // 2, w // 2))
    # float32 as in the released code, whatever the model's precision: float64 comparisons then agree to 1e-15.
    return TokenLayout((h, w), grids, reference_points([(h, w)], like).float(), reference_points(grids, like).float())


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, h*w, D) -> (B, D, h, w), a view: the map is channels-last."""
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, (B, C, h, w) -> (B, C, *size): the one way in which this code resizes feature and score maps."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def conv_norm_relu(in_channels: int, out_channels: int, stride: int) -> list[nn.Module]:
    """The layers of a 3x3 convolution without bias, batch norm and ReLU, to be chained in one Sequential."""
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


class SpatialPrior(nn.Module):
    """A convolutional stem and pyramid: image -> map at stride 4 and tokens at strides 8, 16 and 32 (section 3.2).
    Official: adapter_modules.py, SpatialPriorModule."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.stem = nn.Sequential(
            *conv_norm_relu(3, channels, 2),
            *conv_norm_relu(channels, channels, 1),
            *conv_norm_relu(channels, channels, 1),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.conv2 = nn.Sequential(*conv_norm_relu(channels, 2 * channels, 2))
        self.conv3 = nn.Sequential(*conv_norm_relu(2 * channels, 4 * channels, 2))
        self.conv4 = nn.Sequential(*conv_norm_relu(4 * channels, 4 * channels, 2))
        self.fc1 = nn.Conv2d(channels, dim, 1)
        self.fc2 = nn.Conv2d(2 * channels, dim, 1)
        self.fc3 = nn.Conv2d(4 * channels, dim, 1)
        self.fc4 = nn.Conv2d(4 * channels, dim, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, 3, H, W) -> a map (B, D, H/4, W/4), and tokens [(B, n, D)] at strides 8, 16, 32."""
        c4 = self.stem(images)
        c8 = self.conv2(c4)
        c16 = self.conv3(c8)
        c32 = self.conv4(c16)
        maps = self.fc2(c8), self.fc3(c16), self.fc4(c32)
        return self.fc1(c4), [m.flatten(2).transpose(1, 2) for m in maps]  # (B, D, h, w) -> (B, h*w, D)


class Injector(nn.Module):
    """ViT tokens look into the pyramid: x + gamma * attention(norm(x), norm(pyramid)) (section 3.3, equation 1).
    Official: adapter_modules.py, Injector."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = MSDeformAttn(dim, num_heads, 3, NUM_POINTS, VALUE_RATIO)
        # The released code starts gamma at 1e-6, the paper says 0: either way the ViT starts as it was pre-trained.
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, tokens: Tensor, pyramid: Tensor, layout: TokenLayout) -> Tensor:
        query, value = self.query_norm(tokens), self.feat_norm(pyramid)
        return tokens + self.gamma * self.attn(query, layout.vit_points, value, layout.pyramid_grids)


class ConvFFN(nn.Module):
    """Feed-forward with a depth-wise 3x3 convolution on each level of the pyramid between its two linear layers.
    Official: adapter_modules.py, ConvFFN and DWConv."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, pyramid: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Tokens (B, S, D) of levels with these (height, width) -> (B, S, D)."""
        levels = self.fc1(pyramid).split([h * w for h, w in grids], dim=1)
        maps = [self.dwconv(to_map(level, grid)) for level, grid in zip(levels, grids, strict=True)]
        hidden = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)  # (B, hidden, h, w) -> (B, S, hidden)
        return self.fc2(F.gelu(hidden))


class Extractor(nn.Module):
    """Pyramid tokens look into the ViT, then pass a ConvFFN (section 3.3, equations 2 and 3).
    Official: adapter_modules.py, Extractor."""

    def __init__(self, dim: int, num_heads: int, drop_path: float):
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = MSDeformAttn(dim, num_heads, 1, NUM_POINTS, VALUE_RATIO)
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = ConvFFN(dim, int(dim * FFN_RATIO))
        # The released code drops only the feed-forward path, and at the ViT's highest rate in every extractor.
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, pyramid: Tensor, tokens: Tensor, layout: TokenLayout) -> Tensor:
        query, value = self.query_norm(pyramid), self.feat_norm(tokens)
        pyramid = pyramid + self.attn(query, layout.pyramid_points, value, [layout.vit_grid])
        return pyramid + self.drop_path(self.ffn(self.ffn_norm(pyramid), layout.pyramid_grids))


class Interaction(nn.Module):
    """Inject, run a quarter of the ViT, extract; the last interaction extracts three times (figure 4).
    Official: adapter_modules.py, InteractionBlockWithCls."""

    def __init__(self, dim: int, num_heads: int, drop_path: float, num_extractors: int):
        super().__init__()
        self.injector = Injector(dim, num_heads)
        self.extractors = nn.ModuleList(Extractor(dim, num_heads, drop_path) for _ in range(num_extractors))

    def forward(self, cls_token: Tensor, tokens: Tensor, pyramid: Tensor, run_blocks: Callable[[Tensor], Tensor],
                layout: TokenLayout) -> tuple[Tensor, Tensor, Tensor]:
        tokens = self.injector(tokens, pyramid, layout)
        tokens = run_blocks(torch.cat([cls_token, tokens], dim=1))  # the class token takes part in the ViT only
        cls_token, tokens = tokens[:, :1], tokens[:, 1:]
        for extractor in self.extractors:
            pyramid = extractor(pyramid, tokens, layout)
        return cls_token, tokens, pyramid


class ViTAdapter(nn.Module):
    """The adapter around a ViT of width `dim` (figure 4). Official: beit_adapter.py, BEiTAdapter.

    Args:
        dim: width D of the ViT, and of the four maps that come out.
        spm_channels: width of the convolutional stem (64 in the released models).
        num_heads: of the deformable attentions.
        drop_path: rate of stochastic depth in the extractors.
    """

    def __init__(self, dim: int, spm_channels: int, num_heads: int, drop_path: float = 0.0):
        super().__init__()
        self.spatial_prior = SpatialPrior(spm_channels, dim)
        self.level_embed = nn.Parameter(torch.empty(3, dim))
        self.interactions = nn.ModuleList(
            Interaction(dim, num_heads, drop_path, num_extractors=3 if i == NUM_INTERACTIONS - 1 else 1)
            for i in range(NUM_INTERACTIONS)
        )
        self.up = nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim) for _ in FeatureMaps._fields)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.level_embed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():  # after the linear layers: deformable attention has a start of its own
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()

    def forward(self, images: Tensor, cls_token: Tensor, tokens: Tensor,
                vit_stages: Sequence[Callable[[Tensor], Tensor]]) -> FeatureMaps:
        """Run ViT and adapter together.

        Args:
            images: (B, 3, H, W), H and W multiples of 32.
            cls_token: (B, 1, D); tokens: (B, L, D), the embedded patches at stride 16.
            vit_stages: four callables (B, 1 + L, D) -> (B, 1 + L, D), the ViT's blocks in order.
        """
        layout = token_layout(images.shape[2] // 16, images.shape[3] // 16, like=tokens)
        c4, levels = self.spatial_prior(images)
        pyramid = torch.cat([level + embed for level, embed in zip(levels, self.level_embed, strict=True)], dim=1)
        vit_maps = []
        for interaction, run_blocks in zip(self.interactions, vit_stages, strict=True):
            cls_token, tokens, pyramid = interaction(cls_token, tokens, pyramid, run_blocks, layout)
            vit_maps.append(to_map(tokens, layout.vit_grid))
        return self.merge(c4, pyramid, vit_maps, layout)

    def merge(self, c4: Tensor, pyramid: Tensor, vit_maps: list[Tensor], layout: TokenLayout) -> FeatureMaps:
        """Add to each level of the pyramid the ViT's map after one interaction, then normalise."""
        levels = pyramid.split([h * w for h, w in layout.pyramid_grids], dim=1)
        c8, c16, c32 = (to_map(level, grid) for level, grid in zip(levels, layout.pyramid_grids, strict=True))
        c4 = c4 + self.up(c8)
        sums = [c + resize(x, c.shape[2:]) for c, x in zip((c4, c8, c16, c32), vit_maps, strict=True)]
        return FeatureMaps(*(norm(m) for norm, m in zip(self.norms, sums, strict=True)))
