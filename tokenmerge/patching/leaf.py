"""Models traced by torch.fx: what depends on sizes becomes one node of the graph, and runs as it is when the graph does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Proxy


def as_leaf(module: Any, x: Proxy, *args: Any, **kwargs: Any) -> Proxy:
    """One call of a module, whatever tracer runs: sizes travel with real tensors, and a tracer's have none."""
    tracer: Any = x.tracer
    node: Proxy = tracer.create_proxy("call_module", tracer.path_of_module(module), (x, *args), kwargs)
    return node


def deferred(function: Callable[..., Any], x: Any, *args: Any) -> Any:
    """`function(x, *args)`; one call of it where torch.fx traces the model."""
    return (
        x.tracer.create_proxy("call_function", function, (x, *args), {}) if isinstance(x, Proxy) else function(x, *args)
    )
