"""The failure taxonomy. It is decided where the failure happens, before the error crosses a process."""

from typing import ClassVar

import pydantic


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


class Internal(RepertoryError):
    """A defect in an actor; the text carries the original exception."""

    code = "INTERNAL"


def classify(error: BaseException) -> RepertoryError:
    """Give any exception its place in the taxonomy; one that has a place already is returned as it is."""
    if isinstance(error, RepertoryError):
        return error
    if isinstance(error, pydantic.ValidationError):
        return BadInput(describe_validation_error(error))
    return Internal(f"{type(error).__name__}: {error}")


def describe_validation_error(error: pydantic.ValidationError) -> str:
    """One line per wrong field: its path, the value that was given, and what was expected."""
    return "; ".join(_describe_one(dict(item)) for item in error.errors(include_url=False))


def _describe_one(item: dict[str, object]) -> str:
    location = item["loc"]
    path = ".".join(str(part) for part in location) if isinstance(location, tuple) else str(location)
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
