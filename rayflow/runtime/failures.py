"""How an exception becomes the cause of a failure: one line that names the subtask, and whether trying again helps."""

from __future__ import annotations

import re
import traceback

from rayflow.core.messages import FailureCause
from rayflow.errors import (
    CommitLostError,
    ConfigError,
    CorruptCheckpointError,
    DataError,
    ExpressionError,
    PlanError,
    ProtocolError,
    SchemaChangedError,
    StateSchemaError,
    StateTooLargeError,
    UserCodeError,
)

FATAL = (
    CommitLostError, ConfigError, CorruptCheckpointError, PlanError, ProtocolError, SchemaChangedError,
    StateSchemaError, StateTooLargeError,
)  # fmt: skip
"""Errors that another attempt cannot mend."""
MISTAKES = (AssertionError, AttributeError, ImportError, LookupError, NameError, TypeError)
"""Errors of a program, not of its surroundings: of the engine, where user code has not raised them."""
_NAMES_SUBTASK = re.compile(r"step '[^']*' subtask \d+/\d+")


def cause_of(error: BaseException, *, where: str, position: str = "", fatal: tuple[type, ...] = ()) -> FailureCause:
    """The error as it travels to the coordinator. Only faults of data or of a program have a position (see `Restart`).

    Errors of the ``fatal`` types, and those that would come back for ever, end the job at once.
    """
    root: BaseException = error
    while isinstance(root, UserCodeError) and root.__cause__ is not None:
        root = root.__cause__
    repeatable = isinstance(error, (UserCodeError, DataError, ExpressionError, *MISTAKES))
    # User code and libraries raise messages of several lines; the traceback keeps them as they are.
    text = " ".join(line.strip() for line in str(error).splitlines()) or type(error).__name__
    return FailureCause(
        message=text if where in text or _NAMES_SUBTASK.match(text) else f"{where}: {text}",
        kind=type(error).__name__ if root is error else f"{type(error).__name__}({type(root).__name__})",
        position=position if repeatable else "",
        traceback="".join(traceback.format_exception(error)),
        fatal=isinstance(error, FATAL + fatal),
    )
