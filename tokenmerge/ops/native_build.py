"""Compilation of the functions in `ops/c` by the machine's C compiler, at their first use, into the user's cache folder.

The library is a plain shared object without PyTorch's headers, so it is compiled in about a second and fits every version of
PyTorch. The name of its file is a digest of the sources, the compiler, the flags and the processor, because code for one
processor may not run on another that shares the folder.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_SOURCES = Path(__file__).with_name("c")
_FLAGS = ("-O3", "-std=gnu11", "-fPIC")
_EXACT = {"merge.c": ("-ffp-contract=off",)}
"""Flags of single files; without fused multiply-add, merging rounds as PyTorch's operators do."""
_SECONDS = 120


class BuildError(Exception):
    """The functions cannot be compiled or loaded; the message says why in one phrase."""


def compiler() -> list[str] | None:
    """Return the command of a C compiler, or `None` if there is none.

    The environment's `CC` comes first, then `cc`, `gcc` and `clang`, then the compiler of the package `ziglang`, which pip
    installs where the system has none.
    """
    wanted = os.environ.get("CC", "").split()
    for command in [wanted] if wanted else [["cc"], ["gcc"], ["clang"]]:
        found = shutil.which(command[0])
        if found:
            return [found, *command[1:]]
    if not wanted and importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc"]
    return None


def _processor() -> str:
    """Return a text that is the same on processors with the same instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    kinds = ("flags", "Features", "model name")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(kinds)}))


@functools.cache
def _own_folder() -> Path:
    """Return a folder for compiled code that no other user can write to.

    Raises:
        BuildError: if the folder belongs to another user or can be written by others, who could put code into it.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "tokenmerge"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError:
        return _temporary_folder()  # no home that can be written: compiled in every process
    if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise BuildError(f"{folder} belongs to, or can be written by, other users")
    return folder if os.access(folder, os.W_OK) else _temporary_folder()


def _temporary_folder() -> Path:
    """Return a folder that is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="tokenmerge-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run ({type(error).__name__})") from None
    if done.returncode:
        lines = (
            [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
        )
        raise BuildError(f"{command[0]} failed: {lines[0].strip():.200}")


def _compile(command: list[str], flags: tuple[str, ...], library: Path) -> None:
    """Compile and link the sources, and move the result to its place at once, so that others never see half of it."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        objects = []
        for source in sorted(_SOURCES.glob("*.c")):
            objects.append(str(Path(folder) / f"{source.stem}.o"))
            _run([*command, *flags, *_EXACT.get(source.name, ()), "-c", str(source), "-o", objects[-1]])
        made = Path(folder) / library.name
        # linked without -fopenmp: GOMP_parallel is then PyTorch's, whose threads would compete with those of a second library
        _run([*command, "-shared", *objects, "-o", str(made), "-lm"])
        if not made.is_file():
            raise BuildError(f"{command[0]} wrote no library")
        with made.open("rb") as file:
            os.fsync(file.fileno())  # before the name exists, so that a crash leaves no half of it
        made.replace(library)


def _loaded(command: list[str], flags: tuple[str, ...]) -> ctypes.CDLL:
    digest = hashlib.sha256()
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.read_bytes())
    digest.update("\0".join([*command, *flags, _processor(), sys.platform]).encode())
    if (found := shutil.which(command[0])) is not None:
        digest.update(str(os.stat(found).st_mtime_ns).encode())
    library = _own_folder() / f"{digest.hexdigest()[:32]}.so"
    if not library.is_file() or not library.stat().st_size:
        _compile(command, flags, library)
    try:
        return ctypes.CDLL(str(library), mode=os.RTLD_NOW)  # a missing OpenMP is known now and not at the first call
    except OSError as error:
        raise BuildError(f"the library cannot be loaded ({error!s:.200})") from None


@functools.cache
def library() -> Any:
    """Return the loaded library, compiled if this machine has not compiled it before; or the reason why there is none, a `str`."""
    if sys.platform == "win32":
        return "the functions in C are not compiled on Windows"
    command = compiler()
    if command is None:
        return "no C compiler was found (set CC, or pip install 'tokenmerge[c]')"
    reason = ""
    for flags in (("-march=native", "-fopenmp"), ("-march=native",), ()):
        try:
            return _loaded(command, (*_FLAGS, *flags))
        except (BuildError, OSError) as error:
            reason = reason or str(error)
    return reason
