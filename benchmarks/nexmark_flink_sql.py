"""The queries of Nexmark for Flink SQL, over the tables ``person``, ``auction`` and ``bid``.

q6 is missing because Flink cannot run it, q10 and q13 because their connectors are not in the package.
"""

from __future__ import annotations

from typing import Final

_RANKS: Final = """
    count(*) as total_bids, count(*) filter (where price < 10000) as rank1_bids,
    count(*) filter (where price >= 10000 and price < 1000000) as rank2_bids,
    count(*) filter (where price >= 1000000) as rank3_bids
"""
_PARTIES: Final = ", ".join(
    f"count(distinct {who}){where}"
    for who in ("bidder", "auction")
    for where in (
        "",
        " filter (where price < 10000)",
        " filter (where price >= 10000 and price < 1000000)",
        " filter (where price >= 1000000)",
    )
)
_DAY: Final = "date_format(dateTime, 'yyyy-MM-dd')"
_WON: Final = "a.id = b.auction and b.dateTime between a.dateTime and a.expires"
_TUMBLE: Final = "table(tumble(table {0}, descriptor(dateTime), interval '10' second))"
_HOP: Final = "table(hop(table bid, descriptor(dateTime), interval '2' second, interval '10' second))"
_COUNTS: Final = (
    f"select auction, count(*) as num, window_start, window_end from {_HOP} group by auction, window_start, window_end"
)
_CHANNEL_ID: Final = "regexp_extract(url, '(&|^)channel_id=([^&]*)', 2)"

FLINK_SQL: Final = {
    "q0": "select auction, bidder, price, dateTime, extra from bid",
    "q1": "select auction, bidder, 0.908 * price as price, dateTime, extra from bid",
    "q2": "select auction, price from bid where mod(auction, 123) = 0",
    "q3": """select p.name, p.city, p.state, a.id from auction a join person p on a.seller = p.id
             where a.category = 10 and p.state in ('OR', 'ID', 'CA')""",
    "q4": f"""select category, avg(final) from (
                select max(b.price) as final, a.category from auction a, bid b where {_WON} group by a.id, a.category)
              group by category""",
    "q5": f"""select c.auction, c.num from ({_COUNTS}) c join (
                select max(num) as most, window_start, window_end from ({_COUNTS}) group by window_start, window_end) m
              on c.window_start = m.window_start and c.window_end = m.window_end and c.num >= m.most""",
    "q7": f"""select b.auction, b.price, b.bidder, b.dateTime, b.extra from bid b join (
                select max(price) as highest, window_end from {_TUMBLE.format("bid")}
                group by window_start, window_end) h
              on b.price = h.highest
              where b.dateTime between h.window_end - interval '10' second and h.window_end""",
    "q8": f"""select p.id, p.name, p.window_start from (
                select id, name, window_start, window_end from {_TUMBLE.format("person")}
                group by id, name, window_start, window_end) p
              join (select seller, window_start, window_end from {_TUMBLE.format("auction")}
                group by seller, window_start, window_end) a
              on p.id = a.seller and p.window_start = a.window_start and p.window_end = a.window_end""",
    "q9": f"""select * from (
                select a.*, b.auction, b.bidder, b.price, b.dateTime as bid_dateTime, b.extra as bid_extra,
                       row_number() over (partition by a.id order by b.price desc, b.dateTime asc) as place
                from auction a, bid b where {_WON})
              where place <= 1""",
    "q11": """select bidder, count(*), session_start(dateTime, interval '10' second),
                     session_end(dateTime, interval '10' second)
              from bid group by bidder, session(dateTime, interval '10' second)""",
    "q12": f"""select bidder, count(*), window_start, window_end from {_TUMBLE.format("bid")}
               group by bidder, window_start, window_end""",
    "q14": """select auction, bidder, 0.908 * price, case
                when hour(dateTime) >= 8 and hour(dateTime) <= 18 then 'dayTime'
                when hour(dateTime) <= 6 or hour(dateTime) >= 20 then 'nightTime' else 'otherTime' end,
                dateTime, extra, char_length(extra) - char_length(replace(extra, 'c', ''))
              from bid where 0.908 * price > 1000000 and 0.908 * price < 50000000""",
    "q15": f"select {_DAY}, {_RANKS}, {_PARTIES} from bid group by {_DAY}",
    "q16": f"""select channel, {_DAY}, max(date_format(dateTime, 'HH:mm')), {_RANKS}, {_PARTIES}
               from bid group by channel, {_DAY}""",
    "q17": f"""select auction, {_DAY}, {_RANKS}, min(price), max(price), avg(price), sum(price)
               from bid group by auction, {_DAY}""",
    "q18": """select auction, bidder, price, channel, url, dateTime, extra from (
                select *, row_number() over (partition by bidder, auction order by dateTime desc) as place from bid)
              where place <= 1""",
    "q19": """select * from (
                select *, row_number() over (partition by auction order by price desc) as place from bid)
              where place <= 10""",
    "q20": """select b.auction, b.bidder, b.price, b.channel, b.url, b.dateTime, b.extra, a.itemName, a.description,
                     a.initialBid, a.reserve, a.dateTime, a.expires, a.seller, a.category, a.extra
              from bid b join auction a on b.auction = a.id where a.category = 10""",
    "q21": f"""select auction, bidder, price, channel, case lower(channel) when 'apple' then '0' when 'google' then '1'
                 when 'facebook' then '2' when 'baidu' then '3' else {_CHANNEL_ID} end
               from bid where {_CHANNEL_ID} is not null
                  or lower(channel) in ('apple', 'google', 'facebook', 'baidu')""",
    "q22": """select auction, bidder, price, channel, split_index(url, '/', 3), split_index(url, '/', 4),
                     split_index(url, '/', 5) from bid""",
}
