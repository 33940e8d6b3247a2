"""The `tokenmerge` command line: parse arguments, call one function of `tokenmerge.tools`, print errors as one sentence."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

import tokenmerge
from tokenmerge.errors import InputError, TokenMergeError
from tokenmerge.flags import (
    add_command,
    add_data,
    add_matcher,
    add_merging,
    add_model,
    add_pretrained,
    add_prop_attn,
    add_running,
    add_sampling_rate,
    add_tuning,
    add_weights,
    between,
    count,
)
from tokenmerge.tools.compare.options import add_compare_options
from tokenmerge.tools.explore.options import add_explore_options
from tokenmerge.tools.search.options import add_search_options
from tokenmerge.tools.train.options import add_train_options
from tokenmerge.tools.visualize.options import add_visualize_options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; `None` reads them from `sys.argv`.

    Returns:
        The exit code: 0; 1 for `eval --strict` with skipped images; 2 for invalid input, an unsupported model or too
        little memory; 130 if interrupted.

    Raises:
        SystemExit: (from argparse) for `--help`, `--version` and arguments that cannot be parsed.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    args = make_parser().parse_args(words)
    args.typed = words[1:]
    try:
        code = int(args.run(args))
        sys.stdout.flush()  # now, so that a broken pipe raises inside this try
        return code
    except TokenMergeError as error:
        print(f"tokenmerge: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        print("tokenmerge: memory ran out: use a smaller --batch-size, --img-size or model", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tokenmerge: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe closed it (`| head`), which is no error
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out; on a CPU torch raises a plain RuntimeError for that."""
    words = ("can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


def entry() -> None:
    """Run the command and exit with its code; the console script of the package."""
    sys.exit(main())


class _Parser(argparse.ArgumentParser):
    """Argument parser that prints errors as one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}: see {self.prog} --help\n")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line, with one subparser per command."""
    parser = _Parser(prog="tokenmerge", description="Vision Transformers made faster by merging similar tokens.")
    parser.add_argument("--version", action="version", version=f"tokenmerge {tokenmerge.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = add_command(commands, "demo", _demo, "merge tokens of a model and images that ship with the package")
    add_merging(demo, ["0", "8", "16", "24"])
    demo.add_argument(
        "--output", type=Path, default=Path("tokenmerge-demo.png"), help="file to write the picture to (%(default)s)"
    )
    demo.add_argument(
        "--export",
        type=Path,
        metavar="DIR",
        help="also write the model (DIR/model) and its images (DIR/train, DIR/val), to try the other commands with",
    )

    inspect = add_command(commands, "inspect", _inspect, "check whether a model is supported; tokens and FLOPs")
    add_model(inspect)
    add_merging(inspect, ["8"])

    bench = add_command(commands, "bench", _bench, "measure speed with and without merging, interleaved in one run")
    add_model(bench)
    add_merging(bench, None, required=False)
    add_running(bench, batch_size=8)
    add_tuning(bench, "passes of the model")
    bench.add_argument(
        "--num-warm-iter", type=count(0), default=3, metavar="N", help="warm-up passes before measuring (%(default)s)"
    )
    bench.add_argument(
        "--num-bench-iter", type=count(1), default=15, metavar="N", help="interleaved rounds to measure (%(default)s)"
    )
    bench.add_argument(
        "--statistic",
        choices=("median", "min"),
        default="median",
        help="statistic of the measured times; min is steadier on shared machines (%(default)s)",
    )
    bench.add_argument("--compile", action="store_true", help="run torch.compile on the unmerged and the merged models")
    bench.add_argument(
        "--break-even",
        action="store_true",
        help="find the smallest r that is faster, for batch sizes 1, 2, 4, … up to --batch-size; without --r, try r=1, 2, 4, …",
    )

    export = add_command(commands, "export", _export, "write the merged model as one file for ONNX Runtime or PyTorch")
    add_model(export)
    add_merging(export, None, backend=False)
    add_weights(export)
    export.add_argument(
        "--format",
        choices=("onnx", "pt2", "aoti"),
        default="onnx",
        help="file format: ONNX, torch.export (pt2), or compiled by AOTInductor for this processor (%(default)s)",
    )
    export.add_argument(
        "--output", "-o", type=Path, metavar="FILE", help="file to write (default: MODEL_rR in the current folder)"
    )
    export.add_argument(
        "--batch-size", "-b", type=count(1), metavar="N", help="the only batch size to support (default: any)"
    )
    export.add_argument(
        "--tune-schedule",
        action="store_true",
        help="measure the written file against one without merging, and against ones that merge as many tokens in every 2nd, 3rd or 4th block; "
        "keep the fastest",
    )
    export.add_argument("--opset", type=count(18), default=18, help="ONNX opset version (%(default)s)")
    export.add_argument("--no-verify", action="store_true", help="do not run the file to compare it with the model")

    evaluate = add_command(commands, "eval", _eval, "measure top-1, top-5 and images per second for each r")
    add_model(evaluate)
    add_data(evaluate, "images, sounds or videos", " files")
    add_merging(evaluate, None)
    add_running(evaluate, batch_size=64)
    add_tuning(evaluate, "passes of the first batch")
    evaluate.add_argument(
        "--class-map", metavar="FILE", help="file of class names in the order of the model's outputs, one per line"
    )
    add_sampling_rate(evaluate)
    evaluate.add_argument(
        "--crop-pct", type=between(0, 1), help="side of the centre crop ÷ side of the image (default: the model's own)"
    )
    evaluate.add_argument(
        "--crop-mode", choices=("squash", "border", "center"), help="crop mode, as in timm (default: the model's own)"
    )
    evaluate.add_argument(
        "--interpolation",
        choices=("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
        help="interpolation of resizing (default: the model's own)",
    )
    evaluate.add_argument("--mean", type=float, nargs=3, help="mean of each channel (default: the model's own)")
    evaluate.add_argument(
        "--std", type=between(0, 1e6), nargs=3, help="standard deviation of each channel (default: the model's own)"
    )
    evaluate.add_argument("--strict", action="store_true", help="exit with 1 if any image could not be read")

    compare = add_command(
        commands,
        "compare",
        _compare,
        "compare methods and settings: accuracy with confidence intervals, and measured speed",
        page=False,
    )
    add_compare_options(compare)

    search = add_command(
        commands,
        "search",
        _search,
        "search for the most accurate setting at a measured speed-up, and check it on held-out images",
    )
    add_search_options(search)

    visualize = add_command(
        commands,
        "visualize",
        _visualize,
        "show which patches merge into one token: pictures, films, or an interactive page",
        page=False,
    )
    add_visualize_options(visualize)

    explore = add_command(
        commands,
        "explore",
        _explore,
        "serve the interactive page of visualize in a browser, for your own pictures",
        rows=False,
    )
    add_explore_options(explore)

    train = add_command(
        commands, "train", _train, "train or fine-tune a model with merging, on one machine or many", page=False
    )
    add_model(train)
    train.add_argument(
        "--r", metavar="R", help="tokens merged per block, as in bench; 0 trains without merging (default: 0)"
    )
    add_prop_attn(train)
    add_matcher(train)
    add_pretrained(train)
    add_train_options(train)
    train.set_defaults(parser=train)
    return parser


def _prepare(args: argparse.Namespace) -> tuple[Any, list[Any], dict[str, Any]]:
    """Return the report, the settings of `--r`, and the config fields from the flags."""
    try:
        from tokenmerge.tools.report import Report
    except ImportError as error:
        raise InputError(
            f"{error.name} is not installed, but the command needs it: pip install 'tokenmerge[timm]'"
        ) from None
    from tokenmerge.tools.plugins import load_plugins
    from tokenmerge.tools.settings import matching_fields, parse_setting

    load_plugins(args.plugin)
    prop_attn = {"auto": "auto", "on": True, "off": False}[args.prop_attn]
    given = [args.r] if isinstance(args.r, str) else args.r or args.default_r or ()
    return (
        Report(args.json, getattr(args, "html", None)),
        [parse_setting(text) for text in given],
        {
            "prop_attn": prop_attn,
            **matching_fields(args),
            **{name: getattr(args, name) for name in ("attention", "backend") if name in args},
        },
    )


def _model_args(args: argparse.Namespace) -> Any:
    from tokenmerge.tools.models import ModelArgs

    names = ("model", "pretrained", "checkpoint", "num_classes", "img_size", "device", "dtype", "channels_last")
    return ModelArgs(**{name: getattr(args, name) for name in names if hasattr(args, name)})


def _demo(args: argparse.Namespace) -> int:
    report, settings, fields = _prepare(args)
    from tokenmerge.tools.demo.run import run_demo

    return run_demo(settings, fields, args.output, args.export, report)


def _inspect(args: argparse.Namespace) -> int:
    report, settings, fields = _prepare(args)
    from tokenmerge.tools.inspect import run_inspect

    return run_inspect(_model_args(args), settings, fields, report)


def _bench(args: argparse.Namespace) -> int:
    report, settings, fields = _prepare(args)
    from tokenmerge.tools.bench import BenchArgs, run_bench
    from tokenmerge.tools.tuning import tune_args

    bench = BenchArgs(
        batch_size=args.batch_size,
        warmup=args.num_warm_iter,
        rounds=args.num_bench_iter,
        statistic=args.statistic,
        compile=args.compile,
        tuning=tune_args(args),
    )
    if args.break_even:
        from tokenmerge.tools.break_even import run_break_even

        return run_break_even(_model_args(args), bench, settings, fields, report)
    if not settings:
        raise InputError("bench was given no r: give tokens per block to compare, such as --r 8 16, or --break-even")
    return run_bench(_model_args(args), bench, settings, fields, report)


def _export(args: argparse.Namespace) -> int:
    report, settings, fields = _prepare(args)
    if len(settings) != 1:
        raise InputError(f"{len(settings)} settings were given to --r, but one file holds one: give one")
    from tokenmerge.tools.export import ExportArgs, run_export

    export = ExportArgs(
        format=args.format,
        output=args.output,
        batch_size=args.batch_size,
        opset=args.opset,
        verify=not args.no_verify,
        tune_schedule=args.tune_schedule,
    )
    return run_export(_model_args(args), export, settings[0], fields, report)


def _train(args: argparse.Namespace) -> int:
    from tokenmerge.tools.train.options import model_kwargs, train_args, with_config

    if args.config is not None:
        args = with_config(args.parser, args.config, args.typed)
    args.r, args.default_r = args.r or "0", None
    report, settings, fields = _prepare(args)
    from tokenmerge.tools.train.run import run_train

    base = dataclasses.replace(_model_args(args), device="cpu", model_kwargs=model_kwargs(args))
    return run_train(base, train_args(args, settings[0], fields), report)


def _compare(args: argparse.Namespace) -> int:
    report, settings, fields = _prepare(args)
    from tokenmerge.tools.compare.options import compare_args
    from tokenmerge.tools.compare.run import run_compare

    compare = compare_args(args, settings)
    if args.model is None:
        if compare.experiment is None:
            raise InputError("compare was given no MODEL: name one, or give --paper for the paper's own")
        args.model, args.pretrained = compare.experiment.model, True
    return run_compare(_model_args(args), compare, fields, report)


def _visualize(args: argparse.Namespace) -> int:
    report, settings, fields = _prepare(args)
    from tokenmerge.tools.visualize.run import VisualizeArgs, run_visualize

    names = [field.name for field in dataclasses.fields(VisualizeArgs)]
    wanted = VisualizeArgs(**{name: getattr(args, name) for name in names})
    return run_visualize(_model_args(args), wanted, settings, fields, report)


def _explore(args: argparse.Namespace) -> int:
    r, args.r, args.default_r, args.json = args.r, [], None, None
    report, _, fields = _prepare(args)
    from tokenmerge.tools.explore.server import run_explore

    return run_explore(_model_args(args), fields, r, args.data, args.host, args.port, report)


def _search(args: argparse.Namespace) -> int:
    from tokenmerge.tools.report import Report
    from tokenmerge.tools.search.run import SearchArgs, run_search

    names = [field.name for field in dataclasses.fields(SearchArgs)]
    report = Report(args.json, args.html)
    return run_search(_model_args(args), SearchArgs(**{name: getattr(args, name) for name in names}), report)


def _eval(args: argparse.Namespace) -> int:
    report, settings, fields = _prepare(args)
    from tokenmerge.tools.evaluate import EvalArgs, run_eval
    from tokenmerge.tools.tuning import tune_args

    names = ("crop_pct", "crop_mode", "interpolation", "mean", "std")
    evaluation = EvalArgs(
        data=args.data,
        batch_size=args.batch_size,
        workers=args.workers,
        class_map=args.class_map,
        preprocessing={name: getattr(args, name) for name in names if getattr(args, name) is not None},
        sampling_rate=args.sampling_rate,
        strict=args.strict,
        tuning=tune_args(args),
    )
    return run_eval(_model_args(args), evaluation, settings, fields, report)


if __name__ == "__main__":
    entry()
