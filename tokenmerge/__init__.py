"""tokenmerge: Vision Transformers about twice as fast, by merging similar tokens inside them.

    handle = tokenmerge.patch(model, r=16)

Importing this package imports torch and nothing else that is heavy; timm and the other model libraries are
imported when a model of theirs is patched.
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
from tokenmerge.patching import Handle, Summary, handle_of, is_patched, model_cost, patch, patched, unpatch
from tokenmerge.patching.calibrate import calibrate, diffrate_schedule
from tokenmerge.patching.state import carry, token_sizes
from tokenmerge.plan import MergePlan
from tokenmerge.tracing.trace import Trace, trace_of

__version__ = "0.1.0"

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
    "method_names",
    "model_cost",
    "patch",
    "patched",
    "register_matcher",
    "register_method",
    "token_sizes",
    "trace_of",
    "unpatch",
    "vit_cost",
]
