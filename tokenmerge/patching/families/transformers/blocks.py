"""Rows of transformers' layers, one per class; most are two sequences of names of the layer's own modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge.attention.tap import fused_metric, head_mean, note_input, weigh_probabilities
from tokenmerge.errors import PatchError
from tokenmerge.flops import BlockCost
from tokenmerge.patching.families.family import Example
from tokenmerge.patching.families.linear import channels_of, linear_weights
from tokenmerge.patching.families.transformers.attention import (
    CAN_CARRY,
    FollowsTokens,
    TakesSizes,
    TurnsByPosition,
    refuse_implementation,
)

_ATTENTIONS = ("attention", "self_attn")


def _apply(block: Any, names: Sequence[str], x: Tensor, attend: dict[str, Any]) -> Tensor:
    """Apply the named parts of a layer to x, one after the other: modules, learned scales, and attention."""
    y = x
    for name in names:
        part = getattr(block, name)
        if name in _ATTENTIONS:
            y = part(y, **attend)
            y = y[0] if isinstance(y, tuple) else y
        elif isinstance(part, nn.Module):
            y = part(y)
        elif part is not None:  # a learned scale, or the constant 1.0
            y = part * y
    return y


def _check_implementation(block: Any) -> None:
    config = _config_of(block)
    chosen = getattr(config, "chosen_attention", None) or getattr(config, "_attn_implementation", "eager")
    if chosen not in (*CAN_CARRY, None):
        raise PatchError(
            f"the attention implementation was changed to {chosen!r} after patching, but it cannot carry token sizes: "
            "call model.set_attn_implementation('sdpa')"
        )


def _config_of(block: Any) -> Any:
    return next((m.config for m in _attention_of(block).modules() if hasattr(m, "config")), None)


def _attention_of(block: Any) -> Any:
    return getattr(block, next(name for name in _ATTENTIONS if hasattr(block, name)))


def _attention(chain: str, masked: bool = True) -> Callable[..., Tensor]:
    """Return the attention branch of a pre-norm layer.

    Args:
        chain: names of the layer's parts, in order, separated by spaces.
        masked: whether its attention takes `attention_mask`.
    """
    names = chain.split()

    def branch(block: Any, x: Tensor, bias: Tensor | None, **given: Any) -> Tensor:
        return _apply(block, names, x, {"attention_mask": bias, **given} if masked else given) + x

    return branch


def _mlp(chain: str) -> Callable[[Any, Tensor], Tensor]:
    names = chain.split()
    return lambda block, x: _apply(block, names, x, {}) + x


def _key_module(block: Any) -> list[nn.Module]:
    """Return the module whose output is K: the norm of the keys if there is one, otherwise their projection."""
    named = dict(_attention_of(block).named_modules())
    for wanted in ("k_norm", "k_proj", "key"):
        found = [module for name, module in named.items() if name.rpartition(".")[2] == wanted]
        if found and not isinstance(found[0], nn.Identity):
            return found[:1]
    return []


def _heads(block: Any) -> int:
    attention = _attention_of(block)
    modules: list[Any] = list(attention.modules())
    for module in modules:
        for name in ("num_heads", "num_attention_heads"):
            if hasattr(module, name):
                return int(getattr(module, name))
    raise PatchError(f"{type(attention).__name__} does not say how many heads it has: report this version")


def _flat_per_head(block: Any, keys: tuple[Tensor, ...]) -> Tensor:
    """Return K `[B, N, H·D]` as `[B, H, N, D]`, a view."""
    per_head: Tensor = keys[0].unflatten(2, (_heads(block), -1)).transpose(1, 2)
    return per_head


def _flat_metric(block: Any, keys: tuple[Tensor, ...]) -> Tensor:
    """Return K `[B, N, H·D]` averaged over heads: `[B, N, D]`."""
    return head_mean(block, (_flat_per_head(block, keys),))


def _qkv_metric(block: Any, noted: tuple[Tensor, ...]) -> Tensor:
    """Return K averaged over heads, `[B, N, D]`, from the input of a joint projection of Q, K and V."""
    qkv = _attention_of(block).qkv
    return fused_metric(noted[0], qkv, _heads(block))


def _cost(block: Any) -> BlockCost:
    attention = _attention_of(block)
    inside_attention = linear_weights(attention)
    keys: list[Any] = _key_module(block)
    width = next((int(m.out_features) for m in keys if hasattr(m, "out_features")), None)
    if width is None:
        width = channels_of(block, 0)
    return BlockCost(inside_attention, linear_weights(block) - inside_attention, 2 * width)


def _refuse(block: Any) -> list[str]:
    reasons = refuse_implementation(_config_of(block))
    if getattr(block, "chunk_size_feed_forward", 0) and hasattr(block, "seq_len_dim"):
        reasons.append("it runs its MLP in chunks (chunk_size_feed_forward)")
    return reasons


def pre_norm(attention: str, mlp: str, masked: bool = True, **seams: Any) -> dict[str, Any]:
    """Return the fields of the row of a layer whose two branches are sequences of its own modules.

    Args:
        attention: names of the parts of the attention branch, separated by spaces.
        mlp: names of the parts of the MLP branch, separated by spaces.
        masked: whether its attention takes `attention_mask`.
        **seams: fields of `BlockFamily` that differ from the usual ones.
    """
    return {
        "attention": _attention(attention, masked),
        "mlp": _mlp(mlp),
        "keys": _key_module,
        "metric": _flat_metric,
        "per_head": _flat_per_head,
        "cost": _cost,
        "refuse": _refuse,
        "ready": _check_implementation,
        "mask": "attention_mask",
        "passes": True,
        **seams,
    }


# --- layers that differ from two sequences of modules ----------------------------------------------------


def _routed(attention: Callable[[Any], Any], mixin: type = TakesSizes) -> Callable[[Any], Sequence[Any]]:
    return lambda block: [(attention(block), mixin)]


def _intermediate_mlp(block: Any, x: Tensor) -> Tensor:
    """Run VideoMAE's MLP branch, whose output module adds the residual itself."""
    out: Tensor = block.output(block.intermediate(block.layernorm_after(x)), x)
    return out


def _whisper_mlp(block: Any, x: Tensor) -> Tensor:
    y = block.activation_fn(block.fc1(block.final_layer_norm(x)))
    y = nn.functional.dropout(y, p=block.activation_dropout, training=block.training)
    y = nn.functional.dropout(block.fc2(y), p=block.dropout, training=block.training)
    x = x + y
    if x.dtype == torch.float16:
        limit = torch.finfo(x.dtype).max - 1000
        x = torch.clamp(x, min=-limit, max=limit)
    return x


def _whisper_attention(block: Any, x: Tensor, bias: Tensor | None, **given: Any) -> Tensor:
    y, _ = block.self_attn(hidden_states=block.self_attn_layer_norm(x), attention_mask=bias, **given)
    return x + nn.functional.dropout(y, p=block.dropout, training=block.training)


def _beit_attention(
    block: Any,
    x: Tensor,
    bias: Tensor | None,
    interpolate_pos_encoding: bool = False,
    resolution: tuple[int, int] | None = None,
    **given: Any,
) -> Tensor:
    own = block.relative_position_bias
    if own is not None and resolution is not None:
        window = (resolution[0] // block.patch_size, resolution[1] // block.patch_size)
        between = own(window, interpolate_pos_encoding, dim_size=x.shape[1])
        bias = between if bias is None else between + bias
    y = _apply(block, ("layernorm_before", "attention"), x, {"attention_mask": bias, **given})
    return _apply(block, ("dropout", "lambda_1", "drop_path"), y, {}) + x


def _window(block: Any) -> Example:
    """Return an example with as many tokens as the block's own table of relative positions is for."""
    table = getattr(block, "relative_position_bias", None) or getattr(
        _attention_of(block).attention if hasattr(_attention_of(block), "attention") else block,
        "relative_position_bias",
        None,
    )
    if table is None:
        return Example()
    height, width = table.window_size
    patch = getattr(block, "patch_size", None) or _attention_of(block).attention.config.patch_size
    return Example(height * width + 1, {"resolution": (height * patch, width * patch)})


def _data2vec_attention(block: Any, x: Tensor, bias: Tensor | None, **given: Any) -> Tensor:
    if given.get("output_attentions"):
        raise PatchError("this model cannot return attentions while it merges: call it without output_attentions")
    y = _apply(block, ("layernorm_before", "attention"), x, {"relative_position_bias": bias, **given})
    return _apply(block, ("lambda_1", "drop_path"), y, {}) + x


def _own_bias(block: Any) -> list[tuple[nn.Module, type]]:
    owner = block if hasattr(block, "relative_position_bias") else _attention_of(block).attention
    table = getattr(owner, "relative_position_bias", None)
    return [] if table is None else [(table, FollowsTokens)]


def _vjepa_attention(block: Any, x: Tensor, bias: Tensor | None, **given: Any) -> Tensor:
    """Run the attention branch without the caller's arguments, which upstream's layer does not pass on either."""
    return _apply(block, ("norm1", "attention", "drop_path"), x, {}) + x


def _vjepa_positions(block: Any, x: Tensor) -> Tensor:
    """Return the frame, row and column of every patch, `[1, N₀, 3]` float32."""
    return torch.stack(block.attention.get_position_ids(x), dim=-1).float().unsqueeze(0)


def _identity_rotation(block: Any) -> Example:
    dim = int(block.attention.head_dim)
    table = torch.ones(1, dim, dtype=torch.float64), torch.zeros(1, dim, dtype=torch.float64)
    return Example(arguments={"position_embeddings": table})


_VIT = pre_norm("layernorm_before attention dropout", "layernorm_after mlp dropout")
_DINO = pre_norm("norm1 attention layer_scale1 drop_path", "norm2 mlp layer_scale2 drop_path")
_CLIP = pre_norm("layer_norm1 self_attn", "layer_norm2 mlp")
_BLIP = pre_norm(
    "layer_norm1 self_attn",
    "layer_norm2 mlp",
    masked=False,
    keys=lambda block: [block.self_attn],
    tap=note_input,
    metric=_qkv_metric,
    per_head=None,
    mask=None,
)
_VIDEOMAE = {
    **pre_norm("layernorm_before attention", "", masked=False),
    "mlp": _intermediate_mlp,
    "mixins": _routed(lambda block: block.attention.attention),
    "mask": None,
}

LAYERS: dict[str, dict[str, Any]] = {
    "vit.ViTLayer": _VIT,
    "deit.DeiTLayer": _VIT,
    "vit_mae.ViTMAELayer": _VIT,
    "vit_msn.ViTMSNLayer": _VIT,
    "ijepa.IJepaLayer": _VIT,
    "vivit.VivitLayer": _VIT,
    "audio_spectrogram_transformer.ASTLayer": _VIT,
    "dinov2.Dinov2Layer": _DINO,
    "dinov2_with_registers.Dinov2WithRegistersLayer": _DINO,
    "dinov3_vit.DINOv3ViTLayer": {**_DINO, "rope": "position_embeddings", "example": _identity_rotation},
    "beit.BeitLayer": {
        **pre_norm("", "layernorm_after mlp dropout lambda_2 drop_path"),
        "attention": _beit_attention,
        "mask": None,
        "pair_bias": "attention_mask",
        "mixins": _own_bias,
        "example": _window,
    },
    "data2vec_vision.Data2VecVisionLayer": {
        **pre_norm("", "layernorm_after intermediate output lambda_2 drop_path"),
        "attention": _data2vec_attention,
        "mask": None,
        "pair_bias": "relative_position_bias",
        "mixins": _own_bias,
        "example": _window,
        "wrap": lambda x: (x, None),
    },
    "clip.CLIPEncoderLayer": _CLIP,
    "siglip.SiglipEncoderLayer": _CLIP,
    "siglip2.Siglip2EncoderLayer": _CLIP,
    "metaclip_2.MetaClip2EncoderLayer": _CLIP,
    "chinese_clip.ChineseCLIPVisionLayer": _CLIP,
    "altclip.AltCLIPEncoderLayer": _CLIP,
    "git.GitVisionEncoderLayer": _CLIP,
    "idefics2.Idefics2EncoderLayer": _CLIP,
    "idefics3.Idefics3EncoderLayer": _CLIP,
    "smolvlm.SmolVLMEncoderLayer": _CLIP,
    "janus.JanusVisionEncoderLayer": _CLIP,
    "blip.BlipEncoderLayer": {**_BLIP, "hooks": lambda block: [(block.self_attn.dropout, weigh_probabilities)]},
    "blip_2.Blip2EncoderLayer": {**_BLIP, "mixins": _routed(lambda block: block.self_attn)},
    "instructblip.InstructBlipEncoderLayer": {**_BLIP, "mixins": _routed(lambda block: block.self_attn)},
    "aimv2.Aimv2EncoderLayer": pre_norm("rms_norm1 attention", "rms_norm2 ffn"),
    "pixtral.PixtralAttentionLayer": pre_norm(
        "attention_norm attention", "ffn_norm feed_forward", rope="position_embeddings", example=_identity_rotation
    ),
    "internvl.InternVLVisionLayer": pre_norm(
        "layernorm_before attention lambda_1", "layernorm_after mlp dropout lambda_2", mask=None
    ),
    "videomae.VideoMAELayer": _VIDEOMAE,
    "vjepa2.VJEPA2Layer": {
        **pre_norm("", "norm2 mlp drop_path"),
        "attention": _vjepa_attention,
        "mask": None,
        "mixins": _routed(lambda block: block.attention, TurnsByPosition),
        "positions": _vjepa_positions,
        "wrap": lambda x: (x, None),
    },
    "whisper.WhisperEncoderLayer": {
        **pre_norm("", ""),
        "attention": _whisper_attention,
        "mlp": _whisper_mlp,
    },
}
"""Fields of the rows, by layer class as `module.Class` below `transformers.models`."""

_OLD_DINO: dict[str, Any] = {
    "attention": _attention("norm1 attention layer_scale1 drop_path", masked=False),
    "mixins": _routed(lambda block: block.attention.attention),
    "mask": None,
}
WITHOUT_MASK: dict[str, dict[str, Any]] = {
    "dinov2.Dinov2Layer": _OLD_DINO,
    "dinov2_with_registers.Dinov2WithRegistersLayer": _OLD_DINO,
}
"""Fields of layers whose older versions (transformers 5.17) pass no mask on."""
