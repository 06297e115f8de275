"""Errors of expressions and kernels do not know where they happen; the operator does."""

from __future__ import annotations

from typing import Final

from rayflow.errors import ExpressionError, PlanError, RayflowError

UNLOCATED: Final = (ExpressionError, PlanError)
"""Raised by code that works on a batch without knowing step and subtask."""


def located(error: RayflowError, where: object) -> RayflowError:
    """The same error with step and subtask in front; raise it ``from error``."""
    return type(error)(f"{where}: {error}")


__all__ = ["UNLOCATED", "located"]
