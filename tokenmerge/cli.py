"""The `tokenmerge` command: parse, call one function of `tools`, turn errors into one sentence and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

import tokenmerge
from tokenmerge.attention_forms import FORMS
from tokenmerge.errors import InputError, TokenMergeError
from tokenmerge.tools.train.options import add_train_options

_R_HELP = (
    "tokens merged per block, one or more of: 8 (in every block), 16:-1 (r:inflect, falling to 0), 8,8,0 (one per "
    "block), keep=0.9 (of the tokens, per block), flops=0.5 (of the unmerged FLOPs); 0 is the unpatched model"
)
_MODEL_HELP = (
    "timm model name, local-dir:PATH of a folder in timm's hub format, or hf_hub:ID (reads the hub); hf:ID, hf:FOLDER or "
    "hf:TYPE of transformers, such as hf:videomae; torchvision:NAME; open_clip:NAME or open_clip:NAME:TAG"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 (eval --strict with skipped images), 2 (bad input), 130."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(words)
    args.typed = words[1:]
    try:
        code = int(args.run(args))
        sys.stdout.flush()  # here, where a reader that has left is caught
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
    except BrokenPipeError:  # the reader of a pipe left: nothing to say, and nobody to say it to
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _is_out_of_memory(error: BaseException) -> bool:
    """CUDA has a class of its own for it; on CPU torch raises a plain RuntimeError."""
    words = ("can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


def entry() -> None:
    """Console script."""
    sys.exit(main())


class _Parser(argparse.ArgumentParser):
    """argparse, with errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}: see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tokenmerge", description="Vision Transformers made faster by merging similar tokens.")
    parser.add_argument("--version", action="version", version=f"tokenmerge {tokenmerge.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = _command(commands, "demo", _demo, "the main job on a model and images that ship with the package")
    _add_merging(demo, ["0", "8", "16", "24"])
    demo.add_argument(
        "--output", type=Path, default=Path("tokenmerge-demo.png"), help="where the picture goes (%(default)s)"
    )
    demo.add_argument(
        "--export",
        type=Path,
        metavar="DIR",
        help="also write the model (DIR/model) and its test images (DIR/val), to try the other commands on",
    )

    inspect = _command(commands, "inspect", _inspect, "is a model supported, why not, tokens and FLOPs per block")
    _add_model(inspect)
    _add_merging(inspect, ["8"])

    bench = _command(commands, "bench", _bench, "speed of a model with and without merging, interleaved in one run")
    _add_model(bench)
    _add_merging(bench, None, required=False)
    _add_running(bench, batch_size=8)
    bench.add_argument(
        "--num-warm-iter", type=_count(0), default=3, metavar="N", help="passes before measuring (%(default)s)"
    )
    bench.add_argument(
        "--num-bench-iter", type=_count(1), default=15, metavar="N", help="interleaved rounds to measure (%(default)s)"
    )
    bench.add_argument(
        "--statistic",
        choices=("median", "min"),
        default="median",
        help="what is compared: the median, or the minimum, steadier on shared machines (%(default)s)",
    )
    bench.add_argument("--compile", action="store_true", help="torch.compile the model, on both sides")

    bench.add_argument(
        "--break-even",
        action="store_true",
        help="find the smallest r that pays, for batches of 1, 2, 4, … up to --batch-size; without --r, try 1, 2, 4, …",
    )

    export = _command(commands, "export", _export, "write the merged model as one file for ONNX Runtime or torch")
    _add_model(export)
    _add_merging(export, None, backend=False)
    _add_weights(export)
    export.add_argument(
        "--format",
        choices=("onnx", "pt2", "aoti"),
        default="onnx",
        help="ONNX, torch.export, or compiled by AOTInductor for this processor (%(default)s)",
    )
    export.add_argument(
        "--output", "-o", type=Path, metavar="FILE", help="file to write (named after MODEL and R in this folder)"
    )
    export.add_argument(
        "--batch-size", "-b", type=_count(1), metavar="N", help="the only batch size to accept (default: any)"
    )
    export.add_argument("--opset", type=_count(18), default=18, help="ONNX operator set (%(default)s)")
    export.add_argument("--no-verify", action="store_true", help="do not run the file and compare it with the model")

    evaluate = _command(commands, "eval", _eval, "top-1, top-5 and images/s for each r over a folder of images")
    _add_model(evaluate)
    evaluate.add_argument(
        "--data",
        "--data-dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder with one folder of images per class",
    )
    _add_merging(evaluate, None)
    _add_running(evaluate, batch_size=64)
    evaluate.add_argument(
        "--workers",
        "-j",
        type=_count(0),
        default=min(2, os.cpu_count() or 1),
        help="processes that decode images (%(default)s)",
    )
    evaluate.add_argument(
        "--class-map", metavar="FILE", help="class names in the order of the model's outputs, one per line"
    )
    evaluate.add_argument("--crop-pct", type=_between(0, 1), help="override the model's own centre crop")
    evaluate.add_argument(
        "--crop-mode", choices=("squash", "border", "center"), help="override the model's own crop mode"
    )
    evaluate.add_argument(
        "--interpolation",
        choices=("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
        help="override the model's own resizing",
    )
    evaluate.add_argument("--mean", type=float, nargs=3, help="override the model's own mean, per channel")
    evaluate.add_argument("--std", type=_between(0, 1e6), nargs=3, help="override the model's own standard deviation")
    evaluate.add_argument("--strict", action="store_true", help="exit with 1 if any image could not be read")

    train = _command(commands, "train", _train, "train or fine-tune a model with merging, on one machine or many")
    _add_model(train)
    train.add_argument("--r", metavar="R", help="tokens merged per block, as in bench; 0 trains without (default: 0)")
    _add_prop_attn(train)
    _add_matcher(train)
    _add_pretrained(train)
    add_train_options(train)
    train.set_defaults(parser=train)
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + "."
    )
    command.set_defaults(run=run)
    command.add_argument("--json", metavar="FILE", help="write the rows as a JSON list; - is standard output")
    return command


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    command.add_argument("--num-classes", type=_count(0), help="classes of the head, if not the model's own")
    command.add_argument("--img-size", type=_count(1), help="side of the image in pixels, if not the model's own")


def _add_merging(
    command: argparse.ArgumentParser, default: list[str] | None, backend: bool = True, required: bool = True
) -> None:
    command.add_argument(
        "--r",
        nargs="+",
        action="extend",  # --r 8 --r 16 is --r 8 16
        required=required and default is None,
        metavar="R",
        help=_R_HELP + (f" (default: {' '.join(default)})" if default else ""),
    )
    command.set_defaults(default_r=default)
    _add_prop_attn(command)
    _add_matcher(command, backend)


def _add_prop_attn(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--prop-attn",
        choices=("auto", "on", "off"),
        default="auto",
        help="proportional attention; auto is as the weights were trained, off for MAE-pretrained ones, else on (%(default)s)",
    )


def _add_matcher(command: argparse.ArgumentParser, backend: bool = True) -> None:
    command.add_argument("--matcher", default="bipartite", help="matching algorithm (%(default)s)")
    if not backend:
        return
    command.add_argument(
        "--attention",
        choices=FORMS,
        default="auto",
        help="how sizes reach the attention kernel; auto goes by the device (%(default)s)",
    )
    command.add_argument(
        "--backend",
        choices=("auto", "torch", "triton"),
        default="auto",
        help="what matches and merges; auto is Triton's kernels on a GPU (%(default)s)",
    )


def _add_running(command: argparse.ArgumentParser, batch_size: int) -> None:
    _add_weights(command)
    command.add_argument("--batch-size", "-b", type=_count(1), default=batch_size, help="images per pass (%(default)s)")


def _add_pretrained(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--pretrained",
        action="store_true",
        help="load the weights that MODEL stands for (may download); without it they are random",
    )
    command.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="load weights from a safetensors or torch file instead"
    )


def _add_weights(command: argparse.ArgumentParser) -> None:
    _add_pretrained(command)
    command.add_argument("--device", default="cpu", help="torch device (%(default)s)")
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="weights and images (%(default)s)",
    )
    command.add_argument("--channels-last", action="store_true", help="channels-last memory format")


def _count(least: int) -> Any:
    def count(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} given, a whole number of at least {least} expected")
        return value

    return count


def _between(low: float, high: float) -> Any:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low < value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} given, a number above {low:g} and up to {high:g} expected")
        return value

    return number


def _prepare(args: argparse.Namespace) -> tuple[Any, list[Any], dict[str, Any]]:
    """The report, the settings and the config fields that every command has."""
    try:
        from tokenmerge.tools.report import Report
    except ImportError as error:
        raise InputError(
            f"{error.name} is not installed, but the command needs it: pip install 'tokenmerge[timm]'"
        ) from None
    from tokenmerge.matching import get_matcher
    from tokenmerge.tools.settings import parse_setting

    get_matcher(args.matcher)
    prop_attn = {"auto": "auto", "on": True, "off": False}[args.prop_attn]
    given = [args.r] if isinstance(args.r, str) else args.r or args.default_r or ()
    return (
        Report(args.json),
        [parse_setting(text) for text in given],
        {
            "prop_attn": prop_attn,
            "matcher": args.matcher,
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

    bench = BenchArgs(
        batch_size=args.batch_size,
        warmup=args.num_warm_iter,
        rounds=args.num_bench_iter,
        statistic=args.statistic,
        compile=args.compile,
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


def _eval(args: argparse.Namespace) -> int:
    report, settings, fields = _prepare(args)
    from tokenmerge.tools.evaluate import EvalArgs, run_eval

    names = ("crop_pct", "crop_mode", "interpolation", "mean", "std")
    evaluation = EvalArgs(
        data=args.data,
        batch_size=args.batch_size,
        workers=args.workers,
        class_map=args.class_map,
        preprocessing={name: getattr(args, name) for name in names if getattr(args, name) is not None},
        strict=args.strict,
    )
    return run_eval(_model_args(args), evaluation, settings, fields, report)


if __name__ == "__main__":
    entry()
