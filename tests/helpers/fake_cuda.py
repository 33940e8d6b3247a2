"""Run patched models on fake CUDA tensors, on a machine without CUDA, and count kernel launches.

    python -m tests.helpers.fake_cuda launches   # the table: one model per library, dense and merged
    python -m tests.helpers.fake_cuda passes     # every family and option: no host read, no copy from the host
    python -m tests.helpers.fake_cuda devices models graph   # several checks in one process; each prints a description

`test_fake_cuda.py` runs it in a separate process, because Triton's interpreter must be off. Fake tensors have a device and a
shape but no values, so that reading a value raises an error. This shows which operators are dispatched, not their results or speed.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import tokenmerge
from tests.helpers.tiny import images_for, tiny
from tests.helpers.towers import TOWERS
from tokenmerge.attention.call import AttentionCall
from tokenmerge.ops.launch import Launch
from tokenmerge.patching.target import find_target

MOST_MORE = 3
_NO_LAUNCH = (
    "prim.device",
    "aten._unsafe_view",
    "aten.empty",
    "aten.new_empty",
    "aten.lift_fresh",
    "aten.detach",
    "tokenmerge.",
)


class Launches(TorchDispatchMode):
    """Counter of kernel launches: operators that are not views, and Triton kernels.

    Attention counts as one launch, whichever kernel PyTorch would select. `nn.MultiheadAttention` is counted by its parts, as the
    merged model runs it, and not as its fused inference operator, which replaces about five operators.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.copies: list[str] = []
        self.silent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record the operator and run it."""
        name = str(func)
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        view = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
        tensors = [one for one in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        to_gpu = (
            isinstance(out, Tensor) and out.is_cuda and any(one.device.type == "cpu" and one.dim() for one in tensors)
        )
        if to_gpu and not name.startswith("aten.empty"):
            self.copies.append(name)
        if not self.silent and not view and not name.startswith(_NO_LAUNCH):
            self.names.append(name)
        return out


class Attention(AttentionCall):
    """Mode below all others that counts attention as one launch."""

    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.launches = launches

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        """Count one launch, and none for the operators inside."""
        self.launches.names.append("attention")
        self.launches.silent += 1
        try:
            return super().attend(*args, **kwargs)
        finally:
            self.launches.silent -= 1


class NoLists(TorchFunctionMode):
    """Mode that detects tensors made from Python numbers on a GPU, a copy from the host that no dispatcher sees."""

    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.launches = launches

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record `torch.tensor(…, device="cuda")` and similar calls."""
        kwargs = kwargs or {}
        on = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and on is not None and torch.device(on).type == "cuda":
            self.launches.copies.append(f"{func.__name__}({type(args[0]).__name__}, device={on})")
        return func(*args, **kwargs)


def fake(tensors: Mapping[str, Tensor], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return fake tensors like these, with floating-point ones in a dtype."""
    return {
        name: torch.empty(x.shape, dtype=dtype if x.is_floating_point() else x.dtype, device=device)
        for name, x in tensors.items()
    }


def run(
    model: nn.Module, inputs: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16
) -> tuple[Launches, list[int]]:
    """Run one pass on fake CUDA weights, and return the launches per block, including Triton kernels."""
    blocks = [block for block, _ in find_target(model).blocks]
    launches, starts = Launches(), list[int]()
    original = Launch.start

    def start(self: Launch) -> None:
        launches.names.append(f"triton {self.kernel.__name__}")
        original(self)

    hooks = [block.register_forward_pre_hook(lambda *_: starts.append(len(launches.names))) for block in blocks]
    Launch.start = start  # type: ignore[method-assign]
    try:
        with FakeTensorMode(), torch.no_grad(), NoLists(launches), Attention(launches):
            weights = fake(dict(model.named_parameters()), "cuda", dtype) | fake(
                dict(model.named_buffers()), "cuda", dtype
            )
            arguments = fake(inputs, "cuda", dtype)
            with launches:
                torch.func.functional_call(model, weights, args=(), kwargs=dict(arguments))
    finally:
        Launch.start = original  # type: ignore[method-assign]
        for hook in hooks:
            hook.remove()
    ends = [*starts[1:], len(launches.names)]
    return launches, [end - begin for begin, end in zip(starts, ends, strict=True)]


def libraries() -> Iterator[tuple[str, Callable[[], nn.Module], dict[str, Tensor]]]:
    """Return one model per library, with four blocks."""
    from open_clip.transformer import VisionTransformer
    from torchvision.models.vision_transformer import VisionTransformer as Torchvision
    from transformers import ViTConfig, ViTModel

    images = torch.empty(2, 3, 224, 224)
    yield "timm vit_small_patch16_224", lambda: timm.create_model("vit_small_patch16_224", depth=4), {"x": images}
    yield "transformers ViT", lambda: ViTModel(ViTConfig(num_hidden_layers=4)), {"pixel_values": images}
    sizes: dict[str, Any] = {"num_layers": 4, "num_heads": 6, "hidden_dim": 384, "mlp_dim": 1536}
    yield "torchvision ViT", lambda: Torchvision(image_size=224, patch_size=16, **sizes), {"x": images}
    clip: dict[str, Any] = {"layers": 4, "heads": 6, "mlp_ratio": 4.0}
    yield "open_clip ViT", lambda: VisionTransformer(224, 16, 384, **clip), {"x": images}


def print_launches() -> int:
    """Print the table, and return the number of models with too many launches."""
    print(f"launches per block, eager; PyTorch {torch.__version__}")
    print(f"{'model':<30}{'dense':>7}{'first':>7}{'others':>8}{'more':>6}   kernels of ours")
    worse = 0
    for name, build, inputs in libraries():
        model = build().eval()
        _, dense = run(model, inputs)
        tokenmerge.patch(model, r=13)
        launches, merged = run(model, inputs)
        ours = sorted({one.removeprefix("triton ") for one in launches.names if one.startswith("triton")})
        # the last block of some families also unmerges its tokens
        more = max(merged[1:-1]) - dense[1]
        worse += more > MOST_MORE or launches.copies != [] or len(ours) != 3
        print(f"{name:<30}{dense[1]:>7}{merged[0]:>7}{max(merged[1:-1]):>8}{more:>+6}   {', '.join(ours)}")
    return worse


def timm_models() -> Iterator[tuple[str, nn.Module, dict[str, Tensor], dict[str, Any]]]:
    """Return kinds of timm models, and one model with every option."""
    for name in (
        "vit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch16_siglip_224",
        "eva02_tiny_patch14_224",
        "vit_small_patch16_dinov3",
        "beit_base_patch16_224",
        "cait_xxs24_224",
        "vit_relpos_small_patch16_224",
        "naflexvit_base_patch16_gap",
    ):
        if name in timm.list_models():
            model = tiny(name)
            yield name, model, {"x": images_for(model)}, {}
    options: list[dict[str, Any]] = [{"attention": form} for form in ("math", "key_channel", "value_channel")]
    options += [{"partition": one} for one in ("sequential", "random", "checkerboard")]
    options += [
        {"matcher": one} for one in ("random_prune", "attention_prune", "evit", "ats", "diffrate", "pitome", "greedy")
    ]
    options += [{"metric": one} for one in ("q", "v", "kv", "x")] + [
        {"metric": "x_pre", "place": "before"},
        {"place": "after"},
    ]
    options += [{"combine": one} for one in ("norm", "max", "destination", "average", "tofu")] + [
        {"preset": "accurate"}
    ]
    options += [{"trace": True}, {"trace": "attention"}, {"output": "full"}, {"order": "spatial"}, {"prop_attn": False}]
    model = tiny("deit_tiny_patch16_224")
    for option in options:
        yield f"deit_tiny_patch16_224 {option}", model, {"x": images_for(model)}, option


def outcome(model: nn.Module, inputs: Mapping[str, Tensor], option: Mapping[str, Any] | None) -> str:
    """Return why a pass of this model, merged if there is an option, cannot be captured as a CUDA graph.

    It runs in a separate process, because upstream caches tensors in many places, and fake tensors must not meet real ones.
    """
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        with os.fdopen(read) as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
        return text or "the process died"
    try:
        if option is not None:
            tokenmerge.patch(model, r=5, **option)
        copies = run(model, inputs)[0].copies
        text = f"copies from the host: {', '.join(sorted(set(copies)))}" if copies else "nothing"
    except BaseException as error:  # any exception would stop a CUDA graph
        text = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    os.write(write, text.encode())
    os._exit(0)


def print_passes() -> int:
    """Check every family and option, and return how many read a value or copied one from the host."""
    wrong, count, upstream = 0, 0, list[str]()
    cases = list(timm_models())
    cases += [(tower.name, tower.build(), tower.feed(2), {}) for tower in TOWERS]
    # an unmerged model first, so that all forked processes share what PyTorch caches about operators on fake tensors
    warm = tiny("deit_tiny_patch16_224")
    with tokenmerge.patched(warm, r=5):
        run(warm, {"x": images_for(warm)})
    gc.freeze()  # otherwise garbage collection would touch, and so copy, all imported objects in each process
    for name, model, inputs, option in cases:
        count += 1
        found = outcome(model, inputs, option)
        if found == "nothing":
            continue
        if outcome(model, inputs, None) == "nothing":
            wrong += 1
            print(f"{name}: {found}")
        else:  # upstream itself reads values, which hides reads by this package
            upstream.append(name)
    gc.unfreeze()
    print(f"not clean without merging either: {', '.join(upstream) or 'none'}")
    print(f"{count} passes, {wrong} wrong")
    return wrong


def print_devices() -> int:
    """Check that sizes and plans follow the tokens to another device, as with a device map."""
    model: Any = timm.create_model("vit_tiny_patch16_224", depth=4).eval()
    tokenmerge.patch(model, r=8, trace=True)
    for block in model.blocks[2:]:
        block.register_forward_pre_hook(lambda module, args: tuple(x.to("cuda:1") for x in args))
    state, second = model.state_dict(), ("blocks.2", "blocks.3", "norm.", "head.")
    with FakeTensorMode(), torch.no_grad():
        weights = {
            name: torch.empty(x.shape, device="cuda:1" if name.startswith(second) else "cuda:0")
            for name, x in state.items()
        }
        out = torch.func.functional_call(model, weights, (torch.empty(2, 3, 224, 224, device="cuda:0"),))
    print(f"two devices: the output is on {out.device}")
    return int(out.device != torch.device("cuda:1"))


def print_models() -> int:
    """Patch and run models without values, on "meta" and fake, and return the number of failures."""
    wrong = 0
    for name in ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"):
        with torch.device("meta"):
            meta = timm.create_model(name, depth=3)
        wanted = tokenmerge.patch(meta, r=8).summary().tokens[-1]
        model: Any = timm.create_model(name, depth=3).eval()
        with FakeTensorMode():
            for module in model.modules():
                for key, value in list(module._parameters.items()):
                    if value is not None:
                        module._parameters[key] = nn.Parameter(torch.empty(value.shape, device="cuda"))
                for key, buffer in list(module._buffers.items()):
                    if buffer is not None:
                        module._buffers[key] = torch.empty(buffer.shape, device="cuda")
            tokens = tokenmerge.patch(model, r=8).summary().tokens[-1]
            out = model(torch.empty(2, 3, *model.patch_embed.img_size, device="cuda"))
        print(f"without values: {name}, {tokens} tokens at the end, {list(out.shape)}")
        wrong += tokens != wanted or len(out) != 2
    return wrong


def print_graph() -> int:
    """Check that a traced graph holds the Triton kernels and no opaque operators; run it last, because it sets a target.

    PyTorch analyses each kernel to find the tensors it writes, with numbers in place of scalars. If that fails, it only warns,
    and assumes that the kernel writes every tensor.
    """
    from torch._functorch.aot_autograd import aot_export_joint_simple
    from triton.runtime import driver

    from tokenmerge.ops import attending, matching, merging

    unread: list[str] = []
    log = logging.getLogger("torch._higher_order_ops.triton_kernel_wrap")
    log.addFilter(lambda record: unread.append(record.getMessage()) or True)  # type: ignore[func-returns-value]
    # so that PyTorch can analyse which tensors the kernels write
    driver.set_active(importlib.import_module("scripts.kernels").Target(90))

    def both(keys: Tensor, x: Tensor) -> Any:
        plan = matching.match(keys, 4, 1)
        merged = merging.merge(x, None, *plan, torch.bfloat16)
        return *merged, attending.attend(keys, keys, keys, x[:, None, :50, 0].expand(2, 3, 50), 0.125)

    with FakeTensorMode():
        keys, x = (torch.empty(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((2, 3, 50, 64), (2, 50, 192)))
        traced: Any = aot_export_joint_simple(both, (keys, x), trace_joint=False)
    graph = traced.graph
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    kernels, closed = (sum(word in name for name in names) for word in ("triton_kernel_wrapper", "tokenmerge"))
    print(f"a traced graph: {kernels} Triton kernels, {closed} closed operators, {len(unread)} warnings")
    return int(kernels != 4 or closed != 0 or bool(unread))


PARTS = {
    "launches": print_launches,
    "passes": print_passes,
    "devices": print_devices,
    "models": print_models,
    "graph": print_graph,
}

if __name__ == "__main__":
    torch.set_num_threads(1)  # because processes are forked
    if len(sys.argv) < 2:
        sys.exit(f"nothing was asked for: give some of {', '.join(PARTS)}")
    sys.exit(1 if sum([PARTS[name]() for name in sys.argv[1:]]) else 0)
