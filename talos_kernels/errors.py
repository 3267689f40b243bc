"""The errors of the engine: built-in types under one base."""

__all__ = [
    "TalosError",
    "TalosOSError",
    "TalosRuntimeError",
    "TalosTypeError",
    "TalosValueError",
]


class TalosError(Exception):
    """Base of every error that the engine raises on purpose."""


class TalosValueError(TalosError, ValueError):
    """An argument or a file holds a value that cannot be used."""


class TalosTypeError(TalosError, TypeError):
    """An argument has a type or dtype that cannot be used."""


class TalosRuntimeError(TalosError, RuntimeError):
    """The call came in a state in which it cannot be carried out."""


class TalosOSError(TalosError, OSError):
    """A file could not be read or written."""
