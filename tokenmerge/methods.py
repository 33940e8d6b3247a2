"""Published token-reduction methods by name, each as a set of config fields.

`tokenmerge compare --methods …` accepts these names and the names of all registered matchers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from tokenmerge.config import PRESETS, MergeConfig
from tokenmerge.errors import ConfigError, one_of
from tokenmerge.frozen import FrozenDict
from tokenmerge.matching import get_entry, matcher_names
from tokenmerge.matching.values import fault_of
from tokenmerge.patching.match import check_matching

Kind = Literal["matching", "clustering", "pruning"]


@dataclasses.dataclass(frozen=True)
class Method:
    """Token-reduction method.

    Attributes:
        name: name of the method, as in `tokenmerge compare --methods NAME`.
        fields: fields of `MergeConfig` that select the method.
        kind: "matching", "clustering" or "pruning", the groups of arXiv 2210.09461, table 2.
        source: the publication.
        note: difference from the publication, or `""`.
        slow: whether the method is a slow reference for comparisons of accuracy.
    """

    name: str
    fields: Mapping[str, Any]
    kind: Kind = "matching"
    source: str = ""
    note: str = ""
    slow: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", FrozenDict(self.fields))

    @property
    def static(self) -> bool:
        """Whether the number of tokens left depends on shapes alone, and not on the images."""
        return not get_entry(str(self.fields.get("matcher", "bipartite"))).adaptive


_METHODS: dict[str, Method] = {}


def register_method(name: str, *, kind: Kind = "matching", source: str = "", note: str = "", **fields: Any) -> None:
    """Register a set of config fields under a name.

    Args:
        name: the new name.
        kind: "matching", "clustering" or "pruning".
        source: the publication.
        note: difference from the publication, or `""`.
        **fields: fields of `MergeConfig` without the schedule, such as `matcher="pitome"`.

    Raises:
        ConfigError: if another method has this name, or `kind` or a field is invalid.
        UnknownFieldError: (a TypeError) if a keyword is not a field of `MergeConfig`.

    Example:
        >>> import tokenmerge
        >>> tokenmerge.register_method("tome-values", metric="v", note="values in place of keys")
        >>> dict(tokenmerge.get_method("tome-values").fields)
        {'metric': 'v'}
    """
    _add(Method(name, fields, kind, source, note))


def _add(method: Method) -> None:
    if not isinstance(method.name, str) or not method.name:
        raise ConfigError(f"a method was to be registered as {method.name!r:.60}, but its name must be text: change it")
    if _METHODS.get(method.name, method) != method:
        raise ConfigError(f"a method named {method.name!r} is registered already: choose another name")
    if fault := fault_of(method.kind, Kind):
        raise ConfigError(
            f"method {method.name!r:.60} is of kind {method.kind!r:.60}, but it must be {fault}: change it"
        )
    check_matching(MergeConfig.create(**method.fields))
    _METHODS[method.name] = method


def get_method(name: str) -> Method:
    """Return the method of a name; the name of a matcher stands for that matcher with its default options.

    Args:
        name: a registered method or matcher.

    Raises:
        ConfigError: if the name is unknown.
    """
    if isinstance(name, str) and name in _METHODS:
        return _METHODS[name]
    if isinstance(name, str) and name in matcher_names():
        entry = get_entry(name)
        place = {"place": "after"} if "after" in entry.requires else {}
        return Method(name, {"matcher": name, **place}, source=entry.about)
    known = method_names()
    raise ConfigError(f"method {name!r:.60} is not known; known are {', '.join(known)}: {one_of(name, known)}")


def method_names() -> tuple[str, ...]:
    """Return the names of all registered methods, and of all matchers that no method uses, including those of plugins.

    Matchers that need trained predictors are left out.
    """
    used = {str(method.fields.get("matcher", "bipartite")) for method in _METHODS.values()}
    further = (name for name in matcher_names() if name not in used and not get_entry(name).learned)
    return (*_METHODS, *further)


_PAPER = "Bolya et al. 2023, Token Merging"
for _method in (
    Method("tome", {}, source=_PAPER),
    Method("tome_norm", {"combine": "norm"}, source="tokenmerge", note="the mean keeps the length of its members"),
    Method("greedy", {"matcher": "greedy"}, source=_PAPER, slow=True),
    Method("mutual", {"matcher": "mutual"}, source="mutual nearest neighbours (MPM)"),
    Method("pitome", {"matcher": "pitome"}, source="Tran et al. 2024, PiToMe"),
    Method("tofu", {"combine": "tofu"}, source="Kim et al. 2024, Token Fusion", note="half of the blocks prune"),
    Method(
        "strided", {"matcher": "strided"}, source="Bolya & Hoffman 2023, tomesd", note="no unmerging after attention"
    ),
    Method(
        "size_penalty",
        {"matcher": "informed", "options": {"size_penalty": "harmonic", "attention_power": 0.0}},
        source="n_i n_j / (n_i + n_j) · (1 − cos), as in LTMP and DyMU",
    ),
    Method(
        "adaptive",
        {"matcher": "threshold"},
        source="thresholds, as in DyMU and LTMP",
        note="calibrated on these images",
    ),
    Method("within", {"matcher": "temporal"}, source="tokenmerge", note="pairs within one moment of a clip first"),
    Method(
        "across",
        {"matcher": "temporal", "options": {"pairs": "across"}},
        source="tokenmerge",
        note="pairs of different moments first",
    ),
    Method("accurate", PRESETS["accurate"], note="the preset"),
    Method(
        "diffrate", {"matcher": "diffrate"}, source="Chen et al. 2023, DiffRate", note="half pruned; no learned rates"
    ),
    Method("kmeans2", {"matcher": "kmeans", "options": {"iterations": 2}}, "clustering", _PAPER),
    Method("kmeans5", {"matcher": "kmeans", "options": {"iterations": 5}}, "clustering", _PAPER),
    Method("kmedoids", {"matcher": "kmedoids"}, "clustering", "Marin et al. 2023, Token Pooling"),
    Method("atc", {"matcher": "agglomerative"}, "clustering", "Haurum et al. 2024, ATC", slow=True),
    Method("random", {"matcher": "random_prune"}, "pruning", _PAPER),
    Method("attention", {"matcher": "attention_prune"}, "pruning", "Liang et al. 2022, EViT without its fused token"),
    Method(
        "evit",
        {"matcher": "evit", "prop_attn": False},
        "pruning",
        "Liang et al. 2022, EViT",
        "off the shelf; the fused token is a mean",
    ),
    Method("ats", {"matcher": "ats"}, "pruning", "Fayyaz et al. 2022, ATS", "as many tokens in every image"),
):
    _add(_method)
