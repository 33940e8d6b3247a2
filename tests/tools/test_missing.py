"""A package that is not installed: one sentence that names the one extra that holds all that the command needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

_BLOCKED = """
import sys
import torch, torch.testing, torch._dynamo  # they look for packages that they do not need

blocked = set(sys.argv[1].split(","))


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocker())
from tokenmerge.cli import main

code = 0
for line in sys.stdin.read().splitlines():
    print("#", line, flush=True)
    code = main(line.split())
    print(f"exit {code}", file=sys.stderr, flush=True)
"""
_ALL = "timm rich PIL safetensors cyclopts yaml transformers torchvision accelerate optuna matplotlib jinja2 starlette uvicorn sklearn"


def _run(blocked: str, lines: list[str]) -> tuple[str, list[tuple[int, str]]]:
    """Run command lines without some packages; standard output, and exit code and message of each."""
    names = ",".join(blocked.split())
    command = [sys.executable, "-c", _BLOCKED, names]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=False, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    found, message = [], ""
    for line in done.stderr.splitlines():
        if line.startswith("exit "):
            found.append((int(line[5:]), message))
            message = ""
        else:
            message += line
    assert len(found) == len(lines), done.stderr
    return done.stdout, found


def test_with_torch_alone() -> None:
    lines = {
        "demo": "demo",
        "eval m --data d --r 8": "timm",
        "train m --data d --output o": "train",
        "compare m --data d --r 8": "compare",
        "search m --data d": "search",
        "visualize m a.png": "visualize",
        "explore m": "explore",
        "export m --r 8": "export",
        "bench hf:vit --r 8": "transformers",
        "bench torchvision:vit_b_16 --r 8": "torchvision",
        "visualize hf:vit a.png": "visualize,transformers",
    }
    out, found = _run(_ALL, ["", "help settings", *lines])
    assert [code for code, _ in found[:2]] == [0, 0]
    assert "Commands" in out
    assert "combine" in out
    for extra, (code, message) in zip(lines.values(), found[2:], strict=True):
        assert code == 2
        assert message.endswith(f"pip install 'tokenmerge[{extra}]'"), message


@pytest.mark.parametrize(
    ("package", "line", "extra"),
    [
        ("sklearn", "demo", "demo"),
        ("optuna", "search vit_tiny_patch16_224 --data d", "search"),
        ("uvicorn", "explore vit_tiny_patch16_224", "explore"),
        ("accelerate", "train vit_tiny_patch16_224 --data d --output o", "train"),
        ("transformers", "bench hf:vit --r 8", "transformers"),
    ],
)
def test_with_the_rest(package: str, line: str, extra: str) -> None:
    _, [(code, message)] = _run(package, [line])
    assert code == 2
    assert f"tokenmerge[{extra}]" in message
