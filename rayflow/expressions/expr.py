"""The nodes of an expression. Nodes are immutable and pickle; nothing is computed until a batch comes."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import pyarrow as pa
import pyarrow.acero as acero
import pyarrow.compute as pc

from rayflow.errors import ExpressionError, PlanError
from rayflow.expressions.kernels import COMPOSED
from rayflow.expressions.operators import Operand, Operators
from rayflow.expressions.wording import list_names, reason, shown_option, tell_missing


class _MissingColumn(Exception):
    """Told further by `Expr.evaluate` and `Expr.result_type`, which know the whole expression."""


class _KernelFailure(Exception):
    """A kernel refused types or values; the message is its reason."""


class Expr(Operators):
    """A value for each row of a batch, built from columns, values and operators.

    Comparisons and ``& | ~`` follow Kleene's logic of three values: a comparison with null is null,
    ``null & False`` is False. Integer overflow is an error, never a wrong number.
    """

    __slots__ = ()

    # ---- what it needs and what it gives ----

    @abstractmethod
    def columns(self) -> frozenset[str] | None:
        """Names of the columns it reads; None if unknown, because a `pyarrow.compute.Expression` is inside."""

    @abstractmethod
    def output_name(self) -> str:
        """Name of the result: the alias, or else the name of the leftmost column, as in Polars."""

    @abstractmethod
    def _compute(self, batch: pa.RecordBatch) -> Any:
        """An array of the batch's length, or a scalar that stands for all rows."""

    def evaluate(self, batch: pa.RecordBatch) -> pa.Array:
        """One value a row.

        Raises `PlanError` for a missing column, and `ExpressionError` if the data cannot be processed (overflow,
        a cast that does not fit); both name the expression. The caller adds step, subtask and position.
        """
        try:
            return _spread(self._compute(batch), batch.num_rows)
        except _MissingColumn as missing:
            raise PlanError(f"expression {self!r}: {missing}") from None
        except _KernelFailure as failure:
            raise ExpressionError(f"expression {self!r} failed on the data: {failure}") from failure.__cause__

    def result_type(self, schema: pa.Schema) -> pa.DataType:
        """Type of the result for batches of ``schema``, found by evaluating one row of nulls.

        Raises `PlanError` if a column is missing or the types do not fit.
        """
        # Not on no rows: pyarrow compares times with and without a zone, and fails only when there is a row.
        nulls = pa.RecordBatch.from_arrays([pa.nulls(1, field.type) for field in schema], schema=schema)
        try:
            return self._compute(nulls).type
        except _MissingColumn as missing:
            raise PlanError(f"expression {self!r}: {missing}") from None
        except _KernelFailure as failure:
            raise PlanError(f"expression {self!r} does not fit the schema: {failure}") from failure.__cause__

    # ---- nodes on top of this one ----

    def _method(self, kernel: str, symbol: str, *operands: Operand, **options: Any) -> Expr:
        args = (self, *(_operand(operand) for operand in operands))
        return Call(kernel, args, _Style.METHOD, symbol, tuple(options.items()))

    def _infix(self, kernel: str, symbol: str, other: Operand, *, reflected: bool = False) -> Expr:
        right = _operand(other)
        return Call(kernel, (right, self) if reflected else (self, right), _Style.INFIX, symbol)

    def _prefix(self, kernel: str, symbol: str) -> Expr:
        return Call(kernel, (self,), _Style.PREFIX, symbol)

    def alias(self, name: str) -> Expr:
        """The same under another name."""
        return Alias(self, name)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Column(Expr):
    name: str

    def columns(self) -> frozenset[str]:
        return frozenset((self.name,))

    def output_name(self) -> str:
        return self.name

    def _compute(self, batch: pa.RecordBatch) -> Any:
        index = batch.schema.get_field_index(self.name)
        if index < 0:
            raise _MissingColumn(tell_missing(self.name, batch.schema))
        return batch.column(index)

    def __repr__(self) -> str:
        return f"col({self.name!r})"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Literal(Expr):
    scalar: pa.Scalar

    def columns(self) -> frozenset[str]:
        return frozenset()

    def output_name(self) -> str:
        return "literal"

    def _compute(self, batch: pa.RecordBatch) -> Any:
        return self.scalar

    def __repr__(self) -> str:
        return repr(self.scalar.as_py())


class _Style(Enum):
    INFIX = auto()
    PREFIX = auto()
    METHOD = auto()
    FUNCTION = auto()


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Call(Expr):
    """A kernel on the results of ``args``. Kernels go by name, because pyarrow's functions do not pickle."""

    kernel: str
    args: tuple[Expr, ...]
    style: _Style
    symbol: str
    options: tuple[tuple[str, Any], ...] = ()

    def columns(self) -> frozenset[str] | None:
        return _columns_of(self.args)

    def output_name(self) -> str:
        if self.kernel == "struct_field":
            return str(dict(self.options)["indices"])
        named = (arg for arg in self.args if not isinstance(arg, Literal))
        return next(named, self.args[0]).output_name()

    def _compute(self, batch: pa.RecordBatch) -> Any:
        values = [arg._compute(batch) for arg in self.args]
        function = COMPOSED.get(self.kernel) or getattr(pc, self.kernel)
        try:
            return function(*values, **dict(self.options))
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            types = ", ".join(str(value.type) for value in values)
            raise _KernelFailure(f"{self!r} on {types}: {reason(error)}") from error

    def __repr__(self) -> str:
        shown = [repr(arg) for arg in self.args]
        if self.style is _Style.INFIX:
            return f"({shown[0]} {self.symbol} {shown[1]})"
        if self.style is _Style.PREFIX:
            return f"{self.symbol}{shown[0]}"
        options = [f"{name}={shown_option(value)}" for name, value in self.options if value is not None]
        if self.style is _Style.FUNCTION:
            return f"{self.symbol}({', '.join(shown + options)})"
        return f"{shown[0]}.{self.symbol}({', '.join(shown[1:] + options)})"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Alias(Expr):
    expr: Expr
    name: str

    def columns(self) -> frozenset[str] | None:
        return self.expr.columns()

    def output_name(self) -> str:
        return self.name

    def _compute(self, batch: pa.RecordBatch) -> Any:
        return self.expr._compute(batch)

    def __repr__(self) -> str:
        return f"{self.expr!r}.alias({self.name!r})"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ArrowExpression(Expr):
    """A `pyarrow.compute.Expression`, computed by an Acero plan over the one batch."""

    expression: pc.Expression

    def columns(self) -> None:
        return None

    def output_name(self) -> str:
        return str(self.expression)

    def _compute(self, batch: pa.RecordBatch) -> Any:
        # Of the public ways the cheapest (1,000 rows: 0.023 ms; a dataset scanner 0.07, Table.filter 0.06 ms).
        # One thread, or the order of the rows would be lost above 32,768 of them.
        source = acero.TableSourceNodeOptions(pa.Table.from_batches([batch]))
        project = acero.ProjectNodeOptions([self.expression], ["value"])
        plan = acero.Declaration.from_sequence(
            [acero.Declaration("table_source", source), acero.Declaration("project", project)]
        )
        try:
            result = plan.to_table(use_threads=False).column(0)
        except (pa.ArrowException, ValueError, TypeError) as error:
            raise _KernelFailure(
                f"{self!r} with the columns {list_names(batch.schema.names)}: {reason(error)}"
            ) from error
        return _spread(result, batch.num_rows)

    def __repr__(self) -> str:
        return f"arrow({self.expression})"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Conditional(Expr):
    """``then`` where ``condition`` is true, ``otherwise`` where it is false or null."""

    condition: Expr
    then: Expr
    otherwise: Expr

    def columns(self) -> frozenset[str] | None:
        return _columns_of((self.condition, self.then, self.otherwise))

    def output_name(self) -> str:
        return self.then.output_name() if not isinstance(self.then, Literal) else self.otherwise.output_name()

    def _compute(self, batch: pa.RecordBatch) -> Any:
        condition = _spread(self.condition._compute(batch), batch.num_rows)
        try:
            if condition.null_count:
                condition = pc.fill_null(condition, False)
            try:
                return pc.if_else(condition, self.then._compute(batch), self.otherwise._compute(batch))
            except _KernelFailure:
                return self._compute_guarded(batch, condition)
        except (pa.ArrowException, ValueError, TypeError) as error:
            raise _KernelFailure(f"{self!r}: {reason(error)}") from error

    def _compute_guarded(self, batch: pa.RecordBatch, condition: pa.Array) -> Any:
        """Each branch on its own rows only, so that the condition guards a branch that fails on the others.

        It is the second try because both branches on all rows are faster, and hardly ever fail.
        """
        inverse = pc.invert(condition)
        chosen = batch.filter(condition), batch.filter(inverse)
        then = _spread(self.then._compute(chosen[0]), chosen[0].num_rows)
        otherwise = _spread(self.otherwise._compute(chosen[1]), chosen[1].num_rows)
        return pc.if_else(condition, _at_rows(then, condition), _at_rows(otherwise, inverse))

    def __repr__(self) -> str:
        return f"when({self.condition!r}).then({self.then!r}).otherwise({self.otherwise!r})"


@dataclass(frozen=True, slots=True)
class When:
    """``when(condition)`` so far: branches that wait for their value, or for ``otherwise``."""

    branches: tuple[tuple[Expr, Expr], ...]
    condition: Expr | None

    def then(self, value: Operand) -> When:
        if self.condition is None:
            raise PlanError("then() must follow when(); write when(a).then(x).when(b).then(y).otherwise(z)")
        return When((*self.branches, (self.condition, _operand(value))), None)

    def when(self, condition: Operand) -> When:
        if self.condition is not None:
            raise PlanError("when() must be followed by then() before the next when()")
        return When(self.branches, as_expr(condition))

    def otherwise(self, value: Operand) -> Expr:
        """The expression; a Python value is a value, None is null."""
        if self.condition is not None:
            raise PlanError("otherwise() must follow then(); write when(a).then(x).otherwise(y)")
        result = _operand(value)
        for condition, then in reversed(self.branches):
            result = Conditional(condition, then, result)
        return result


def col(name: str) -> Expr:
    """The column ``name``."""
    if not isinstance(name, str):
        raise PlanError(f"col() takes the name of a column, got {name!r}; for a value write lit({name!r})")
    return Column(name)


def lit(value: Any) -> Expr:
    """The same value in every row: a Python value or a `pyarrow.Scalar`."""
    if isinstance(value, pa.Scalar):
        return Literal(value)
    try:
        return Literal(pa.scalar(value))
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise PlanError(
            f"{value!r} cannot be a value in an expression ({reason(error)}); "
            "use a number, string, bytes, bool, date, time, timedelta, Decimal or None"
        ) from error


def when(condition: Operand) -> When:
    """``when(a).then(x).when(b).then(y).otherwise(z)``: the value of the first condition that is true.

    A branch that fails on some rows only fails the expression if the condition selects them, so
    ``when(col("n") == 0).then(0).otherwise(col("sum") // col("n"))`` is safe.
    """
    return When((), as_expr(condition))


def coalesce(*exprs: Operand) -> Expr:
    """The first that is not null; a str names a column."""
    if not exprs:
        raise PlanError("coalesce() needs at least one expression, got none")
    return Call("coalesce", tuple(as_expr(expr) for expr in exprs), _Style.FUNCTION, "coalesce")


def as_expr(value: Operand) -> Expr:
    """An expression as it is, a `pyarrow.compute.Expression` wrapped, a str as a column, else a literal."""
    return col(value) if isinstance(value, str) else _operand(value)


def _operand(value: Operand) -> Expr:
    if isinstance(value, Expr):
        return value
    if isinstance(value, pc.Expression):
        return ArrowExpression(value)
    if isinstance(value, When):
        raise PlanError("when(...).then(...) is not finished; add .otherwise(value), None for null")
    return lit(value)


def _spread(result: Any, rows: int) -> pa.Array:
    if isinstance(result, pa.Array):
        return result
    return result.combine_chunks() if isinstance(result, pa.ChunkedArray) else pa.repeat(result, rows)


def _at_rows(values: pa.Array, mask: pa.Array) -> pa.Array:
    """Value number i at the i-th true row of ``mask``, null elsewhere."""
    positions = pc.subtract(pc.cumulative_sum(pc.cast(mask, pa.int64())), pa.scalar(1))
    return values.take(pc.if_else(mask, positions, pa.scalar(None, pa.int64())))


def _columns_of(exprs: tuple[Expr, ...]) -> frozenset[str] | None:
    needed: frozenset[str] = frozenset()
    for expr in exprs:
        columns = expr.columns()
        if columns is None:
            return None
        needed |= columns
    return needed
