"""What was decided for a model, told to the logger after a patch or an update."""

from __future__ import annotations

import logging

from tokenmerge.patching.check import attention_choice
from tokenmerge.patching.log import log_cut, logger
from tokenmerge.patching.record import Settings
from tokenmerge.patching.settings import backend_choice, prop_attn_choice
from tokenmerge.patching.swap import original_class
from tokenmerge.patching.target import Target
from tokenmerge.schedule import Schedule, cut


def log_settings(target: Target, settings: Settings) -> None:
    """Log the settings of a model after a patch or an update: r, proportional attention, form of attention and backend.

    The reasons are looked up only if somebody listens, because that takes time.

    Args:
        target: the model.
        settings: its settings.
    """
    if not logger.isEnabledFor(logging.INFO):
        return
    name, cost = original_class(target.model).__name__, settings.cost
    proportional = prop_attn_choice(target, settings.config)
    attention, backend = attention_choice(target, settings.config), backend_choice(target, settings.config)
    schedule = settings.schedule_for(cost.tokens)
    logger.info("%s: %d blocks patched, r %s", name, settings.layers, _in_words(schedule))
    logger.info("%s: proportional attention %s: %s", name, proportional.form, proportional.reason)
    logger.info("%s: attention form %s: %s", name, attention.form, attention.reason)
    logger.info("%s: backend %s: %s", name, backend.form, backend.reason)
    if not settings.entry.adaptive:
        log_cut(settings, cost.tokens, schedule, cut(schedule, cost.tokens, cost.protected, cost.most))


def _in_words(schedule: Schedule) -> str:
    """Return r per block in words: one number if it is the same in all blocks.

    Args:
        schedule: r per block.
    """
    return f"{schedule[0]} in each" if len(set(schedule)) == 1 else f"{', '.join(map(str, schedule))}"
