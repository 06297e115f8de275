"""The events: proportions, skew, determinism, disorder; and the source that reads them from any position."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.nexmark.generator import CHANNELS, COLUMNS, FIRST_ID, HOT_CHANNELS, Kind, Nexmark, schema
from examples.nexmark.randomness import Int64Array
from examples.nexmark.source import NexmarkSource, events
from rayflow.errors import ConfigError
from rayflow.operators.base import OperatorContext

EVENTS = 100_000
CONFIG = Nexmark(events=EVENTS)
KINDS = list(Kind)


def column(config: Nexmark, kind: Kind, name: str) -> Int64Array:
    values = config.table(kind, [name]).column(0).combine_chunks()
    return np.asarray((values.view(pa.int64()) if pa.types.is_timestamp(values.type) else values).to_numpy())


def context() -> OperatorContext:
    return OperatorContext("job", "run", "source", "nexmark", 0, 1, 128, 0, range(128), lambda: 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_columns_are_those_of_the_schema(kind: Kind) -> None:
    table = CONFIG.table(kind)
    assert table.schema == schema(kind)
    assert all(c.null_count == 0 for c in table.columns)
    table.validate(full=True)


@given(events=st.integers(0, 10_000))
def test_every_event_is_of_one_kind(events: int) -> None:
    counts = [Nexmark(events=events).count(kind) for kind in KINDS]
    assert sum(counts) == events
    assert counts == [sum(low <= n % 50 < high for n in range(events)) for low, high in ((0, 1), (1, 4), (4, 50))]


def test_times_are_those_of_the_numbering_and_all_differ() -> None:
    times = np.sort(np.concatenate([column(CONFIG, kind, "dateTime") for kind in KINDS]))
    assert (np.diff(times) == 100).all()
    assert times[0] == round(CONFIG.start.timestamp() * 1e6)


@pytest.mark.parametrize("kind", KINDS)
def test_any_stretch_and_any_columns_are_the_same_rows(kind: Kind) -> None:
    config = Nexmark(events=20_000, out_of_order="100ms")
    whole = config.table(kind)
    for first, count in ((0, 1), (7, 100), (config.count(kind) - 5, 5)):
        again = pickle.loads(pickle.dumps(config)).batch(kind, first, count)
        assert pa.Table.from_batches([again]) == whole.slice(first, count).combine_chunks()
        for name in COLUMNS[kind]:
            assert config.batch(kind, first, count, [name]).column(0) == again.column(name)


def test_another_seed_gives_other_events() -> None:
    prices = [column(Nexmark(events=5_000, seed=seed), Kind.BID, "price") for seed in (0, 1)]
    assert (prices[0] != prices[1]).mean() > 0.99


@pytest.mark.parametrize("kind", KINDS)
@given(seconds=st.floats(0, 30), events=st.integers(1, 5_000), rate=st.sampled_from([10.0, 100.0, 2_500.0]))
@settings(max_examples=30, deadline=None)
def test_disorder_keeps_the_rows_and_its_bound(kind: Kind, seconds: float, events: int, rate: float) -> None:
    delay_us = int(seconds * 1e6)
    ordered = Nexmark(events=events, rate=rate)
    shuffled = Nexmark(events=events, rate=rate, out_of_order=f"{delay_us}us")
    times = column(shuffled, kind, "dateTime")
    assert (np.maximum.accumulate(times) - times <= delay_us).all()
    assert (np.sort(times) == column(ordered, kind, "dateTime")).all()


def test_there_is_disorder() -> None:
    times = column(Nexmark(events=EVENTS, out_of_order="1s"), Kind.BID, "dateTime")
    assert (np.maximum.accumulate(times) - times).max() > 800_000


def test_the_hot_ones_have_their_share() -> None:
    def share(kind: Kind, name: str, hot: int, ratio: str) -> float:
        values = column(CONFIG, kind, name) - FIRST_ID
        others = column(Nexmark(events=EVENTS, **{ratio: 1}), kind, name) - FIRST_ID  # type: ignore[arg-type]
        assert (others % 100 == hot).mean() < 0.03
        return float((values % 100 == hot).mean())

    assert share(Kind.BID, "auction", 0, "hot_auction_ratio") == pytest.approx(1 / 2, abs=0.02)
    assert share(Kind.BID, "bidder", 1, "hot_bidders_ratio") == pytest.approx(3 / 4, abs=0.02)
    assert share(Kind.AUCTION, "seller", 0, "hot_sellers_ratio") == pytest.approx(3 / 4, abs=0.02)


def test_bids_are_for_auctions_in_flight_and_by_active_people() -> None:
    config = Nexmark(events=EVENTS, active_people=50)
    numbers = (column(config, Kind.BID, "dateTime") - round(config.start.timestamp() * 1e6)) // 100
    behind = numbers // 50 * 3 + 2 - (column(config, Kind.BID, "auction") - FIRST_ID)
    assert behind.min() == -10
    assert behind.max() == 100
    cold = column(config, Kind.BID, "bidder") - FIRST_ID
    away = (numbers // 50 - cold)[cold % 100 != 1]
    assert away.min() == -10
    assert away.max() == 49


def test_prices_and_texts_are_spread() -> None:
    bids = CONFIG.table(Kind.BID)
    logs = np.log10(bids["price"].to_numpy() / 100.0)
    assert [round(float(q), 1) for q in np.quantile(logs, (0, 0.25, 0.5, 0.75, 1))] == [0, 1.5, 3.0, 4.5, 6.0]
    hot = pc.is_in(bids["channel"], pa.array(HOT_CHANNELS)).to_numpy()
    assert hot.mean() == pytest.approx(0.5, abs=0.01)
    assert len(bids["channel"].unique()) > CHANNELS * 0.98
    named = pc.match_substring(bids["url"], "&channel_id=").to_numpy()
    assert named[~hot].mean() == pytest.approx(0.9, abs=0.01)
    assert not named[hot].any()
    lengths = pc.binary_length(bids["extra"]).to_numpy()
    assert (lengths.min(), lengths.max()) == (54, 81)
    assert len(bids["extra"].unique()) > 4000


def test_an_auction_lasts_as_long_as_it_takes_for_those_in_flight_to_begin() -> None:
    lasts = column(CONFIG, Kind.AUCTION, "expires") - column(CONFIG, Kind.AUCTION, "dateTime")
    assert lasts.min() >= 1_000
    assert lasts.mean() == pytest.approx(166_666, rel=0.05)
    assert (column(CONFIG, Kind.AUCTION, "reserve") > column(CONFIG, Kind.AUCTION, "initialBid")).all()
    assert set(column(CONFIG, Kind.AUCTION, "category")) == {10, 11, 12, 13, 14}


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_goes_on_from_any_position(kind: Kind) -> None:
    config = Nexmark(events=4_000, out_of_order="50ms")
    source = NexmarkSource(config, kind, split_rows=1_000, batch_rows=97)
    read = []
    for _, split in source.discover():
        position, done = None, False
        while not done:  # a new reader for each batch, as after a failure
            polled = source.reader(split, position, context()).poll()
            position, done = polled.position, polled.done
            if polled.batch is not None:
                read.append(polled.batch)
    assert pa.Table.from_batches(read).combine_chunks() == config.table(kind)


def test_a_flow_makes_only_the_columns_it_uses() -> None:
    import rayflow as rf

    flow = rf.Flow("some", events(CONFIG).bid.select("price").collect())
    (planned,) = flow.plan().sources().values()
    assert planned.source.schema().names == ["price", "dateTime"]


@pytest.mark.parametrize(
    ("options", "named"),
    [({"events": -1}, "events"), ({"rate": 0}, "rate"), ({"hot_sellers_ratio": 0}, "hot_sellers_ratio")],
)
def test_options_that_make_no_sense_are_named(options: dict[str, int], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Nexmark(**{"events": 1, **options})  # type: ignore[arg-type]
