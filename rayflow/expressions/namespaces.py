"""The methods behind `col(...).str` and `col(...).dt`. Nulls stay null in all of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Literal

from rayflow.errors import PlanError

if TYPE_CHECKING:
    from rayflow.expressions.expr import Expr
    from rayflow.expressions.operators import Operand, Operators

_CALENDAR_UNITS: Final = {
    "ns": "nanosecond", "us": "microsecond", "ms": "millisecond", "s": "second", "m": "minute", "h": "hour",
    "d": "day", "w": "week", "mo": "month", "q": "quarter", "y": "year",
}  # fmt: skip


class StringMethods:
    """String column in; what comes out is said where it is not a string. Characters are Unicode code points."""

    __slots__ = ("_expr",)

    def __init__(self, expr: Operators) -> None:
        self._expr = expr

    def lower(self) -> Expr:
        return self._expr._method("utf8_lower", "str.lower")

    def upper(self) -> Expr:
        return self._expr._method("utf8_upper", "str.upper")

    def strip(self, characters: str | None = None) -> Expr:
        """Without leading and trailing white space, or ``characters``."""
        if characters is None:
            return self._expr._method("utf8_trim_whitespace", "str.strip")
        return self._expr._method("utf8_trim", "str.strip", characters=characters)

    def contains(self, pattern: str, *, regex: bool = False, ignore_case: bool = False) -> Expr:
        """Bool: ``pattern`` occurs, as it stands or as a regular expression (RE2)."""
        kernel = "match_substring_regex" if regex else "match_substring"
        return self._expr._method(kernel, "str.contains", pattern=pattern, ignore_case=ignore_case)

    def starts_with(self, prefix: str, *, ignore_case: bool = False) -> Expr:
        """Bool."""
        return self._expr._method("starts_with", "str.starts_with", pattern=prefix, ignore_case=ignore_case)

    def ends_with(self, suffix: str, *, ignore_case: bool = False) -> Expr:
        """Bool."""
        return self._expr._method("ends_with", "str.ends_with", pattern=suffix, ignore_case=ignore_case)

    def replace(self, old: str, new: str, *, regex: bool = False, count: int = -1) -> Expr:
        """Every ``old`` (the first ``count`` if not negative) becomes ``new``."""
        kernel = "replace_substring_regex" if regex else "replace_substring"
        return self._expr._method(
            kernel, "str.replace", pattern=old, replacement=new, max_replacements=None if count < 0 else count
        )

    def slice(self, start: int, stop: int | None = None) -> Expr:
        """Characters from ``start`` up to, not including, ``stop``; negative numbers count from the end."""
        return self._expr._method("utf8_slice_codeunits", "str.slice", start=start, stop=stop)

    def len(self) -> Expr:
        """Number of characters, int32 (int64 for large strings)."""
        return self._expr._method("utf8_length", "str.len")

    def concat(self, *others: Operand, separator: str = "") -> Expr:
        """Joined with other string columns or values, row by row; null where any of them is."""
        return self._expr._method("concat", "str.concat", *others, separator=separator)

    def split(self, separator: str) -> Expr:
        """List of strings."""
        return self._expr._method("split_pattern", "str.split", pattern=separator)

    def split_part(self, separator: str, index: int) -> Expr:
        """Piece number ``index`` (from 0) of what `split` gives; null where there are not so many."""
        if index < 0:
            raise PlanError(f"str.split_part got the index {index}; expected 0 for the first piece, or more")
        return self._expr._method("split_part", "str.split_part", separator=separator, index=index)

    def count(self, pattern: str, *, regex: bool = False, ignore_case: bool = False) -> Expr:
        """How often ``pattern`` occurs, without overlaps, int32 (int64 for large strings)."""
        kernel = "count_substring_regex" if regex else "count_substring"
        return self._expr._method(kernel, "str.count", pattern=pattern, ignore_case=ignore_case)

    def extract(self, pattern: str) -> Expr:
        """What the one named group of a regular expression (RE2) matches first, as in ``r"id=(?P<id>[0-9]+)"``.

        Null where the expression does not match; other groups are written ``(?:...)``.
        """
        if pattern.count("(?P<") != 1:
            raise PlanError(f"str.extract got {pattern!r}; expected one named group, as in r'id=(?P<id>[0-9]+)'")
        return self._expr._method("extract_group", "str.extract", pattern=pattern)

    def to_datetime(self, format: str, *, unit: Literal["s", "ms", "us", "ns"] = "us") -> Expr:
        """Timestamp without zone, parsed by a ``strptime`` format; text that does not match is an error."""
        return self._expr._method("strptime", "str.to_datetime", format=format, unit=unit)


class DatetimeMethods:
    """Timestamp or date column in; int64 out unless said otherwise. Fields are those of the column's own zone."""

    __slots__ = ("_expr",)

    def __init__(self, expr: Operators) -> None:
        self._expr = expr

    def year(self) -> Expr:
        return self._expr._method("year", "dt.year")

    def month(self) -> Expr:
        """1 to 12."""
        return self._expr._method("month", "dt.month")

    def day(self) -> Expr:
        """1 to 31."""
        return self._expr._method("day", "dt.day")

    def hour(self) -> Expr:
        return self._expr._method("hour", "dt.hour")

    def minute(self) -> Expr:
        return self._expr._method("minute", "dt.minute")

    def second(self) -> Expr:
        return self._expr._method("second", "dt.second")

    def day_of_week(self) -> Expr:
        """Monday is 0, as in Python's ``weekday()``."""
        return self._expr._method("day_of_week", "dt.day_of_week")

    def day_of_year(self) -> Expr:
        """1 to 366."""
        return self._expr._method("day_of_year", "dt.day_of_year")

    def truncate(self, every: str) -> Expr:
        """The start of the period that holds the time, in the type that came in.

        ``every`` is a number and one of ns, us, ms, s, m, h, d, w (from Monday), mo, q, y: ``"15m"``, ``"1d"``.
        """
        match = re.fullmatch(r"([1-9]\d*)(ns|us|ms|s|m|h|d|w|mo|q|y)", every)
        if match is None:
            raise PlanError(
                f"dt.truncate got {every!r}; expected a positive number and one of "
                f"{', '.join(_CALENDAR_UNITS)}, as in '15m' or '1d'"
            )
        unit = _CALENDAR_UNITS[match[2]]
        return self._expr._method("floor_temporal", "dt.truncate", multiple=int(match[1]), unit=unit)

    def date(self) -> Expr:
        """date32."""
        return self.truncate("1d").cast("date32", safe=False)

    def epoch(self, unit: Literal["s", "ms", "us", "ns"] = "us") -> Expr:
        """Ticks since 1970-01-01 UTC, floored to ``unit``."""
        if unit not in ("s", "ms", "us", "ns"):
            raise PlanError(f"dt.epoch got the unit {unit!r}; expected one of s, ms, us, ns")
        return self._expr._method("epoch", "dt.epoch", unit=unit)
