"""Write the flags of every command into its page under docs/commands and all settings into docs/settings.md, or check them.

python scripts/command_pages.py [--check]
"""

from __future__ import annotations

import argparse
import html
import sys
from pathlib import Path

from tokenmerge.cli import COMMANDS
from tokenmerge.cli.command import Command
from tokenmerge.cli.flags import all_flags
from tokenmerge.cli.help import help_text, usage
from tokenmerge.config import FIELDS, choices_of, help_of
from tokenmerge.tools.options import GROUPS as OPTION_GROUPS

SETTINGS = Path(__file__).parents[1] / "docs" / "settings.md"
GROUPS = {
    "schedule": "Schedule: how many tokens merge (exactly one of these)",
    "matching": "Matching and merging",
    "running": "Implementations (results do not change)",
    "": "Other settings",
}
FOLDER = Path(__file__).parents[1] / "docs" / "commands"
MARK = "<!-- written by scripts/command_pages.py -->\n"


def table(command: Command) -> str:
    """Return the Markdown tables of a command's flags, one per group."""
    options, _ = command.load()
    flags = all_flags(command, options)
    lines: list[str] = []
    for group, title in OPTION_GROUPS.items():
        mine = {field: pair for field, pair in flags.items() if pair[1].group == group}
        if mine:
            lines += ["", f"### {title}", "", "| flag | meaning |", "|---|---|"]
        for field, (hint, flag) in mine.items():
            default = options.__dataclass_fields__[field].default if field in options.__dataclass_fields__ else None
            default = 2 if field == "workers" else default  # on a machine with more than one core
            lines.append(f"| {_code(usage(field, hint, flag))} | {_cell(help_text(flag, default))} |")
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    """Return a cell of code; renderers disagree on how to write a bar between backticks in a table."""
    text = " ".join(text.split())
    return f"<code>{html.escape(text, quote=False).replace('|', '&#124;')}</code>" if "|" in text else f"`{text}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def settings_page() -> str:
    """Return the page of settings, with one table per group of fields of `MergeConfig`."""
    lines = [
        "# Settings",
        "",
        MARK.strip(),
        "",
        "The fields of `tokenmerge.MergeConfig` are keyword arguments of `patch`, `handle.update` and `MergeConfig`, and "
        "properties of a handle. On the command line, `--r` takes a schedule or a JSON file of settings, which `MergeConfig.save` "
        "writes, and `--set NAME=VALUE` any other setting; `tokenmerge help settings` lists them.",
    ]
    for group, title in GROUPS.items():
        lines += ["", f"## {title}", "", "| setting | meaning | choices | default |", "|---|---|---|---|"]
        for name, field in FIELDS.items():
            if field.metadata["group"] == group:
                choices = ", ".join(f"`{choice}`" for choice in choices_of(name))
                default = {} if name == "options" else field.default
                lines.append(f"| `{name}` | {_cell(help_of(name))} | {choices} | `{default}` |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the pages, or check them with `--check`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a page is out of date, and write nothing")
    check = parser.parse_args().check
    pages = {SETTINGS: settings_page()}
    for name, command in COMMANDS.items():
        page = FOLDER / f"{name}.md"
        head = (
            page.read_text(encoding="utf-8").partition(MARK)[0]
            if page.is_file()
            else f"# tokenmerge {name}\n\n## Flags\n\n"
        )
        pages[page] = head + MARK + table(command)
    stale = [page for page, text in pages.items() if not page.is_file() or page.read_text(encoding="utf-8") != text]
    if check and stale:
        sys.exit(f"out of date: {', '.join(page.name for page in stale)}: run python scripts/command_pages.py")
    for page in stale:
        page.write_text(pages[page], encoding="utf-8")
        print(f"wrote {page.relative_to(Path.cwd()) if page.is_relative_to(Path.cwd()) else page}")


if __name__ == "__main__":
    main()
