"""`tokenmerge search`: search with Optuna for settings of low KL divergence at a measured speed-up."""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenmerge import files
from tokenmerge.config import PRESETS, MergeConfig
from tokenmerge.errors import ConfigError, InputError, TokenMergeError
from tokenmerge.flops import ModelCost
from tokenmerge.ops.timing import Spread, keep_memory, take_turns
from tokenmerge.patching import model_cost, patch
from tokenmerge.patching.kept import lasting
from tokenmerge.tools.compare.data import Images, load_scored
from tokenmerge.tools.compare.scoring import Scores, score
from tokenmerge.tools.compare.variants import r_for_speedup
from tokenmerge.tools.pages import title_of
from tokenmerge.tools.report import Report, Row
from tokenmerge.tools.saved import apart_from_matching, saved_with
from tokenmerge.tools.search.figures import figures
from tokenmerge.tools.search.options import SearchOptions
from tokenmerge.tools.search.space import START, config_fields, full, random_parameters, suggest
from tokenmerge.tools.search.study import check_study, open_study, shared
from tokenmerge.tools.signals import check
from tokenmerge.tools.statistics import bootstrap, wilson
from tokenmerge.tools.variants import share_weights

_AGAIN = 6
"""Number of settings that are measured again together."""


class Judge:
    """Measurement of configs: speed relative to the unmerged model, and divergence of the predictions from it."""

    def __init__(self, model: Any, batches: Sequence[tuple[Tensor, Tensor]], timed: Tensor, rounds: int) -> None:
        self.model, self.batches, self.timed, self.rounds = model, batches, timed, rounds
        self.unmerged, self.reference = score(model, batches, None)
        self.copy = share_weights(model)
        self.handle = patch(self.copy, r=0)

    def scores(self, config: MergeConfig) -> Scores:
        """Return the scores of a config for every image."""
        self.handle.update(config)
        return score(self.copy, self.batches, self.reference)[0]

    @torch.inference_mode()
    def relative_time(self, config: MergeConfig) -> float:
        """Return the time of a config divided by the time of the unmerged model, measured in turns."""
        self.handle.update(config)
        calls = [lambda: self.model(self.timed), lambda: self.copy(self.timed)]
        times = take_turns(calls, self.timed.device, 1, self.rounds)
        return Spread.of_ratios(times[1], times[0]).p50

    @torch.inference_mode()
    def speeds(self, configs: Sequence[MergeConfig], rounds: int) -> list[float]:
        """Return the speed-ups of several configs over the unmerged model, measured in turns."""
        copies = [share_weights(self.model) for _ in configs]
        for copy, config in zip(copies, configs, strict=True):
            patch(copy, config)
        calls = [lambda timed_model=timed_model: timed_model(self.timed) for timed_model in (self.model, *copies)]
        times = take_turns(calls, self.timed.device, 1, rounds)
        return [Spread.of_ratios(times[0], mine).p50 for mine in times[1:]]


def run(options: SearchOptions, report: Report | None = None) -> list[Row]:
    """Search for the best config, check it on held-out images, write it, and return the rows of the check.

    Args:
        options: target and data of the search.
        report: receiver of the results; `None` prints them.

    Raises:
        InputError: if Optuna is missing, or data, storage or output cannot be used.
        ConfigError: if no setting reached the speed-up.
    """
    report = report or Report(options.json, options.html, writes=True)
    try:
        import optuna
    except ImportError:
        raise InputError("Optuna is not installed, but search needs it: pip install 'tokenmerge[search]'") from None
    files.check_writable(options.output, "--output", "best.json")
    keep_memory()
    model = load_scored(options, report)
    both = options.calibration + options.holdout
    images = Images(model, options, both)
    if len(images) < 2 * options.batch_size:
        raise InputError(
            f"{len(images)} images are too few to search on and to check on: give at least {2 * options.batch_size}"
        )
    batches = list(images)
    if sum(len(labels) for _, labels in batches) < 2:
        raise InputError(f"none of the files in {images.place} could be read, or one: check --data")
    cut = max(1, round(len(batches) * options.calibration / both))
    mine, others = _shuffled(batches, cut)
    judge = Judge(model, mine, images.first(options.batch_size), options.rounds)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = open_study(options)
    check_study(study, options, model, images)
    space = _space(study, judge, options, report.say)
    _optimize(study, judge, space, options, report)
    _random_schedules(judge, space, options, report)
    best, speed = _best(study, judge, options, space.attention, report)
    rows = _check(best, speed, study, judge, others, options, report)
    _print(report, rows, options)
    report.write(rows, lambda: figures(study, rows))
    return rows


def _shuffled(batches: list[tuple[Tensor, Tensor]], cut: int) -> tuple[list[Any], list[Any]]:
    """Split into calibration and held-out batches after shuffling, because the data are sorted by class."""
    images, labels = torch.cat([one for one, _ in batches]), torch.cat([one for _, one in batches])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(labels.device)
    size = len(batches[0][1])
    parts = [(images[index], labels[index]) for index in order.split(size)]
    return parts[:cut], parts[cut:]


@dataclasses.dataclass(frozen=True)
class Space:
    """Search space of one model on one device.

    Attributes:
        cost: FLOPs of the model.
        layers: number of blocks.
        attention: whether matchers can read the class token's attention.
        flops: factor of FLOPs reduction at which a constant r reaches the target speed-up.
        running: fields of every config: the form of attention and the backend that are fastest here, and fields saved with the
            model that do not say how tokens match.
    """

    cost: ModelCost
    layers: int
    attention: bool
    flops: float
    running: dict[str, Any]

    def config(self, parameters: Any) -> MergeConfig:
        """Return the config that parameters describe."""
        cost = self.cost
        return MergeConfig.create(
            **{
                **self.running,
                **config_fields(parameters, self.flops, self.layers, cost.tokens, cost.protected, cost.fraction),
            },
        )


def _space(study: Any, judge: Judge, search: SearchOptions, say: Callable[[str], Any]) -> Space:
    cost = model_cost(judge.model)
    layers = len(judge.handle.schedule)
    try:
        judge.handle.update(MergeConfig(r=1, matcher="informed"))
        attention = True
    except TokenMergeError:  # the class token's attention is not available
        attention = False

    # measured once for all processes of a study: what runs differently would be compared, and not what merges differently
    running = shared(study, "running", lambda: apart_from_matching(saved_with(search), _running(judge, search), say))

    def measured() -> float:
        try:
            r, _ = r_for_speedup(judge.model, judge.timed, {}, search.speedup, max(7, search.rounds))
            return 1 / cost.fraction((r,) * layers)
        except ConfigError:  # no constant r is fast enough, but another setting may be
            return search.speedup

    # small models and batches need a larger reduction than the speed-up
    return Space(cost, layers, attention, shared(study, "flops_speedup", measured), running)


def _running(judge: Judge, search: SearchOptions) -> dict[str, Any]:
    """Return the form of attention and the backend that are fastest for the paper's matching at the target speed-up by FLOPs."""
    try:
        judge.handle.update(MergeConfig(speedup=search.speedup))
    except ConfigError:  # no schedule reaches it
        judge.handle.update(MergeConfig(r=1))
    chosen = judge.handle.tune(judge.timed, rounds=max(7, search.rounds), call=judge.copy).chosen
    # any other backend than torch cannot run every matcher; "auto" takes it where it can
    return {"attention": chosen["attention"], **({"backend": "torch"} if chosen["backend"] == "torch" else {})}


def _optimize(study: Any, judge: Judge, space: Space, search: SearchOptions, report: Report) -> None:
    from optuna.trial import TrialState

    def objective(trial: Any) -> tuple[float, float]:
        chosen = space.config(suggest(trial, space.layers, space.attention))
        trial.set_user_attr("config", chosen.to_json())
        seconds = judge.relative_time(chosen)
        return seconds, float(judge.scores(chosen).divergence.mean())

    if not study.trials:
        for start in START:
            if space.attention or start.get("matcher") != "informed":
                study.enqueue_trial(full(start, space.layers), skip_if_exists=True)  # another process may start, too
    done = sum(trial.state.is_finished() for trial in study.trials)
    if done:
        report.say(f"{done} trials were there already, in {search.storage}")
    with report.progress() as progress:
        task = progress.add_task("searching", total=max(0, search.trials - done))
        while sum(trial.state.is_finished() for trial in study.trials) < search.trials:  # other workers count, too
            check()
            trial = study.ask()  # not `optimize`, which logs the traceback of a signal
            try:
                study.tell(trial, objective(trial))
            except BaseException:
                study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
                raise
            progress.advance(task)


def _random_schedules(judge: Judge, space: Space, search: SearchOptions, report: Report) -> None:
    """Compare a constant r with random schedules of the same FLOPs, with the paper's settings otherwise."""
    if not search.random:
        return
    draw = random.Random(search.seed)
    configs = [space.config(random_parameters(draw, space.layers)) for _ in range(search.random)]
    constant = float(judge.scores(space.config(full({}, space.layers))).divergence.mean())
    with report.progress() as progress:
        task = progress.add_task("random schedules", total=len(configs))
        found = []
        for config in configs:
            check()
            found.append(float(judge.scores(config).divergence.mean()))
            progress.advance(task)
    better = sum(loss < constant for loss in found)
    report.say(
        f"a constant r has KL {constant:.3f}; of {len(found)} random schedules of the same FLOPs {better} have less (the best "
        f"{min(found):.3f}, the median {statistics.median(found):.3f})"
    )


def _fastest_trial(study: Any, judge: Judge, search: SearchOptions) -> tuple[MergeConfig | None, float]:
    """Return the trial of lowest divergence that is fast enough with its speed, or `None` and the highest speed.

    Trials are measured again with more rounds, several at a time, in the order of their divergence, because the fastest of
    many short measurements is often just lucky.
    """
    finished = [trial for trial in study.trials if trial.values is not None]
    close = sorted((t for t in finished if 1 / t.values[0] >= 0.9 * search.speedup), key=lambda t: t.values[1])
    fastest = 0.0 if close else max((1 / trial.values[0] for trial in finished), default=0.0)
    for start in range(0, len(close), _AGAIN):
        configs = [MergeConfig.from_json(trial.user_attrs["config"]) for trial in close[start : start + _AGAIN]]
        speeds = judge.speeds(configs, max(9, search.rounds))
        fastest = max(fastest, *speeds)
        for config, speed in zip(configs, speeds, strict=True):
            if speed >= search.speedup:
                return config, speed
    return None, fastest


def _best(
    study: Any, judge: Judge, search: SearchOptions, attention: bool, report: Report
) -> tuple[MergeConfig, float]:
    """Return the config of lowest divergence among the best trial and constant schedules that are fast enough.

    Including constant schedules ensures that, up to noise, the result is no worse than a setting without a search.
    """
    config, fastest = _fastest_trial(study, judge, search)
    finalists = [("a trial", config, fastest)] if config is not None else []
    constants: dict[str, dict[str, Any]] = {"a constant r": {}, "a constant r, combine='norm'": {"combine": "norm"}}
    if attention:
        constants["a constant r, preset='accurate'"] = dict(PRESETS["accurate"])
    for name, fields in constants.items():
        fields = {**study.user_attrs["running"], **fields}
        try:
            r, speed = r_for_speedup(judge.model, judge.timed, fields, search.speedup, max(9, search.rounds))
        except ConfigError:
            continue
        finalists.append((name, MergeConfig.create(r=r, **fields), speed))
    if not finalists:
        raise ConfigError(
            f"no setting reached {search.speedup:g}x here (the fastest was {fastest:.2f}x): ask for less, give more --trials, or "
            "a larger --batch-size"
        )
    scores = [float(judge.scores(config).divergence.mean()) for _, config, _ in finalists]
    for (name, _, speed), divergence in zip(finalists, scores, strict=True):
        report.say(f"finalist: {name}, {speed:.2f}x, KL {divergence:.3f} on calibration images")
    _, best, speed = finalists[scores.index(min(scores))]
    return best, speed


def _check(
    best: MergeConfig,
    speed: float,
    study: Any,
    judge: Judge,
    others: Sequence[Any],
    search: SearchOptions,
    report: Report,
) -> list[Row]:
    """Compare the result with a constant r of equal measured speed on held-out images, and write the files."""
    model = judge.model
    running = study.user_attrs["running"]
    r, plain_speed = r_for_speedup(model, judge.timed, running, best, max(9, search.rounds))
    settings = {"found": (best, speed), "constant r": (MergeConfig(r=r, **running), plain_speed)}
    check = Judge(model, others, judge.timed, search.rounds)
    scores = {name: check.scores(config) for name, (config, _) in settings.items()}
    unmerged = check.unmerged
    difference = bootstrap(100 * (scores["found"].top1 - scores["constant r"].top1))
    further = bootstrap(scores["found"].divergence - scores["constant r"].divergence)
    rows: list[Row] = [
        {
            "setting": "unmerged",
            "images": len(unmerged.top1),
            "speedup": 1.0,
            "top1": 100 * float(unmerged.top1.mean()),
            "divergence": 0.0,
        }
    ]
    for name, (config, fast) in settings.items():
        score = scores[name]
        row = {"setting": name, "speedup": fast, "top1": 100 * float(score.top1.mean())}
        rows.append({**row, "divergence": float(score.divergence.mean()), "config": config.to_json()})
    if speed < 0.95 * search.speedup:
        report.warn(
            f"the setting found is {speed:.2f}x as fast when it is measured again, and {search.speedup:g}x was asked for: give more "
            "--rounds, or a larger --batch-size"
        )
    for row, score in zip(rows, (unmerged, scores["found"], scores["constant r"]), strict=True):
        interval = wilson(int(score.top1.sum()), len(score.top1))
        row |= {"top1_low": 100 * interval.low, "top1_high": 100 * interval.high}
    rows[1] |= {"top1_difference": str(difference), "divergence_difference": str(further)}
    frontier = [
        {"speedup": 1 / t.values[0], "divergence": t.values[1], "config": t.user_attrs["config"]}
        for t in study.best_trials
    ]
    beside = search.output.with_suffix(".frontier.json")
    try:
        files.write_json(search.output, json.loads(lasting(best).to_json()), "--output")
        files.write_json(beside, sorted(frontier, key=lambda point: point["speedup"]), "the frontier")
    except InputError:
        report.say(f"found: {best.to_json()}")
        raise
    report.say(f"wrote {search.output} (use it as --r {search.output}, or MergeConfig.from_json) and {beside}")
    return rows


def _print(report: Report, rows: Sequence[Row], search: SearchOptions) -> None:
    report.table(
        f"search on {title_of(search.model)}, checked on {rows[0]['images']} other images",
        ("setting", "speed-up", "top-1", "KL"),
        ((r["setting"], f"{r['speedup']:.2f}x", f"{r['top1']:.2f}", f"{r['divergence']:.3f}") for r in rows),
    )
    report.say(f"found − constant: top-1 {rows[1]['top1_difference']}, KL {rows[1]['divergence_difference']} (95 %)")
