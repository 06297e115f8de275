"""Queries that bring streams together: q3, q4, q5, q6, q7, q8, q9, q20.

Several ask for the winning bid of each auction, which is known when the auction closes. `offers` gives a bid and its
auction as one row whose event time is that moment: no bid comes later than it, so the watermark of the join is one for
these rows too, and a small window of that time holds all bids of an auction.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import rayflow as rf
from examples.nexmark.generator import Kind, schema
from examples.nexmark.query import query
from examples.nexmark.source import Events
from rayflow import col
from rayflow.stream import Stream

AUCTIONS_AND_BIDS = (Kind.AUCTION, Kind.BID)
_Q7 = schema(Kind.BID, ["auction", "price", "bidder", "dateTime", "extra"])


@query(
    """
    select name, city, state, auction.id
    from auction join person on seller = person.id
    where category = 10 and state in ('OR', 'ID', 'CA')
    """,
    reads=(Kind.PERSON, Kind.AUCTION),
)
def q3(events: Events) -> Stream:
    """Local item suggestion: who sells in category 10 in Oregon, Idaho and California."""
    items = events.auction.filter(col("category") == 10).select("id", "seller")
    locals_ = events.person.filter(col("state").is_in(["OR", "ID", "CA"])).select("name", "city", "state", person="id")
    return items.key_by("seller").join(locals_.key_by("person")).select("name", "city", "state", "id")


def offers(events: Events) -> Stream:
    """Bids within the time of their auction, with ``id``, ``category``, ``seller``; ``join_time`` is its end."""
    auctions = events.auction.select("id", "category", "seller", "dateTime", "expires")
    bids = events.bid.select("auction", "bidder", "price", "dateTime", "extra").rename(
        {"dateTime": "bid_dateTime", "extra": "bid_extra"}
    )
    pairs = auctions.key_by("id").join(bids.key_by("auction"), within=("0s", events.longest_auction))
    return pairs.filter(col("bid_dateTime") <= col("expires")).with_columns(join_time=col("expires"))


@query(
    """
    select category, avg(final) as average from (
        select max(price) as final, category
        from auction join bid on auction.id = bid.auction and bid.dateTime between auction.dateTime and expires
        group by auction.id, category
    ) group by category
    """,
    reads=AUCTIONS_AND_BIDS,
    reading="from output qualify row_number() over (partition by category order by auctions desc) = 1",
)
def q4(events: Events) -> Stream:
    """Average price for a category: of the winning bids of all auctions so far.

    Each auction that closes changes the average; the one over the most auctions is the result.
    """
    winners = offers(events).key_by("id", "category").window(rf.tumbling("1s")).agg(final=rf.max("price"))
    return winners.key_by("category").agg(average=rf.mean("final"), auctions=rf.count())


@query(
    """
    with counts as (
        select auction, count(*) as num, starttime
        from (
            select auction, unnest(range(time_bucket(interval 2 seconds, dateTime) - interval 8 seconds,
                                         time_bucket(interval 2 seconds, dateTime) + interval 2 seconds,
                                         interval 2 seconds)) as starttime
            from bid
        ) group by auction, starttime
    )
    select auction, num, starttime from counts qualify num = max(num) over (partition by starttime)
    """
)
def q5(events: Events) -> Stream:
    """Hot items: the auctions with the most bids in the last ten seconds, every two seconds."""
    sliding = events.bid.key_by("auction").window(rf.sliding("10s", every="2s")).agg(num=rf.count())
    counts = sliding.drop("window_end").rename({"window_start": "starttime"})
    most = counts.key_by("starttime").window(rf.tumbling("2s")).agg(most=rf.max("num"))
    hottest = counts.key_by("num").join(most.key_by("most"), window=rf.tumbling("2s"), how="semi")
    return hottest.select("auction", "num", "starttime")


class MovingAverage(rf.KeyedProcess):
    """Of each seller: the mean of the price of a row and those of the ten before it, for rows that come in order."""

    output = pa.schema([("seller", pa.int64()), ("id", pa.int64()), ("average", pa.float64())])
    recent = rf.ValueState(pa.list_(pa.int64()))

    def process_batch(self, batch: pa.RecordBatch, ctx: Any) -> None:
        keys, recent = np.arange(ctx.keys.num_rows), self.recent.get(ctx)
        held = pc.list_value_length(recent).fill_null(0).to_numpy()
        # All prices of a seller one after the other, those of earlier batches first.
        sellers = np.concatenate([np.repeat(keys, held), ctx.index])
        order = np.argsort(sellers, kind="stable")
        prices = np.concatenate([recent.flatten().to_numpy(), batch["price"].to_numpy()])[order]
        begins = np.searchsorted(sellers[order], keys)
        ends = np.append(begins[1:], len(order))
        place = np.arange(len(order))
        first = np.maximum(place - 10, begins[sellers[order]])
        sums = np.append(0, np.cumsum(prices))
        averages = np.empty(len(order))
        averages[order] = (sums[place + 1] - sums[first]) / (place + 1 - first)
        ctx.emit({"seller": batch["seller"], "id": batch["id"], "average": averages[held.sum() :]})
        kept = place >= np.repeat(ends - 10, ends - begins)
        offsets = np.append(0, np.cumsum(np.minimum(ends - begins, 10))).astype(np.int32)
        self.recent.set(ctx, pa.ListArray.from_arrays(offsets, prices[kept]))


@query(
    """
    select seller, id, avg(price) over (partition by seller order by closed, id rows 10 preceding) as average from (
        select seller, auction.id, max(price) as price, any_value(expires) as closed
        from auction join bid on auction.id = bid.auction and bid.dateTime between auction.dateTime and expires
        group by all
    )
    """,
    reads=AUCTIONS_AND_BIDS,
)
def q6(events: Events) -> Stream:
    """Average selling price by seller: of an auction and the ten that the seller closed before.

    The standard query orders auctions by the time of the winning bid, which is known only when they close; here they
    are in the order in which they close. Flink cannot run it.
    """
    windows = offers(events).key_by("id", "seller").window(rf.tumbling("1s"))
    winners = windows.agg(price=rf.max("price"), closed=rf.max("expires")).key_by("seller")
    return winners.sort_by_event_time("closed", "id").key_by("seller").process(MovingAverage)


@query(
    """
    select auction, price, bidder, dateTime, extra from bid
    qualify price = max(price) over (partition by time_bucket(interval 10 seconds, dateTime))
    """
)
def q7(events: Events) -> Stream:
    """Highest bid: all bids of the highest price in each window of ten seconds.

    The standard query also takes a bid at the very end of a window, which is in the next one.
    """
    bids = events.bid.select("auction", "price", "bidder", "dateTime", "extra").map_batches(unbeaten, schema=_Q7)
    highest = bids.key_by(rf.lit(0).alias("all")).window(rf.tumbling("10s")).agg(highest=rf.max("price"))
    return (
        bids.key_by("price").join(highest.key_by("highest"), window=rf.tumbling("10s"), how="semi").select(*_Q7.names)
    )


def unbeaten(bids: pa.RecordBatch) -> pa.RecordBatch:
    """Without the bids that another one of the batch beats in their window: they need not travel to lose."""
    windows = pc.floor_temporal(bids["dateTime"], 10, unit="second").dictionary_encode()
    of_row, prices = windows.indices.to_numpy(), bids["price"].to_numpy()
    best = np.zeros(len(windows.dictionary), np.int64)
    np.maximum.at(best, of_row, prices)
    return bids.filter(pa.array(prices == best[of_row]))


@query(
    """
    select distinct person.id, name, time_bucket(interval 10 seconds, person.dateTime) as starttime
    from person join auction on seller = person.id
         and time_bucket(interval 10 seconds, auction.dateTime) = time_bucket(interval 10 seconds, person.dateTime)
    """,
    reads=(Kind.PERSON, Kind.AUCTION),
)
def q8(events: Events) -> Stream:
    """Monitor new users: who opened an auction in the same ten seconds in which they joined."""
    persons = events.person.select("id", "name", "dateTime").key_by("id")
    sellers = events.auction.select("seller", "dateTime").key_by("seller")
    return persons.join(sellers, window=rf.tumbling("10s"), how="semi").select("id", "name", starttime="window_start")


@query(
    """
    select auction.*, bidder, price, bid.dateTime as bid_dateTime, bid.extra as bid_extra
    from auction join bid on auction.id = bid.auction and bid.dateTime between auction.dateTime and expires
    qualify row_number() over (partition by auction.id order by price desc, bid.dateTime) = 1
    """,
    reads=AUCTIONS_AND_BIDS,
)
def q9(events: Events) -> Stream:
    """Winning bids: of each auction the highest bid, the earliest of several, when the auction closes."""
    age = col("bid_dateTime").dt.epoch() - col("dateTime").dt.epoch()
    ranked = offers(events).with_columns(better=col("price") * 2**36 - age)
    winners = (
        ranked.key_by("id")
        .window(rf.tumbling("1s"))
        .agg(
            bidder=rf.arg_max("bidder", by="better"),
            price=rf.max("price"),
            bid_dateTime=rf.arg_max("bid_dateTime", by="better"),
            bid_extra=rf.arg_max("bid_extra", by="better"),
        )
    )
    closing = winners.drop("window_end").key_by("id")
    earlier = (-events.longest_auction, timedelta(seconds=1))
    return closing.join(events.auction.key_by("id"), within=earlier).drop("window_start", "join_time")


@query(
    """
    select auction, bidder, price, channel, url, bid.dateTime, bid.extra, itemName, description, initialBid, reserve,
           auction.dateTime as auction_dateTime, expires, seller, category, auction.extra as auction_extra
    from bid join auction on bid.auction = auction.id where category = 10
    """,
    reads=AUCTIONS_AND_BIDS,
)
def q20(events: Events) -> Stream:
    """Expand bid with auction: bids on auctions of category 10, with all of both."""
    auctions = events.auction.filter(col("category") == 10).rename({"dateTime": "auction_dateTime"})
    return events.bid.key_by("auction").join(auctions.rename({"extra": "auction_extra"}).key_by("id"))
