"""The peer of `bench systems --against transformers`: what a user could take from that library instead of this code."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Peer(nn.Module):
    """What a user could take from `transformers` instead: its BEiT with the same head, at our widths, random weights.

    **It computes less than ours**: its pyramid is three transposed convolutions and a pooling, no ViT-Adapter.
    """

    def __init__(self, c):
        super().__init__()
        import transformers
        transformers.logging.set_verbosity_error()  # it warns of every backbone that it was not tested with
        beit = transformers.BeitConfig(
            image_size=c.window, patch_size=16, hidden_size=c.embed_dim, num_hidden_layers=c.depth,
            num_attention_heads=c.num_heads, intermediate_size=4 * c.embed_dim, layer_norm_eps=1e-6,
            layer_scale_init_value=1e-6, drop_path_rate=c.drop_path, use_relative_position_bias=True,
            use_mask_token=False, add_fpn=True, out_indices=[quarter * c.depth // 4 for quarter in (1, 2, 3, 4)])
        if c.head == "upernet":
            self.model = transformers.UperNetForSemanticSegmentation(transformers.UperNetConfig(
                backbone_config=beit, num_labels=c.num_classes, hidden_size=c.head_channels,
                auxiliary_channels=c.aux_channels, auxiliary_loss_weight=0.4, loss_ignore_index=255))
        else:
            self.model = transformers.Mask2FormerForUniversalSegmentation(transformers.Mask2FormerConfig(
                backbone_config=beit, num_labels=c.num_classes, ignore_value=255, feature_size=c.head_channels,
                mask_feature_size=c.head_channels, hidden_dim=c.head_channels, num_attention_heads=c.mask_heads,
                num_queries=c.num_queries, encoder_layers=c.encoder_layers, encoder_feedforward_dim=c.encoder_ffn,
                decoder_layers=c.decoder_layers + 1,  # it counts the prediction before the first layer as one
                dim_feedforward=c.decoder_ffn, dropout=0.0, train_num_points=c.num_points))
        self.config = c

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """(B, 3, w, w) -> scores (B, K, w, w); with labels long (B, w, w), 255 = ignore, the losses' sum as "loss"."""
        if self.config.head == "upernet":
            output = self.model(images, labels=labels)
            return output.logits if labels is None else {"loss": output.loss}
        if labels is not None:
            masks, classes = binary_masks(labels)
            return {"loss": self.model(images, mask_labels=masks, class_labels=classes).loss}
        output = self.model(images)  # its own post-processing would enlarge every query's mask before it makes scores
        classes, masks = output.class_queries_logits.softmax(2)[..., :-1], output.masks_queries_logits.sigmoid()
        scores = torch.einsum("bqk,bqhw->bkhw", classes, masks)
        return F.interpolate(scores, images.shape[2:], mode="bilinear", align_corners=False)


def binary_masks(labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The library's form of labels (B, w, w): of each image float masks (N, w, w) and the classes (N,) in it."""
    classes = [present[present != 255] for present in map(torch.unique, labels)]
    return [(x == present[:, None, None]).float() for x, present in zip(labels, classes, strict=True)], classes
