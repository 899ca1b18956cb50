"""What a user would pick from `transformers` instead, at our widths and behind our interface: for `benchmark.py`.

Read: build_peer -> UperNetPeer, Mask2FormerPeer -> beit_config -> binary_masks.

The library has BEiT, UperNet and Mask2Former but no ViT-Adapter. Where ours runs the adapter, the peer makes its four
maps out of the blocks' outputs with three transposed convolutions and a pooling, so **it computes less than ours** and
its scores are not ours: only seconds and bytes may be compared. What the library offers is taken as it is, with its
fastest attention: `scaled_dot_product_attention` in BEiT; its heads have one implementation only.

Weights are random, nothing is downloaded.

Shapes: B batch, w window, K classes, Q queries, M classes present in one image.
"""
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from heads import (
    CLASS_WEIGHT,
    DICE_WEIGHT,
    IGNORE,
    IMPORTANT,
    MASK_WEIGHT,
    NO_OBJECT_WEIGHT,
    OVERSAMPLE,
    resize,
)
from model import PATCH, SIZES, ModelConfig


def build_peer(head: str, size: str, num_classes: int = 59, **changes) -> nn.Module:
    """The peer of `model.build_model(head, size, num_classes, **changes)`, to be called as that model is.

    `peer(images)` gives scores (B, K, w, w), `peer(images, labels)` a dict with the sum of the losses under "loss".
    Backbone and head have exactly our numbers of parameters. The adapter's settings and UperNet's dropout are not used:
    the library has neither.

    Raises:
        ValueError: `transformers` is not installed, an unknown head, or values that do not fit together.
    """
    config = replace(SIZES[size], head=head, num_classes=num_classes, **changes)
    return UperNetPeer(config) if head == "upernet" else Mask2FormerPeer(config)


def library() -> ModuleType:
    """The package `transformers`, silenced but for errors: it warns of every backbone that it was not tested with."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError("no models to compare with, because the package transformers is missing: "
                         "pip install -r requirements-dev.txt") from error
    transformers.logging.set_verbosity_error()
    return transformers


def beit_config(c: ModelConfig) -> Any:
    """A BEiT of our widths, with the library's pyramid: four (B, D, w/s, w/s) maps at strides s = 4, 8, 16, 32.

    They come from the ends of the quarters of the blocks, where ours exchanges features with the adapter.
    """
    return library().BeitConfig(
        image_size=c.window, patch_size=PATCH, hidden_size=c.embed_dim, num_hidden_layers=c.depth,
        num_attention_heads=c.num_heads, intermediate_size=4 * c.embed_dim, layer_norm_eps=1e-6,
        layer_scale_init_value=1e-6, drop_path_rate=c.drop_path, use_relative_position_bias=True, use_mask_token=False,
        add_fpn=True, out_indices=[quarter * c.depth // 4 for quarter in (1, 2, 3, 4)], attn_implementation="sdpa",
    )


class UperNetPeer(nn.Module):
    """BEiT + UperNet with the auxiliary head on stride 16, which this library also runs where only scores are asked."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        config = library().UperNetConfig(
            backbone_config=beit_config(c), hidden_size=c.head_channels, auxiliary_channels=c.aux_channels,
            auxiliary_loss_weight=0.4, loss_ignore_index=IGNORE, num_labels=c.num_classes,
        )
        self.model = library().UperNetForSemanticSegmentation(config)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """(B, 3, w, w) -> logits (B, K, w, w); with labels long (B, w, w), 255 = ignore, the losses' sum as "loss"."""
        output = self.model(images, labels=labels)
        return output.logits if labels is None else {"loss": output.loss}


class Mask2FormerPeer(nn.Module):
    """BEiT + Mask2Former, trained as ours: the same weights of the losses, points, queries and supervised layers."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        config = library().Mask2FormerConfig(
            backbone_config=beit_config(c), num_labels=c.num_classes, ignore_value=IGNORE,
            feature_size=c.head_channels, mask_feature_size=c.head_channels, hidden_dim=c.head_channels,
            num_attention_heads=c.mask_heads, num_queries=c.num_queries,
            encoder_layers=c.encoder_layers, encoder_feedforward_dim=c.encoder_ffn,
            decoder_layers=c.decoder_layers + 1,  # the library counts the prediction before the first layer as one
            dim_feedforward=c.decoder_ffn, dropout=0.0,
            class_weight=CLASS_WEIGHT, mask_weight=MASK_WEIGHT, dice_weight=DICE_WEIGHT,
            no_object_weight=NO_OBJECT_WEIGHT, train_num_points=c.num_points, oversample_ratio=float(OVERSAMPLE),
            importance_sample_ratio=IMPORTANT,
        )
        self.model = library().Mask2FormerForUniversalSegmentation(config)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """(B, 3, w, w) -> scores (B, K, w, w); with labels long (B, w, w), 255 = ignore, the losses' sum as "loss".

        The library's own post-processing resizes every query's mask to 384 x 384 before it makes scores of them; the
        peer is spared that, since ours makes scores at stride 4.
        """
        if labels is None:
            output = self.model(images)
            classes, masks = output.class_queries_logits.softmax(dim=2)[..., :-1], output.masks_queries_logits.sigmoid()
            return resize(torch.einsum("bqk,bqhw->bkhw", classes, masks), images.shape[2:])
        masks, classes = binary_masks(labels)
        return {"loss": self.model(images, mask_labels=masks, class_labels=classes).loss}


def binary_masks(labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The library's form of labels: for each image float masks (M, w, w) and the classes (M,) that they show.

    Its image processor makes them while the data is loaded. Its model takes nothing else, so they belong to a step.
    """
    classes = [present[present != IGNORE] for present in map(torch.unique, labels)]
    masks = [(image == present[:, None, None]).float() for image, present in zip(labels, classes, strict=True)]
    return masks, classes
