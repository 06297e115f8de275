"""The operators and methods of an expression. A Python value as an operand, a `str` too, is a value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import pyarrow as pa

from rayflow.errors import PlanError
from rayflow.expressions.namespaces import DatetimeMethods, StringMethods

if TYPE_CHECKING:
    from rayflow.expressions.expr import Expr

# An `Expr`, a `pyarrow.compute.Expression`, or a Python value that pyarrow can make a scalar of.
Operand: TypeAlias = Any
# The class below has a property named `str`.
Text: TypeAlias = str


class Operators(ABC):
    """Each operator only adds a node, by one of the three functions below."""

    __slots__ = ()

    @abstractmethod
    def _method(self, kernel: Text, symbol: Text, *operands: Operand, **options: Any) -> Expr:
        """``self.symbol(operands, options)``, computed by ``kernel``."""

    @abstractmethod
    def _infix(self, kernel: Text, symbol: Text, other: Operand, *, reflected: bool = False) -> Expr:
        """``self symbol other``."""

    @abstractmethod
    def _prefix(self, kernel: Text, symbol: Text) -> Expr:
        """``symbol self``."""

    def __add__(self, other: Operand) -> Expr:
        return self._infix("add", "+", other)

    def __radd__(self, other: Operand) -> Expr:
        return self._infix("add", "+", other, reflected=True)

    def __sub__(self, other: Operand) -> Expr:
        return self._infix("subtract_checked", "-", other)

    def __rsub__(self, other: Operand) -> Expr:
        return self._infix("subtract_checked", "-", other, reflected=True)

    def __mul__(self, other: Operand) -> Expr:
        return self._infix("multiply_checked", "*", other)

    def __rmul__(self, other: Operand) -> Expr:
        return self._infix("multiply_checked", "*", other, reflected=True)

    def __truediv__(self, other: Operand) -> Expr:
        """Integers divide as float64; x / 0 is inf or nan."""
        return self._infix("true_divide", "/", other)

    def __rtruediv__(self, other: Operand) -> Expr:
        return self._infix("true_divide", "/", other, reflected=True)

    def __floordiv__(self, other: Operand) -> Expr:
        """Rounds towards minus infinity as in Python; an integer divided by zero is an `ExpressionError`."""
        return self._infix("floor_divide", "//", other)

    def __rfloordiv__(self, other: Operand) -> Expr:
        return self._infix("floor_divide", "//", other, reflected=True)

    def __mod__(self, other: Operand) -> Expr:
        """Has the sign of the divisor as in Python; an integer modulo zero is an `ExpressionError`."""
        return self._infix("modulo", "%", other)

    def __rmod__(self, other: Operand) -> Expr:
        return self._infix("modulo", "%", other, reflected=True)

    def __pow__(self, other: Operand) -> Expr:
        return self._infix("power_checked", "**", other)

    def __rpow__(self, other: Operand) -> Expr:
        return self._infix("power_checked", "**", other, reflected=True)

    def __eq__(self, other: Operand) -> Expr:  # type: ignore[override]
        return self._infix("equal", "==", _not_none(other))

    def __ne__(self, other: Operand) -> Expr:  # type: ignore[override]
        return self._infix("not_equal", "!=", _not_none(other))

    def __lt__(self, other: Operand) -> Expr:
        return self._infix("less", "<", other)

    def __le__(self, other: Operand) -> Expr:
        return self._infix("less_equal", "<=", other)

    def __gt__(self, other: Operand) -> Expr:
        return self._infix("greater", ">", other)

    def __ge__(self, other: Operand) -> Expr:
        return self._infix("greater_equal", ">=", other)

    def __and__(self, other: Operand) -> Expr:
        return self._infix("and_kleene", "&", other)

    def __rand__(self, other: Operand) -> Expr:
        return self._infix("and_kleene", "&", other, reflected=True)

    def __or__(self, other: Operand) -> Expr:
        return self._infix("or_kleene", "|", other)

    def __ror__(self, other: Operand) -> Expr:
        return self._infix("or_kleene", "|", other, reflected=True)

    def __xor__(self, other: Operand) -> Expr:
        return self._infix("xor", "^", other)

    def __rxor__(self, other: Operand) -> Expr:
        return self._infix("xor", "^", other, reflected=True)

    def __invert__(self) -> Expr:
        return self._prefix("invert", "~")

    def __neg__(self) -> Expr:
        return self._prefix("negate_checked", "-")

    def __abs__(self) -> Expr:
        return self.abs()

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        raise TypeError(
            f"the truth of {self!r} is not known before there is data; use & | ~ for and, or, not, with parentheses "
            "around comparisons, and .between(a, b) for a chained comparison"
        )

    # ---- methods ----

    def abs(self) -> Expr:
        return self._method("abs_checked", "abs")

    def is_null(self) -> Expr:
        return self._method("is_null", "is_null")

    def is_not_null(self) -> Expr:
        return self._method("is_valid", "is_not_null")

    def is_nan(self) -> Expr:
        return self._method("is_nan", "is_nan")

    def fill_null(self, value: Operand) -> Expr:
        """``value`` where null; a Python value takes the column's type and must fit it."""
        return self._method("fill_null", "fill_null", value)

    def is_in(self, values: Iterable[Any]) -> Expr:
        """True where the value is one of ``values``; False for null unless None is one of them."""
        return self._method("is_in", "is_in", value_set=_value_set(values))

    def between(self, lower: Operand, upper: Operand) -> Expr:
        """Both bounds belong."""
        both: Expr = (self >= lower) & (self <= upper)
        return both

    def cast(self, type: pa.DataType | Text, *, safe: bool = True) -> Expr:
        """In another type, a `pyarrow.DataType` or its name; what does not fit is an error unless ``safe=False``."""
        if isinstance(type, str):
            try:
                type = pa.type_for_alias(type)
            except ValueError:
                raise PlanError(f"cast got {type!r}; expected the name of a pyarrow type such as 'int64'") from None
        return self._method("cast", "cast", target_type=type, safe=safe)

    def round(self, decimals: int = 0) -> Expr:
        """Half to even, as Python rounds."""
        return self._method("round_half_even", "round", decimals=decimals)

    def floor(self) -> Expr:
        return self._method("floor", "floor")

    def ceil(self) -> Expr:
        return self._method("ceil", "ceil")

    def sqrt(self) -> Expr:
        """float64; nan for negative numbers."""
        return self._method("sqrt", "sqrt")

    def log(self, base: float | None = None) -> Expr:
        """float64; natural without ``base``; -inf for 0, nan for negative numbers."""
        return self._method("ln", "log") if base is None else self._method("logb", "log", float(base))

    def exp(self) -> Expr:
        return self._method("exp", "exp")

    def clip(self, lower: Operand = None, upper: Operand = None) -> Expr:
        """Not below ``lower`` nor above ``upper``; the type stays; nulls stay."""
        return self._method("clip", "clip", lower, upper)

    def field(self, name: Text) -> Expr:
        """A field of a struct column."""
        return self._method("struct_field", "field", indices=name)

    @property
    def str(self) -> StringMethods:
        return StringMethods(self)

    @property
    def dt(self) -> DatetimeMethods:
        return DatetimeMethods(self)


def _not_none(other: Operand) -> Operand:
    if other is None:
        raise TypeError("a comparison with None is never true; use .is_null() or .is_not_null()")
    return other


def _value_set(values: Iterable[Any]) -> pa.Array:
    if isinstance(values, str | bytes):
        raise PlanError(f"is_in got {values!r}; expected a list of values")
    if isinstance(values, pa.ChunkedArray):
        return values.combine_chunks()
    try:
        return values if isinstance(values, pa.Array) else pa.array(list(values))
    except (pa.ArrowException, TypeError) as error:
        raise PlanError(f"is_in got values that are not of one type: {error}") from error
