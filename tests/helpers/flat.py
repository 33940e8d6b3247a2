"""The timm modules whose blocks run global self-attention over one flat sequence, which are the families to cover."""

from __future__ import annotations

import timm

PLAIN = ("vision_transformer", "deit", "vision_transformer_hybrid")
OTHERS = ("eva", "beit", "cait", "vision_transformer_relpos", "naflexvit", "qwen3_vit", "deepseek_vit")
REFUSED = ("convit", "gemma4_vit")


def names(*modules: str) -> list[str]:
    """Return the model names of modules, as far as the installed timm has these modules."""
    return [name for module in modules if module in timm.list_modules() for name in timm.list_models(module=module)]
