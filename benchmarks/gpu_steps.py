"""Steps of `gpu.py`, each run in a separate process, so that a lost device or a hang does not affect the next step.

    python benchmarks/gpu_steps.py ops --out FOLDER [--rehearse]

Every result is appended to FOLDER/rows.jsonl immediately.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # runs kernels on the CPU; Triton reads it on import

import torch
from common import where
from gpu_commands import commands
from gpu_graphs import graphed
from torch import Tensor

import tokenmerge
from tokenmerge.attention.call import AttentionCall
from tokenmerge.attention.forms import FORMS
from tokenmerge.ops import launch, matching, triton_refusals
from tokenmerge.ops.combine import merge_rows
from tokenmerge.ops.timing import Call, synchronize, take_turns

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for the small models of the tests
ROWS = "rows.jsonl"


class Bench:
    """Device and output of a step.

    Attributes:
        device: "cuda", or "cpu" in a rehearsal.
        rehearse: whether to use small inputs.
        dtype: dtype of the tokens.
        rates: bytes per second of a copy and multiply-adds per second of a product, as the step `card` measured them.
    """

    def __init__(self, step: str, folder: Path, rehearse: bool) -> None:
        self.step, self.folder, self.rehearse = step, folder, rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.dtype = torch.float32 if rehearse else torch.bfloat16
        self.made_by = {
            **where("gpu", self.device.type),
            "step": step,
            "rehearsal": rehearse,
            "dtype": str(self.dtype)[6:],
        }

    def note(self, **values: Any) -> None:
        """Append one row and print it."""
        with (self.folder / ROWS).open("a") as file:
            file.write(json.dumps({**self.made_by, **values}) + "\n")
        print(
            "  "
            + ", ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items() if k != "printed"
            ),
            flush=True,
        )

    @functools.cached_property
    def rates(self) -> tuple[float, float]:
        """Measured rates of the GPU; a step that runs alone measures them itself."""
        numbers, side = (2**20, 256) if self.rehearse else (2**28, 8192)
        source = torch.randn(numbers, device=self.device)
        target = torch.empty_like(source)
        a, b = (torch.randn(side, side, device=self.device).to(self.dtype) for _ in range(2))
        copy, product = self.times([lambda: target.copy_(source), lambda: a @ b])
        return 8 * numbers / copy, side**3 / product

    def times(self, calls: list[Call], rounds: int = 12) -> list[float]:
        """Return the median seconds of calls that take turns."""
        rounds = 2 if self.rehearse else rounds
        return [statistics.median(one) for one in take_turns(calls, self.device, 2, rounds)]

    def first(self, call: Call) -> float:
        """Return the seconds of the first call, which includes compilation and plans of libraries."""
        synchronize(self.device)
        start = time.perf_counter()
        call()
        synchronize(self.device)
        return time.perf_counter() - start


def card(bench: Bench) -> None:
    """Record the GPU, its memory bandwidth and its matrix product rate."""
    import transformers
    import triton

    bandwidth, rate = bench.rates
    bench.note(
        what="ceilings",
        copy_gb_per_s=bandwidth / 1e9,
        product_tflops=2 * rate / 1e12,
        triton=triton.__version__,
        transformers=transformers.__version__,
        cudnn=torch.backends.cudnn.version() or 0,
        kernels="; ".join(triton_refusals(torch.empty(1, 8, 64, device=bench.device, dtype=bench.dtype))) or "run",
    )


def checks(bench: Bench) -> None:
    """Run the tests of the kernels and of the attention implementations on this device.

    The log has a line for each test as soon as it ends, so that results before a timeout are kept.
    """
    few = ["-k", "test_an_empty_batch"] if bench.rehearse else ["-n", "14", "-m", "not slow"]
    files = ["tests/ops/test_ops.py", "tests/ops/test_attending.py", "tests/attention/test_forms.py"]
    files = files[:1] if bench.rehearse else files
    command = [sys.executable, "-m", "pytest", "-vv", "--durations=15", "-p", "no:cacheprovider", *few, *files]
    log = bench.folder / "checks.log"
    with log.open("w") as file:
        tests = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | str = tests.wait(STEPS["checks"][1] * (10 if bench.rehearse else 1) - 5)
        except subprocess.TimeoutExpired:
            os.killpg(tests.pid, signal.SIGKILL)
            code = "time ran out"
    lines = log.read_text().splitlines()
    passed = sum(" PASSED " in f" {line} " for line in lines)
    failed = sorted({line for line in lines if line.startswith(("FAILED", "ERROR")) or " FAILED " in f" {line} "})
    bench.note(what="tests", exit_code=code, passed=passed, failed=len(failed), first_failure="".join(failed[:1]))


def op_calls(
    started: list[launch.Launch], keys: Tensor, x: Tensor, size: Tensor, plan: tokenmerge.MergePlan, r: int
) -> dict[str, Call]:
    """Return the calls that `ops` measures."""
    return {
        "unit keys": started[0].start,
        "unit keys and match": lambda: launch.start_all(started),
        "matching": lambda: matching.match(keys, r, 1),
        "merge": lambda: merge_rows(x, size, plan, "mean", "triton", x.dtype),
        "matching in torch": lambda: tokenmerge.bipartite_matching(keys, r, 1, backend="torch"),
        "merge in torch": lambda: plan.merge(x, size, backend="torch"),
    }


def ops(bench: Bench) -> None:
    """Measure each launch and operation against its lower bound from bytes or multiply-adds."""
    bandwidth, rate = bench.rates
    shapes = [(1, 17, 2, 32)] if bench.rehearse else [(64, 197, 12, 64), (64, 577, 12, 64), (64, 1370, 16, 80)]
    for batch, tokens, heads, dim in shapes:
        r, channels = max(1, tokens // 25), heads * dim
        keys = torch.randn(batch, tokens, 3, heads, dim, device=bench.device).to(bench.dtype).permute(2, 0, 3, 1, 4)[1]
        x = torch.randn(batch, tokens, channels, device=bench.device).to(bench.dtype)
        size = torch.ones(batch, tokens, device=bench.device)
        started = matching.launches(keys, r, 1)[3]
        plan = tokenmerge.MergePlan(*matching.match(keys, r, 1))
        calls = op_calls(started, keys, x, size, plan, r)
        width = -(-dim // 16) * 16
        unit = (keys.numel() * keys.element_size() + 4 * batch * tokens * width) / bandwidth
        match = max(3 * batch * (tokens / 2) ** 2 * dim / rate, 4 * batch * tokens * width / bandwidth)
        merge = (2 * tokens - r) * batch * channels * x.element_size() / bandwidth
        floors = {"unit keys": unit, "unit keys and match": unit + match, "matching": unit + match, "merge": merge}
        replayed = {name: captured(call, bench) for name, call in calls.items()}
        for name, seconds in zip(calls, bench.times(list(replayed.values()), 30), strict=True):
            floor = floors.get(name, floors["matching" if "matching" in name else "merge"])
            shape = {"batch_size": batch, "tokens": tokens, "heads": heads, "head_dim": dim, "r": r}
            bench.note(what="op", op=name, **shape, ms=1e3 * seconds, floor_ms=1e3 * floor, over_floor=seconds / floor)


def attention(bench: Bench) -> None:
    """Measure every attention implementation at three shapes, and its first call (cuDNN plans, flex compiles)."""
    shapes = [(1, 2, 33, 32)] if bench.rehearse else [(64, 12, 197, 64), (64, 16, 1025, 64), (64, 16, 1370, 80)]
    forms = ["math", "key_channel"] if bench.rehearse else [form for form in FORMS if form != "auto"]
    for batch, heads, tokens, dim in shapes:
        qkv = torch.randn(batch, tokens, 3, heads, dim, device=bench.device).to(bench.dtype)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        # rows aligned to 16 bytes, as merging writes them, because PyTorch copies other masks, which doubles the time
        width = -(-tokens // 8) * 8
        mask = torch.randint(1, 9, (batch, width), device=bench.device).float().log().to(v)[:, None, None, :tokens]

        def attend(form: str, q: Tensor = q, k: Tensor = k, v: Tensor = v, mask: Tensor = mask) -> Any:
            with torch.inference_mode():
                if form == "no sizes":
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v)
                with AttentionCall(form):
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)

        calls, firsts = {}, {}
        for form in ("no sizes", *forms):
            calls[form] = functools.partial(attend, form)
            try:
                firsts[form] = bench.first(calls[form])
            except RuntimeError as error:  # the kernel does not support the shape
                bench.note(what="attention", form=form, tokens=tokens, fault=str(error).splitlines()[0])
                del calls[form]
        shape = {"batch_size": batch, "heads": heads, "tokens": tokens, "head_dim": dim}
        for form, seconds in zip(calls, bench.times(list(calls.values())), strict=True):
            rate = 4 * batch * heads * tokens**2 * dim / seconds / 1e12
            bench.note(what="attention", form=form, **shape, ms=1e3 * seconds, first_ms=1e3 * firsts[form], tflops=rate)


def captured(call: Call, bench: Bench) -> Call:
    """Return a function that replays a call as a CUDA graph; in a rehearsal, the call itself."""
    if bench.device.type != "cuda":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.inference_mode():
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.inference_mode():
        call()
    return graph.replay


def model_calls(
    bench: Bench, name: str, size: int, r: int, batch: int, prepare: Callable[[Any], Any] = lambda model: model
) -> tuple[dict[str, Call], dict[str, Any]]:
    """Return forward passes of a dense and a merged model after a preparation, with their description."""
    import timm  # imported here because it takes seconds and few steps need it

    small: dict[str, Any] = {"depth": 3, "embed_dim": 48, "num_heads": 3} if bench.rehearse else {}
    size, batch = (96, 2) if bench.rehearse else (size, batch)
    made = {}
    for variant in ("dense", "merged"):
        with bench.device:  # initializing a large model on a CPU takes long
            torch.manual_seed(0)
            made[variant] = timm.create_model(name, img_size=size, **small).eval().to(bench.dtype)
    handle = tokenmerge.patch(made["merged"], r=min(r, 4) if bench.rehearse else r)
    images = torch.randn(batch, 3, size, size, device=bench.device).to(bench.dtype)

    def one(model: Any) -> Call:
        def call() -> Any:
            with torch.no_grad():
                return model(images)

        return call

    summary = handle.summary()
    shape = {"model": name, "img_size": size, "r": r, "batch_size": batch, "flops_ratio": summary.flops_ratio}
    return {variant: one(prepare(model)) for variant, model in made.items()}, {**shape, "attention": summary.attention}


def models(bench: Bench, wanted: list[tuple[str, int, int, int]]) -> None:
    """Measure dense and merged models in eager mode and as manually captured CUDA graphs."""
    for job in wanted:
        calls, shape = model_calls(bench, *job)
        firsts = {variant: bench.first(call) for variant, call in calls.items()}
        for mode, wrapped in (("eager", calls), ("graph", {v: captured(call, bench) for v, call in calls.items()})):
            for variant, seconds in zip(wrapped, bench.times(list(wrapped.values()), 8), strict=True):
                bench.note(
                    what="model", **shape, variant=variant, mode=mode, ms=1e3 * seconds, first_ms=1e3 * firsts[variant]
                )
        del calls, wrapped
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def compiled(bench: Bench) -> None:
    """Measure `torch.compile` in its default mode, dense and merged."""
    compiled_in(bench, "default", ("vit_base_patch16_224", 224, 16, 64))


def compiled_graphs(bench: Bench) -> None:
    """Measure `torch.compile` in the mode "reduce-overhead", dense and merged."""
    for job in (("vit_base_patch16_224", 224, 16, 64), ("vit_small_patch16_224", 224, 13, 1)):
        compiled_in(bench, "reduce-overhead", job)


def compiled_in(bench: Bench, mode: str, job: tuple[str, int, int, int]) -> None:
    """Measure one model in one mode of `torch.compile`, dense and merged."""
    options = {"backend": "aot_eager"} if bench.rehearse else {"mode": mode}
    torch.compiler.reset()
    calls, shape = model_calls(bench, *job, prepare=functools.partial(torch.compile, **options))
    firsts = {variant: bench.first(call) for variant, call in calls.items()}
    for call in (*calls.values(), *calls.values()):  # a graph is captured by the second or third call
        call()
    name = "compiled" if mode == "default" else "compiled graph"
    for variant, seconds in zip(calls, bench.times(list(calls.values()), 12), strict=True):
        bench.note(what="model", **shape, variant=variant, mode=name, ms=1e3 * seconds, first_ms=1e3 * firsts[variant])


def families(bench: Bench) -> None:
    """Compare every family and option, on small models: device against CPU in float32, and kernels in half precision.

    Half precision is compared on the device, kernels against plain PyTorch with unfused attention. Rounding may change a pair
    in later blocks, so only the direction of the outputs is compared.
    """
    from tests.helpers.fake_cuda import timm_models
    from tests.helpers.towers import TOWERS

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    cases = [*timm_models(), *((tower.name, tower.build(), tower.feed(2), {}) for tower in TOWERS)]
    worst, wrong = {"float32": 0.0, "half": 0.0}, []
    cases = cases[:1] if bench.rehearse else cases
    for name, model, inputs, option in cases:
        try:
            found = differences(bench, copy.deepcopy(model), inputs, option)
        except Exception as error:  # record any failure, and continue with the next family
            wrong.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        if found["float32"] > 1e-3 or found["half"] > 0.05:
            wrong.append(f"{name}: {found}")
        worst = {kind: max(worst[kind], value) for kind, value in found.items()}
    for text in wrong:
        print(f"  {text}", flush=True)
    counts = {"passed": len(cases) - len(wrong), "failed": len(wrong), "first_failure": "".join(wrong[:1])}
    bench.note(what="families", **counts, **{f"worst_{kind}": value for kind, value in worst.items()})


def differences(bench: Bench, model: Any, inputs: dict[str, Tensor], option: dict[str, Any]) -> dict[str, float]:
    """Return the difference of a merged model from the reference: relative (float32), or 1 - cosine (half precision)."""

    def output(plain: bool = False) -> Tensor:
        at = next(model.parameters())
        fed = {k: x.to(at.device, at.dtype if x.is_floating_point() else x.dtype) for k, x in inputs.items()}
        with tokenmerge.patched(model, r=5, **option) as handle, torch.no_grad():
            if plain:
                handle.update(backend="torch")
            if plain and handle.summary().attention == "triton":
                handle.update(attention="math")
            out = model(**fed)
        out = out if isinstance(out, Tensor) else next(x for x in out.values() if isinstance(x, Tensor))
        return out.double().cpu().flatten()

    wanted = output()
    model.to(bench.device)
    float32 = (output() - wanted).norm() / wanted.norm()
    model.to(bench.dtype)
    half = 1 - torch.nn.functional.cosine_similarity(output(), output(plain=True), dim=0)
    return {"float32": float(float32), "half": float(half)}


STEPS: dict[str, tuple[Callable[[Bench], None], int]] = {
    "card": (card, 30),
    "checks": (checks, 125),
    "ops": (ops, 30),
    "attention": (attention, 50),
    "models": (
        lambda bench: models(bench, [("vit_base_patch16_224", 224, 16, 64), ("vit_large_patch16_224", 512, 40, 64)]),
        45,
    ),
    "extremes": (
        lambda bench: models(bench, [("vit_huge_patch14_224", 518, 40, 64), ("vit_small_patch16_224", 224, 13, 1)]),
        50,
    ),
    "compile": (compiled, 70),
}
"""Each with its limit in seconds, in the order of their worth."""
FURTHER: dict[str, tuple[Callable[[Bench], None], int]] = {
    "families": (families, 100),
    "compile-graphs": (compiled_graphs, 110),
    "graphed": (graphed, 60),
    "commands": (commands, 240),
}
"""Those that are run when they are asked for."""


def rehearse(step: str, folder: Path) -> None:
    """Run one step of a rehearsal, in a process that was forked after all imports."""
    torch.set_num_threads(1)
    {**STEPS, **FURTHER}[step][0](Bench(step, folder, True))


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices={**STEPS, **FURTHER})
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    {**STEPS, **FURTHER}[args.step][0](Bench(args.step, args.out, args.rehearse))


if __name__ == "__main__":
    main()
