"""`Tuning`, the record of a tuning: what was tried, for what, and what was chosen; it can be saved and loaded."""

from __future__ import annotations

import dataclasses
import os
import platform
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from tokenmerge import files
from tokenmerge.errors import InputError, shown
from tokenmerge.frozen import frozen, thawed
from tokenmerge.ops.timing import Spread
from tokenmerge.schedule import is_count

What = Literal["attention", "backend", "schedule"]
_FORMAT = "tokenmerge_tuning"
_VERSION = 1
_MOST = 1e15
"""Largest number in a record; one of more digits than a float has would fail when it is printed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tried:
    """One alternative that a tuning tried.

    Attributes:
        what: what was varied: "attention" and "backend" are the fields of `MergeConfig`; "schedule" is where to merge.
        choice: the value of the field, or the schedule in words.
        r: tokens that each block merges away, for a schedule; `None` for the others.
        seconds: percentiles of the seconds of a forward pass; `None` if it did not run.
        speedup: percentiles over the paired rounds of the speed-up over the unmerged model (for a schedule), or over what was
            in use before; `None` if it did not run.
        flops_ratio: FLOPs without merging ÷ FLOPs with this schedule; `None` for the others.
        moved: mean KL divergence of the predictions from those of the unmerged model; `None` if it was not judged.
        correct: how many of the judged images were classified correctly; `None` without labels.
        reason: why it did not run or was not allowed; empty if neither.
    """

    what: What
    choice: str
    r: tuple[int, ...] | None = None
    seconds: Spread | None = None
    speedup: Spread | None = None
    flops_ratio: float | None = None
    moved: float | None = None
    correct: int | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Record of a tuning, which `Handle.tune` returns; `str()` turns it into a table.

    Attributes:
        model: class name of the model.
        blocks: number of its patched blocks.
        config: the settings before tuning that differ from the defaults, without those of group "running".
        inputs: shape and dtype of each input tensor, such as `("[1, 3, 224, 224] torch.float32",)`.
        tokens: tokens per image that entered the first block.
        flops: multiply-adds per image without merging, by which models of one class are told apart.
        dtype: dtype of the model's parameters.
        device: device type, such as "cpu".
        processor: name of the processor or GPU.
        threads: threads that PyTorch used on the CPU.
        versions: versions by package: "tokenmerge" and "torch".
        rounds: rounds in which the alternatives took turns.
        tried: what was tried.
        chosen: the fields of `MergeConfig` that were set, with their values.
        words: the result as a sentence, which `Handle.summary` quotes.

    Example:
        >>> import timm, torch, tokenmerge
        >>> model = timm.create_model("deit_tiny_patch16_224", depth=2, embed_dim=48, num_heads=3, img_size=96).eval()
        >>> handle = tokenmerge.patch(model, r=8)
        >>> tuning = handle.tune(torch.zeros(1, 3, 96, 96), rounds=1)
        >>> sorted(tuning.chosen)
        ['attention', 'backend']
        >>> tokenmerge.Tuning.from_json(tuning.to_json()) == tuning
        True
    """

    model: str
    blocks: int
    config: Mapping[str, Any]
    inputs: tuple[str, ...]
    tokens: int
    flops: int
    dtype: str
    device: str
    processor: str
    threads: int
    versions: Mapping[str, str]
    rounds: int
    tried: tuple[Tried, ...]
    chosen: Mapping[str, Any]
    words: str

    def to_json(self) -> str:
        """Return this record as the text of one JSON object.

        Raises:
            InputError: if a number of it is not finite.
        """
        fields = {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return files.to_json({_FORMAT: _VERSION, **fields}, "the record of a tuning", indent=1)

    @classmethod
    def from_json(cls, text: str) -> Tuning:
        """Return the record that `to_json` wrote.

        Raises:
            InputError: if the text is not such a record.
        """
        found = files.parse_json(text, "a record of a tuning was expected, but the text")
        version = found.pop(_FORMAT, None) if isinstance(found, dict) else None
        if type(version) is not int or version != _VERSION:
            raise InputError(
                f"a record of a tuning was expected, but {_FORMAT!r}: {_VERSION} is missing: give a file that Tuning.save wrote"
            )
        _check_fields(found)
        tried = tuple(_tried(one) for one in found["tried"])
        _check_chosen(found["chosen"], tried)
        values = {**found, "inputs": tuple(found["inputs"]), "tried": tried}
        for name in ("config", "versions", "chosen"):
            values[name] = frozen(found[name])
        return cls(**values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write this record to a file, as JSON.

        Raises:
            InputError: if the file cannot be written.
        """
        files.write(path, self.to_json() + "\n", "the record of a tuning")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tuning:
        """Read a record that `save` wrote.

        Raises:
            InputError: if the file cannot be read, or holds no such record.
        """
        return cls.from_json(files.read_text(path, "the record of a tuning"))

    def __str__(self) -> str:
        where = f"{self.device} ({self.processor}, {self.threads} threads)"
        lines = [*textwrap.wrap(self.words, 80), f"  {self.rounds} rounds on {where}, torch {self.versions['torch']}"]
        lines.append("  tried                                  ms   speed-up   FLOPs      KL")
        for one in self.tried:
            name = f"{one.what} {one.choice}"
            if one.seconds is None or one.speedup is None:
                lines.append(f"  {name:32.32s}        -   does not run here")
                continue
            ratio = f"{one.flops_ratio:6.2f}x" if one.flops_ratio is not None else "      -"
            moved = f"{one.moved:6.3f}" if one.moved is not None else "     -"
            note = "  refused" if one.reason else ""
            lines.append(
                f"  {name:32.32s} {1e3 * one.seconds.p50:8.2f}   {one.speedup.p50:7.2f}x {ratio}  {moved}{note}"
            )
        return "\n".join(lines)


_TYPES: dict[str, type] = {
    **dict.fromkeys(("model", "dtype", "device", "processor", "words"), str),
    **dict.fromkeys(("blocks", "tokens", "flops", "threads", "rounds"), int),
    **dict.fromkeys(("config", "versions", "chosen"), dict),
    **dict.fromkeys(("inputs", "tried"), list),
}


def _check_fields(found: dict[str, Any]) -> None:
    """Raise `InputError` unless the fields of a record are all there, no others, and of the right types."""
    for name in [*_TYPES, *found]:
        wanted = _TYPES.get(name)
        if wanted is None or name not in found or type(found[name]) is not wanted:
            given = shown(found[name]) if name in found else "missing"
            raise InputError(
                f"a record of a tuning has {name!r} {given}, but {wanted.__name__ if wanted else 'no such field'} was expected: "
                "give a file that Tuning.save wrote"
            )
    texts = [*found["inputs"], *found["versions"].values()]
    counts = [value for name, value in found.items() if _TYPES[name] is int]
    if (
        not all(isinstance(text, str) for text in texts)
        or not {"torch", "tokenmerge"} <= set(found["versions"])
        or min(counts) < 1
    ):
        raise InputError(
            f"a record of a tuning is for inputs {shown(found['inputs'])}, versions {shown(found['versions'])} and counts {counts}, but "
            "texts and positive numbers were expected: give a file that Tuning.save wrote"
        )


def _check_chosen(chosen: dict[str, Any], tried: tuple[Tried, ...]) -> None:
    """Raise `InputError` unless everything that a record sets is among what it tried."""
    named = {(one.what, one.choice) for one in tried if one.seconds is not None}
    schedules = [one.r for one in tried if one.what == "schedule" and one.r is not None]
    r = chosen.get("r")
    as_tuple = (
        tuple(r)
        if isinstance(r, list)
        else (0,) * len(schedules[0])
        if schedules and type(r) is int and r == 0
        else None
    )
    known = {"attention", "backend"} <= set(chosen) <= {"attention", "backend", "r"}
    if (
        not known
        or not all((name, chosen[name]) in named for name in ("attention", "backend"))
        or ("r" in chosen and as_tuple not in schedules)
    ):
        raise InputError(
            f"a record of a tuning sets {shown(chosen)}, but an attention, a backend and perhaps an r among those that it tried were "
            "expected: give a file that Tuning.save wrote"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Tried | Spread):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return thawed(value)


def _tried(given: Any) -> Tried:
    try:
        names = {field.name for field in dataclasses.fields(Tried)}
        if set(given) != names or given["what"] not in get_args(What):
            raise TypeError
        if not isinstance(given["choice"], str) or not isinstance(given["reason"], str):
            raise TypeError
        r, correct = given["r"], given["correct"]
        if not (r is None or (isinstance(r, list) and all(is_count(one) for one in r))) or not (
            correct is None or is_count(correct)
        ):
            raise TypeError
        spreads = {name: None if given[name] is None else Spread(**given[name]) for name in ("seconds", "speedup")}
        numbers = [one for spread in spreads.values() if spread is not None for one in dataclasses.astuple(spread)]
        numbers += [given[name] for name in ("flops_ratio", "moved") if given[name] is not None]
        if any(isinstance(one, bool) or not isinstance(one, int | float) or abs(one) > _MOST for one in numbers):
            raise TypeError
        return Tried(**{**given, **spreads, "r": None if r is None else tuple(r)})
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        raise InputError(
            f"a record of a tuning tried {shown(given)}, but the fields of Tried were expected: give a file that Tuning.save wrote"
        ) from None


def processor_of(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor."""
    if device.type == "cuda" and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
