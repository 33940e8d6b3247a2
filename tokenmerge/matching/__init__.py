"""Matching algorithms: one file per idea; importing this package registers all of them."""

from tokenmerge.matching.bipartite import bipartite_matching
from tokenmerge.matching.registry import Matcher, get_matcher, has_backends, register_matcher, run_matcher

__all__ = ["Matcher", "bipartite_matching", "get_matcher", "has_backends", "register_matcher", "run_matcher"]
