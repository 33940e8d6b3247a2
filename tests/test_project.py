"""The files around the package: workflows, forms for issues, and one version in all places."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import tokenmerge

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))
pytestmark = pytest.mark.skipif(not (ROOT / ".github").exists(), reason="a source distribution has no .github")


def read(path: Path) -> dict[Any, Any]:
    found = yaml.safe_load(path.read_text("utf-8"))
    assert isinstance(found, dict)
    return found


def steps(workflow: dict[Any, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_whole(path: Path) -> None:
    """Every action has a version, every step does one thing, and no step has more rights than it needs."""
    workflow = read(path)
    assert workflow["name"] == path.stem
    assert workflow[True], "`on` is true in YAML 1.1"
    assert workflow["permissions"] == {"contents": "read"}
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step["uses"]), step["uses"]


def test_the_gate_runs_for_every_change() -> None:
    workflow = read(ROOT / ".github" / "workflows" / "ci.yml")
    assert {"push", "pull_request"} <= set(workflow[True])
    commands = [step["run"] for step in steps(workflow) if "run" in step]
    assert commands == [".ci/run"]
    assert (ROOT / commands[0]).stat().st_mode & 0o100, "it can be executed"


def test_a_release_is_published_without_a_token() -> None:
    path = ROOT / ".github" / "workflows" / "release.yml"
    workflow = read(path)
    assert workflow[True] == {"push": {"tags": ["v*"]}}
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    assert "python -m build\n" in "".join(step.get("run", "") for step in build["steps"])
    assert publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}
    assert "permissions" not in build, "what builds cannot publish"
    last = publish["steps"][-1]
    assert last == {"uses": "pypa/gh-action-pypi-publish@release/v1"}, "no address of an index, no password"
    assert "secrets" not in path.read_text("utf-8")
    up, down = (
        next(s for s in job["steps"] if word in s.get("uses", ""))
        for job, word in ((build, "upload"), (publish, "download"))
    )
    assert up["with"]["name"] == down["with"]["name"]
    assert up["with"]["path"] == down["with"]["path"]


@pytest.mark.parametrize(("tag", "fits"), [("v{}", True), ("{}", False), ("v{}.post1", False), ("v9.9.9", False)])
def test_a_tag_that_is_not_the_version_is_refused(tag: str, fits: bool) -> None:
    """By the workflow's own lines."""
    workflow = read(ROOT / ".github" / "workflows" / "release.yml")
    check = next(step["run"] for step in steps(workflow) if "tag" in step.get("name", ""))
    name = tag.format(tokenmerge.__version__)
    command, environment = ["sh", "-e", "-c", check], {"GITHUB_REF_NAME": name, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if fits else 1)
    assert fits or f"the tag is {name}, but the version is {tokenmerge.__version__}" in done.stdout


def test_one_version_in_all_places() -> None:
    assert read(ROOT / "CITATION.cff")["version"] == tokenmerge.__version__
    heads = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert heads[0] == tokenmerge.__version__


def test_forms_are_all_there() -> None:
    assert [path.stem for path in FORMS] == ["bug", "model", "question"]
    assert read(ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml") == {"blank_issues_enabled": False}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_ask_for_what_an_answer_needs(path: Path) -> None:
    form = read(path)
    assert {"name", "description", "labels", "body"} == set(form)
    fields = {field["id"]: field for field in form["body"] if field["type"] != "markdown"}
    assert len(fields) == sum(field["type"] != "markdown" for field in form["body"]), "an id is given once"
    for field in fields.values():
        assert field["type"] in ("input", "textarea", "dropdown", "checkboxes")
        assert field["attributes"]["label"]
    assert {"versions", "inspect", "code"} <= set(fields)
    assert "`tokenmerge inspect MODEL`" in fields["inspect"]["attributes"]["label"]
    asked = {name for name, field in fields.items() if field.get("validations", {}).get("required")}
    assert "versions" in asked
    assert path.stem == "question" or {"inspect", "code"} <= asked
