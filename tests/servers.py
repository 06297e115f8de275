"""Real and simulated S3 servers for tests: on 127.0.0.1, on free ports, one of each a session.

The fixtures are registered in ``tests/conftest.py`` and start on first use.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

KEY, SECRET = "test", "testtest"
_START_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class S3Server:
    """Where a server listens and what it takes to use it."""

    endpoint_url: str
    key: str = KEY
    secret: str = SECRET

    @property
    def storage_options(self) -> dict[str, Any]:
        """For fsspec, `ObjectStore` and `CheckpointConfig`."""
        return {"key": self.key, "secret": self.secret, "endpoint_url": self.endpoint_url}

    def client(self) -> Any:
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
            config=Config(retries={"max_attempts": 0}, connect_timeout=2, read_timeout=10),
        )

    def bucket(self) -> str:
        """A new empty bucket; its ``s3://`` URL."""
        name = f"rayflow-{uuid.uuid4().hex[:12]}"
        with contextlib.closing(self.client()) as client:
            client.create_bucket(Bucket=name)
        return f"s3://{name}"


@pytest.fixture(scope="session")
def moto_server() -> Iterator[S3Server]:
    """S3 as moto imitates it, in this process; in memory."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield S3Server(f"http://{host}:{port}")
    finally:
        server.stop()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3-compatible server (SeaweedFS) with its data in a temporary folder."""
    with seaweed(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@contextlib.contextmanager
def seaweed(folder: Path) -> Iterator[S3Server]:
    """Run ``weed mini`` on ``folder``."""
    for tries_left in (2, 1, 0):
        server = Seaweed(folder)
        try:
            server.start()
            break
        except RuntimeError:  # somebody else was faster to take one of its ports
            server.kill()
            if not tries_left:
                raise
    try:
        yield server.s3
    finally:
        server.kill()  # it takes seconds to say goodbye, and its data are temporary


class Seaweed:
    """``weed mini`` on ``folder``, which can be killed and started again there, on the same ports.

    ``more``: flags of its own.
    """

    def __init__(self, folder: Path, *more: str) -> None:
        ports = _free_ports(12)
        names = ["master", "volume", "filer", "s3", "admin"]
        flags = [f"-{name}.port={ports[2 * i]}" for i, name in enumerate(names)]
        flags += [f"-{name}.port.grpc={ports[2 * i + 1]}" for i, name in enumerate(names)]
        flags += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false"]
        flags += ["-master.telemetry=false", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *more]
        self.s3 = S3Server(f"http://127.0.0.1:{ports[6]}")
        self._command = [str(Path(sys.executable).parent / "weed"), "mini", *flags]
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when a bucket was made and read."""
        log = self._folder / "weed.log"
        environment = os.environ | {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        with log.open("ab") as output:
            process = self._process = subprocess.Popen(
                self._command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=self._folder
            )
        _wait_until_it_works(self.s3, process, log)

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _wait_until_it_works(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            url = server.bucket()
            with contextlib.closing(server.client()) as client:
                client.put_object(Bucket=url.removeprefix("s3://"), Key="ready", Body=b"yes")
                client.get_object(Bucket=url.removeprefix("s3://"), Key="ready")["Body"].read()
            return
        except Exception as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"weed mini did not start: {log.read_text()[-2000:]}") from error
            time.sleep(0.05)  # the server offers nothing to wait on but an answer


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago; held together, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
