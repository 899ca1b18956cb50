"""The names that others give to the tensors of a model, and which kind of file has which.

Reading order: our_names -> RENAMES, not_needed, rename_official -> join_attention. "Official" names are those of the
released ViT-Adapter code, in which the backbone's are those of BEiT's authors and of timm.
"""
import contextlib
import re
from collections.abc import Callable, Collection
from functools import reduce
from typing import Any

import torch
from torch import Tensor

POSITION_TABLE = "relative_position_bias_table"
KINDS = {"released": "released ViT-Adapter checkpoint", "ours": "own checkpoint", "beit": "BEiT pre-training"}
SIGNS = {  # how a name in each starts, behind any prefix; the last two are of transformers, its files and its models
    "released": r"backbone\.interactions\.0\.", "ours": r"adapter\.interactions\.0\.", "beit":
    r"blocks\.0\.attn\.qkv\.|encoder\.layer\.0\.attention\.attention\.query\.|layers\.0\.attention\.q_proj\."}
WRAPPER = r"(?:(?:module|_orig_mod)\.)"  # what DataParallel and torch.compile call the module that they wrap
AVERAGE = re.compile(r"(?<![a-z])ema(?![a-z])")


def our_names(names: Collection[str]) -> tuple[str | None, dict[str, str], list[str]]:
    """What kind of file has these names (a key of KINDS, None if none has); our name -> its name; removed prefixes.

    Left out are names that no model needs, and names without the prefix that is common to the model's.
    """
    for kind in KINDS:
        sign = SIGNS[kind].replace(r"\.", rf"\.{WRAPPER}*")
        matches = [re.match(rf"((?:[^.]+\.)*?)(?:{sign})", name) for name in names]
        if prefixes := {match[1] for match in matches if match}:
            # A state dict may hold a model and its average (EMA): the model is taken.
            prefix = min(prefixes, key=lambda prefix: (bool(AVERAGE.search(prefix)), len(prefix), prefix))
            start, wrapper = "backbone." if kind == "beit" else "", re.compile(rf"(?<![^.]){WRAPPER}")
            rests = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
            ours = {start + wrapper.sub("", rest): name for name, rest in rests.items()}
            removed = dict.fromkeys([prefix, *(part for rest in rests.values() for part in wrapper.findall(rest))])
            return kind, ours if kind == "ours" else rename_official(ours), list(filter(None, removed))
    return None, {}, []


def not_needed(state: dict[str, Any]) -> list[str]:
    """Official names that no model has a place for, by design."""
    pattern = r"(.*\.)?relative_position_index|backbone\.(embeddings\.)?mask_token"  # computed; BEiT's own tasks
    pattern += r"|backbone\.(norm|fc_norm|head|lm_head|cls_pt_layers|layernorm|pooler|fpn\d)\..*"
    if "decode_head.query_feat.weight" in state:  # Mask2Former inherits, saves and never uses a per-pixel classifier
        pattern += r"|decode_head\.conv_seg\..*"
    return [name for name in state if re.fullmatch(pattern, name)]


# Official name -> ours; every pattern is applied, in this order.
RENAMES: list[tuple[str, str | Callable[[re.Match], str]]] = [
    # BEiT in transformers
    (r"^backbone\.embeddings\.", "backbone."), (r"\.patch_embeddings\.projection\.", ".patch_embed."),
    (r"\.position_embeddings$", ".pos_embed"), (r"^backbone\.(encoder\.layer|layers)\.", "backbone.blocks."),
    (r"\.layernorm_before\.", ".norm1."), (r"\.layernorm_after\.", ".norm2."), (r"\.lambda_", ".gamma_"),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."), (r"\.attention\.attention\.", ".attention."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."), (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.attention\.([qkv])(uery|ey|alue|_proj)\.", r".attn.\1."), (r"\.attn\.([qv])\.bias$", r".attn.\1_bias"),
    (r"\.(encoder\.relative|shared)_position_bias\.", ".rel_pos_bias."),
    (r"(\.attention)?\.relative_position_bias\.", ".attn."),
    # ViT-Adapter
    (r"^backbone\.spm\.", "adapter.spatial_prior."), (r"^backbone\.(level_embed|interactions|up)", r"adapter.\1"),
    (r"^backbone\.norm([1-4])\.", lambda m: f"adapter.norms.{int(m[1]) - 1}."),
    (r"\.extractor\.", ".extractors.0."), (r"\.extra_extractors\.(\d)\.", lambda m: f".extractors.{int(m[1]) + 1}."),
    (r"\.dwconv\.dwconv\.", ".dwconv."), (r"\.patch_embed\.proj\.", ".patch_embed."),
    # mmcv's transformer layers
    (r"\.ffns\.0\.layers\.0\.0\.", ".ffn.0."), (r"\.ffns\.0\.layers\.1\.", ".ffn.2."),
    (r"(layers\.\d+)\.norms\.(\d)\.", lambda m: f"{m[1]}.norm{int(m[2]) + 1}."),
    (r"\.encoder\.layers\.(\d+)\.attentions\.0\.", r".encoder.layers.\1.attention."),
    (r"\.(encoder|transformer_decoder)\.", "."), (r"\.attentions\.0\.attn\.", ".cross_attention."),
    (r"\.attentions\.1\.attn\.", ".self_attention."), (r"\.in_proj_", ".in_proj."), (r"\.post_norm\.", ".norm."),
    # heads
    (r"^decode_head\.", "head."), (r"^auxiliary_head\.convs\.0\.", "auxiliary_head.conv."),
    (r"\.pixel_decoder\.(lateral|output)_convs\.0\.", r".pixel_decoder.\1."),
    (r"\.input_convs\.", ".inputs."), (r"\.lateral_convs\.", ".laterals."), (r"\.fpn_convs\.", ".outputs."),
    (r"\.fpn_bottleneck\.", ".fuse."), (r"\.psp_modules\.(\d)\.1\.", r".pools.\1."), (r"\.conv_seg\.", ".classifier."),
    (r"\.cls_embed\.", ".class_embed."), (r"\.mask_feature\.", ".mask_features."),
    (r"\.level_encoding\.", ".level_embed."), (r"\.(query_feat|query_embed|level_embed)\.weight$", r".\1"),
    (r"(head\..*)\.conv\.(weight|bias)$", r"\1.0.\2"), (r"(head\..*)\.(bn|gn)\.", r"\1.1."),  # mmcv's ConvModule
]


def rename_official(state: dict[str, Any]) -> dict[str, Any]:
    """Official names to ours, whatever the values; names that no model needs are left out."""
    dropped = not_needed(state)
    return {reduce(lambda text, rename: re.sub(*rename, text), RENAMES, name): value
            for name, value in state.items() if name not in dropped}


def join_attention(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One matrix for queries, keys and values where there are three; a table for each block where all share one."""
    shared = state.pop("backbone.rel_pos_bias." + POSITION_TABLE, None)
    for block in [name.removesuffix("norm1.weight") for name in state if name.endswith("norm1.weight")]:
        if shared is not None:
            state[f"{block}attn.{POSITION_TABLE}"] = shared
        three = [f"{block}attn.{letter}.weight" for letter in "qkv"]
        with contextlib.suppress(KeyError, RuntimeError):  # one matrix already, or of shapes that fit nothing
            state[f"{block}attn.qkv.weight"] = torch.cat([state[name] for name in three])
            state = {name: tensor for name, tensor in state.items() if name not in three}
    return state
