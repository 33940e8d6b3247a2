"""Random schedules of the same FLOPs as a constant r, which the paper drew 15,000 of, and the rank of the constant r."""

from __future__ import annotations

import random
import statistics
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenmerge.patching import model_cost, patch
from tokenmerge.tools.compare.data import Images
from tokenmerge.tools.compare.measuring import accuracy, common_of
from tokenmerge.tools.compare.scoring import Scores, score
from tokenmerge.tools.compare.variants import Variant, key_of
from tokenmerge.tools.report import Report, Row
from tokenmerge.tools.search.space import random_parameters, shaped
from tokenmerge.tools.signals import check
from tokenmerge.tools.statistics import paired_difference
from tokenmerge.tools.variants import share_weights

RANDOM = "random schedule"
"""Label of the rows."""


def random_rows(
    model: Any,
    constant: Variant,
    row: Row,
    scores: Scores,
    count: int,
    images: Images,
    reference: Tensor,
    folder: Path,
    context: str,
    options: Any,
    report: Report,
) -> tuple[list[Row], str]:
    """Score random schedules, add the rank of the constant r to its row, and return the rows and a sentence.

    Args:
        model: the unmerged model.
        constant: the variant with a constant r.
        row: row of the constant r, which gets its ranks.
        scores: scores of the constant r.
        count: number of schedules.
        images: the images.
        reference: log-probabilities of the unmerged model.
        folder: folder of stored scores.
        context: what stored scores depend on besides the config.
        options: options of the model.
        report: receiver of progress.
    """
    cost, layers = model_cost(model), len(constant.handle.schedule)
    target = cost.fraction(constant.handle.schedule)
    draw, copy = random.Random(0), share_weights(model)
    handle = patch(copy, constant.config)
    rows: list[Row] = []
    with report.progress() as progress:
        task = progress.add_task("random schedules", total=count)
        for _ in range(count):
            check()
            parts = random_parameters(draw, layers)
            schedule = shaped(parts, target, layers, cost.tokens, cost.protected, cost.fraction)
            handle.update(r=list(schedule))
            file = folder / f"{key_of(handle.config, context)}.json"
            mine = Scores.load(file)
            if mine is None or len(mine.top1) != len(scores.top1):
                mine, _ = score(copy, images, reference)
                mine.save(file)
            title = f"r={','.join(map(str, schedule))}"
            found: Row = {"method": RANDOM, "kind": "matching", "setting": title, "group": constant.group}
            found |= {"gflops": handle.summary().flops_after / 1e9, **accuracy(mine), **_difference(mine, scores)}
            rows.append({**found, "config": handle.config.to_json(), **common_of(options, len(mine.top1))})
            progress.advance(task)
    better = sum(one["top1"] > row["top1"] for one in rows)
    closer = sum(one["divergence"] < row["divergence"] for one in rows)
    row |= {"rank_top1": better + 1, "rank_divergence": closer + 1, "ranked": count + 1}
    best = max(one["top1"] for one in rows)
    middle = statistics.median(one["top1"] for one in rows)
    return rows, (
        f"the constant {row['setting']} has rank {better + 1:,} of {count + 1:,} by top-1 among random schedules of the same FLOPs, and "
        f"{closer + 1:,} by KL: its top-1 is {row['top1']:.2f}, the best of the others {best:.2f}, their median {middle:.2f}"
    )


def _difference(mine: Scores, first: Scores) -> Row:
    """Return the difference of top-1 with its interval, and of KL, to the constant r on the same images."""
    gained = int(((mine.top1 == 1) & (first.top1 == 0)).sum())
    lost = int(((mine.top1 == 0) & (first.top1 == 1)).sum())
    interval = paired_difference(gained, lost, len(mine.top1))
    return {
        "top1_difference": 100 * interval.mean,
        "top1_low": 100 * interval.low,
        "top1_high": 100 * interval.high,
        "divergence_difference": float((mine.divergence - first.divergence).mean()),
    }
