"""Conformance suites for sources and sinks of one's own, run with pytest; needs no Ray and no server.

Derive a test class from `SourceConformance` or `SinkConformance` and give the fixtures it asks for; pytest runs all of
its tests. docs/custom-sources.md and docs/custom-sinks.md show how. What each test is about stands in its docstring.
"""

try:
    import pytest
except ImportError as error:
    raise ImportError("rayflow.testing needs pytest: pip install pytest") from error

pytest.register_assert_rewrite("rayflow.testing.sources", "rayflow.testing.sinks", "rayflow.testing.flows")

from rayflow.testing.driving import SinkRun, operator_context, read_split  # noqa: E402
from rayflow.testing.flows import InjectedFailure  # noqa: E402
from rayflow.testing.sinks import SinkConformance  # noqa: E402
from rayflow.testing.sources import SourceConformance  # noqa: E402

__all__ = [
    "InjectedFailure",
    "SinkConformance",
    "SinkRun",
    "SourceConformance",
    "operator_context",
    "read_split",
]
