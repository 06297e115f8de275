"""The few requests of the Kafka protocol that no client library offers: the state of transactions, and their end by
another process than the one that began them.

Plain sockets, one request at a time. Only versions are used that Apache Kafka 3.0 to 4.x and Redpanda speak, checked
with ApiVersions on every connection. EndTxn stays below version 5 on purpose: from there on the broker raises the epoch
with every transaction (KIP-890), and clients of version 5 expect that; librdkafka's producers do not ask for it.
Formats: https://kafka.apache.org/protocol
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType
from typing import Self, TypeVar

from rayflow.errors import ConfigError, ConnectorError

CALL_TIMEOUT_S = 10.0
PATIENCE_S = 20.0
"""For how long a coordinator that moves, or is busy with the transaction, is asked again."""
_RETRY_S = 0.05
_CLIENT = b"rayflow"
_FRAME_BYTES_MAX = 64 * 1024 * 1024
T = TypeVar("T")


class Code(IntEnum):
    """Error codes that mean something here."""

    NONE = 0
    COORDINATOR_LOADING = 14
    COORDINATOR_NOT_AVAILABLE = 15
    NOT_COORDINATOR = 16
    INVALID_PRODUCER_EPOCH = 47
    INVALID_TXN_STATE = 48
    INVALID_PRODUCER_ID_MAPPING = 49
    INVALID_TRANSACTION_TIMEOUT = 50
    CONCURRENT_TRANSACTIONS = 51
    TRANSACTIONAL_ID_AUTHORIZATION_FAILED = 53
    PRODUCER_FENCED = 90
    TRANSACTIONAL_ID_NOT_FOUND = 105


_MOVED = (Code.COORDINATOR_LOADING, Code.COORDINATOR_NOT_AVAILABLE, Code.NOT_COORDINATOR)


@dataclass(frozen=True, slots=True)
class _Api:
    name: str
    key: int
    version: int
    flexible: bool = False


_FIND_COORDINATOR = _Api("FindCoordinator", 10, 1)
_INIT_PRODUCER_ID = _Api("InitProducerId", 22, 1)
_END_TXN = _Api("EndTxn", 26, 1)
_DESCRIBE = _Api("DescribeTransactions", 65, 0, flexible=True)
_LIST = _Api("ListTransactions", 66, 0, flexible=True)


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Listed:
    transactional_id: str
    producer_id: int
    state: str
    """``Ongoing``, ``CompleteCommit``, ``CompleteAbort``, ``Empty`` … as the broker calls it."""


@dataclass(frozen=True, slots=True)
class Described:
    transactional_id: str
    state: str
    timeout_ms: int
    started_ms: int
    """Unix milliseconds; -1 when no transaction is open."""
    producer_id: int
    epoch: int
    partitions: tuple[tuple[str, int], ...]


def addresses(bootstrap_servers: str) -> list[Address]:
    """Raises `ConfigError` for what is not ``host:port,host:port``."""
    found = []
    for each in bootstrap_servers.split(","):
        host, _, port = each.strip().rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f'bootstrap_servers must be "host:port" (or several, with commas), got {each!r}')
        found.append(Address(host.removeprefix("PLAINTEXT://").strip("[]"), int(port)))
    return found


class Reader:
    """Takes a response apart."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, format: str) -> tuple[int, ...]:
        found = struct.unpack_from(">" + format, self._data, self._at)
        self._at += struct.calcsize(">" + format)
        return found

    def one(self, format: str) -> int:
        return self.take(format)[0]

    def string(self) -> str:
        size = self.one("h")
        return self._text(max(0, size))

    def varint(self) -> int:
        value, shift = 0, 0
        while True:
            byte = self.one("B")
            value |= (byte & 0x7F) << shift
            if not byte & 0x80:
                return value
            shift += 7

    def compact_string(self) -> str:
        return self._text(max(0, self.varint() - 1))

    def compact_array(self) -> range:
        return range(max(0, self.varint() - 1))

    def tags(self) -> None:
        for _ in range(self.varint()):
            self.varint()
            self._at += self.varint()

    def _text(self, size: int) -> str:
        text = self._data[self._at : self._at + size].decode()
        self._at += size
        return text


class _Connection:
    """Raises `OSError` when the other side goes away."""

    def __init__(self, address: Address) -> None:
        self._socket = socket.create_connection((address.host, address.port), CALL_TIMEOUT_S)
        self._count = 0
        self._versions = dict[int, tuple[int, int]]()
        reader = self._exchange(_Api("ApiVersions", 18, 0), b"")
        reader.take("h")
        for _ in range(reader.one("i")):
            key, low, high = reader.take("hhh")
            self._versions[key] = low, high
        self._address = address

    def call(self, api: _Api, body: bytes) -> Reader:
        low, high = self._versions.get(api.key, (0, -1))
        if not low <= api.version <= high:
            raise ConfigError(
                f'write_kafka(guarantee="exactly_once") needs a broker that speaks {api.name} version {api.version} '
                f"(Apache Kafka 3.0 or later), {self._address} offers {f'{low} to {high}' if high >= 0 else 'none'}; "
                'use guarantee="at_least_once"'
            )
        return self._exchange(api, body)

    def close(self) -> None:
        self._socket.close()

    def _exchange(self, api: _Api, body: bytes) -> Reader:
        self._count += 1
        head = struct.pack(">hhih", api.key, api.version, self._count, len(_CLIENT)) + _CLIENT
        frame = head + (b"\0" if api.flexible else b"") + body
        self._socket.sendall(struct.pack(">i", len(frame)) + frame)
        (size,) = struct.unpack(">i", self._exactly(4))
        if not 4 <= size <= _FRAME_BYTES_MAX:
            raise OSError(f"the answer to {api.name} is not of the Kafka protocol")
        reader = Reader(self._exactly(size))
        if reader.one("i") != self._count:
            raise OSError(f"the answer to {api.name} belongs to another request")
        if api.flexible:
            reader.tags()
        return reader

    def _exactly(self, size: int) -> bytes:
        parts = []
        while size:
            part = self._socket.recv(min(size, 1 << 20))
            if not part:
                raise OSError("the broker closed the connection")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


class TransactionClient:
    """Asks the coordinators of transactional ids. One thread at a time; close it, or use it in ``with``.

    Every method raises `ConnectorError` when the broker cannot be reached or is not ready within ``patience_s``,
    `ConfigError` when it does not speak what is needed.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        *,
        patience_s: float = PATIENCE_S,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._bootstrap = addresses(bootstrap_servers)
        self._patience_s = patience_s
        self._now = now
        self._sleep = sleep
        self._connections: dict[Address, _Connection] = {}
        self._coordinators: dict[str, Address] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for each in self._connections.values():
            with contextlib.suppress(OSError):
                each.close()
        self._connections = {}

    def end(self, transactional_id: str, producer_id: int, epoch: int, *, commit: bool) -> Code | int:
        """The coordinator's answer: NONE, or why not. Ending what has ended so is NONE."""
        body = _string(transactional_id) + struct.pack(">qh?", producer_id, epoch, commit)
        return self._at_coordinator(transactional_id, _END_TXN, body, lambda r: (r.take("ih")[1], None))[0]

    def init(self, transactional_id: str, timeout_ms: int) -> tuple[Code | int, int, int]:
        """(answer, producer id, epoch). Aborts what is open under the id and fences whoever has it."""

        def read(reader: Reader) -> tuple[int, tuple[int, int]]:
            _, code, producer_id, epoch = reader.take("ihqh")
            return code, (producer_id, epoch)

        body = _string(transactional_id) + struct.pack(">i", timeout_ms)
        code, found = self._at_coordinator(transactional_id, _INIT_PRODUCER_ID, body, read)
        return code, *found

    def describe(self, transactional_id: str) -> Described | None:
        """None for an id that the broker does not know."""

        def read(reader: Reader) -> tuple[int, Described | None]:
            reader.take("i")
            code, found = int(Code.TRANSACTIONAL_ID_NOT_FOUND), None
            for _ in reader.compact_array():
                code = reader.one("h")
                name, state = reader.compact_string(), reader.compact_string()
                timeout, started, producer_id, epoch = reader.take("iqqh")
                found = Described(name, state, timeout, started, producer_id, epoch, tuple(_partitions(reader)))
                reader.tags()
            return code, found

        body = _varint(2) + _compact(transactional_id) + b"\0"
        code, found = self._at_coordinator(transactional_id, _DESCRIBE, body, read)
        return found if code == Code.NONE else None

    def listed(self, brokers: Sequence[Address]) -> list[Listed]:
        """All transactional ids that these brokers are coordinators of, open or not, in the order of their names."""
        found: dict[str, Listed] = {}
        for broker in brokers:

            def read(reader: Reader) -> tuple[int, list[Listed]]:
                _, code = reader.take("ih")
                for _ in reader.compact_array():
                    reader.compact_string()
                each = []
                for _ in reader.compact_array():
                    each.append(Listed(reader.compact_string(), reader.one("q"), reader.compact_string()))
                    reader.tags()
                return code, each

            code, own = self._patiently("ListTransactions", lambda b=broker, r=read: r(self._ask(b, _LIST, b"\1\1\0")))  # type: ignore[misc]
            if code != Code.NONE:
                raise ConnectorError(f"broker {broker} cannot list transactions: error {code}; it is tried again")
            found |= {each.transactional_id: each for each in own}
        return [found[name] for name in sorted(found)]

    # ------------------------------------------------------------------------------------------------------- transport

    def _at_coordinator(
        self, transactional_id: str, api: _Api, body: bytes, read: Callable[[Reader], tuple[int, T]]
    ) -> tuple[int, T]:
        def once() -> tuple[int, T]:
            answer = read(self._ask(self._coordinator(transactional_id), api, body))
            if answer[0] in _MOVED:
                self._coordinators.pop(transactional_id, None)
            return answer

        return self._patiently(f"{api.name} of {transactional_id!r}", once)

    def _patiently(self, what: str, once: Callable[[], tuple[int, T]]) -> tuple[int, T]:
        deadline = self._now() + self._patience_s
        while True:
            try:
                answer = once()
                if answer[0] not in (*_MOVED, Code.CONCURRENT_TRANSACTIONS):
                    return answer
                problem = f"the broker answers {_name(answer[0])}"
            except (OSError, struct.error, UnicodeDecodeError) as error:
                self.close()
                self._coordinators = {}
                problem = str(error) or type(error).__name__
            if self._now() >= deadline:
                known = ", ".join(map(str, self._bootstrap))
                raise ConnectorError(f"Kafka at {known} did not do {what} within {self._patience_s:g} s: {problem}")
            self._sleep(_RETRY_S)

    def _coordinator(self, transactional_id: str) -> Address:
        known = self._coordinators.get(transactional_id)
        if known is not None:
            return known
        failure: OSError | None = None
        for broker in self._bootstrap:
            try:
                reader = self._ask(broker, _FIND_COORDINATOR, _string(transactional_id) + b"\1")
            except OSError as error:
                failure = error
                continue
            _, code = reader.take("ih")
            reader.string()
            reader.take("i")
            if code != Code.NONE:
                raise OSError(f"no coordinator of transactions: {_name(code)}")
            self._coordinators[transactional_id] = Address(reader.string(), reader.one("i"))
            return self._coordinators[transactional_id]
        raise failure or OSError("no broker")

    def _ask(self, broker: Address, api: _Api, body: bytes) -> Reader:
        if broker not in self._connections:
            self._connections[broker] = _Connection(broker)
        return self._connections[broker].call(api, body)


def _partitions(reader: Reader) -> Iterator[tuple[str, int]]:
    for _ in reader.compact_array():
        topic = reader.compact_string()
        for _ in reader.compact_array():
            yield topic, reader.one("i")
        reader.tags()


def _name(code: int) -> str:
    return Code(code).name if code in Code._value2member_map_ else f"error {code}"


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">h", len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _compact(text: str) -> bytes:
    data = text.encode()
    return _varint(len(data) + 1) + data
