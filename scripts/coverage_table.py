"""Write the README's coverage table from the names that the tests run, or check that it is up to date.

    python scripts/coverage_table.py [--check]

Every name is built as the tests build it, patched and run; the table says how many are patched, and names the rest.
"""

from __future__ import annotations

import argparse
import collections
import sys
from pathlib import Path
from typing import Any

import timm
import torch

import tokenmerge
from tests.tiny import images_for, tiny

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- coverage: written by scripts/coverage_table.py -->", "<!-- end of coverage -->"
MODULES = ("vision_transformer", "deit")


def kind(model: Any) -> str:
    """Block class and, where it differs from timm's standard, attention class."""
    block = type(model.blocks[0]).__name__
    attention = type(getattr(model.blocks[0], "attn", None)).__name__
    return f"{block}, {attention}" if attention == "DiffAttention" else block


def rows() -> tuple[dict[tuple[str, str], list[str]], list[str]]:
    """Patched names by (module, kind), and "name: reasons" for refused ones."""
    patched: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    refused = []
    for module in MODULES:
        for name in timm.list_models(module=module):
            model = tiny(name)
            which = kind(model)
            try:
                with tokenmerge.patched(model, r=5), torch.no_grad():
                    model(images_for(model))
            except tokenmerge.UnsupportedModelError as error:
                refused.append(f"{name}: {'; '.join(error.reasons)}")
                continue
            patched[module, which].append(name)
    return patched, refused


def table() -> str:
    """The table in Markdown."""
    patched, refused = rows()
    lines = ["| timm module | blocks | models patched | for example |", "|---|---|---|---|"]
    for (module, which), names in sorted(patched.items(), key=lambda item: -len(item[1])):
        lines.append(f"| `{module}` | {which} | {len(names)} | `{names[len(names) // 2]}` |")
    count = sum(map(len, patched.values()))
    lines.append("")
    lines.append(
        f"{count} of {count + len(refused)} names of timm {timm.__version__}; refused: {'; '.join(refused) or 'none'}."
    )
    return "\n".join(lines)


def main() -> int:
    """Write or check; 1 if the README differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the README is up to date")
    args = parser.parse_args()
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        print(f"README.md has no {BEGIN!r} … {END!r}: add both lines where the table belongs", file=sys.stderr)
        return 1
    new = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if args.check:
        if new != text:
            print("README.md's coverage table is out of date: run python scripts/coverage_table.py", file=sys.stderr)
        return int(new != text)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
