"""Servers for the tests of storage."""

from __future__ import annotations

from tests.servers import moto_server, s3_server

__all__ = ["moto_server", "s3_server"]
