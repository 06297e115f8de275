"""The servers of all tests, each started on first use, once a session (and once a worker of pytest-xdist).

They are registered here and imported nowhere: a session fixture that several modules import is one fixture for each.
"""

from __future__ import annotations

pytest_plugins = ["tests.servers", "tests.kafka_server", "tests.postgres_server"]
