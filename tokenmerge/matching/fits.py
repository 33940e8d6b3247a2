"""Whether a matcher can do what a config says of matching."""

from __future__ import annotations

from tokenmerge.config import FIELDS, MergeConfig
from tokenmerge.errors import ConfigError
from tokenmerge.matching.registry import check_options, entry_for


def check_matching(config: MergeConfig, layers: int | None = None) -> None:
    """Raise `ConfigError` unless the matcher can do what the config says of matching.

    Args:
        config: the settings.
        layers: blocks of the model, where one is known.
    """
    entry = entry_for(config)
    check_options(entry.name, config.options, layers)
    for name, field in FIELDS.items():
        value, usual = getattr(config, name), field.default
        if field.metadata["by_matcher"] and name not in entry.offered and value != usual and name != "backend":
            raise ConfigError(f"{name}={value!r} means nothing to matcher {entry.name!r}: leave it at {usual!r}")
    if entry.most == "half":
        keep = config.keep if isinstance(config.keep, list) else [config.keep or 1]
        if min(keep, default=1) < 0.5:
            raise ConfigError(
                f"keep={config.keep!r}, but matcher {entry.name!r} merges at most half of the tokens of a block: keep 0.5 or "
                "more"
            )
    if config.place == "before" and entry.looks_inside:
        raise ConfigError(
            f"place='before' merges before attention runs, but matcher {entry.name!r} looks at it: use place='between'"
        )
