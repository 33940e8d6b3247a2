"""The command under bad values, files and outputs: one sentence and a documented exit code, no traceback, no hang, no abort.

Values are drawn from the options themselves, so that a new option is tried as well.
"""

from __future__ import annotations

import json
import os
import random
import signal
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import save_file

from tests.helpers.tiny import tiny
from tokenmerge.cli import COMMANDS, main
from tokenmerge.cli.flags import all_flags, names_of
from tokenmerge.tools.options import Flag, without_none

_SECONDS = 30
_RUNS = 64  # in each of the shards
_WORDS = [
    "", " ", "0", "1", "-1", "2", "8", "0.5", "1e999", "-1e999", "nan", "inf", "1_0", "0x10", "9" * 400, "9" * 30, "99999999999",
    "x", "None", "true", "False", "-", "--", "---", "-h-", "=", "a=b", "=b", "a=", "a==b", "../..", "/", "/dev/null", "/dev/full",
    "/dev/zero", "\udcff", "💥", "é" * 200, "n" * 300, "[" * 3000, "{}", "[]", "{{x}}", "%s", "$HOME", "`id`", "class_path=os.system",
    "8:-1", "8:", ":8", "8:-99", "8,", ",8", "8,8,8,8,8,8,8,8", "keep=2", "keep=0", "keep=", "speedup=100", "speedup=1e9", "flops=0",
    "flops=-1", "a\0b", "hf:", "hf:/", "hf:vit-large", "local-dir:", "torchvision:x", "open_clip:", "hf_hub:no/body", "resnet18", "vit_tiny",
    "sqlite:///", "mysql://x", "cuda:99", "meta", "float64", "rand-m99", "random", "wds/x", "hfds/x", "1=8", "x=8", "1=8:9:9",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every kind of file that can be in the way."""
    root = tmp_path_factory.mktemp("fuzz")
    (root / "empty").touch()
    (root / "binary.bin").write_bytes(bytes(range(256)) * 40)
    (root / "pickle.pkl").write_bytes(b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x08touch pp\x85R.")
    (root / "deep.json").write_text("[" * 100_000)
    (root / "deep.yaml").write_text("a: " + "[" * 5000)
    (root / "bomb.yaml").write_text("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nr: *c\n")
    (root / "code.yaml").write_text("r: !!python/object/apply:os.system ['touch ran']\n")
    (root / "list.yaml").write_text("r: ['--plugin', 'evil.py']\n")
    (root / "class.yaml").write_text("model: {class_path: os.system, init_args: {command: 'touch ran'}}\n")
    (root / "plugin.yaml").write_text("plugin: evil.py\n")
    (root / "numbers.yaml").write_text("batch_size: 1e999\nworkers: .nan\nr: 1.5\n")
    (root / "latin.txt").write_bytes("ä\nö\n".encode("latin-1"))
    (root / "names.txt").write_text("ant\nant\n\n")
    (root / "found.json").write_text('{"r": 3, "combine": "norm"}')
    (root / "wrong.json").write_text('{"r": 3, "combine": "sum"}')
    (root / "evil.py").write_text(f"open({str(root / 'ran')!r}, 'w')\n")
    (root / "raises.py").write_text("raise SystemExit(5)\n")
    (root / "weights.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    (root / "weights.pt").write_bytes(b"PK\x03\x04" + b"\0" * 40)
    os.mkfifo(root / "pipe.png")
    os.mkfifo(root / "pipe.json")
    (root / "loop").symlink_to(root / "loop")
    (root / "broken").symlink_to(root / "nothing")
    (root / "around").mkdir()
    (root / "around" / "again").symlink_to(root / "around")
    (root / "readonly.json").write_text("{}")
    (root / "readonly.json").chmod(0o400)
    Image.new("RGB", (60_000, 1)).save(root / "oblong.png")
    Image.new("RGB", (40, 30), "red").save(root / "fine.png")
    (root / "half.png").write_bytes((root / "fine.png").read_bytes()[:60])
    return root


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A model in timm's hub format, and a folder with train and val of two classes."""
    root = tmp_path_factory.mktemp("small")
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = tiny("vit_tiny_patch16_224", **args, num_classes=2)
    about = {"input_size": [3, 32, 32], "num_classes": 2, "classifier": "head", "first_conv": "patch_embed.proj"}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 2, "model_args": args, "pretrained_cfg": about}
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), root / "model" / "model.safetensors")
    for split in ("train", "val"):
        for label in ("dark", "light"):
            folder = root / "data" / split / label
            folder.mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (32, 32), (number * 20, 60, 200)).save(folder / f"{number}.png")
    return f"local-dir:{root / 'model'}", root / "data"


class Hung(BaseException):
    """A run took too long; no `except Exception` can catch it."""


@pytest.fixture
def limited() -> Iterator[None]:
    """An alarm that ends a test that hangs."""

    def ring(*_: Any) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, ring)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _value(draw: random.Random, place: Path, hint: Any, flag: Flag) -> list[str]:
    """One value for an option, bad more often than not."""
    files = [str(path) for path in place.iterdir()]
    kind, _ = without_none(hint)
    words = [*_WORDS, *files, *map(str, flag.choices)]
    parts = typing.get_args(kind) or (kind,)
    if draw.random() < 0.7:  # of the right kind, and odd within it
        if Path in parts:
            words = files
        elif str in parts and flag.choices:
            words = [str(choice) for choice in flag.choices]
        elif int in parts and str not in parts:
            words = [
                "0",
                "1",
                "2",
                "3",
                "-1",
                "7",
                "64",
                "99999999999",
                "4294967296",
                "9" * 30,
                "1.5",
                "1e3",
            ]
        elif float in parts:
            words = ["0", "1", "0.5", "1e-9", "1e30", "-0.1", "nan", "inf", "-inf", "1e-400", "2", "100"]
        elif "r" in flag.metavar.lower() and str in parts:
            words = [
                "0",
                "1",
                "2",
                "5",
                "500",
                "-3",
                "8:-1",
                "3,0",
                "1,2,3",
                "keep=0.9",
                "keep=0.1",
                "flops=0.9",
                "flops=1e-9",
                "speedup=1.1",
                *files,
            ]
        if flag.pairs:
            words = [
                "combine=norm",
                "combine=x",
                "metric=x",
                "iterations=3",
                "backend=c",
                "place=before",
                "order=spatial",
                "depth=1",
                "nope=1",
            ]
    many = draw.randint(1, 3) if typing.get_origin(kind) is not None or flag.pairs else 1
    return [draw.choice(words) for _ in range(many)]


def _line(draw: random.Random, place: Path, model: str, data: Path, name: str) -> list[str]:
    """A command line: a small run that would work, with a few options spoilt, left out or added."""
    out = place / "out"
    small = {
        "inspect": [model, "--r", "2"],
        "bench": [model, "--r", "2", "--num-bench-iter", "1", "--num-warm-iter", "0", "-b", "1"],
        "eval": [model, "--data", str(data), "--r", "2", "-j", "0"],
        "compare": [model, "--data", str(data), "--r", "2", "--methods", "tome", "--rounds", "0", "-j", "0", "--output", str(out / "compare")],
        "search": [model, "--data", str(data), "--trials", "1", "--output", str(out / "found.json"), "-j", "0", "-b", "2"],
        "train": [model, "--data", str(data.parent), "--epochs", "1", "--output", str(out / "run"), "-b", "4", "-j", "0", "--warmup-epochs", "0"],
        "visualize": [model, str(place / "fine.png"), "--r", "2", "--out", str(out / "a.png")],
        "explore": [model, "--port", "0"],
        "export": [model, "--r", "2", "--output", str(out / "a.pt2"), "--format", "pt2"],
        "demo": ["--r", "2", "--output", str(out / "a.png")],
    }  # fmt: skip
    words = list(small[name])
    flags = all_flags(COMMANDS[name], COMMANDS[name].load()[0])
    for field in draw.sample(sorted(flags), draw.choice([1, 1, 1, 2, 3])):
        hint, flag = flags[field]
        value = _value(draw, place, hint, flag)
        if flag.positional:
            words[0] = value[0]
            continue
        bool_hint = without_none(hint)[0] is bool
        for known in [
            one for one in names_of(field, flag) if one in words
        ]:  # replaced, because a second one is an error
            place_of = words.index(known)
            del words[place_of : place_of + 2]
        if field in ("compile", "break_even") or "aoti" in value:  # these compile or repeat for half a minute
            continue
        words += [draw.choice(names_of(field, flag)), *([] if bool_hint else value)]
    if draw.random() < 0.15:
        words.insert(draw.randrange(len(words) + 1), draw.choice(_WORDS))
    if draw.random() < 0.1:
        words.pop(draw.randrange(len(words)))
    return [name, *words]


def _check(words: list[str], capfd: pytest.CaptureFixture[str], seconds: int = _SECONDS) -> int:
    signal.alarm(seconds)
    try:
        code = main(words)
    except Hung:
        pytest.fail(f"hangs: {words!r}")
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__}: {error}: {words!r}") from error
    finally:
        signal.alarm(0)
    if any(word.startswith("--plugin") for word in words):  # the one way in which code is meant to run
        for word in words:
            Path(word).with_name("ran").unlink(missing_ok=True) if word.endswith("evil.py") else None
    _, err = capfd.readouterr()
    assert code in (0, 1, 2), f"{code}: {words!r}: {err[-500:]}"
    assert "Traceback" not in err, f"{words!r}: {err[-800:]}"
    if code == 2 and "not supported" not in err:
        last = err.strip().splitlines()[-1:] or [""]
        supported = words[0] == "inspect" and not last[0].startswith("tokenmerge")
        assert last[0].startswith("tokenmerge") or supported, f"{words!r}: {err[-500:]}"
    return code


@pytest.fixture
def run_checked(
    limited: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[list[str]], int]:
    """Runs a command line in a folder of its own; a server would serve for ever, so it ends at once."""
    import uvicorn

    monkeypatch.chdir(tmp_path)

    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets=None: None)
    return lambda words: _check(words, capfd)


_COMMON = (
    "inspect",
    "bench",
    "eval",
    "eval",
    "compare",
    "visualize",
    "visualize",
    "explore",
    "train",
    "search",
    "export",
)


def _codes(
    run_checked: Callable[[list[str]], int],
    place: Path,
    small: tuple[str, Path],
    seed: int,
    count: int,
    commands: Sequence[str],
) -> list[int]:
    """Run drawn command lines, and return their exit codes."""
    (place / "out").mkdir(exist_ok=True)
    draw = random.Random(seed)
    return [run_checked(_line(draw, place, small[0], small[1] / "val", draw.choice(commands))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(8))
def test_bad_values_are_one_sentence(
    run_checked: Callable[[list[str]], int],
    place: Path,
    small: tuple[str, Path],
    seed: int,
) -> None:
    """512 runs in all."""
    codes = _codes(run_checked, place, small, seed, _RUNS, _COMMON)
    assert codes.count(2) > _RUNS // 3
    assert not (place / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 116))
def test_bad_values_for_longer(
    run_checked: Callable[[list[str]], int],
    place: Path,
    small: tuple[str, Path],
    seed: int,
) -> None:
    if not os.environ.get("TOKENMERGE_FUZZ"):
        pytest.skip("TOKENMERGE_FUZZ=1 runs it: some ten minutes")
    _codes(run_checked, place, small, seed, 4 * _RUNS, (*_COMMON, "demo"))
