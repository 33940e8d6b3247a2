"""Write the flags of every command into its page under docs/commands and all settings into docs/settings.md, or check them.

python scripts/command_pages.py [--check]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tokenmerge.cli import make_parser
from tokenmerge.config import FIELDS, choices_of, help_of

SETTINGS = Path(__file__).parents[1] / "docs" / "settings.md"
GROUPS = {
    "schedule": "Schedule: how many tokens merge (exactly one of these)",
    "matching": "Matching and merging",
    "running": "Implementations (results do not change)",
    "": "Other settings",
}
FOLDER = Path(__file__).parents[1] / "docs" / "commands"
MARK = "<!-- written by scripts/command_pages.py -->\n"


def commands() -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of all commands by name."""
    for action in make_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise SystemExit("the command has no subcommands")


def table(parser: argparse.ArgumentParser) -> str:
    """Return the Markdown table of a command's flags."""
    formatter = parser._get_formatter()
    lines = ["", "| flag | meaning |", "|---|---|"]
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
            continue
        value = "" if action.nargs == 0 else " " + formatter._format_args(action, _name(action))
        flag = ", ".join(action.option_strings) + value if action.option_strings else str(action.metavar or action.dest)
        text = formatter._expand_help(action) if action.help else ""
        lines.append(f"| `{_cell(flag)}` | {_cell(text)} |")
    return "\n".join(lines) + "\n"


def _name(action: argparse.Action) -> str:
    if action.choices is not None and action.metavar is None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return str(action.metavar or action.dest.upper())


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
        "properties of a handle. `--r` accepts a JSON file of them, which `MergeConfig.to_json` writes.",
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
    parser.add_argument("--check", action="store_true", help="exit with 1 if a page is out of date")
    check = parser.parse_args().check
    page = settings_page()
    if check and (not SETTINGS.exists() or SETTINGS.read_text(encoding="utf-8") != page):
        sys.exit(f"{SETTINGS} is out of date: run python scripts/command_pages.py")
    if not check:
        SETTINGS.write_text(page, encoding="utf-8")
    found = commands()
    pages = {path.stem for path in FOLDER.glob("*.md")}
    if pages != set(found):
        sys.exit(f"docs/commands has pages for {sorted(pages)}, but the commands are {sorted(found)}")
    for name, command in found.items():
        path = FOLDER / f"{name}.md"
        before = path.read_text(encoding="utf-8")
        head, mark, _ = before.partition(MARK)
        if not mark:
            sys.exit(f"{path} has no line {MARK.strip()!r}")
        after = head + MARK + table(command)
        if check and after != before:
            sys.exit(f"{path} is out of date: run python scripts/command_pages.py")
        path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
