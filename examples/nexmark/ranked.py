"""Queries for the latest or the best rows of each key: q18, q19.

Their result changes with every row that comes. The flows tell the changes once a batch: each row that is then among the
best and came with the batch. The result at any moment is the ranking of the rows told so far, and so it is read here.
"""

from __future__ import annotations

from examples.nexmark.query import query
from examples.nexmark.source import Events
from rayflow.stream import Stream


@query(
    """
    select auction, bidder, price, channel, url, dateTime, extra
    from bid qualify row_number() over (partition by bidder, auction order by dateTime desc) = 1
    """,
    reading="from output qualify row_number() over (partition by bidder, auction order by dateTime desc) = 1",
)
def q18(events: Events) -> Stream:
    """The last bid of each bidder on each auction."""
    return events.bid.key_by("bidder", "auction").top(1, by="dateTime", emit="batch")


@query(
    """
    select auction, price, row_number() over (partition by auction order by price desc) as rank_number
    from bid qualify rank_number <= 10
    """,
    reading="""
    select auction, price, row_number() over (partition by auction order by price desc) as rank_number
    from (from output semi join bid using (auction, bidder, price, channel, url, dateTime, extra))
    qualify rank_number <= 10
    """,
)
def q19(events: Events) -> Stream:
    """The ten highest bids on each auction.

    Which of bids of equal prices come first is open in the standard query, so prices and ranks are compared, and that
    the rows are bids.
    """
    return events.bid.key_by("auction").top(10, by="price", emit="batch")
