"""Matching algorithms, one module per idea; importing this package registers all of them."""

from tokenmerge.matching.bipartite import bipartite_matching
from tokenmerge.matching.registry import (
    OFFERED,
    Entry,
    Matcher,
    check_options,
    entry_for,
    get_entry,
    get_matcher,
    matcher_names,
    register_matcher,
)

# isort: split
from tokenmerge.matching import (  # noqa: F401  (they register themselves)
    avit,
    clustering,
    dynamicvit,
    informed,
    pairing,
    pruning,
    spvit,
    temporal,
)

__all__ = [
    "OFFERED",
    "Entry",
    "Matcher",
    "bipartite_matching",
    "check_options",
    "entry_for",
    "get_entry",
    "get_matcher",
    "matcher_names",
    "register_matcher",
]
