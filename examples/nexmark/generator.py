"""The events of Nexmark: persons, auctions and bids in the proportion 1 : 3 : 46, with the standard skew.

Every event is a function of its number alone, and of the options; nothing is drawn in sequence. So any stretch of the
events can be made anywhere, again, and only those columns of it that are asked for. Of 50 events in a row the first is
a person, the next three are auctions and the others bids; event ``n`` has the time ``start + n / rate``.

Proportions, ratios and lengths are those of the generator of Apache Beam and of nexmark-flink; the random numbers, and
so the events, are others. Times have microseconds, not milliseconds: up to a million events a second no two events have
the same time, and queries that ask for the latest row have one answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import cache
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from examples.nexmark.randomness import Int64Array, UInt64Array, below, mix, unit, words
from rayflow.config import Duration, duration_us
from rayflow.errors import ConfigError

PERSONS, AUCTIONS, BIDS = 1, 3, 46
TOTAL: Final = PERSONS + AUCTIONS + BIDS
FIRST_ID: Final = 1000
"""Of persons and of auctions."""
FIRST_CATEGORY: Final = 10
CATEGORIES: Final = 5
HOT_STRETCH: Final = 100
"""The hot one of so many auctions, or persons, is the first of them; the hot bidder is the second."""
LEAD: Final = 10
"""So many auctions, or persons, that are yet to come may be named by an event."""
CHANNELS: Final = 10_000
HOT_CHANNELS: Final = ("Google", "Facebook", "Baidu", "Apple")
_POOL: Final = 4096
_STRIDE: Final = 953


class Kind(Enum):
    PERSON = "person"
    AUCTION = "auction"
    BID = "bid"

    @property
    def share(self) -> int:
        """So many of `TOTAL` events are of this kind."""
        return {Kind.PERSON: PERSONS, Kind.AUCTION: AUCTIONS, Kind.BID: BIDS}[self]

    @property
    def before(self) -> int:
        """So many of `TOTAL` events come before the first of this kind."""
        return {Kind.PERSON: 0, Kind.AUCTION: PERSONS, Kind.BID: PERSONS + AUCTIONS}[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class Nexmark:
    """Which events. Immutable and picklable; equal options make equal events."""

    events: int
    """Of all three kinds together."""
    rate: float = 10_000.0
    """Events a second of event time."""
    out_of_order: Duration = "0s"
    """How far a row may come behind later ones: rows are shuffled over stretches of about that length. The set of the
    events is the same for every value."""
    seed: int = 0
    start: datetime = datetime(2015, 7, 15, tzinfo=UTC)
    hot_auction_ratio: int = 2
    """One bid in so many is not for the hot auction; likewise below."""
    hot_bidders_ratio: int = 4
    hot_sellers_ratio: int = 4
    in_flight_auctions: int = 100
    active_people: int = 1000
    _gap_us: float = field(init=False, repr=False, compare=False)
    _delay_us: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.events < 0:
            raise ConfigError(f"Nexmark(events) must not be negative, got {self.events}")
        if not self.rate > 0:
            raise ConfigError(f"Nexmark(rate) must be events a second, more than 0, got {self.rate}")
        for name in ("hot_auction_ratio", "hot_bidders_ratio", "hot_sellers_ratio", "in_flight_auctions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Nexmark({name}) must be at least 1, got {getattr(self, name)}")
        object.__setattr__(self, "_gap_us", 1e6 / self.rate)
        object.__setattr__(self, "_delay_us", duration_us(self.out_of_order, what="Nexmark(out_of_order)"))

    @property
    def longest_auction(self) -> timedelta:
        """No auction lasts longer: twice the time in which as many begin as may be in flight, and a millisecond."""
        return timedelta(microseconds=1_000 + self._auction_spread_us)

    @property
    def _auction_spread_us(self) -> int:
        return max(2 * int(self.in_flight_auctions * TOTAL / AUCTIONS * self._gap_us), 1)

    def count(self, kind: Kind) -> int:
        """Rows of this kind among the events."""
        whole, rest = divmod(self.events, TOTAL)
        return whole * kind.share + min(max(rest - kind.before, 0), kind.share)

    def table(self, kind: Kind, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of a kind, in the order in which they are read."""
        return pa.Table.from_batches([self.batch(kind, 0, self.count(kind), columns)])

    def batch(self, kind: Kind, first: int, count: int, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """Rows ``first`` to ``first + count`` of a kind in reading order; the columns of `schema`, or some of them."""
        ranks = self.ranks(kind, np.arange(first, first + count, dtype=np.int64))
        rows = _Rows(self, ranks, ranks // kind.share * TOTAL + kind.before + ranks % kind.share)
        known = COLUMNS[kind]
        names = list(known) if columns is None else list(columns)
        return pa.RecordBatch.from_arrays([known[name](rows) for name in names], schema=schema(kind, names))

    def ranks(self, kind: Kind, positions: Int64Array) -> Int64Array:
        """Which row, counted by event time, stands at a position in reading order: shuffled within stretches."""
        stretch = self._stretch(kind)
        if stretch < 2:
            return positions
        start = positions // stretch * stretch
        size = np.minimum(stretch, self.count(kind) - start)
        step = np.where(size % _STRIDE == 0, 1, _STRIDE)  # 953 is prime, so this is a permutation
        return np.asarray(start + (positions - start) * step % size, np.int64)

    def _stretch(self, kind: Kind) -> int:
        """Rows of a kind whose times are less than ``out_of_order`` apart."""
        return int((self._delay_us / self._gap_us - TOTAL) * kind.share / TOTAL)

    def times(self, numbers: Int64Array) -> Int64Array:
        """Event times, us since the epoch."""
        since: Int64Array = np.floor(numbers * self._gap_us).astype(np.int64)
        return since + round(self.start.timestamp() * 1e6)


def schema(kind: Kind, columns: Sequence[str] | None = None) -> pa.Schema:
    """Names as in the SQL of Nexmark; ids, prices and categories are int64, times timestamp[us] without a zone."""
    names = list(COLUMNS[kind]) if columns is None else columns
    return pa.schema([(name, _TYPES.get(name, pa.int64())) for name in names])


class _Rows:
    """Some rows of one kind: their numbers, and what is random about them."""

    def __init__(self, config: Nexmark, ranks: Int64Array, numbers: Int64Array) -> None:
        self.config = config
        self.ranks = ranks
        self.numbers = numbers
        self._unsigned = numbers.astype(np.uint64)
        self._channel_numbers: pa.Array | None = None

    def bits(self, salt: int) -> UInt64Array:
        return mix(self._unsigned, self.config.seed * 64 + salt)

    def below(self, salt: int, bound: int | Int64Array) -> Int64Array:
        return below(self.bits(salt), bound)

    def one_of(self, salt: int, pool: pa.Array) -> pa.Array:
        return pool.take(pa.array(self.below(salt, len(pool)).astype(np.int32)))

    def price(self, salt: int) -> Int64Array:
        """From 100 to 100,000,000; the logarithm is spread evenly."""
        return np.rint(np.power(10.0, unit(self.bits(salt)) * 6.0) * 100.0).astype(np.int64)

    def channel_numbers(self) -> pa.Array:
        """Every second bid comes over one of the hot channels."""
        if self._channel_numbers is None:
            bits = self.bits(35)
            hot = CHANNELS + (bits & np.uint64(3)).astype(np.int64)
            numbers = np.where((bits & np.uint64(4)) != 0, hot, below(bits, CHANNELS))
            self._channel_numbers = pa.array(numbers.astype(np.int32))
        return self._channel_numbers

    def hot(self, salt: int, ratio: int, hot: Int64Array, others: Int64Array) -> pa.Array:
        return pa.array(np.where(self.below(salt, ratio) > 0, hot, others) + FIRST_ID)

    def person(self, salt: int) -> Int64Array:
        """One of the active people, or of those that come next; counted from 0."""
        people = self.numbers // TOTAL + 1
        active = np.minimum(people, self.config.active_people)
        return people - active + self.below(salt, active + LEAD)


# ------------------------------------------------------------------------------------------------------------ persons


def _text(*pieces: pa.Array | str) -> pa.Array:
    return pc.binary_join_element_wise(*pieces, "")


def _credit_card(rows: _Rows) -> pa.Array:
    digits = [rows.one_of(salt, _four_digits()) for salt in (13, 14, 15, 16)]
    return pc.binary_join_element_wise(*digits, " ")


@cache
def _four_digits() -> pa.Array:
    return pa.array([f"{i:04d}" for i in range(10_000)])


def _list(text: str) -> pa.Array:
    return pa.array(text.split(","))


_FIRST_NAMES: Final = _list("Peter,Paul,Luke,John,Saul,Vicky,Kate,Julie,Sarah,Deiter,Walter")
_LAST_NAMES: Final = _list("Shultz,Abrams,Spencer,White,Bartels,Walton,Smith,Jones,Noris")
_CITIES: Final = _list("Phoenix,Los Angeles,San Francisco,Boise,Portland,Bend,Redmond,Seattle,Kent,Cheyenne")
_STATES: Final = _list("AZ,CA,ID,OR,WA,WY")


@cache
def _pool(shortest: int, longest: int, special: bytes = b"") -> pa.Array:
    """Strings that events take one of: making each anew would cost more than all the rest."""
    return words(_POOL, shortest, longest, salt=shortest * 4096 + longest * 2, special=special)


# ----------------------------------------------------------------------------------------------------------- auctions


def _seller(rows: _Rows) -> pa.Array:
    hot = rows.numbers // TOTAL // HOT_STRETCH * HOT_STRETCH
    return rows.hot(20, rows.config.hot_sellers_ratio, hot, rows.person(21))


def _expires(rows: _Rows) -> pa.Array:
    """On average when so many more auctions as may be in flight have begun."""
    length = 1_000 + np.floor(unit(rows.bits(23)) * rows.config._auction_spread_us).astype(np.int64)
    return _timestamps(rows.config.times(rows.numbers) + length)


# --------------------------------------------------------------------------------------------------------------- bids


def _auction(rows: _Rows) -> pa.Array:
    last = rows.numbers // TOTAL * AUCTIONS + AUCTIONS - 1
    lowest = np.maximum(last - rows.config.in_flight_auctions, 0)
    others = lowest + rows.below(31, last - lowest + 1 + LEAD)
    return rows.hot(30, rows.config.hot_auction_ratio, last // HOT_STRETCH * HOT_STRETCH, others)


def _bidder(rows: _Rows) -> pa.Array:
    hot = rows.numbers // TOTAL // HOT_STRETCH * HOT_STRETCH + 1
    return rows.hot(32, rows.config.hot_bidders_ratio, hot, rows.person(33))


@cache
def _channels() -> pa.Array:
    return pa.array([*(f"channel-{i}" for i in range(CHANNELS)), *HOT_CHANNELS])


@cache
def _urls() -> pa.Array:
    """Of each channel; nine in ten of those that are not hot name the channel."""
    count = CHANNELS + len(HOT_CHANNELS)
    folders = [words(count, 3, 4, salt=salt, special=b"_") for salt in (101, 103, 105)]
    named = below(mix(np.arange(count, dtype=np.uint64), 107), 10) > 0
    named[CHANNELS:] = False
    reversed_bits = [int(f"{i:032b}"[::-1], 2) for i in range(count)]
    ids = [f"&channel_id={min(r, 2**32 - r)}" if name else "" for r, name in zip(reversed_bits, named, strict=True)]
    path = pc.binary_join_element_wise("https://www.nexmark.com", *folders, "item.htm?query=1", "/")
    return _text(path, pa.array(ids))


# ------------------------------------------------------------------------------------------------------------ columns


def _timestamps(times_us: Int64Array) -> pa.Array:
    return pa.array(times_us).view(_TIME)


def _time(rows: _Rows) -> pa.Array:
    return _timestamps(rows.config.times(rows.numbers))


def _id(rows: _Rows) -> pa.Array:
    return pa.array(rows.ranks + FIRST_ID)


_TIME: Final = pa.timestamp("us")
_TEXT_COLUMNS: Final = (
    "name", "emailAddress", "creditCard", "city", "state", "extra", "itemName", "description", "channel", "url"
)  # fmt: skip
_TYPES: Final = {"dateTime": _TIME, "expires": _TIME} | dict.fromkeys(_TEXT_COLUMNS, pa.string())

COLUMNS: Final[Mapping[Kind, Mapping[str, Callable[[_Rows], pa.Array]]]] = {
    Kind.PERSON: {
        "id": _id,
        "name": lambda rows: _text(rows.one_of(10, _FIRST_NAMES), " ", rows.one_of(11, _LAST_NAMES)),
        "emailAddress": lambda rows: _text(rows.one_of(12, _pool(3, 6)), "@", rows.one_of(19, _pool(3, 4)), ".com"),
        "creditCard": _credit_card,
        "city": lambda rows: rows.one_of(17, _CITIES),
        "state": lambda rows: rows.one_of(18, _STATES),
        "dateTime": _time,
        "extra": lambda rows: rows.one_of(9, _pool(106, 158)),
    },
    Kind.AUCTION: {
        "id": _id,
        "itemName": lambda rows: rows.one_of(24, _pool(3, 19, b" ")),
        "description": lambda rows: rows.one_of(25, _pool(3, 99, b" ")),
        "initialBid": lambda rows: pa.array(rows.price(26)),
        "reserve": lambda rows: pa.array(rows.price(26) + rows.price(27)),
        "dateTime": _time,
        "expires": _expires,
        "seller": _seller,
        "category": lambda rows: pa.array(FIRST_CATEGORY + rows.below(22, CATEGORIES)),
        "extra": lambda rows: rows.one_of(28, _pool(312, 467)),
    },
    Kind.BID: {
        "auction": _auction,
        "bidder": _bidder,
        "price": lambda rows: pa.array(rows.price(34)),
        "channel": lambda rows: _channels().take(rows.channel_numbers()),
        "url": lambda rows: _urls().take(rows.channel_numbers()),
        "dateTime": _time,
        "extra": lambda rows: rows.one_of(36, _pool(54, 81)),
    },
}
"""The columns of each kind in their order, and how they are made."""
