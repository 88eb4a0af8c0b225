"""Exceptions of the package.

::

    CadyqError                  everything the package raises on purpose
    ├── ArgumentError           an argument has a wrong value (also a ValueError)
    ├── ImageError              a picture cannot be read, is not one, or is too large
    ├── CheckpointError         a model file is missing, damaged, foreign or too new
    ├── DataError               a data set folder is missing or not laid out as expected
    ├── UnsupportedError        a network or option that this part of the package refuses
    └── MissingExtraError       an optional dependency is needed and not installed

Every message names the argument, its value, what was expected and the remedy.
"""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "CadyqError",
    "CheckpointError",
    "DataError",
    "ImageError",
    "MissingExtraError",
    "UnsupportedError",
]


class CadyqError(Exception):
    """Base of all errors raised on purpose; the command line prints it without a traceback.

    ``exit_code`` is what the command line returns for it.
    """

    exit_code = 1


class ArgumentError(CadyqError, ValueError):
    """An argument has a value outside what the function accepts."""

    exit_code = 2

    def __init__(self, name: str, value: object, expected: str, remedy: str = "") -> None:
        message = f"{name} is {value!r}, expected {expected}"
        super().__init__(f"{message}; {remedy}" if remedy else message)


class ImageError(CadyqError):
    """A picture is missing, truncated, not a picture, or too large to be one."""

    exit_code = 3


class CheckpointError(CadyqError):
    """A model file is missing, damaged, of another kind, or written by a newer version."""

    exit_code = 4


class DataError(CadyqError):
    """A data set is missing or is not laid out as its loader expects."""

    exit_code = 5


class UnsupportedError(CadyqError):
    """The network, quantiser or option is valid, but not supported here."""

    exit_code = 6


class MissingExtraError(CadyqError):
    """An optional dependency is needed; the message says which extra installs it."""

    exit_code = 7
