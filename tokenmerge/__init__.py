"""Make Vision Transformers about twice as fast by merging similar tokens inside them, without training.

Token Merging ("Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461) merges r tokens in every block.

Example:
    >>> import timm, tokenmerge
    >>> model = timm.create_model("deit_tiny_patch16_224").eval()
    >>> handle = tokenmerge.patch(model, r=13)
    >>> handle.summary().tokens[-1]
    41
    >>> handle.remove()

Shapes in every docstring use one legend:

| symbol | meaning |
|---|---|
| B | images (clips, sounds) in a batch |
| N | tokens per image that enter a step: a block, a merge; prefix tokens such as the class token included |
| N' | tokens per image that leave it |
| N₀ | tokens per image that entered the first block |
| r | tokens per image that a step merges away: N − N' |
| C | channels of a token |
| H | attention heads |
| D | channels of a head, or of the metric |

Importing this package imports torch and nothing else that is heavy; timm and the other model libraries are imported when a
model of theirs is patched.
"""

from tokenmerge.config import PRESETS, MergeConfig
from tokenmerge.errors import (
    ConfigError,
    InputError,
    PatchError,
    TokenMergeError,
    UnknownFieldError,
    UnsupportedModelError,
)
from tokenmerge.flops import BlockCost, ModelCost, vit_cost
from tokenmerge.matching import Matcher, bipartite_matching, register_matcher
from tokenmerge.methods import Method, get_method, method_names, register_method
from tokenmerge.patching import Handle, Summary, Tuning, handle_of, is_patched, model_cost, patch, patched, unpatch
from tokenmerge.patching.calibrate import calibrate, diffrate_schedule
from tokenmerge.patching.state import carry, token_sizes
from tokenmerge.plan import MergePlan
from tokenmerge.saving import load, save
from tokenmerge.tracing.trace import Trace, trace_of

__version__ = "0.1.0"
"""Version of the package."""

__all__ = [
    "PRESETS",
    "BlockCost",
    "ConfigError",
    "Handle",
    "InputError",
    "Matcher",
    "MergeConfig",
    "MergePlan",
    "Method",
    "ModelCost",
    "PatchError",
    "Summary",
    "TokenMergeError",
    "Trace",
    "Tuning",
    "UnknownFieldError",
    "UnsupportedModelError",
    "__version__",
    "bipartite_matching",
    "calibrate",
    "carry",
    "diffrate_schedule",
    "get_method",
    "handle_of",
    "is_patched",
    "load",
    "method_names",
    "model_cost",
    "patch",
    "patched",
    "register_matcher",
    "register_method",
    "save",
    "token_sizes",
    "trace_of",
    "unpatch",
    "vit_cost",
]
