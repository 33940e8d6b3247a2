"""Small random transformers models, one per row: how to build and feed them, and where the oracle adds hooks."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.helpers.tiny import randomize

_SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
_IMAGE = {**_SMALL, "image_size": 96, "patch_size": 16}
_EXTRA = {"attention_dropout": 0.0}


def _images(batch: int) -> dict[str, Tensor]:
    return {"pixel_values": _noise(batch, 3, 96, 96)}


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@dataclasses.dataclass(frozen=True)
class Tower:
    """One transformers model under test.

    Attributes:
        name: `module.Class` of the model; the config class is `config`.
        config: name of its config class.
        fields: fields of the config.
        blocks: path of its layers.
        second: the module of a layer before which tokens merge.
        keys: the module of a layer that outputs K, and whether it outputs Q, K and V together.
        prefix: tokens that never merge.
        feed: function that returns inputs for a batch.
    """

    name: str
    config: str
    fields: dict[str, Any]
    blocks: str = "layers"
    second: str = "layernorm_after"
    keys: str = "attention.k_proj"
    prefix: int = 1
    feed: Callable[[int], dict[str, Tensor]] = _images
    rope: str = ""
    bias: str = ""

    def build(self, **overrides: Any) -> Any:
        """Return the model with random weights, in evaluation mode."""
        module, _, cls = self.name.partition(".")
        folder = "data2vec" if module == "data2vec_vision" else module
        models = importlib.import_module(f"transformers.models.{folder}.modeling_{module}")
        config = getattr(importlib.import_module("transformers"), self.config)(**{**self.fields, **overrides})
        model = getattr(models, cls)(config).eval()
        randomize(model)
        return model

    @property
    def heads(self) -> int:
        """Return the number of attention heads."""
        return int(self.fields.get("num_attention_heads") or self.fields["encoder_attention_heads"])


def _clip(name: str, config: str, prefix: int = 1, **fields: Any) -> Tower:
    return Tower(name, config, {**_IMAGE, **fields}, "encoder.layers", "layer_norm2", "self_attn.k_proj", prefix)


TOWERS = [
    Tower("vit.ViTModel", "ViTConfig", _IMAGE),
    Tower("deit.DeiTModel", "DeiTConfig", _IMAGE, prefix=2),
    Tower("vit_msn.ViTMSNModel", "ViTMSNConfig", _IMAGE),
    Tower("vit_mae.ViTMAEModel", "ViTMAEConfig", {**_IMAGE, "mask_ratio": 0.0},
          feed=lambda batch: {**_images(batch), "noise": torch.arange(36.0).expand(batch, -1)}),
    Tower("ijepa.IJepaModel", "IJepaConfig", _IMAGE, prefix=0),
    Tower("dinov2.Dinov2Model", "Dinov2Config", {**_IMAGE, "layerscale_value": 0.7}, "encoder.layer", "norm2", "attention.*"),
    Tower(
        "dinov2_with_registers.Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {**_IMAGE, "num_register_tokens": 3},
        "encoder.layer",
        "norm2",
        "attention.*",
        4,
    ),
    Tower(
        "dinov3_vit.DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**_IMAGE, "num_register_tokens": 2},
        "model.layer",
        "norm2",
        "attention.k_proj",
        3,
        rope="dinov3",
    ),
    Tower("beit.BeitModel", "BeitConfig", {**_IMAGE, "use_relative_position_bias": True, "layer_scale_init_value": 0.5}, bias="own"),
    Tower(
        "beit.BeitModel",
        "BeitConfig",
        {**_IMAGE, "use_shared_relative_position_bias": True, "use_mean_pooling": False},
        bias="shared",
    ),
    Tower(
        "data2vec_vision.Data2VecVisionModel",
        "Data2VecVisionConfig",
        {**_IMAGE, "use_relative_position_bias": True},
        "encoder.layer",
        keys="attention.attention.key",
        bias="own",
    ),
    _clip("clip.CLIPVisionModel", "CLIPVisionConfig"),
    _clip("metaclip_2.MetaClip2VisionModel", "MetaClip2VisionConfig"),
    _clip("chinese_clip.ChineseCLIPVisionModel", "ChineseCLIPVisionConfig"),
    _clip("altclip.AltCLIPVisionModel", "AltCLIPVisionConfig"),
    _clip("siglip.SiglipVisionModel", "SiglipVisionConfig", 0),
    _clip("idefics2.Idefics2VisionTransformer", "Idefics2VisionConfig", 0),
    Tower(
        "git.GitVisionModel",
        "GitVisionConfig",
        _IMAGE,
        "vision_model.encoder.layers",
        "layer_norm2",
        "self_attn.k_proj",
    ),
    _clip("idefics3.Idefics3VisionTransformer", "Idefics3VisionConfig", 0),
    _clip("smolvlm.SmolVLMVisionTransformer", "SmolVLMVisionConfig", 0),
    _clip("janus.JanusVisionModel", "JanusVisionConfig", 0),
    Tower(
        "instructblip.InstructBlipVisionModel",
        "InstructBlipVisionConfig",
        _IMAGE,
        "encoder.layers",
        "layer_norm2",
        "self_attn.qkv",
    ),
    Tower(
        "blip.BlipVisionModel", "BlipVisionConfig", _IMAGE, "encoder.layers", "layer_norm2", "self_attn.qkv"
    ),
    Tower(
        "blip_2.Blip2VisionModel", "Blip2VisionConfig", _IMAGE, "encoder.layers", "layer_norm2", "self_attn.qkv"
    ),
    Tower("aimv2.Aimv2VisionModel", "Aimv2VisionConfig", _IMAGE, "encoder.layers", "rms_norm2", "attention.k_proj", 0),
    Tower(
        "pixtral.PixtralVisionModel",
        "PixtralVisionConfig",
        _IMAGE,
        "transformer.layers",
        "ffn_norm",
        "attention.k_proj",
        0,
        lambda batch: {"pixel_values": _noise(1, 3, 96, 96)},
        rope="pixtral",
    ),
    Tower("internvl.InternVLVisionModel", "InternVLVisionConfig", {**_IMAGE, "image_size": [96, 96], "patch_size": [16, 16]}, "encoder.layer"),
    Tower(
        "vivit.VivitModel",
        "VivitConfig",
        {**_SMALL, "image_size": 64, "num_frames": 4, "tubelet_size": [2, 16, 16]},
        feed=lambda batch: {"pixel_values": _noise(batch, 4, 3, 64, 64)},
    ),
    Tower(
        "videomae.VideoMAEModel",
        "VideoMAEConfig",
        {**_SMALL, "image_size": 64, "patch_size": 16, "num_frames": 4, "tubelet_size": 2},
        "encoder.layer",
        keys="attention.attention.key",
        prefix=0,
        feed=lambda batch: {"pixel_values": _noise(batch, 4, 3, 64, 64)},
    ),
    Tower(
        "vjepa2.VJEPA2Model",
        "VJEPA2Config",
        {**_SMALL, "crop_size": 64, "patch_size": 16, "frames_per_clip": 4, "tubelet_size": 2, "pred_hidden_size": 48,
         "pred_num_attention_heads": 4, "pred_num_hidden_layers": 1},
        "encoder.layer",
        "norm2",
        "attention.key",
        0,
        lambda batch: {"pixel_values_videos": _noise(batch, 4, 3, 64, 64)},
        rope="vjepa2",
    ),
    Tower(
        "audio_spectrogram_transformer.ASTModel",
        "ASTConfig",
        {**_SMALL, "max_length": 64, "num_mel_bins": 48, "frequency_stride": 16, "time_stride": 10},
        prefix=2,
        feed=lambda batch: {"input_values": _noise(batch, 64, 48)},
    ),
    Tower(
        "whisper.WhisperEncoder",
        "WhisperConfig",
        {"d_model": 48, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 96, "max_source_positions": 40},
        second="final_layer_norm",
        keys="self_attn.k_proj",
        prefix=0,
        feed=lambda batch: {"input_features": _noise(batch, 80, 80)},
    ),
]  # fmt: skip

BY_NAME = {f"{tower.name.partition('.')[2]}{'-' + tower.bias if tower.bias else ''}": tower for tower in TOWERS}
