"""``rayflow txn`` against a real broker."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from rayflow.cli.main import main
from tests.kafka_server import KafkaServer
from tests.operators.kafka_sink.place import Place, prepared, rows


@pytest.fixture
def place(kafka: KafkaServer) -> Place:
    return Place(kafka, kafka.topic(1))


def txn(place: Place, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["txn", *arguments, "--bootstrap-servers", place.kafka.bootstrap_servers])


def listed(place: Place, *arguments: str) -> list[dict[str, Any]]:
    result = txn(place, "list", "--json", "--job", place.job, *arguments)
    assert result.exit_code == 0, result.output
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


def test_what_a_job_has_left_open_is_listed_and_aborted(place: Place) -> None:
    assert listed(place) == []
    crashed = place.start(2, parallelism=3)
    crashed.process(rows(1), 0)
    prepared(crashed, 1)
    (found,) = listed(place)
    name = f"rayflow-{place.job}:write_kafka-1:2:0"
    assert found["transactional_id"] == name
    assert (found["job"], found["operator"], found["subtask"], found["slot"]) == (place.job, "write_kafka-1", 2, 0)
    assert (found["state"], found["open"], found["timeout_ms"]) == ("Ongoing", True, 900_000)
    assert {"topic": place.topic, "partition": 0} in found["partitions"]
    assert len(listed(place, "--all")) == 2
    table = txn(place, "list")
    assert name in table.output
    assert f"{place.topic}[0]" in table.output
    assert json.loads(txn(place, "abort", name, "--json").stdout) == {"transactional_id": name, "aborted": True}
    assert listed(place) == []
    assert txn(place, "abort", name).output == f"{name}: nothing was open\n"


def test_what_is_not_rayflows_is_left_alone(place: Place) -> None:
    result = txn(place, "abort", "someone-else")
    assert result.exit_code == 1
    assert "ends transactions of rayflow only, got 'someone-else'" in result.output
    result = txn(place, "abort", "rayflow-a:b:0:0")
    assert result.exit_code == 1
    assert "knows no transactional id" in result.output
