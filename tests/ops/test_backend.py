"""Which backend runs, and what happens where the kernels cannot."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import tokenmerge
from tests.helpers.tiny import images_for, tiny
from tokenmerge.errors import ConfigError
from tokenmerge.ops import choice, native, takes_triton

pytest.importorskip("triton")


class OnGpu(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True
    device = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU, for those who only ask; what is known of it is forgotten afterwards."""
    monkeypatch.setattr(choice, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch.cuda, "device", lambda index: warnings.catch_warnings())
    monkeypatch.setattr(choice, "_faults", {})
    choice._refusal.cache_clear()
    choice._warn_once.cache_clear()
    yield torch.zeros(2, 3, 9, 16).as_subclass(OnGpu)
    choice._refusal.cache_clear()
    choice._warn_once.cache_clear()


def break_kernels(monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[int]:
    """Compiling any of them fails; how often it was tried."""
    from tokenmerge.ops import matching, merging

    tried: list[int] = []

    def fail(*_: Any) -> Any:
        tried.append(1)
        raise error

    for module in (matching, merging):
        monkeypatch.setattr(module, "compiled_for", fail)
    return tried


def test_kernels_that_do_not_compile_are_done_without(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By "auto", with one warning; asked for by name, they are an error with the reason."""
    tried = break_kernels(monkeypatch, RuntimeError("out of resource: shared memory\nmore lines"))
    with pytest.warns(UserWarning, match=r"plain torch.*Some GPU \(RuntimeError: out of resource: shared memory\)\."):
        assert not takes_triton("auto", gpu, "match")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert not takes_triton("auto", gpu, "match")
    assert len(tried) == 1
    with pytest.raises(ConfigError, match=r"backend='triton' cannot run: the kernels do not compile for Some GPU"):
        takes_triton("triton", gpu, "match")
    assert choice.faults(torch.float32) == [
        "the kernels do not compile for Some GPU (RuntimeError: out of resource: shared memory)"
    ]


def test_kernels_that_compile_are_taken(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenmerge.ops import matching

    monkeypatch.setattr(matching, "compiled_for", lambda *_: [])
    assert takes_triton("auto", gpu, "match")
    assert takes_triton("triton", gpu, "match")
    assert not takes_triton("torch", gpu, "match")
    assert not takes_triton("auto", torch.zeros(1, 2, 3), "match")


def test_the_summary_says_which_and_why() -> None:
    model = tiny("deit_tiny_patch16_224")
    summary = tokenmerge.patch(model, r=5).summary()
    without_c = "torch" if native.refusal() else "c"
    assert summary.backend == without_c or torch.cuda.is_available()
    assert "backend" in str(summary)
    assert all(len(line) <= 80 for line in str(summary).splitlines())
    tokenmerge.handle_of(model).update(backend="torch")
    assert tokenmerge.handle_of(model).summary().backend_reason == "as the config asks"


def test_a_compiled_model_keeps_its_backend_its_form_and_its_trace() -> None:
    """Compiling is not exporting: torch 2.11 tells Dynamo that it is."""
    torch.compiler.reset()  # what other tests compiled counts towards Dynamo's limit
    model = tiny("deit_tiny_patch16_224")
    images = images_for(model)
    handle = tokenmerge.patch(model, r=5, backend="triton", attention="key_channel", trace=True)
    wanted = model(images)
    source = handle.trace.source()
    graphs: list[Any] = []

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled: Any = torch.compile(model, backend=keep, fullgraph=True)
    handle.update(trace=True)  # forgets what was traced
    torch.testing.assert_close(compiled(images), wanted, atol=2e-5, rtol=2e-5)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("tokenmerge" in name and "match" in name for name in targets) == 3
    calls = [
        node for graph in graphs for node in graph.graph.nodes if "scaled_dot_product_attention" in str(node.target)
    ]
    masks = [node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None) for node in calls]
    assert len(calls) == 3
    assert masks == [None] * 3  # sizes are channels of K, in the blocks that have any
    assert torch.equal(handle.trace.source(), source)


def test_masks_that_are_more_than_padding_are_refused_when_compiled_too() -> None:
    """Where values cannot be read, PyTorch's own assertion says the sentence."""
    from tokenmerge.patching.begin import padding_sizes

    mask = torch.zeros(2, 1, 9, 9)
    mask[:, :, :, -2:] = -torch.inf

    def read(mask: torch.Tensor) -> torch.Tensor:
        sizes = padding_sizes(mask, 2, 9)
        assert sizes is not None
        return sizes

    compiled: Any = torch.compile(read, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(mask), read(mask))
    mask[0, 0, 3, 4] = -torch.inf
    with pytest.raises(RuntimeError, match="more than padding"):
        compiled(mask)
