"""The failure taxonomy. It is decided where the failure happens, before the error crosses a process."""

from collections.abc import Sequence
from typing import ClassVar

import pydantic

SHOWN = 10
"""Wrong fields that an error names; of more it says how many."""


class RepertoryError(Exception):
    """Base of every error that an actor, a handle or a script raises on purpose.

    `code` is the gRPC status name that the error keeps on every transport.
    """

    code: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class BadInput(RepertoryError):
    """The caller's fault: the message names the field, the value and what was expected. Never retried."""

    code = "INVALID_ARGUMENT"

    def __init__(self, message: str, fields: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.fields = tuple(fields)
        """Path of each wrong field and what is wrong with it, where that is known."""


class Unavailable(RepertoryError):
    """The actor is gone or not ready; the same call may succeed elsewhere or later."""

    code = "UNAVAILABLE"


class DeadlineExceeded(RepertoryError):
    """The named actor did not answer in the time that the caller gave it."""

    code = "DEADLINE_EXCEEDED"


class Stale(RepertoryError):
    """The call needs another weight version, or another run state, than the one that is there."""

    code = "FAILED_PRECONDITION"


class Corrupt(RepertoryError):
    """Stored or computed data is not what it must be: a broken checkpoint, a non-finite gradient."""

    code = "DATA_LOSS"


class Unauthenticated(RepertoryError):
    """The caller has shown no token, or none that is known."""

    code = "UNAUTHENTICATED"


class Denied(RepertoryError):
    """The caller is known and may not do this."""

    code = "PERMISSION_DENIED"


class Exhausted(RepertoryError):
    """There is no room for the call now; it may be made again after `retry_after_s`."""

    code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Internal(RepertoryError):
    """A defect in an actor; the text carries the original exception."""

    code = "INTERNAL"


def classify(error: BaseException) -> RepertoryError:
    """Give any exception its place in the taxonomy; one that has a place already is returned as it is."""
    if isinstance(error, RepertoryError):
        return error
    if isinstance(error, pydantic.ValidationError):
        return BadInput(describe_validation_error(error), wrong_fields(error))
    return Internal(f"{type(error).__name__}: {error}")


def describe_validation_error(error: pydantic.ValidationError) -> str:
    """One line per wrong field: its path, the value that was given, and what was expected."""
    shown = [_describe_one(item) for item in _first(error)]
    return "; ".join(shown + ([f"and {left} more"] if (left := error.error_count() - len(shown)) else []))


def wrong_fields(error: pydantic.ValidationError) -> list[tuple[str, str]]:
    """Path of each wrong field, and what is wrong with it."""
    return [(_path(item), _describe_one(item)) for item in _first(error)]


def _first(error: pydantic.ValidationError) -> list[dict[str, object]]:
    return [dict(item) for item in error.errors(include_url=False)[:SHOWN]]


def _path(item: dict[str, object]) -> str:
    location = item["loc"]
    return ".".join(str(part) for part in location) if isinstance(location, tuple) else str(location)


def _describe_one(item: dict[str, object]) -> str:
    path = _path(item)
    value = repr(item.get("input"))
    shown = value if len(value) <= 80 else value[:77] + "..."
    if item["type"] == "missing":
        return f"{path}: required, but missing"
    if item["type"] == "extra_forbidden":
        return f"{path}: unknown field"
    message = str(item["msg"]).removeprefix("Value error, ")
    if not path and item["type"] == "value_error":
        # Of a rule over several fields, which its text names; the whole input would bury them.
        return message
    return f"{path or 'value'}: got {shown}; {message[:1].lower() + message[1:]}"
