"""Refused credentials are told at once and in one sentence, by a broker that refuses everybody.

The broker of the other tests lets everybody in. This one speaks as much of Kafka's protocol as it takes to say no:
ApiVersions (18), SaslHandshake (17), SaslAuthenticate (36) with error 58.
"""

from __future__ import annotations

import socketserver
import struct
import time
from collections.abc import Iterator
from threading import Thread

import pytest

from rayflow.errors import ConfigError
from rayflow.operators.kafka.client import CALL_TIMEOUT_S
from tests.kafka_server import KafkaServer
from tests.operators.helpers import context
from tests.operators.kafka.reading import drain, json_source

_VERSIONS = struct.pack(">hi", 0, 5) + b"".join(
    struct.pack(">hhh", key, 0, version) for key, version in ((1, 4), (3, 2), (17, 1), (18, 0), (36, 0))
)
_UNSUPPORTED_VERSION = struct.pack(">hi", 35, 1) + struct.pack(">hhh", 18, 0, 0)
_PLAIN = struct.pack(">hi", 0, 1) + struct.pack(">h5s", 5, b"PLAIN")
_REFUSED = struct.pack(">hh", 58, 3) + b"no!" + struct.pack(">i", 0)


class Refuses(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while size := self.rfile.read(4):
            request = self.rfile.read(struct.unpack(">i", size)[0])
            key, version, correlation = struct.unpack(">hhi", request[:8])
            answers = {17: _PLAIN, 18: _VERSIONS if version == 0 else _UNSUPPORTED_VERSION, 36: _REFUSED}
            answer = struct.pack(">i", correlation) + answers[key]
            self.wfile.write(struct.pack(">i", len(answer)) + answer)


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True


@pytest.fixture
def refusing() -> Iterator[KafkaServer]:
    server = Server(("127.0.0.1", 0), Refuses)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield KafkaServer(f"127.0.0.1:{server.server_address[1]}", None)  # type: ignore[arg-type]
    server.shutdown()
    server.server_close()


OPTIONS = {
    "security.protocol": "SASL_PLAINTEXT",
    "sasl.mechanism": "PLAIN",
    "sasl.username": "me",
    "sasl.password": "not the one",
}


def test_refused_credentials_end_a_job_at_its_start(refusing: KafkaServer) -> None:
    source = json_source(refusing, "topic", options=OPTIONS)
    began = time.monotonic()
    with pytest.raises(
        ConfigError, match=rf"list topics at {refusing.bootstrap_servers}: _AUTHENT.*no!.*check cred"
    ) as e:
        source.discover()
    assert time.monotonic() - began < CALL_TIMEOUT_S  # not after the patience for brokers that are away
    assert "not the one" not in str(e.value)


def test_credentials_refused_while_a_job_runs_end_it(refusing: KafkaServer) -> None:
    source = json_source(refusing, "topic", options=OPTIONS)
    reader = source.reader({"topic": "topic", "partition": 0, "start": 0, "stop": None}, None, context())
    with pytest.raises(ConfigError, match=r"could not read at .*_AUTHENTICATION"):
        drain(reader)
    reader.close()
