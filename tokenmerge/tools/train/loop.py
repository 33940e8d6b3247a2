"""The training loop: epochs, updates, evaluation and checkpoints."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge.errors import InputError, shown
from tokenmerge.patching import Handle
from tokenmerge.tools.eval.data import guarded, loading
from tokenmerge.tools.eval.precision import Precision
from tokenmerge.tools.eval.scores import Score, seen_by
from tokenmerge.tools.processes import Processes, agree
from tokenmerge.tools.report import Report, Row
from tokenmerge.tools.settings import Setting
from tokenmerge.tools.signals import check, on_sigterm
from tokenmerge.tools.train import merging
from tokenmerge.tools.train.checkpoints import Checkpoints, progress_of
from tokenmerge.tools.train.data import Augmented, EpochBatches, make_loader, seed_all
from tokenmerge.tools.train.logbook import Logbook
from tokenmerge.tools.train.objective import Objective
from tokenmerge.tools.train.options import TrainingError, TrainOptions
from tokenmerge.tools.train.progress import TrainProgress
from tokenmerge.tools.train.sharding import gathered, whole_norm
from tokenmerge.tools.train.state import RunState


class Stopped(Exception):  # noqa: N818 not an error
    """Signal that the run was asked to end and has saved its state."""


@dataclasses.dataclass(kw_only=True)
class Loop:
    """Training loop of one run.

    Attributes:
        accelerator: the `Accelerator`.
        args: options of the run.
        model: the model that Accelerate prepared; `bare` is the patched model inside it, and `handle` its handle.
        optimizer, schedule: the prepared optimizer, and timm's learning rate schedule.
        ema: timm's moving average, or `None`.
        state: all of these, for checkpoints.
        objective: the loss.
        images, batches: training images and their order.
        validation: an iterable of batches, or `None`.
        checkpoints, logbook, report: writers of checkpoints, records and messages.
    """

    accelerator: Any
    args: TrainOptions
    model: nn.Module
    bare: nn.Module
    handle: Handle
    optimizer: Any
    schedule: Any
    ema: Any
    state: RunState
    objective: Objective
    images: Augmented
    batches: EpochBatches
    validation: Any
    checkpoints: Checkpoints
    logbook: Logbook | None
    report: Report
    update: int = 0
    """Number of updates of the weights so far."""
    _asked_to_stop: bool = False
    _skipped: set[str] = dataclasses.field(default_factory=set)

    def run(self) -> list[Row]:
        """Train to the end, and return the rows of the last evaluation.

        Raises:
            Stopped: if SIGTERM arrived; the state is saved.
            TrainingError: if the loss is not finite, or a checkpoint cannot be written.
        """
        rows: list[Row] = []
        with (
            on_sigterm(self._ask_to_stop),
            loading(),
            TrainProgress(self.report, self.accelerator.is_main_process) as bars,
        ):
            for epoch in range(self.update // self.batches.updates, self.args.epochs):
                self._epoch(epoch, bars)
                rows = self._evaluate(epoch, bars)
                self._save()
                if epoch + 1 < self.args.epochs and self._stop_everywhere():
                    raise Stopped
        return rows

    def _ask_to_stop(self) -> None:
        self._asked_to_stop = True

    def _epoch(self, epoch: int, bars: TrainProgress) -> None:
        self.batches.epoch = self.images.epoch = epoch
        self.batches.start = self.update - epoch * self.batches.updates
        self.objective.set_epoch(epoch)
        merging.set_epoch(self.handle, self.args, epoch)
        self.model.train()
        steps = self.args.grad_accum_steps
        loader = iter(guarded(make_loader(self.images, self.batches, self.args.workers)))
        bars.epoch(epoch, self.args.epochs, self.batches.updates, self.batches.start)
        start, total, done = time.perf_counter(), 0.0, 0
        for place in range(self.batches.start, self.batches.updates):
            loss = sum(self._micro(self._next(loader), epoch, place, micro) for micro in range(steps)) / steps
            self.update += 1
            if self.schedule is not None:  # --sched none
                self.schedule.step_update(self.update)
            if self.ema is not None:
                self.ema.update(self.bare, step=self.update)
            total, done = total + loss, done + 1
            rate = done * self.args.global_batch(self.accelerator.num_processes) / (time.perf_counter() - start)
            bars.advance(loss, rate)
            self._log(epoch, place, loss, rate)
            if place + 1 < self.batches.updates:  # the last one is saved after its evaluation
                self._between_updates()
        with agree(TrainingError):
            if self.accelerator.is_main_process and done:
                self.report.say(
                    f"epoch {epoch}: loss {total / done:.4f}, {rate:.1f} images/s, r {list(self.handle.schedule)}"
                )

    def _next(self, loader: Iterator[Any]) -> Any:
        try:
            return next(loader)
        except InputError:  # a data loader process died
            if self.accelerator.num_processes == 1:  # with several processes, the others would wait for this one
                self._save()
                if self._asked_to_stop:
                    raise Stopped from None
            raise

    def _between_updates(self) -> None:
        check()
        interval = self.args.recovery_interval
        stop = self._stop_everywhere()
        if stop or (interval and self.update % interval == 0):
            self._save()
        if stop:
            raise Stopped

    def _micro(self, batch: Any, epoch: int, place: int, micro: int) -> float:
        """Run one forward and backward pass, and the optimizer at the end of an update; return the mean loss of all processes."""
        accelerator = self.accelerator
        self._name(batch.skipped)
        if len(batch.labels) < self.args.batch_size:
            raise TrainingError(
                f"no image could be read in 50 in a row (the first is {batch.skipped[0]}): check the files in {str(self.args.data)!r}"
            )
        images, labels = batch.images.to(accelerator.device), batch.labels.to(accelerator.device)
        with accelerator.accumulate(self.model):
            seed_all(self.args.seed, "step", self.update, micro, accelerator.process_index)
            with accelerator.autocast():
                loss = self.objective(self.model, images, labels)
            value = float(accelerator.reduce(loss.detach(), "mean"))
            if not math.isfinite(value):
                self._stop_at(value, "loss", epoch, place, micro)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                limit = math.inf if self.args.clip_grad is None else self.args.clip_grad
                norm = whole_norm(accelerator.clip_grad_norm_(self.model.parameters(), limit))
                if not math.isfinite(norm) and accelerator.scaler is None:  # a scaler skips such steps by itself
                    self._stop_at(norm, "gradient", epoch, place, micro)
                self.optimizer.step()
                self.optimizer.zero_grad()
        return value

    def _stop_at(self, value: float, what: str, epoch: int, place: int, micro: int) -> None:
        """Save the weights if they are still finite, and raise an error that names the update and its images."""
        order, step = self.batches.samples(), place * self.args.grad_accum_steps + micro
        size = self.args.batch_size * self.accelerator.num_processes
        files = [self.images.folder.name_of(index) for index, _ in order[step * size : (step + 1) * size]]
        self.optimizer.zero_grad()
        whole = self._all_finite()
        kept = "the weights were already damaged; go on from an earlier checkpoint"
        if whole:
            self._save()
            kept = "the weights before it are saved"
        raise TrainingError(
            f"the {what} became {value} at update {self.update} (epoch {epoch}, batch {step}: {', '.join(files[:3])} …); {kept}: "
            "lower --lr, give --clip-grad 1 or, with --amp, --amp-dtype bfloat16, in a new --output, or mend the images"
        )

    def _all_finite(self) -> bool:
        """Return whether all weights in all processes are finite."""
        mine = (p.to_local() if hasattr(p, "to_local") else p for p in self.bare.parameters())
        bad = sum(not bool(p.isfinite().all()) for p in mine)
        return float(self.accelerator.reduce(torch.tensor(float(bad), device=self.accelerator.device), "sum")) == 0

    def _stop_everywhere(self) -> bool:
        """Return whether any process was asked to stop, so that all stop at the same update."""
        if self.accelerator.num_processes == 1:
            return self._asked_to_stop
        flag = torch.tensor(float(self._asked_to_stop), device=self.accelerator.device)
        return float(self.accelerator.reduce(flag, "sum")) > 0

    def _name(self, problems: tuple[str, ...]) -> None:
        for problem in problems:
            if problem not in self._skipped:
                self._skipped.add(problem)
                self.report.warn(f"{problem} (the next image stands in for it)")

    def _log(self, epoch: int, place: int, loss: float, rate: float) -> None:
        last = place + 1 == self.batches.updates
        if not (last or self.update % self.args.log_interval == 0):
            return
        row: Row = {
            "kind": "train",
            "update": self.update,
            "epoch": epoch + (place + 1) / self.batches.updates,
            "loss": loss,
        }
        row |= {
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": rate,
            "schedule": list(self.handle.schedule),
        }
        if self.accelerator.device.type == "cuda":
            row["peak_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
        with agree(TrainingError):
            if self.logbook is not None:
                self.logbook.add(row)

    def _save(self) -> Path:
        progress = {"update": self.update, "processes": self.accelerator.num_processes}
        return self.checkpoints.save(self.state, progress, self.accelerator.is_main_process)

    def go_on(self, checkpoint: Path) -> None:
        """Load a checkpoint; all processes must call it.

        Raises:
            TrainingError: if it is damaged, or of another run.
        """
        progress, most = progress_of(checkpoint), self.args.epochs * self.batches.updates
        if progress["update"] > most or progress["processes"] != self.accelerator.num_processes:
            raise TrainingError(
                f"the checkpoint {shown(str(checkpoint))} is of update {progress['update']} on {progress['processes']} processes, "
                f"but this run has {most} updates on {self.accelerator.num_processes}: give the options it was written with"
            )
        self.state.load(checkpoint)
        self.update = progress["update"]
        if self.schedule is not None:
            self.schedule.step_update(self.update)

    @property
    def result(self) -> nn.Module:
        """The model to save: the moving average if there is one, otherwise the trained model."""
        return self.bare if self.ema is None else self.ema.module

    def _evaluate(self, epoch: int, bars: TrainProgress) -> list[Row]:
        """Evaluate each setting of `eval_r` on the validation images of all processes, and return the rows."""
        if self.validation is None:
            with agree(TrainingError):
                if self.logbook is not None:
                    self.logbook.draw()
            return []
        import tokenmerge

        model, handle = self.result, tokenmerge.handle_of(self.result)
        settings = self.args.evaluated or (merging.setting_at(self.args, epoch),)
        model.eval()
        bars.evaluation(len(self.validation))
        with gathered(model), agree(TrainingError):
            scores = evaluate_settings(
                model,
                handle,
                settings,
                guarded(self.validation),
                self.accelerator,
                bars.tick,
                self._name,
                Precision if self.args.several else Score,
            )
        rows: list[Row] = []
        for score in scores:
            score.join(Processes(self.accelerator.process_index, self.accelerator.num_processes, ""))
            if not score.images:
                raise TrainingError(
                    f"none of the validation images in {str(self.args.data)!r} could be read: check the files, or give --val-split ''"
                )
            row: Row = {"kind": "eval", "update": self.update, "epoch": float(epoch + 1), "r": score.setting.label}
            row |= score.percentages()
            rows.append({**row, "images": score.images, "gflops": score.gflops})
        with agree(TrainingError):
            if self.logbook is not None:
                for row in rows:
                    self.logbook.add(row)
                self.logbook.draw()
                key, name = next(iter(scores[0].METRICS.items()))
                self.report.say("  " + ", ".join(f"r={row['r']}: {name} {row[key]:.2f}" for row in rows))
        return rows


def evaluate_settings(
    model: nn.Module,
    handle: Handle,
    settings: tuple[Setting, ...],
    batches: Iterator[Any],
    accelerator: Any,
    tick: Callable[[], None],
    name: Callable[[tuple[str, ...]], None],
    kind: type[Score | Precision] = Score,
) -> Sequence[Score | Precision]:
    """Return one score per setting over this process's batches; the last setting remains active afterwards."""

    def forward(setting: Setting) -> Callable[[Tensor], Tensor]:
        def call(images: Tensor) -> Tensor:
            merging.apply(handle, setting)
            with accelerator.autocast():
                logits: Tensor = model(images)
            return logits

        return call

    scores = []
    for setting in settings:
        merging.apply(handle, setting)
        gflops = handle.summary().flops_after / 1e9
        scores.append(kind(setting, forward(setting), gflops, seen=seen_by(model, handle)))
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):  # otherwise every r would be compiled
        for batch in batches:
            name(batch.skipped)
            if len(batch.labels):
                images, labels = batch.images.to(accelerator.device), batch.labels.to(accelerator.device)
                for score in scores:
                    score.add(images, labels)
            tick()
    return scores
