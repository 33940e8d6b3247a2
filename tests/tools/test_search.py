"""The study of a search, when several processes begin it at the same moment."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from tokenmerge.errors import InputError
from tokenmerge.tools.search import study
from tokenmerge.tools.search.options import SearchOptions
from tokenmerge.tools.search.study import open_study, shared

optuna = pytest.importorskip("optuna")
sqlalchemy = pytest.importorskip("sqlalchemy")


def options(storage: str, tmp_path: Path) -> SearchOptions:
    return SearchOptions(model="m", data=tmp_path, storage=storage)


@pytest.mark.parametrize(
    "moment", ["CREATE TABLE trial_params", "CREATE TABLE studies", "CREATE TABLE alembic_version"]
)
def test_another_process_creates_the_tables_at_the_same_moment(moment: str, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'search.db'}"
    others: list[Any] = []

    def another(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if moment in statement and not others:
            others.append(None)
            others[0] = optuna.storages.RDBStorage(storage)

    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "before_cursor_execute", another)
    try:
        with pytest.raises(sqlalchemy.exc.DBAPIError):  # without a second try
            optuna.create_study(study_name="tokenmerge", storage=storage)
        (tmp_path / "search.db").unlink()
        others.clear()
        found = open_study(options(storage, tmp_path))
    finally:
        sqlalchemy.event.remove(sqlalchemy.engine.Engine, "before_cursor_execute", another)
    assert others[0].get_study_id_from_name(found.study_name) == found._study_id
    assert len(found.directions) == 2


def _begin(storage: str, folder: Path, at: Any) -> None:
    at.wait(60)
    open_study(options(storage, folder))


def test_six_processes_begin_one_study(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    at = context.Barrier(6)
    storage = f"sqlite:///{tmp_path / 'search.db'}"
    processes = [context.Process(target=_begin, args=(storage, tmp_path, at)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
    assert [one.study_name for one in optuna.get_all_study_summaries(storage)] == ["tokenmerge"]


def test_a_storage_that_cannot_be_used_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "_PAUSES", (0.0,))
    (tmp_path / "text.db").write_text("not a database, but long enough for one" * 100)
    for storage in (f"sqlite:///{tmp_path / 'text.db'}", f"sqlite:///{tmp_path / 'none' / 'a.db'}", "nothing://x"):
        with pytest.raises(InputError, match=r"cannot be used .*: try sqlite:///search\.db"):
            open_study(options(storage, tmp_path))


def test_what_processes_measure_is_measured_once() -> None:
    one = optuna.create_study()
    assert shared(one, "running", lambda: {"backend": "torch"}) == {"backend": "torch"}
    assert shared(one, "running", lambda: pytest.fail("measured again")) == {"backend": "torch"}

    def slow() -> float:
        one.set_user_attr("flops_speedup", 2.0)  # by another process, meanwhile
        return 3.0

    assert shared(one, "flops_speedup", slow) == 2.0
