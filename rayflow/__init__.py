"""rayflow: a stateful, parallel dataflow engine for Python, exactly-once on Ray."""

from rayflow.checkpoint import Checkpoint, read_checkpoint
from rayflow.compaction import Compacted, compact_files
from rayflow.config import CheckpointConfig, JobConfig, Restart
from rayflow.difference import StateDifference, diff
from rayflow.errors import (
    ClusterError,
    CommitLostError,
    ConfigError,
    ConnectorError,
    CorruptCheckpointError,
    DataError,
    FencedError,
    GuaranteeWarning,
    JobCancelledError,
    JobFailedError,
    PlanError,
    RayflowError,
    StateSchemaError,
    StorageError,
    UserCodeError,
)
from rayflow.expressions import Expr, coalesce, col, lit, when
from rayflow.flow import Flow, attach
from rayflow.kafka import read_kafka, topic_pattern
from rayflow.keyed import KeyedStream
from rayflow.operators.aggregates import (
    aggregate,
    approx_count_distinct,
    arg_max,
    arg_min,
    collect,
    count,
    count_distinct,
    first,
    last,
    max,
    mean,
    median,
    min,
    quantile,
    stddev,
    sum,
    variance,
)
from rayflow.operators.base import (
    Committer,
    CommitterContext,
    FrozenState,
    FrozenTable,
    OperatorContext,
    Polled,
    RestoredState,
    SinkOperator,
    Source,
    SplitReader,
)
from rayflow.operators.process import BroadcastProcess, KeyedProcess
from rayflow.operators.sinks.committed import CommittedFile, committed_files
from rayflow.operators.sinks.sink import Sink
from rayflow.operators.state.declared import (
    AggregatingState,
    BroadcastState,
    ListState,
    MapState,
    ReducingState,
    ValueState,
)
from rayflow.operators.user_aggregate import UserAggregate
from rayflow.operators.windowing.calendar import tumbling
from rayflow.operators.windowing.count import count_window
from rayflow.operators.windowing.global_window import global_window
from rayflow.operators.windowing.session import session
from rayflow.operators.windowing.sliding import sliding
from rayflow.operators.windowing.triggers import every
from rayflow.reading import from_arrow, from_generator, read_csv, read_json, read_parquet, read_source
from rayflow.restore_plan import RestorePlan, restore_plan
from rayflow.runtime.results import JobResult, JobStatus, SubtaskInfo
from rayflow.storage.rebucket import rebucket
from rayflow.stream import Stream

__version__ = "0.1.0"

__all__ = [
    "AggregatingState",
    "BroadcastProcess",
    "BroadcastState",
    "Checkpoint",
    "CheckpointConfig",
    "ClusterError",
    "CommitLostError",
    "CommittedFile",
    "Committer",
    "CommitterContext",
    "Compacted",
    "ConfigError",
    "ConnectorError",
    "CorruptCheckpointError",
    "DataError",
    "Expr",
    "FencedError",
    "Flow",
    "FrozenState",
    "FrozenTable",
    "GuaranteeWarning",
    "JobCancelledError",
    "JobConfig",
    "JobFailedError",
    "JobResult",
    "JobStatus",
    "KeyedProcess",
    "KeyedStream",
    "ListState",
    "MapState",
    "OperatorContext",
    "PlanError",
    "Polled",
    "RayflowError",
    "ReducingState",
    "Restart",
    "RestorePlan",
    "RestoredState",
    "Sink",
    "SinkOperator",
    "Source",
    "SplitReader",
    "StateDifference",
    "StateSchemaError",
    "StorageError",
    "Stream",
    "SubtaskInfo",
    "UserAggregate",
    "UserCodeError",
    "ValueState",
    "aggregate",
    "approx_count_distinct",
    "arg_max",
    "arg_min",
    "attach",
    "coalesce",
    "col",
    "collect",
    "committed_files",
    "compact_files",
    "count",
    "count_distinct",
    "count_window",
    "diff",
    "every",
    "first",
    "from_arrow",
    "from_generator",
    "global_window",
    "last",
    "lit",
    "max",
    "mean",
    "median",
    "min",
    "quantile",
    "read_checkpoint",
    "read_csv",
    "read_json",
    "read_kafka",
    "read_parquet",
    "read_source",
    "rebucket",
    "restore_plan",
    "session",
    "sliding",
    "stddev",
    "sum",
    "topic_pattern",
    "tumbling",
    "variance",
    "when",
]
