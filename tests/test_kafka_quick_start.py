"""The Kafka quick start of the README, as it stands there but for the address of the broker."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import rayflow as rf
from tests.kafka_server import KafkaServer, records

README = Path(__file__).resolve().parent.parent / "README.md"
ADDRESS, TOPIC = '"localhost:9092"', '"orders"'


def test_the_flow_of_the_readme_reads_a_topic(
    kafka: KafkaServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = [
        b
        for b in re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
        if "read_kafka" in b
    ]
    assert block.count(ADDRESS) == block.count(TOPIC) == 1
    topic = kafka.topic(2)
    rows = [
        {"at": "2026-01-01T10:00:00Z", "shop": "Lisbon", "amount": 3},
        {"at": "2026-01-01T10:00:59.999Z", "shop": "Lisbon", "amount": 4},
        {"at": "2026-01-01T10:01:00Z", "shop": "Lisbon", "amount": 5},
        {"at": "2026-01-01T10:01:02Z", "shop": "Quito", "amount": 6},
    ]
    kafka.produce(topic, records(rows, partitions=2))
    namespace: dict[str, Any] = {"rf": rf}
    exec(block.replace(ADDRESS, f'"{kafka.bootstrap_servers}"').replace(TOPIC, f'"{topic}"'), namespace)
    namespace["from_kafka"].run(local=True)
    found = rf.read_parquet("turnover/").to_arrow().select(["shop", "n", "turnover"]).to_pylist()
    assert sorted(tuple(row.values()) for row in found) == [("Lisbon", 1, 5), ("Lisbon", 2, 7), ("Quito", 1, 6)]
