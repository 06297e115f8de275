"""Which tests of a suite say something about a connector; the others are not there, instead of being skipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from rayflow.operators.base import Guarantee

Method = TypeVar("Method", bound=Callable[..., None])


@dataclass(frozen=True, slots=True)
class Applies:
    to: tuple[Guarantee, ...]
    hook: str


def applies(*guarantees: Guarantee, hook: str = "") -> Callable[[Method], Method]:
    """Only to sinks with one of these guarantees, and with this fixture."""

    def mark(test: Method) -> Method:
        test.applies = Applies(guarantees, hook)  # type: ignore[attr-defined]
        return test

    return mark


def drop_what_does_not_apply(cls: type, suite: type, guarantee: Guarantee) -> None:
    """``cls``, which derives from the suite, keeps the tests marked by `applies` that say something about it."""
    for name in dir(suite):
        needs: Applies | None = getattr(getattr(suite, name), "applies", None)
        if needs is not None and name not in vars(cls):
            given = not needs.hook or _definer(cls, needs.hook) is not suite
            setattr(cls, name, getattr(suite, name) if guarantee in needs.to and given else None)


def _definer(cls: type, name: str) -> type:
    return next(each for each in cls.__mro__ if name in vars(each))
