"""Fixtures: the reference data next to the repository, where it exists, and quiet, repeatable torch."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # read by Triton when it is imported, so before anything that imports it: test_ops.py needs the interpreter then
    os.environ.setdefault("TRITON_INTERPRET", "1")

# by Inductor when it is imported: these tests ask whether an exported file is right, and not how fast its wrapper runs
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")

# and by huggingface_hub: a name that nobody has is looked for on this machine only, at once and not after five tries
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import timm
from hypothesis import HealthCheck, settings
from PIL import Image
from safetensors.torch import save_file

from tests.helpers import flat
from tests.helpers.tiny import tiny
from tokenmerge import methods
from tokenmerge.cli import main
from tokenmerge.matching import registry
from tokenmerge.ops import native_build

# a busy machine is no failure: how long an example takes is not what these tests are about
settings.register_profile("tokenmerge", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tokenmerge")

if os.environ.get("TOKENMERGE_TESTS_WITHOUT_C"):  # as on a machine without a compiler, where PyTorch's operators run
    native_build.library = lambda: "the tests run without it"  # type: ignore[assignment]

Run = Callable[..., tuple[int, str, str]]

CLASSES = ("ant", "bee", "cat")
_NAMES = ("test_every_name[", "test_every_other_flat_name[")

SHARED = Path(os.environ.get("TOKENMERGE_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of tools first, which run whole commands: one of minutes that begins last would leave the other core idle."""
    items.sort(key=lambda item: "tools" not in item.path.parts)


def pytest_collection_finish() -> None:
    """What is there before the first test is not looked through again, and what comes, seldom: tracing makes many objects.

    A test that looks for leaks collects by itself.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def pytest_unconfigure() -> None:
    """Triton's bindings complain of what is still alive at the end."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with golden tensors and real data; skips where there is none (a stranger's clone)."""
    if not (SHARED / "reference").is_dir():
        pytest.skip(f"no reference data at {SHARED} (set TOKENMERGE_SHARED to the folder that holds it)")
    return SHARED


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers, pages of the docs included, is gone after it."""
    monkeypatch.setattr(registry, "_MATCHERS", dict(registry._MATCHERS))
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))


@pytest.fixture(autouse=True)
def _dynamo() -> Iterator[None]:
    """What a test compiled is forgotten after it: versions of a function count towards one limit, whoever asked for them."""
    yield
    frames = sys.modules.get("torch._dynamo.convert_frame")  # which nobody has imported who compiles nothing
    if frames is not None and frames.FRAME_COUNTER:
        torch._dynamo.reset()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs the command in an 80-column terminal in an empty folder; exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)

    def call(*args: object) -> tuple[int, str, str]:
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        table = err if "-" in args else out  # JSON on standard output sends the tables to standard error
        assert all(len(line) <= 80 for line in table.splitlines() if line and line[0] in "┏┃┡│└"), table
        return code, out, err

    return call


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many of timm's flat transformers were patched and equal to the oracle in this run."""
    passed = [r for r in terminalreporter.stats.get("passed", []) if any(name in r.nodeid for name in _NAMES)]
    if not passed:
        return
    every = len(flat.names(*flat.PLAIN, *flat.OTHERS, *flat.REFUSED))
    terminalreporter.write_line(
        f"timm {timm.__version__}: {len(passed)} of {every} names with flat global self-attention are patched "
        f"({100 * len(passed) / every:.1f} %)"
    )


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A model in timm's hub format: 3 classes, 36 patches."""
    folder = tmp_path / "model"
    folder.mkdir()
    args = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    model = tiny("vit_tiny_patch16_224", **args, num_classes=3)
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 3,
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [3, 48, 48],
            "num_classes": 3,
            "classifier": "head",
            "first_conv": "patch_embed.proj",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four images in each of three classes, sizes all different."""
    folder = tmp_path / "images"
    generator = torch.Generator().manual_seed(0)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(4):
            pixels = torch.randint(0, 255, (40 + 9 * number, 50 + 5 * label, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{number}.png")
    return folder
