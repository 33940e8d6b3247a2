"""The functions in C against PyTorch's operators, and what happens where they cannot be had."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenmerge
from tests.helpers.plans import exact_metric
from tests.helpers.tiny import images_for, tiny
from tokenmerge import MergePlan, bipartite_matching
from tokenmerge.errors import ConfigError, InputError
from tokenmerge.ops import choice, native, native_build
from tokenmerge.ops.combine import combine, merge_rows

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
needs_c = pytest.mark.skipif(native.refusal() is not None, reason=f"no functions in C: {native.refusal()}")
FIELDS = ("kept", "source", "target")


def same(first: MergePlan, second: MergePlan) -> bool:
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in FIELDS)


def both(metric: Tensor, r: int, protected: int = 0) -> tuple[MergePlan, MergePlan]:
    return (
        bipartite_matching(metric, r, protected, backend="c"),
        bipartite_matching(metric, r, protected, backend="torch"),
    )


# --- matching ----------------------------------------------------------------------------------------------


@needs_c
@DTYPES
@pytest.mark.parametrize("protected", [0, 1, 2, 5])
@pytest.mark.parametrize("tokens", [6, 17, 50, 129, 300])
def test_plans_are_those_of_torch(tokens: int, protected: int, dtype: torch.dtype) -> None:
    if tokens - protected < 2:
        pytest.skip("nothing can merge")
    metric = exact_metric(tokens, batch=3, seed=tokens).to(dtype)  # sums without rounding: ties are ties in any order
    for r in {1, (tokens - protected) // 4 or 1, (tokens - protected) // 2}:
        assert same(*both(metric, r, protected))


@needs_c
@DTYPES
@pytest.mark.parametrize(("heads", "dim"), itertools.product([1, 3, 12], [1, 16, 40, 64]))
def test_heads_are_summed_with_any_strides(heads: int, dim: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(heads * dim)
    fused = torch.randint(-3, 4, (2, 33, 3, heads, dim), generator=draw).to(dtype)
    keys = fused.permute(2, 0, 3, 1, 4)[1]  # as timm's attention makes them
    assert not keys.is_contiguous()
    plan = bipartite_matching(keys, 9, 1, backend="c")
    assert same(plan, bipartite_matching(keys.contiguous(), 9, 1, backend="c"))
    assert same(plan, bipartite_matching(keys.transpose(2, 3).contiguous().transpose(2, 3), 9, 1, backend="c"))
    if dim > 1:
        assert same(plan, bipartite_matching(keys.sum(dim=1, dtype=torch.float32), 9, 1, backend="c"))


@needs_c
def test_the_best_edges_are_found() -> None:
    keys = torch.randn(2, 3, 101, 64)
    plan = bipartite_matching(keys, 20, 1, backend="c")
    unit = torch.nn.functional.normalize(keys.double().mean(dim=1), dim=2)
    scores = unit[:, 2::2] @ unit[:, 1::2].transpose(1, 2)
    best = scores.amax(dim=2)
    for image in range(2):
        merged = (plan.source[image] - 2) // 2
        chosen = scores[image, merged, plan.target[image] - (plan.tokens_out - scores.shape[2])]
        torch.testing.assert_close(chosen, best[image].topk(20).values, rtol=0, atol=1e-6)


@needs_c
def test_ties_go_to_the_lower_positions() -> None:
    for protected in (0, 1, 2):
        plan, wanted = both(torch.ones(2, 21, 8), 7, protected)
        first = protected + protected % 2
        assert plan.source.tolist() == [list(range(first, first + 14, 2))] * 2
        assert same(plan, wanted)


@needs_c
@pytest.mark.parametrize("where", [[3], [4], [3, 8], [0], [20], list(range(21))])
def test_tokens_that_are_not_numbers_merge_as_in_torch(where: list[int]) -> None:
    metric = exact_metric(21, batch=2)
    metric[1, where] = torch.nan
    plan, wanted = both(metric, 6, 1)
    assert same(plan, wanted)
    metric[1, where] = torch.inf
    assert same(*both(metric, 6, 1))


@needs_c
def test_more_than_can_merge_is_cut() -> None:
    keys = torch.randn(1, 1, 9, 4)
    kept, source, target = native.match(keys, 100, 1)
    assert (kept.shape, source.shape, target.shape) == ((1, 5), (1, 4), (1, 4))


@needs_c
def test_threads_change_nothing() -> None:
    keys, x = torch.randn(3, 6, 577, 64), torch.randn(3, 577, 768)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            plan = bipartite_matching(keys, 100, 1, backend="c")
            found.append((plan, *plan.merge(x, backend="c")))
    finally:
        torch.set_num_threads(before)
    for plan, *merged in found[1:]:
        assert same(plan, found[0][0])
        assert all(torch.equal(a, b) for a, b in zip(merged, found[0][1:], strict=True))


@needs_c
def test_python_threads_do_not_share_memory() -> None:
    keys = [torch.randn(2, 3, 60 + 7 * i, 32) for i in range(6)]
    wanted = [bipartite_matching(k, 11, 1, backend="c") for k in keys]
    wrong: list[int] = []

    def work(which: int) -> None:
        for turn in range(60):
            at = (which + turn) % len(keys)
            if not same(bipartite_matching(keys[at], 11, 1, backend="c"), wanted[at]):
                wrong.append(at)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))  # raises what a thread raised
    assert not wrong


# --- merging -----------------------------------------------------------------------------------------------


def drawn_plan(batch: int, tokens: int, r: int, crowded: bool) -> MergePlan:
    """Any plan; where it is crowded, many sources join one token."""
    order = torch.stack([torch.randperm(tokens) for _ in range(batch)])
    return MergePlan(
        order[:, : tokens - r].contiguous(),
        order[:, tokens - r :].contiguous(),
        torch.randint(0, min(2, tokens - r) if crowded else tokens - r, (batch, r)),
    )


@needs_c
@DTYPES
@pytest.mark.parametrize(
    ("batch", "tokens", "r", "channels"), [(1, 2, 1, 1), (1, 50, 20, 192), (3, 197, 16, 40), (2, 400, 199, 7)]
)
@pytest.mark.parametrize("crowded", [False, True])
def test_means_are_those_of_torch_to_the_bit(
    batch: int, tokens: int, r: int, channels: int, crowded: bool, dtype: torch.dtype
) -> None:
    plan, x = drawn_plan(batch, tokens, r, crowded), torch.randn(batch, tokens, channels).to(dtype)
    for size in (None, torch.randint(0, 9, (batch, tokens)).float(), torch.rand(batch, tokens) * 1e-20):
        merged, sizes = plan.merge(x, size, backend="c")
        wanted, wanted_sizes = plan.merge(x, size, backend="torch")
        assert torch.equal(merged, wanted)
        assert torch.equal(sizes, wanted_sizes)


@needs_c
@DTYPES
def test_broken_tokens_stay_where_they_are(dtype: torch.dtype) -> None:
    plan, x = drawn_plan(2, 30, 10, False), torch.randn(2, 30, 8).to(dtype)
    x[0, 3], x[1, 4, 2] = torch.nan, torch.inf
    merged, wanted = (plan.merge(x, backend=backend)[0] for backend in ("c", "torch"))
    assert torch.equal(merged.isnan(), wanted.isnan())
    assert torch.equal(merged.nan_to_num(7.0), wanted.nan_to_num(7.0))


@needs_c
def test_tokens_of_any_strides_merge() -> None:
    plan, x = drawn_plan(2, 40, 9, False), torch.randn(3, 40, 2, 8).permute(2, 1, 0, 3)[:, :, 1]
    for one in (x, torch.randn(2, 8, 40).transpose(1, 2), torch.randn(1, 40, 8).expand(2, -1, -1)):
        assert torch.equal(plan.merge(one, backend="c")[0], plan.merge(one.contiguous(), backend="torch")[0])


@needs_c
@DTYPES
def test_logarithms_have_the_dtype_of_attention(dtype: torch.dtype) -> None:
    plan, size = drawn_plan(2, 40, 9, False), torch.randint(0, 3, (2, 40)).float()
    merged = merge_rows(torch.randn(2, 40, 8), size, plan, backend="c", log=dtype)
    assert merged.log_size is not None
    wanted = merged.size.log().to(dtype).clamp_min(torch.finfo(dtype).min)
    torch.testing.assert_close(merged.log_size, wanted, rtol=3e-7 if dtype == torch.float32 else 0, atol=0)
    assert merge_rows(torch.randn(2, 40, 8), size, plan, backend="c").log_size is None


@needs_c
@DTYPES
def test_one_call_is_two_calls(dtype: torch.dtype) -> None:
    x = torch.randn(2, 50, 96).to(dtype)
    keys = torch.randn(2, 50, 3, 3, 32).to(dtype).permute(2, 0, 3, 1, 4)[1]
    for size in (None, torch.randint(1, 5, (2, 50)).float()):
        plan, merged = native.match_and_merge(keys, x, size, 11, 1, dtype)
        apart = native.match(keys, 11, 1)
        assert all(torch.equal(a, b) for a, b in zip(plan, apart, strict=True))
        for a, b in zip(merged, native.merge(x, size, *apart, dtype), strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)


@needs_c
@pytest.mark.parametrize("which", FIELDS)
@pytest.mark.parametrize("value", [-1, 10**9, -(2**62)])
def test_a_plan_of_tokens_that_do_not_exist_is_refused(which: str, value: int) -> None:
    plan = drawn_plan(1, 10, 3, False)
    getattr(plan, which)[0, 1] = value
    with pytest.raises(InputError, match=r"outside 0 … .*make plans with a matcher"):
        plan.merge(torch.randn(1, 10, 4), backend="c")


@needs_c
def test_a_plan_of_unequal_parts_is_refused() -> None:
    plan = drawn_plan(2, 10, 3, False)
    with pytest.raises(InputError, match=r"source \(2, 3\) and target \(2, 1\)"):
        MergePlan(plan.kept, plan.source, plan.target[:, :1]).merge(torch.randn(2, 10, 4), backend="c")


@needs_c
def test_memory_of_large_batches_lives_as_long_as_the_call() -> None:
    """More scratch memory than is kept between calls; it was freed before the call once."""
    keys, x = torch.randn(70, 3, 197, 64), torch.randn(70, 197, 8)
    assert keys.shape[0] * native._floats(197, 64, 1) > native._KEPT
    plan, merged = native.match_and_merge(keys, x, None, 11, 1, torch.float32)
    wanted = bipartite_matching(keys, 11, 1, backend="torch")
    assert torch.equal(plan[0], wanted.kept)
    assert torch.equal(merged[0], wanted.merge(x, backend="torch")[0])


@needs_c
def test_a_compiler_without_float16_leaves_it_to_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "cc -U__FLT16_MANT_DIG__")
    _fresh(monkeypatch)
    assert not native._functions().tokenmerge_has_float16()
    plan, size = drawn_plan(2, 40, 9, False), torch.randint(1, 3, (2, 40)).float()
    assert merge_rows(torch.randn(2, 40, 8), size, plan, backend="c", log=torch.float16).log_size is None
    assert merge_rows(torch.randn(2, 40, 8).half(), size, plan).x.isfinite().all()
    with pytest.raises(ConfigError, match="knows no float16"):
        plan.merge(torch.randn(2, 40, 8).half(), backend="c")
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)
    with tokenmerge.patched(model, r=5), torch.inference_mode(), torch.autocast("cpu", torch.float16):
        assert model(images).isfinite().all()


@needs_c
def test_lazily_negated_tensors_are_read_as_negative() -> None:
    plan, x, size = drawn_plan(2, 33, 9, False), torch.randn(2, 33, 8), torch.rand(2, 33)
    negated = torch._neg_view(x)
    assert torch.equal(plan.merge(negated)[0], plan.merge(-x, backend="torch")[0])
    merged = merge_rows(x, torch._neg_view(-size), plan, backend="c")
    assert torch.equal(merged.x, merge_rows(x, size, plan, backend="torch").x)
    assert same(bipartite_matching(torch._neg_view(x), 9), bipartite_matching(-x, 9))


@needs_c
@pytest.mark.parametrize("which", FIELDS)
def test_a_plan_of_fractions_is_refused(which: str) -> None:
    plan = drawn_plan(2, 10, 3, False)
    parts = {name: getattr(plan, name) for name in FIELDS}
    with pytest.raises(InputError, match=r"torch.float32 on 'cpu', but int64"):
        MergePlan(**{**parts, which: parts[which].float()}).merge(torch.randn(2, 10, 4), backend="c")


# --- where the functions do not run ------------------------------------------------------------------------


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions that were called."""
    calls: list[str] = []

    def watch(name: str) -> None:
        own = getattr(native, name)

        def call(*args: Any) -> Any:
            calls.append(name)
            return own(*args)

        monkeypatch.setattr(native, name, call)

    for name in ("match", "merge", "match_and_merge"):
        watch(name)
    return calls


@needs_c
def test_a_model_uses_one_call_for_each_block(noted: list[str]) -> None:
    model = tiny("vit_tiny_patch16_224")
    images = images_for(model)
    handle = tokenmerge.patch(model, r=5)
    with torch.inference_mode():
        model(images)
    assert noted == ["match_and_merge"] * len(handle.schedule)
    assert handle.summary().backend == "c"
    assert "matching and merging by functions in C" in str(handle.summary())


@needs_c
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_gap_224", "eva02_tiny_patch14_224"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_compute_the_same_with_torch(name: str, dtype: torch.dtype) -> None:
    model = tiny(name).to(dtype)
    images = images_for(model).to(dtype)
    found = []
    for backend in ("c", "torch"):
        with tokenmerge.patched(model, r=5, backend=backend, trace=True) as handle, torch.no_grad():
            found.append((model(images), handle.trace.source()))
    assert torch.equal(found[0][1], found[1][1])
    atol = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=atol)


@needs_c
def test_gradients_are_those_of_torch(noted: list[str]) -> None:
    model = tiny("vit_tiny_patch16_224")
    images, found = images_for(model), []
    for backend in ("c", "torch"):
        with tokenmerge.patched(model, r=5, backend=backend):
            model.zero_grad()
            model(images).square().sum().backward()
            found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert set(noted) == {"match"}  # merging records a gradient
    for own, wanted in zip(*found, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-5)


@needs_c
@pytest.mark.parametrize("how", ["compile", "export", "trace", "vmap", "forward-mode", "count"])
def test_code_that_is_traced_holds_operators_only(how: str, noted: list[str]) -> None:
    keys, x = exact_metric(20), torch.randn(2, 20, 6)

    def merge(keys: Tensor, x: Tensor) -> Tensor:
        return bipartite_matching(keys, 5, 1, backend="c").merge(x, backend="c")[0]

    wanted = merge(keys, x)
    noted.clear()
    if how == "compile":
        found = torch.compile(merge, backend="eager", fullgraph=True)(keys, x)
    elif how == "export":

        class Module(torch.nn.Module):
            def forward(self, keys: Tensor, x: Tensor) -> Tensor:
                return merge(keys, x)

        found = torch.export.export(Module(), (keys, x)).module()(keys, x)
    elif how == "trace":
        traced = torch.jit.trace(merge, (keys, x), check_trace=False)
        found = traced(keys, x)
        assert torch.equal(traced(keys.flip(0), x.flip(0)), wanted.flip(0))  # nothing was kept as a constant
    elif how == "vmap":
        assign = torch.func.vmap(lambda k: bipartite_matching(k[None], 5, 1, backend="c").assign[0])(keys)
        found = MergePlan.from_assign(assign, 15).merge(x, backend="torch")[0]
    elif how == "forward-mode":
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            found, tangent = torch.autograd.forward_ad.unpack_dual(merge(keys, dual))
            torch.testing.assert_close(tangent, torch.ones_like(tangent))
    else:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            found = merge(keys, x)
        assert counter.get_total_flops() > 0
    assert noted == []
    torch.testing.assert_close(found, wanted)


@needs_c
def test_a_backend_that_cannot_run_is_an_error() -> None:
    x, plan = torch.randn(2, 10, 4, dtype=torch.float64), drawn_plan(2, 10, 3, False)
    with pytest.raises(ConfigError, match=r"backend='c' cannot run: the tokens are torch.float64.*use backend='auto'"):
        plan.merge(x, backend="c")
    with pytest.raises(ConfigError, match=r"compare by cosine, not by 'dot'"):
        bipartite_matching(torch.randn(1, 10, 4), 3, backend="c", distance="dot")
    assert choice.c_refusals(torch.device("cuda"), torch.float32) == [
        "the tokens are on 'cuda', and the functions in C run on CPUs"
    ]


@needs_c
def test_other_tokens_take_the_way_of_torch(noted: list[str]) -> None:
    plan = drawn_plan(2, 10, 3, False)
    plan.merge(torch.randn(2, 10, 4, dtype=torch.float64))
    plan.merge(torch.randn(2, 10, 4), reduce="norm")
    MergePlan.from_assign(torch.tensor([[0, 0, -1, 1]])).merge(torch.randn(1, 4, 2))
    assert noted == []
    plan.merge(torch.randn(2, 10, 4))
    assert noted == ["merge"]


# --- compilation -------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _folders() -> Iterator[None]:
    native_build._own_folder.cache_clear()
    yield
    native_build._own_folder.cache_clear()


def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (native_build.library, native.refusal, native.knows, native._functions):
        monkeypatch.setattr(sys.modules[function.__module__], function.__name__, function.__wrapped__)


@pytest.mark.skipif("TOKENMERGE_TESTS_WITHOUT_C" in os.environ, reason="the compiler is not looked for in this run")
def test_without_a_compiler_torch_runs_and_the_summary_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    _fresh(monkeypatch)
    monkeypatch.setenv("CC", "/nowhere/cc")
    handle = tokenmerge.patch(tiny("vit_tiny_patch16_224"), r=5)
    assert handle.summary().backend == "torch"
    assert "no C compiler was found" in handle.summary().backend_reason
    keys = torch.randn(1, 20, 8)
    assert bipartite_matching(keys, 4).r == 4
    with pytest.raises(ConfigError, match=r"backend='c' cannot run: no C compiler was found \(set CC"):
        bipartite_matching(keys, 4, backend="c")


@needs_c
@pytest.mark.parametrize("compiler", ["false", "true", "sleep 1000", "sh -c printf\\ '\\377'>&2;false"])
def test_a_broken_compiler_is_said(compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native_build, "_SECONDS", 0.5)
    assert isinstance(native_build.library.__wrapped__(), str)
    assert not list(tmp_path.rglob("*.so"))


@needs_c
def test_the_library_is_compiled_once_for_its_owner_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runs: list[list[str]] = []
    own = native_build._run

    def run(command: list[str]) -> None:
        runs.append(command)
        own(command)

    monkeypatch.setattr(native_build, "_run", run)
    assert not isinstance(native_build.library.__wrapped__(), str)
    assert runs
    assert stat.S_IMODE((tmp_path / "tokenmerge").stat().st_mode) == 0o700
    runs.clear()
    assert not isinstance(native_build.library.__wrapped__(), str)
    assert runs == []


@needs_c
@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no users here")
def test_a_folder_that_others_can_write_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "tokenmerge").mkdir()
    (tmp_path / "tokenmerge").chmod(0o777)
    assert "other users" in native_build.library.__wrapped__()


@needs_c
def test_without_a_home_nothing_stays_behind(tmp_path: Path) -> None:
    code = "from tokenmerge.ops import native; print(native.refusal())"
    environment = {**os.environ, "XDG_CACHE_HOME": "/proc/nowhere", "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
    assert not list(tmp_path.glob("tokenmerge-*"))


@needs_c
def test_an_empty_library_is_compiled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not isinstance(native_build.library.__wrapped__(), str)
    (library,) = (tmp_path / "tokenmerge").glob("*.so")
    size = library.stat().st_size
    library.unlink()  # the loaded file must not be cut off
    library.touch()
    assert not isinstance(native_build.library.__wrapped__(), str)
    assert library.stat().st_size == size


@needs_c
def test_without_openmp_the_results_are_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = native_build.compiler()
    assert command is not None
    keys, x = torch.randn(3, 6, 300, 64), torch.randn(3, 300, 64)
    plan = bipartite_matching(keys, 100, 1, backend="c")
    wanted = plan.merge(x, backend="c")[0]
    plain = native_build._loaded(command, native_build._FLAGS)  # for any processor of this kind, too
    monkeypatch.setattr(native_build, "library", lambda: plain)
    monkeypatch.setattr(native, "_functions", native._functions.__wrapped__)
    found = bipartite_matching(keys, 100, 1, backend="c")
    assert torch.equal(found.merge(x, backend="c")[0], wanted)
    assert torch.equal(found.assign, plan.assign)


@needs_c
@pytest.mark.slow
def test_processes_may_compile_at_once(tmp_path: Path) -> None:
    code = "from tokenmerge.ops import native; print(native.refusal())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [process.communicate()[0].strip() for process in running] == ["None"] * 3
    assert len(list((tmp_path / "tokenmerge").iterdir())) == 1


def test_the_reference_is_torch() -> None:
    """`combine`, which the functions in C repeat, is what runs with backend="torch"."""
    plan, x = drawn_plan(1, 12, 4, False), torch.randn(1, 12, 5)
    from tokenmerge.ops.combine import _members

    assert torch.equal(plan.merge(x, backend="torch")[0][0], combine(x, None, _members(plan), "mean")[0])
