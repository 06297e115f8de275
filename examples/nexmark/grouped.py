"""Queries that aggregate bids by key and window: q12, q17."""

from __future__ import annotations

import rayflow as rf
from examples.nexmark.query import query
from examples.nexmark.source import Events
from rayflow import col
from rayflow.stream import Stream


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


@query(
    """
    select auction, strftime(dateTime, '%Y-%m-%d') as day, count(*) as total_bids,
           count(*) filter (price < 10000) as rank1_bids,
           count(*) filter (price >= 10000 and price < 1000000) as rank2_bids,
           count(*) filter (price >= 1000000) as rank3_bids,
           min(price) as min_price, max(price) as max_price, avg(price) as avg_price, sum(price)::bigint as sum_price
    from bid group by auction, day
    """
)
def q17(events: Events) -> Stream:
    """Statistics of each auction by day.

    The standard query tells every change; here a day is told when it is over.
    """
    price = col("price")
    ranked = events.bid.with_columns(
        rank1=(price < 10_000).cast("int64"),
        rank2=((price >= 10_000) & (price < 1_000_000)).cast("int64"),
        rank3=(price >= 1_000_000).cast("int64"),
    )
    days = (
        ranked.key_by("auction")
        .window(rf.tumbling("1d"))
        .agg(
            total_bids=rf.count(),
            rank1_bids=rf.sum("rank1"),
            rank2_bids=rf.sum("rank2"),
            rank3_bids=rf.sum("rank3"),
            min_price=rf.min("price"),
            max_price=rf.max("price"),
            avg_price=rf.mean("price"),
            sum_price=rf.sum("price"),
        )
    )
    return days.with_columns(day=col("window_start").dt.date().cast("string")).drop("window_start", "window_end")
