"""Queries that look at one bid at a time: q0, q1, q2, q10, q13, q14, q21, q22."""

from __future__ import annotations

from functools import cache
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from examples.nexmark.query import query
from examples.nexmark.source import Events
from rayflow import col, when
from rayflow.stream import Stream

EURO: Final = 0.908
SIDE_ROWS: Final = 10_000


@query("select auction, bidder, price, dateTime, extra from bid")
def q0(events: Events) -> Stream:
    """Pass through: what the engine itself costs."""
    return events.bid.select("auction", "bidder", "price", "dateTime", "extra")


@query("select auction, bidder, 0.908::double * price as price, dateTime, extra from bid")
def q1(events: Events) -> Stream:
    """Currency conversion: prices in euro."""
    return events.bid.select("auction", "bidder", "dateTime", "extra", price=col("price") * EURO)


@query("select auction, price from bid where auction % 123 = 0")
def q2(events: Events) -> Stream:
    """Selection: bids on every 123rd auction."""
    return events.bid.filter(col("auction") % 123 == 0).select("auction", "price")


@query(
    """
    select auction, bidder, price, dateTime, extra,
           strftime(dateTime, '%Y-%m-%d') as day, strftime(dateTime, '%H:%M') as minute
    from bid
    """
)
def q10(events: Events) -> Stream:
    """Log to files: bids with day and minute.

    The standard query writes folders by day and minute. Here they are columns of Parquet files, which become visible
    with each checkpoint; the runner writes every query's result that way.
    """
    return events.bid.select(
        "auction",
        "bidder",
        "price",
        "dateTime",
        "extra",
        day=col("dateTime").dt.date().cast("string"),
        minute=col("dateTime").cast("string").str.slice(11, 16),
    )


class SideInput:
    """The table of the other side, in every subtask: keys 0 to 9,999 and a value for each."""

    def __init__(self) -> None:
        self._table = side_input()

    def __call__(self, bids: pa.RecordBatch) -> pa.RecordBatch:
        keys = pc.subtract(bids["auction"], pc.multiply(pc.divide(bids["auction"], SIDE_ROWS), SIDE_ROWS))
        found = pc.index_in(keys, value_set=self._table["key"])
        known = found.is_valid()
        values = self._table["value"].combine_chunks().take(found.filter(known))
        rows = bids.filter(known)
        return pa.RecordBatch.from_arrays([*rows.select(_Q13).columns, values], schema=Q13_SCHEMA)


@cache
def side_input() -> pa.Table:
    return pa.table({"key": range(SIDE_ROWS), "value": [str(i) for i in range(SIDE_ROWS)]})


_Q13: Final = ["auction", "bidder", "price", "dateTime"]
Q13_SCHEMA: Final = pa.schema(
    [("auction", pa.int64()), ("bidder", pa.int64()), ("price", pa.int64()), ("dateTime", pa.timestamp("us")),
     ("value", pa.string())]
)  # fmt: skip


@query(
    """
    with side_input as (select range as key, range::varchar as value from range(10000))
    select auction, bidder, price, dateTime, value from bid join side_input on auction % 10000 = key
    """
)
def q13(events: Events) -> Stream:
    """Bounded side input: bids with what a fixed table says of their auction.

    The standard query looks the table up as it is in a file when the bid comes; here every subtask holds it.
    """
    return events.bid.select(*_Q13).map_batches(SideInput, schema=Q13_SCHEMA)


@query(
    """
    select auction, bidder, 0.908::double * price as price,
           case when hour(dateTime) between 8 and 18 then 'dayTime'
                when hour(dateTime) <= 6 or hour(dateTime) >= 20 then 'nightTime'
                else 'otherTime' end as bidTimeType,
           dateTime, extra, (length(extra) - length(replace(extra, 'c', ''))) as c_counts
    from bid where 0.908::double * price > 1000000 and 0.908::double * price < 50000000
    """
)
def q14(events: Events) -> Stream:
    """Calculation: the time of day of bids in a range of prices, and how often their text has the letter c."""
    hour = col("dateTime").dt.hour()
    time_type = when(hour.between(8, 18)).then("dayTime").when((hour <= 6) | (hour >= 20)).then("nightTime")
    return (
        events.bid.with_columns(price=col("price") * EURO)
        .filter((col("price") > 1_000_000) & (col("price") < 50_000_000))
        .select(
            "auction",
            "bidder",
            "price",
            "dateTime",
            "extra",
            bidTimeType=time_type.otherwise("otherTime"),
            c_counts=col("extra").str.count("c"),
        )
    )


@query(
    r"""
    with named as (
        select *, nullif(regexp_extract(url, '(&|^)channel_id=([^&]*)', 2), '') as in_url from bid
    )
    select auction, bidder, price, channel,
           case lower(channel) when 'apple' then '0' when 'google' then '1'
                               when 'facebook' then '2' when 'baidu' then '3' else in_url end as channel_id
    from named where in_url is not null or lower(channel) in ('apple', 'google', 'facebook', 'baidu')
    """
)
def q21(events: Events) -> Stream:
    """Add channel id: of the hot channels a number, of others what their URL says; bids without one are left out."""
    channel = col("channel").str.lower()
    in_url = col("url").str.extract("(?:&|^)channel_id=(?P<id>[^&]*)")
    number = when(channel == "apple").then("0").when(channel == "google").then("1")
    number = number.when(channel == "facebook").then("2").when(channel == "baidu").then("3")
    return events.bid.select("auction", "bidder", "price", "channel", channel_id=number.otherwise(in_url)).filter(
        col("channel_id").is_not_null()
    )


@query(
    """
    select auction, bidder, price, channel,
           split_part(url, '/', 4) as dir1, split_part(url, '/', 5) as dir2, split_part(url, '/', 6) as dir3
    from bid
    """
)
def q22(events: Events) -> Stream:
    """Folders of the URL."""
    folders = [col("url").str.split_part("/", i + 2).alias(f"dir{i}") for i in (1, 2, 3)]
    return events.bid.select("auction", "bidder", "price", "channel", *folders)
