"""The errors a user of tokenmerge can meet.

Every message is one sentence in three parts: what was found, what was expected, what to do. All of them
derive from `TokenMergeError`, so a tool can print them without a traceback; each also derives from the
built-in class that a Python user would expect for it.
"""


def shown(value: object) -> str:
    """A value for a message: its beginning, where it is long or cannot be written at all (Python writes no huge numbers)."""
    try:
        return f"{value!r:.200}"
    except Exception:  # of whatever class it is
        return f"<a {type(value).__name__} that cannot be shown>"


class TokenMergeError(Exception):
    """Base class of everything tokenmerge raises on purpose."""


class ConfigError(TokenMergeError, ValueError):
    """A setting has a value that means nothing, or two settings contradict each other."""


class UnknownFieldError(TokenMergeError, TypeError):
    """A keyword is no field of `MergeConfig`."""


class InputError(TokenMergeError, ValueError):
    """A tensor has the wrong shape or type, or a file or folder is missing, empty or damaged."""


class UnsupportedModelError(TokenMergeError, ValueError):
    """The model cannot be patched right, so it is left untouched.

    Attributes:
        reasons: every reason that was found, in words.
    """

    def __init__(self, message: str, reasons: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.reasons = reasons

    def __reduce__(self) -> tuple[type, tuple[str, tuple[str, ...]]]:
        return type(self), (str(self), self.reasons)


class PatchError(TokenMergeError, RuntimeError):
    """A model is patched twice, a handle is stale, or merging met a state in which it would be wrong."""
