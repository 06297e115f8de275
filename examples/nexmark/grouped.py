"""Queries that aggregate bids by key and window: q11, q12, q15, q16, q17."""

from __future__ import annotations

from typing import Final

import rayflow as rf
from examples.nexmark.query import query
from examples.nexmark.source import Events
from rayflow import col
from rayflow.keyed import KeyedStream
from rayflow.operators.aggregates import Aggregate
from rayflow.stream import Stream


@query(
    """
    with begun as (
        select bidder, dateTime, coalesce(
            dateTime - lag(dateTime) over (partition by bidder order by dateTime) >= interval 10 seconds, true
        ) as begins
        from bid
    ),
    numbered as (
        select *, sum(begins::int) over (partition by bidder order by dateTime, begins) as session from begun
    )
    select bidder, count(*) as bid_count, min(dateTime) as starttime, max(dateTime) + interval 10 seconds as endtime
    from numbered group by bidder, session
    """
)
def q11(events: Events) -> Stream:
    """Bids of each bidder in sessions, which end when the bidder does nothing for ten seconds.

    Bids exactly ten seconds apart are in two sessions here, and in one for Flink.
    """
    counts = events.bid.key_by("bidder").window(rf.session(gap="10s")).agg(bid_count=rf.count())
    return counts.rename({"window_start": "starttime", "window_end": "endtime"})


@query(
    """
    select bidder, count(*) as bid_count, time_bucket(interval 10 seconds, dateTime) as starttime,
           starttime + interval 10 seconds as endtime
    from bid group by bidder, starttime
    """
)
def q12(events: Events) -> Stream:
    """Bids of each bidder in windows of ten seconds.

    The standard query cuts windows by the clock of the machine, so that it has no result to compare; here it is by
    event time.
    """
    counts = events.bid.key_by("bidder").window(rf.tumbling("10s")).agg(bid_count=rf.count())
    return counts.rename({"window_start": "starttime", "window_end": "endtime"})


LOW: Final = col("price") < 10_000
MIDDLE: Final = (col("price") >= 10_000) & (col("price") < 1_000_000)
HIGH: Final = col("price") >= 1_000_000
BIDS: Final = {
    "total_bids": rf.count(),
    "rank1_bids": rf.count(where=LOW),
    "rank2_bids": rf.count(where=MIDDLE),
    "rank3_bids": rf.count(where=HIGH),
}
PARTIES: Final = {
    "total_bidders": rf.count_distinct("bidder"),
    "rank1_bidders": rf.count_distinct("bidder", where=LOW),
    "rank2_bidders": rf.count_distinct("bidder", where=MIDDLE),
    "rank3_bidders": rf.count_distinct("bidder", where=HIGH),
    "total_auctions": rf.count_distinct("auction"),
    "rank1_auctions": rf.count_distinct("auction", where=LOW),
    "rank2_auctions": rf.count_distinct("auction", where=MIDDLE),
    "rank3_auctions": rf.count_distinct("auction", where=HIGH),
}
_BIDS_SQL: Final = """
    count(*) as total_bids,
    count(*) filter (price < 10000) as rank1_bids,
    count(*) filter (price >= 10000 and price < 1000000) as rank2_bids,
    count(*) filter (price >= 1000000) as rank3_bids
"""
_PARTIES_SQL: Final = """
    count(distinct bidder) as total_bidders,
    count(distinct bidder) filter (price < 10000) as rank1_bidders,
    count(distinct bidder) filter (price >= 10000 and price < 1000000) as rank2_bidders,
    count(distinct bidder) filter (price >= 1000000) as rank3_bidders,
    count(distinct auction) as total_auctions,
    count(distinct auction) filter (price < 10000) as rank1_auctions,
    count(distinct auction) filter (price >= 10000 and price < 1000000) as rank2_auctions,
    count(distinct auction) filter (price >= 1000000) as rank3_auctions
"""


def by_day(keyed: KeyedStream, **aggregates: Aggregate) -> Stream:
    """One row a key and day, told when the day is over."""
    days = keyed.window(rf.tumbling("1d")).agg(name=None, **aggregates)
    return days.with_columns(day=col("window_start").dt.date().cast("string")).drop("window_start", "window_end")


@query(f"select strftime(dateTime, '%Y-%m-%d') as day, {_BIDS_SQL}, {_PARTIES_SQL} from bid group by day")
def q15(events: Events) -> Stream:
    """Bidding statistics: bids, bidders and auctions of each day by range of prices.

    The standard query tells every change; here, in q16 and in q17 a day is told when it is over.
    """
    return by_day(events.bid.key_by(rf.lit(0).alias("all")), **BIDS, **PARTIES).drop("all")


@query(
    f"""
    select channel, strftime(dateTime, '%Y-%m-%d') as day, max(strftime(dateTime, '%H:%M')) as minute,
           {_BIDS_SQL}, {_PARTIES_SQL}
    from bid group by channel, day
    """
)
def q16(events: Events) -> Stream:
    """Channel statistics: the same for each channel, with the minute of its last bid."""
    minute = rf.max(col("dateTime").cast("string").str.slice(11, 16))
    return by_day(events.bid.key_by("channel"), minute=minute, **BIDS, **PARTIES)


@query(
    f"""
    select auction, strftime(dateTime, '%Y-%m-%d') as day, {_BIDS_SQL},
           min(price) as min_price, max(price) as max_price, avg(price) as avg_price, sum(price)::bigint as sum_price
    from bid group by auction, day
    """
)
def q17(events: Events) -> Stream:
    """Auction statistics: bids and prices of each auction by day."""
    prices = {
        "min_price": rf.min("price"),
        "max_price": rf.max("price"),
        "avg_price": rf.mean("price"),
        "sum_price": rf.sum("price"),
    }
    return by_day(events.bid.key_by("auction"), **BIDS, **prices)
