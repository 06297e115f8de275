"""Kafka to Parquet: turnover by shop and minute, exactly once, with a broker of its own in a temporary folder.

    pip install 'rayflow[kafka]' noida-db     # noida-db: a broker with the Kafka protocol in one wheel
    python examples/kafka_to_parquet.py [--events 20000] [--ray]

Orders are produced to a topic of three partitions, some of them in a transaction that is then given up: nobody may
count those. The flow reads up to what is there now (``stop="latest"``; without it, it would go on for ever).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic

import rayflow as rf

TOPIC, PARTITIONS = "orders", 3
SHOPS = ("Bergen", "Lisbon", "Osaka", "Quito")
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
SCHEMA = pa.schema([("at", pa.timestamp("ms", "UTC")), ("shop", pa.string()), ("amount", pa.int64())])


def build(bootstrap_servers: str, target: str) -> rf.Flow:
    orders = rf.read_kafka(
        TOPIC,
        bootstrap_servers=bootstrap_servers,
        schema=SCHEMA,
        stop="latest",
        event_time="at",
        max_delay="5s",
    )
    turnover = orders.key_by("shop").window(rf.tumbling("1m")).agg(n=rf.count(), turnover=rf.sum("amount"))
    return rf.Flow("orders", turnover.write_parquet(target))


def order(i: int) -> dict[str, Any]:
    """Ten a second."""
    at = BEGIN + timedelta(milliseconds=100 * i)
    return {
        "at": at.isoformat(timespec="milliseconds"),
        "shop": SHOPS[i // 3 * 7 % 5 % len(SHOPS)],
        "amount": i % 97 + 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--ray", action="store_true", help="on Ray, not in this process")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, broker(Path(folder, "broker")) as servers:
        print(f"a broker listens on {servers}")
        produce(servers, (order(i) for i in range(options.events)), commit=True)
        produce(servers, (order(i) for i in range(100)), commit=False)
        print(f"{options.events:,} orders are in topic {TOPIC!r}, and 100 in a transaction that was given up")
        target = str(Path(folder, "out"))
        build(servers, target).run(
            parallelism=2,
            checkpoints=rf.CheckpointConfig(str(Path(folder, "checkpoints")), interval="1s"),
            local=not options.ray,
        )
        rows = pq.read_table(target).sort_by([("window_start", "ascending"), ("shop", "ascending")]).to_pylist()
    for row in rows[:4]:
        print(f"{row['window_start']:%H:%M} {row['shop']:6} n={row['n']:3} turnover={row['turnover']:6,}")
    print("..." if len(rows) > 4 else "")
    orders, turnover = Counter[Any](), Counter[Any]()
    for each in map(order, range(options.events)):
        minute = each["shop"], each["at"][:16]
        orders[minute] += 1
        turnover[minute] += each["amount"]
    found = {(row["shop"], f"{row['window_start']:%Y-%m-%dT%H:%M}"): (row["n"], row["turnover"]) for row in rows}
    assert len(found) == len(rows), "a window came twice"
    assert found == {minute: (orders[minute], turnover[minute]) for minute in orders}, "counted otherwise"
    print(f"{options.events} orders were each counted exactly once, in {len(rows)} rows of Parquet")


def produce(servers: str, orders: Iterable[dict[str, Any]], *, commit: bool) -> None:
    """In one transaction."""
    producer = Producer({"bootstrap.servers": servers, "transactional.id": "shops", "linger.ms": 5})
    producer.init_transactions(30)
    producer.begin_transaction()
    for i, each in enumerate(orders):
        producer.produce(TOPIC, json.dumps(each), partition=i % PARTITIONS)
        if i % 1_000 == 0:
            producer.flush(30)
    producer.flush(30)
    if commit:
        producer.commit_transaction(30)
    else:
        producer.abort_transaction(30)


@contextlib.contextmanager
def broker(folder: Path) -> Iterator[str]:
    """Address of a broker that runs meanwhile, with the topic made."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    binary = Path(str(files("noida_db"))) / "noida-db"
    binary.chmod(0o755)
    quiet = subprocess.DEVNULL
    flags = ["--data-dir", str(folder), "--host", "127.0.0.1", "--only", "kafka", "--kafka-port", str(port)]
    process = subprocess.Popen(
        [str(binary), "start", *flags], env=os.environ | {"HOME": str(folder)}, stdout=quiet, stderr=quiet
    )
    try:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit("the broker did not start")
            time.sleep(0.02)
        servers = f"127.0.0.1:{port}"
        # Orders of the past are kept.
        topic = NewTopic(TOPIC, PARTITIONS, 1, config={"retention.ms": "-1"})
        admin = AdminClient({"bootstrap.servers": servers})
        admin.create_topics([topic])[TOPIC].result(30)
        del admin  # it would complain of the end of the broker
        yield servers
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
