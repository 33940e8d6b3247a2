"""Every kernel compiles for the GPUs that users have, and none spills: Triton's compiler, not its interpreter.

`scripts/kernels.py` does it (`make kernels` prints the whole table); it needs no GPU, and shows no more than that.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.ops.test_fake_cuda import ROOT, without_interpreter
from tokenmerge.ops import choice

pytest.importorskip("triton")
KERNELS = (
    "unit_keys_kernel",
    "match_kernel",
    "rank_kernel",
    "select_kernel",
    "merge_kernel",
    "merge_gradient_kernel",
    "attention_kernel",
)
SCRIPT = str(ROOT / "scripts" / "kernels.py")


@pytest.mark.parametrize(
    ("target", "dtype"),
    [(80, "float16"), (90, "bfloat16"), pytest.param(100, "float32", marks=pytest.mark.slow)],
)
def test_kernels_compile_without_spills(target: int, dtype: str) -> None:
    """A representative part: head sizes that fill the registers most, and each dtype on one target.

    Edges are found in one dtype, that of the unit keys, whatever the model's; `make kernels` compiles every combination.
    """
    done = without_interpreter(SCRIPT, "--targets", str(target), "--dims", "64", "80", "128", "--dtypes", dtype)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 faults" in done.stdout
    kernels = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("sm_")}
    assert kernels == set(KERNELS) - ({"attention_kernel"} if dtype == "float32" else set())


def changed(tmp_path: Path, file: str, old: str, new: str) -> Path:
    """A copy of the package in which one text is another."""
    shutil.copytree(
        ROOT / "tokenmerge", tmp_path / "tokenmerge", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors")
    )
    path = tmp_path / "tokenmerge" / "ops" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return tmp_path


MUTANTS = {
    "annotations are evaluated": ("merge_kernel", "merge_kernels.py", "    x,\n", "    x: Any,\n"),
    "fractions are float64, from Inductor": (
        "attention_kernel",
        "attention_kernels.py",
        "    scale = tl.full((), scale, tl.float32)\n",
        "",
    ),
    "registers run out": ("match_kernel", "matching.py", "rows = 64 if best.shape[1] > 32 else 16", "rows = 256"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_what_does_not_compile_is_seen(tmp_path: Path, name: str) -> None:
    """As the kernels once were: green in the interpreter, and of no use on a GPU."""
    kernel, file, old, new = MUTANTS[name]
    path = changed(tmp_path, file, old, new)
    if "Any" in new:
        text = (path / "tokenmerge" / "ops" / file).read_text()
        (path / "tokenmerge" / "ops" / file).write_text(
            text.replace("import triton\n", "from typing import Any\n\nimport triton\n", 1)
        )
    words = ("--targets", "90", "--dims", "64", "--dtypes", "bfloat16", "--kernels", kernel)
    done = without_interpreter(SCRIPT, *words, path=path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert " ^ " in done.stdout
    assert ("Any" in done.stdout) == ("Any" in new)


VARIANTS = """
import torch
from triton.runtime import driver
from scripts.kernels import Target
from tokenmerge.ops import attending, matching, merging

driver.set_active(Target(90))
found = {}
for tokens in (577, 560, 197, 184, 173, 100, 99, 83):
    qkv = torch.empty(3, tokens, 3, 12, 64, dtype=torch.bfloat16, device="meta").permute(2, 0, 3, 1, 4)
    x = torch.empty(3, tokens, 768, dtype=torch.bfloat16, device="meta")
    log = torch.empty(3, -(-tokens // 8) * 8, dtype=torch.bfloat16, device="meta")[:, None, :tokens].expand(3, 12, tokens)
    started = matching.launches(qkv[1], 16, 1)[3] + merging.launches(x, True, 16, x.dtype) + attending.launches(*qkv, log)
    for launch in started:
        found.setdefault(launch.kernel.__name__, set()).add(launch.compile().hash)
print({name: len(hashes) for name, hashes in found.items()})
"""


def test_blocks_of_a_model_share_their_kernels() -> None:
    """Numbers of tokens are no constants of the compiler: every block would compile its own."""
    done = without_interpreter("-c", VARIANTS)
    assert done.returncode == 0, done.stderr
    # matching has a variant that writes the plan as well, for few tokens
    assert done.stdout.strip() == str({**dict.fromkeys(KERNELS, 1), "match_kernel": 2})


def test_older_cards_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Ampere Triton multiplies without the matrix unit, and there the edges would spill."""
    monkeypatch.setattr(choice, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = choice.device_refusal(torch.device("cuda", 0))
    assert reason is not None
    assert "7.5" in reason
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "AMD" in str(choice.device_refusal(torch.device("cuda", 0)))
