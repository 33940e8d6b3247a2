"""Which of timm's names have blocks that see one flat sequence with global self-attention: the field to cover."""

from __future__ import annotations

import timm

PLAIN = ("vision_transformer", "deit", "vision_transformer_hybrid")
OTHERS = ("eva", "beit", "cait", "vision_transformer_relpos", "naflexvit", "qwen3_vit", "deepseek_vit")
REFUSED = ("convit", "gemma4_vit")


def names(*modules: str) -> list[str]:
    """The names of those modules that this timm has."""
    return [name for module in modules if module in timm.list_modules() for name in timm.list_models(module=module)]
