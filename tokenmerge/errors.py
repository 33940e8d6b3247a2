"""The errors that tokenmerge raises.

Every message is one sentence that states what was found, what was expected and what to do. All classes derive from
`TokenMergeError`, so that a tool can print their messages without a traceback; each one also derives from the built-in
exception that fits it.
"""

from collections.abc import Iterable


def shown(value: object) -> str:
    """Return a value as text for a message, cut to 200 characters; a placeholder if its `repr` fails (huge integers)."""
    try:
        return f"{value!r:.200}"
    except Exception:  # `__repr__` of any class may raise anything
        return f"<a {type(value).__name__} that cannot be shown>"


def nearest(word: object, known: Iterable[object], alike: float = 0.7) -> str | None:
    """Return the known word that is most similar to a misspelt one; `None` if none is."""
    import difflib

    found = difflib.get_close_matches(str(word), [str(one) for one in known], n=1, cutoff=alike)
    return found[0] if found else None


def one_of(word: object, known: Iterable[object]) -> str:
    """Return what to do about an unknown word: the known one that was probably meant, or to choose one."""
    near = nearest(word, known) if isinstance(word, str) else None
    return "choose one of them" if near is None else f"did you mean {near}?"


class TokenMergeError(Exception):
    """Base class of all errors that tokenmerge raises on purpose."""


class ConfigError(TokenMergeError, ValueError):
    """Error for a setting with an invalid value, or settings that contradict each other."""


class UnknownFieldError(TokenMergeError, TypeError):
    """Error for a keyword that is not a field of `MergeConfig`."""


class InputError(TokenMergeError, ValueError):
    """Error for a tensor of the wrong shape or type, or a missing, empty or damaged file or folder."""


class DamagedFileError(InputError):
    """Error for one file of a data set that cannot be decoded: damaged, cut off, mislabelled, too large, or no file.

    Attributes:
        reason: the reason in words that follow the name of the file, such as "it is empty".
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (str(self), self.reason)


class UnsupportedModelError(TokenMergeError, ValueError):
    """Error for a model that cannot be patched correctly and is therefore left unchanged.

    Attributes:
        reasons: all reasons that were found, one sentence each.
    """

    def __init__(self, message: str, reasons: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.reasons = reasons

    def __reduce__(self) -> tuple[type, tuple[str, tuple[str, ...]]]:
        return type(self), (str(self), self.reasons)


class PatchError(TokenMergeError, RuntimeError):
    """Error for a model patched twice, a stale handle, or a state in which merging would give wrong results."""
