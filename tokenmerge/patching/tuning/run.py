"""The tuning of a patched model: form of attention, backend and, if the user wants, where and whether to merge."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tokenmerge.config import FIELDS, MergeConfig, choices_of
from tokenmerge.errors import ConfigError, InputError
from tokenmerge.flops import ModelCost
from tokenmerge.frozen import frozen
from tokenmerge.ops.choice import interpreted
from tokenmerge.ops.timing import Spread
from tokenmerge.patching.check import attention_choice
from tokenmerge.patching.record import ModelRecord, Settings
from tokenmerge.patching.settings import backend_choice, backend_refusals, settings_for
from tokenmerge.patching.swap import original_class
from tokenmerge.patching.target import Target
from tokenmerge.patching.tuning.judge import Judge, Verdict
from tokenmerge.patching.tuning.measure import ASKED, NONE, check_rounds, confirmed, fastest, in_turns, in_words
from tokenmerge.patching.tuning.record import Tried, Tuning, processor_of
from tokenmerge.patching.tuning.schedules import alternatives, check_movable
from tokenmerge.schedule import Schedule, cut


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What a user wants of a tuning; see `Handle.tune`.

    Attributes:
        schedule: whether to choose where and whether to merge.
        judge: images to judge schedules by, or `None`.
        forms: forms of attention to measure; `None` measures all that run.
        backends: backends to measure; `None` measures all that run.
        rounds: rounds in which the alternatives take turns.
        call: function that is timed in place of the model; `None` calls the model.
        load: a saved tuning to use instead; `None` measures.
    """

    schedule: bool = False
    judge: Any = None
    forms: Sequence[str] | None = None
    backends: Sequence[str] | None = None
    rounds: int = 7
    call: Callable[..., Any] | None = None
    load: Any = None

    def check(self) -> None:
        """Raise `InputError` if a wish cannot be granted."""
        check_rounds(self.rounds)
        for name, given in (("forms", self.forms), ("backends", self.backends)):
            if given is not None and (not isinstance(given, list | tuple) or not given):
                raise InputError(
                    f"{name}={given!r:.60}, but a list of {name} to measure was expected: use {name}=None to try all"
                )
        if not isinstance(self.schedule, bool) or (self.call is not None and not callable(self.call)):
            raise InputError(
                f"schedule={self.schedule!r:.60} and call={self.call!r:.60}, but true or false, and a function, were expected"
            )
        given = [name for name in ("judge", "forms", "backends", "call") if getattr(self, name) is not None]
        if self.load is not None and given:
            raise InputError(
                f"{given[0]} was given with load, but a saved tuning is used without measuring: give one of them"
            )
        if self.judge is not None and not self.schedule:
            raise InputError("judge was given without schedule=True, but only schedules change predictions: give both")


class Tuner:
    """Measurement of one patched model; it changes the settings in force, which its user restores."""

    def __init__(
        self, target: Target, record: ModelRecord, wishes: Wishes, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self.target, self.record, self.wishes = target, record, wishes
        outer = record.outer() if record.outer is not None and any(record.around) else None
        call = wishes.call or outer or target.model
        self.call = call
        self.run = functools.partial(call, *inputs, **options)
        self.given = (inputs, options)
        self.device = next(target.model.parameters()).device
        self.config = record.settings.config
        self.base = base_of(self.config)
        self.chosen: dict[str, Any] = {}
        self.tried: list[Tried] = []

    def tune(self) -> Tuning:
        """Measure, and return the record, whose `chosen` holds the fields to set."""
        if not self.record.settings.merges:
            raise InputError(
                "the model merges nothing (r=0), so there is nothing to tune: set r, keep, flops or speedup first"
            )
        tokens = self._tokens()
        self._choose("attention", attention_choice(self.target, self.config).form, self.wishes.forms)
        self._choose("backend", backend_choice(self.target, self.config).form, self.wishes.backends)
        words = ", ".join(f"{name} {value}" for name, value in self.chosen.items())
        if self.wishes.schedule:
            words = f"{self._schedule(tokens)}; {words}"
        described = describe(*self.given)
        return Tuning(
            model=original_class(self.target.model).__name__,
            blocks=self.record.settings.layers,
            config=frozen(self.base),
            inputs=described,
            tokens=tokens,
            flops=self.record.settings.cost.at(tokens).total(),
            dtype=str(next(self.target.model.parameters()).dtype),
            device=self.device.type,
            processor=processor_of(self.device),
            threads=torch.get_num_threads(),
            versions=frozen(versions()),
            rounds=self.wishes.rounds,
            tried=tuple(self.tried),
            chosen=frozen(self.chosen),
            words=f"tuned for inputs {', '.join(described)} on {self.device.type}: {words}",
        )

    # --- what is measured --------------------------------------------------------------------------------------

    def _use(self, settings: Settings) -> None:
        self.record.settings = settings

    def _settings(self, config: MergeConfig) -> Settings:
        return settings_for(self.target, config, self.record.readers)

    def _times(self, settings: Sequence[Settings]) -> list[list[float]]:
        return in_turns(
            self.run, lambda which: self._use(settings[which]), len(settings), self.device, self.wishes.rounds
        )

    def _tokens(self) -> int:
        """Run the model once as it is, and return the number of tokens that entered its first block."""
        seen: list[int] = []

        def note(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)
            if first is not None:
                seen.append(int(first.shape[1]))

        hook = self.target.blocks[0][0].register_forward_pre_hook(note, with_kwargs=True)
        try:
            self.run()
        finally:
            hook.remove()
        if not seen:
            raise InputError(
                "the model's blocks did not run, so nothing was measured: let call= run the patched model, and not a copy of it"
            )
        return seen[0]

    # --- attention and backend ---------------------------------------------------------------------------------

    def _choose(self, what: Any, before: str, wanted: Sequence[str] | None) -> None:
        """Measure the choices of a field that can run, and keep the fastest one; the present one stays if none is faster."""
        able: dict[str, Settings] = {}
        for choice in wanted or [choice for choice in choices_of(what) if choice != "auto"]:
            if wanted is None and choice == "triton" and interpreted():
                self.tried.append(Tried(what=what, choice=choice, reason="Triton runs in its interpreter here"))
                continue
            try:
                settings = self._settings(MergeConfig.create(self.config, **{what: choice}))
                self._use(settings)
                attention_choice(self.target, settings.config)
                self.run()  # warm-up: compiles kernels, and raises if the choice cannot run
            except (ConfigError, RuntimeError) as error:
                # kernels that refuse a shape, and exhausted memory, raise RuntimeErrors of many kinds
                if wanted is not None or choice in ("mask", "torch"):
                    raise
                self.tried.append(Tried(what=what, choice=choice, reason=_first_line(error)))
                continue
            able[choice] = settings
        names = list(able)
        first = names.index(before) if before in able else 0
        times = self._times(list(able.values()))
        best = fastest(times, first)
        for name, mine in zip(names, times, strict=True):
            gain = Spread.of_ratios(times[first], mine)
            self.tried.append(Tried(what=what, choice=name, seconds=Spread.of(mine), speedup=gain))
        self.chosen[what] = names[best]
        self.config = MergeConfig.create(self.config, **{what: names[best]})

    # --- schedules ---------------------------------------------------------------------------------------------

    def _schedule(self, tokens: int) -> str:
        """Choose where and whether to merge, and return the result in words."""
        settings = self._settings(self.config)
        check_movable(settings)
        cost = settings.cost.at(tokens)
        asked = cut(settings.schedule_for(tokens), tokens, settings.protected, settings.entry.most)
        dense = self._settings(MergeConfig.create(self.config, r=0))
        judge = self._judge(dense)
        schedules = {ASKED: asked, **alternatives(asked, cost, early=judge is not None)}
        able = {NONE: dense, ASKED: settings}
        for name, schedule in schedules.items():
            if name != ASKED:
                able[name] = self._settings(MergeConfig.create(self.config, r=list(schedule)))
        times = dict(zip(able, self._times(list(able.values())), strict=True))
        verdicts = {} if judge is None else self._verdicts(judge, able)
        for name, mine in times.items():
            self.tried.append(self._tried(name, mine, times[NONE], schedules.get(name), cost, verdicts))
        allowed = {
            name: mine
            for name, mine in times.items()
            if judge is None or name in (NONE, ASKED) or not verdicts[ASKED].objection(verdicts[name])
        }
        name, gain = confirmed(allowed, lambda names: self._times([able[one] for one in names]))
        schedule = schedules.get(name, (0,) * len(asked))
        if name != ASKED:
            self.chosen["r"] = list(schedule) if any(schedule) else 0
        return in_words(name, gain, schedule, asked, cost)

    def _judge(self, dense: Settings) -> Judge | None:
        if self.wishes.judge is None:
            return None
        self._use(dense)
        return Judge(self._predict, self.wishes.judge)

    def _predict(self, batch: Any) -> Any:
        return self.call(**batch) if hasattr(batch, "keys") else self.call(batch)

    def _verdicts(self, judge: Judge, able: Mapping[str, Settings]) -> dict[str, Verdict]:
        """Return the verdicts on all alternatives; all are judged, so that the record shows what each would cost."""
        found: dict[str, Verdict] = {}
        for name, settings in able.items():
            self._use(settings)
            found[name] = judge.verdict()
        return found

    def _tried(
        self,
        name: str,
        mine: list[float],
        dense: list[float],
        schedule: Schedule | None,
        cost: ModelCost,
        verdicts: Mapping[str, Verdict],
    ) -> Tried:
        schedule = schedule or (0,) * len(cost.blocks)
        verdict, limit = verdicts.get(name), verdicts.get(ASKED)
        return Tried(
            what="schedule",
            choice=name,
            r=schedule,
            seconds=Spread.of(mine),
            speedup=Spread.of_ratios(dense, mine),
            flops_ratio=cost.total() / cost.total(schedule),
            moved=None if verdict is None else verdict.moved,
            correct=None if verdict is None else verdict.correct,
            reason="" if name == NONE or verdict is None or limit is None else limit.objection(verdict),
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def versions() -> dict[str, str]:
    """Return the versions that speed depends on."""
    return {"tokenmerge": str(sys.modules["tokenmerge"].__version__), "torch": str(torch.__version__)}


def describe(inputs: tuple[Any, ...], options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return shape and dtype of each tensor in the inputs of a pass."""
    leaves = pytree.tree_leaves((inputs, dict(options)))
    return tuple(f"{list(leaf.shape)} {leaf.dtype}" for leaf in leaves if isinstance(leaf, Tensor))


def base_of(config: MergeConfig) -> dict[str, Any]:
    """Return the settings of a config that a tuning rests on: all that differ from the defaults, but not how they run."""
    kept = {
        name: value
        for name, value in config.changed().items()
        if FIELDS[name].metadata["group"] != "running" and name != "trace"
    }
    if isinstance(pair := kept.get("r"), tuple):  # as in a config's JSON
        kept["r"] = {"r": pair[0], "inflect": pair[1]}
    return kept


def loaded(target: Target, record: ModelRecord, given: Any, inputs: tuple[str, ...], schedule: bool) -> Tuning:
    """Return a saved tuning, after checking that it is of this model, these settings, device and inputs.

    Args:
        target: the model.
        record: its record.
        given: a `Tuning`, or the path of a saved one.
        inputs: shapes and dtypes of the inputs that came with it; none are compared if there are none.
        schedule: whether a schedule is wanted.

    Raises:
        InputError: if it is of something else.
    """
    if not isinstance(given, Tuning | str | os.PathLike):
        raise InputError(f"load={given!r:.60}, but a Tuning or the path of a saved one was expected: give one")
    tuning = given if isinstance(given, Tuning) else Tuning.load(given)
    parameter = next(target.model.parameters())
    device = parameter.device
    own: dict[str, Any] = {
        "model": original_class(target.model).__name__,
        "blocks": record.settings.layers,
        "config": base_of(record.settings.config),
        "device": device.type,
        "dtype": str(parameter.dtype),
        "flops": record.settings.cost.at(tuning.tokens).total(),
        **({"inputs": inputs} if inputs else {}),
    }
    for name, value in own.items():
        known = getattr(tuning, name)
        in_force = name == "config" and record.tuned == tuning  # it has changed the settings itself
        if known != value and not in_force:
            words = [", ".join(one) if isinstance(one, tuple) else str(one) for one in (known, value)]
            raise InputError(
                f"the tuning is for {name} {words[0]:.200}, but {words[1]:.200} was found here: tune anew, or load another"
            )
    if schedule and not any(one.what == "schedule" for one in tuning.tried):
        raise InputError("the tuning chose no schedule, but schedule=True was asked for: tune anew with schedule=True")
    backend = tuning.chosen["backend"]
    if reasons := backend_refusals(backend, target):
        raise ConfigError(
            f"the tuning chose backend {backend!r}, which does not run here ({'; '.join(reasons)}): tune anew"
        )
    here = {"processor": processor_of(device), "threads": torch.get_num_threads(), "versions": versions()}
    other = [f"{name} {getattr(tuning, name)}" for name, value in here.items() if getattr(tuning, name) != value]
    if other:
        warnings.warn(
            f"the tuning was measured with {', '.join(other)}, which is not what runs here, so another choice may be faster",
            stacklevel=3,
        )
    return tuning
