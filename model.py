"""ViT-Adapter segmentation models: a BEiT, the adapter around it, and a head.

Reading order: ModelConfig and the sizes -> relative_position_index -> Attention -> Block -> BEiT -> Segmenter ->
build_model.

Shapes: B batch, D width, N = 1 + h * w tokens (class token first, then the h x w patches at stride 16), d channels of
a head, K classes. "official" names the file and class of the released code.
"""
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from adapter import NUM_INTERACTIONS, FeatureMaps, ViTAdapter, resize
from heads import FCN, Mask2Former, Normalizers, UperNet, mask2former_losses, semantic_scores, upernet_losses

PATCH = 16


@dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes a model. The defaults are Mask2Former + ViT-Adapter-L."""

    head: str = "mask2former"  # or "upernet"
    num_classes: int = 59
    window: int = 480  # side in pixels of the training crop and of the sliding window; a multiple of 32
    # BEiT
    embed_dim: int = 1024
    depth: int = 24  # four interactions of depth / 4 blocks
    num_heads: int = 16
    drop_path: float = 0.3  # stochastic depth: rises linearly to this rate over the blocks
    # adapter
    deform_heads: int = 16
    spm_channels: int = 64
    # heads
    head_channels: int = 1024
    aux_channels: int = 256  # UperNet only
    dropout: float = 0.1  # UperNet only
    # Mask2Former only
    num_queries: int = 100
    mask_heads: int = 32
    encoder_layers: int = 6
    encoder_ffn: int = 4096
    decoder_layers: int = 9
    decoder_ffn: int = 4096
    num_points: int = 12544  # at which masks are compared in matching and losses

    def __post_init__(self) -> None:
        problems = [message for wrong, message in (
            (self.head not in ("mask2former", "upernet"),
             f"head {self.head!r} does not exist; choose mask2former or upernet"),
            (self.num_classes < 1, f"num_classes is {self.num_classes}; at least 1 is needed"),
            (self.window < 32 or self.window % 32, f"window {self.window} is not a multiple of 32"),
            (self.depth % NUM_INTERACTIONS, f"depth {self.depth} is not a multiple of {NUM_INTERACTIONS}"),
            (self.embed_dim % self.num_heads,
             f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}"),
        ) if wrong]
        if problems:
            raise ValueError("; ".join(problems))


LARGE = ModelConfig()
BASE = replace(
    LARGE, embed_dim=768, depth=12, num_heads=12, drop_path=0.2, deform_heads=12, head_channels=256, mask_heads=8,
    encoder_ffn=1024, decoder_ffn=2048,
)
# For a CPU, toy data and tests: not a released model.
TINY = replace(
    LARGE, window=128, embed_dim=128, depth=4, num_heads=4, drop_path=0.0, deform_heads=4, spm_channels=32,
    head_channels=128, aux_channels=64, dropout=0.0, num_queries=30, mask_heads=4, encoder_layers=2, encoder_ffn=256,
    decoder_layers=3, decoder_ffn=256, num_points=1024,
)
SIZES = {"tiny": TINY, "base": BASE, "large": LARGE}


def relative_position_index(h: int, w: int) -> Tensor:
    """For each pair of tokens its row in a relative-position table: long (N, N), N = 1 + h * w.

    Row (dy + h - 1) * (2w - 1) + (dx + w - 1) for two patches; the last three rows are class token to patch, patch to
    class token, class token to itself (BEiT, appendix; Swin's scheme with three rows more).
    """
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    y, x = y.flatten(), x.flatten()
    patches = (y[:, None] - y + h - 1) * (2 * w - 1) + (x[:, None] - x + w - 1)
    rows = (2 * h - 1) * (2 * w - 1)
    index = F.pad(patches, (1, 0, 1, 0), value=rows)
    index[1:, 0] = rows + 1
    index[0, 0] = rows + 2
    return index


class Attention(nn.Module):
    """Self-attention with a learned bias for each relative position; queries and values have a bias, keys have none.
    Official: beit.py, Attention."""

    def __init__(self, dim: int, num_heads: int, window_grid: tuple[int, int]):
        super().__init__()
        h, w = window_grid
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * h - 1) * (2 * w - 1) + 3, num_heads))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Tokens (B, N, D) and the window's position index (N, N) -> (B, N, D)."""
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, d)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.position_bias(index).to(q.dtype)[None])
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, heads, N, d) -> (B, N, D)

    def position_bias(self, index: Tensor) -> Tensor:
        """What each pair of tokens adds to its score, by their relative position: index (N, N) -> (heads, N, N)."""
        return self.relative_position_bias_table.t()[:, index]


class MLP(nn.Module):
    """Two linear layers with a GELU between.
    Official: beit.py, Mlp."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block with layer scale (`gamma_1`, `gamma_2`) and stochastic depth.
    Official: beit.py, Block."""

    def __init__(self, dim: int, num_heads: int, window_grid: tuple[int, int], drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, window_grid)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, 4 * dim)
        self.gamma_1 = nn.Parameter(torch.full((dim,), 1e-6))
        self.gamma_2 = nn.Parameter(torch.full((dim,), 1e-6))
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x), index))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class BEiT(nn.Module):
    """BEiT (Bao et al., ICLR 2022) without its classifier: patches and blocks, no absolute position, no last norm.
    Official: beit.py, BEiT."""

    def __init__(self, dim: int, depth: int, num_heads: int, window: int, drop_path: float):
        super().__init__()
        grid = (window // PATCH, window // PATCH)
        self.patch_embed = nn.Conv2d(3, dim, PATCH, stride=PATCH)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, num_heads, grid, rate) for rate in rates)
        # One index serves all blocks; it is computed, not learned, and so no part of a checkpoint.
        self.register_buffer("position_index", relative_position_index(*grid), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> class token (B, 1, D) and patch tokens (B, h*w, D)."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, h*w, D)
        return self.cls_token.expand(images.shape[0], -1, -1), patches

    def run_stage(self, stage: int, x: Tensor) -> Tensor:
        """One quarter of the blocks, (B, N, D) -> (B, N, D)."""
        size = len(self.blocks) // NUM_INTERACTIONS
        for block in self.blocks[stage * size:(stage + 1) * size]:
            x = block(x, self.position_index)
        return x


class Segmenter(nn.Module):
    """Backbone, adapter and head: `model(images)` gives scores, `model(images, labels)` gives losses.

    Attributes:
        criterion: the losses of the head, `criterion(prediction, labels, normalizers) -> dict`. Put your own loss here.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        self.backbone = BEiT(c.embed_dim, c.depth, c.num_heads, c.window, c.drop_path)
        self.adapter = ViTAdapter(c.embed_dim, c.spm_channels, c.deform_heads, drop_path=c.drop_path)
        self.auxiliary_head = None
        if c.head == "upernet":
            self.head = UperNet(c.embed_dim, c.head_channels, c.num_classes, c.dropout)
            self.auxiliary_head = FCN(c.embed_dim, c.aux_channels, c.num_classes, c.dropout)
            self.criterion = upernet_losses
        else:
            self.head = Mask2Former(
                c.embed_dim, c.head_channels, c.num_classes, c.num_queries, c.mask_heads, c.decoder_layers,
                c.decoder_ffn, c.encoder_layers, c.encoder_ffn,
            )
            self.criterion = partial(mask2former_losses, num_points=c.num_points)

    def features(self, images: Tensor) -> FeatureMaps:
        """(B, 3, H, W) with H = W = window -> four maps (B, D, H/s, W/s) at strides s = 4, 8, 16, 32."""
        window = self.config.window
        if images.shape[2:] != (window, window):
            raise ValueError(f"images are {images.shape[2]} x {images.shape[3]}, but this model's window is {window} x "
                             f"{window}: use evaluate.slide for other sizes, or build the model with another window")
        # Channels last, a map is a matrix of tokens: going from one to the other, all over the model, copies nothing.
        images = images.contiguous(memory_format=torch.channels_last)
        stages = [partial(self.backbone.run_stage, i) for i in range(NUM_INTERACTIONS)]
        return self.adapter(images, *self.backbone.embed(images), stages)

    def forward(self, images: Tensor, labels: Tensor | None = None,
                normalizers: Normalizers | None = None) -> Tensor | dict[str, Tensor]:
        """Scores or losses.

        Args:
            images: float (B, 3, window, window), normalised by ImageNet's mean and standard deviation.
            labels: long (B, window, window), classes 0 to K - 1, 255 = ignore.
            normalizers: what Mask2Former's losses are divided by when the images are part of a larger batch.

        Returns:
            Without labels, scores (B, K, window, window): logits (UperNet) or class-weighted mask probabilities
            (Mask2Former). With labels, a dict of named losses and their sum under "loss".
        """
        features = self.features(images)
        prediction = self.head(features)
        if labels is None:
            scores = prediction if isinstance(prediction, Tensor) else semantic_scores(prediction)
            return resize(scores, images.shape[2:])
        if self.auxiliary_head is not None:
            prediction = prediction, self.auxiliary_head(features.f16)
        losses = self.criterion(prediction, labels, normalizers)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}


def build_model(head: str, size: str, num_classes: int = 59, **changes) -> Segmenter:
    """A model by name, with starting values; `changes` replace fields of its ModelConfig.

    Args:
        head: "mask2former" or "upernet".
        size: "tiny", "base" or "large".

    Raises:
        ValueError: an unknown head, size or field, or values that do not fit together.
    """
    if size not in SIZES:
        raise ValueError(f"size {size!r} does not exist; choose one of {', '.join(SIZES)}")
    try:
        config = replace(SIZES[size], head=head, num_classes=num_classes, **changes)
    except TypeError:
        known = ", ".join(ModelConfig.__dataclass_fields__)
        raise ValueError(f"unknown field among {', '.join(changes)}; ModelConfig has {known}") from None
    return Segmenter(config)
