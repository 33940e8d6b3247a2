"""Modules of transformers that read the tokens of a tower, and whether they can read merged tokens.

Merged tokens can be read one by one, and the class token, which never merges, can be read as usual. Means, cross-attention,
masks by position and layouts on a grid would misread them. A class that is not in this table gets unmerged tokens.
"""

from __future__ import annotations

_CLASS_TOKEN = (
    "vit.ViTForImageClassification",
    "deit.DeiTForImageClassification",
    "deit.DeiTForImageClassificationWithTeacher",
    "vit_msn.ViTMSNForImageClassification",
    "vivit.VivitForVideoClassification",
    "audio_spectrogram_transformer.ASTForAudioClassification",
    "clip.CLIPModel",
    "clip.CLIPVisionModelWithProjection",
    "metaclip_2.MetaClip2Model",
    "metaclip_2.MetaClip2VisionModelWithProjection",
    "chinese_clip.ChineseCLIPModel",
    "altclip.AltCLIPModel",
    "siglip.SiglipModel",  # its head is a reader that gets unmerged tokens
    "vision_text_dual_encoder.VisionTextDualEncoderModel",
)
ONE_BY_ONE = (  # a projection of each token, and a language model that takes any number of them
    "llava.LlavaModel",
    "llava.LlavaForConditionalGeneration",
    "git.GitVisionModel",  # it returns its tower's tokens unchanged
    "paligemma.PaliGemmaModel",
    "paligemma.PaliGemmaForConditionalGeneration",
)
_AVERAGES = "averages its tokens without sizes"
_CROSS = "reads its tokens by cross-attention, which would not know the sizes"
_GRID = "puts its tokens on their grid"

READERS: dict[str, str] = {
    **dict.fromkeys((*_CLASS_TOKEN, *ONE_BY_ONE), ""),
    **dict.fromkeys(
        (
            "clip.CLIPForImageClassification",
            "siglip.SiglipForImageClassification",
            "siglip2.Siglip2ForImageClassification",
            "metaclip_2.MetaClip2ForImageClassification",
            "dinov2.Dinov2ForImageClassification",
            "dinov2_with_registers.Dinov2WithRegistersForImageClassification",
            "dinov3_vit.DINOv3ViTForImageClassification",
            "ijepa.IJepaForImageClassification",
            "beit.BeitForImageClassification",
            "data2vec_vision.Data2VecVisionForImageClassification",
            "videomae.VideoMAEForVideoClassification",
        ),
        _AVERAGES,
    ),
    **dict.fromkeys(
        (
            "blip.BlipForConditionalGeneration",
            "blip.BlipForImageTextRetrieval",
            "blip.BlipForQuestionAnswering",
            "blip_2.Blip2ForConditionalGeneration",
            "instructblip.InstructBlipForConditionalGeneration",
            "whisper.WhisperModel",
            "whisper.WhisperForConditionalGeneration",
            "vision_encoder_decoder.VisionEncoderDecoderModel",
            "idefics2.Idefics2Model",
            "idefics2.Idefics2ForConditionalGeneration",
        ),
        _CROSS,
    ),
    **dict.fromkeys(
        (
            "vit.ViTForMaskedImageModeling",
            "deit.DeiTForMaskedImageModeling",
            "idefics3.Idefics3Model",
            "smolvlm.SmolVLMModel",
            "internvl.InternVLModel",
        ),
        _GRID,
    ),
}
"""Reasons why a class would misread merged tokens, by `module.Class` below `transformers.models`; empty if it would not."""
