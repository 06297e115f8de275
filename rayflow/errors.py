"""Every error that rayflow raises on purpose.

A message is one sentence that names the step, the subtask, what was expected, what came and what to do.
Classes say who has to act: the builder of the flow (`PlanError`), the owner of the data (`DataError`), the owner of
the user function (`UserCodeError`), the operator of storage, of another system or of the cluster (`StorageError`,
`ConnectorError`, `ClusterError`), or us (`ProtocolError`, which means that a numbered rule was about to be broken).
"""

from __future__ import annotations


class RayflowError(Exception):
    """Base of all errors raised by rayflow."""


class PlanError(RayflowError, ValueError):
    """The flow cannot be built or planned as written: a wrong column, type, option or schema."""


class ConfigError(PlanError):
    """An option has a value that cannot be used."""


class ExpressionError(RayflowError):
    """An expression failed on real data (overflow, a cast that does not fit)."""


class DataError(RayflowError):
    """Input data cannot be processed: an unreadable row, a file that is gone, a null where none may be."""


class KeyHashError(DataError):
    """A key column has a type that has no stable hash (rule K2)."""


class UserCodeError(RayflowError):
    """A user function raised or returned something else than it promised; the cause is chained."""


class SchemaChangedError(UserCodeError, DataError):
    """Rows of another schema than those before them, where the first rows had decided it.

    Ends the job at once: after a restart the wrong rows would be the first, and then nothing would be wrong any more.
    """


class StorageError(RayflowError):
    """Checkpoint storage could not do what was asked; nothing committed is lost."""


class ConnectorError(RayflowError):
    """A system that a source reads or a sink writes cannot be reached, or refuses for now: the job tries again with
    its restart strategy, nothing committed is lost."""


class CorruptCheckpointError(StorageError):
    """A manifest or state file is missing, torn or flipped; named by its path, never silently replaced."""


class FencedError(StorageError):
    """A later coordinator took over this checkpoint directory (rule C8)."""


class CommitLostError(RayflowError):
    """What a complete checkpoint had pre-committed is gone; the job must not go on (rule S1)."""


class ClusterError(RayflowError):
    """The Ray cluster cannot run the plan (too small, gone, unreachable)."""


class GuaranteeWarning(UserWarning):
    """A flow gives less than ``CheckpointConfig(mode)`` asks for; with ``strict`` it is a `PlanError` instead."""


class JobFailedError(RayflowError):
    """The job ended with an error; the cause is chained and told in the message."""


class JobCancelledError(RayflowError):
    """The job was cancelled by its user."""


class StateTooLargeError(RayflowError):
    """State held by the coordinator passed its bound (``state="memory"``)."""


class StateSchemaError(RayflowError):
    """Restored state does not fit what the flow declares now, and there is no safe migration; nothing was changed."""


class ProtocolError(RayflowError):
    """A numbered protocol rule was about to be broken; raised, never asserted, because data would be wrong."""
