"""Support for torch.fx: modules and functions that depend on sizes become single nodes, which run when the graph runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Proxy


def as_leaf(module: Any, x: Proxy, *args: Any, **kwargs: Any) -> Proxy:
    """Record a module's call as a single node, for any tracer, because the tracer's proxies carry no sizes."""
    tracer: Any = x.tracer
    node: Proxy = tracer.create_proxy("call_module", tracer.path_of_module(module), (x, *args), kwargs)
    return node


def deferred(function: Callable[..., Any], x: Any, *args: Any) -> Any:
    """Return `function(x, *args)`; if torch.fx is tracing, record that call as a single node instead."""
    return (
        x.tracer.create_proxy("call_function", function, (x, *args), {}) if isinstance(x, Proxy) else function(x, *args)
    )
