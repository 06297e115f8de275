"""Runs inside the environment that has apache-flink and nothing of rayflow: queries from stdin, seconds to stdout.

In: one JSON object, ``tables`` (name -> {"columns": DDL, "files": folder}), ``queries`` (name -> SQL), ``parallelism``,
``interval_ms``, ``delay_ms``. Out: a JSON line {"query", "seconds"} each, or {"query", "error"}.
"""

import json
import sys
import tempfile
from typing import Any


def main() -> None:
    from pyflink.table import EnvironmentSettings, TableEnvironment  # type: ignore[import-not-found]

    task: dict[str, Any] = json.load(sys.stdin)
    env = TableEnvironment.create(EnvironmentSettings.in_streaming_mode())
    settings = env.get_config()
    settings.set("parallelism.default", str(task["parallelism"]))
    settings.set("execution.checkpointing.interval", f"{task['interval_ms']} ms")
    settings.set("execution.checkpointing.storage", "filesystem")
    settings.set("execution.checkpointing.dir", "file://" + tempfile.mkdtemp(prefix="flink-checkpoints-"))
    settings.set("state.backend.type", "hashmap")
    settings.set("table.local-time-zone", "UTC")
    settings.set("taskmanager.memory.process.size", "6g")
    for name, table in task["tables"].items():
        env.execute_sql(
            f"create temporary table {name} ({table['columns']}, watermark for `dateTime` as `dateTime` - "
            f"interval '{task['delay_ms'] / 1000:.3f}' second) "
            f"with ('connector' = 'filesystem', 'path' = '{table['files']}', 'format' = 'csv')"
        )
    for name, sql in task["queries"].items():
        try:
            print(json.dumps({"query": name, "seconds": run(env, name, sql)}), flush=True)
        except Exception as error:
            print(json.dumps({"query": name, "error": str(error).strip()[-600:]}), flush=True)


def run(env: Any, name: str, sql: str) -> float:
    """Seconds by Flink's own count, without the start of its processes; rows are thrown away."""
    result = env.sql_query(sql)
    columns = ", ".join(f"c{i} {kind}" for i, kind in enumerate(_types(result.get_resolved_schema())))
    env.execute_sql(f"create temporary table sink_{name} ({columns}) with ('connector' = 'blackhole')")
    job = result.execute_insert(f"sink_{name}").get_job_client()
    return float(job.get_job_execution_result().result().get_net_runtime()) / 1000


def _types(schema: Any) -> list[str]:
    """SQL types of the columns; time attributes as plain times."""
    java = schema._j_resolved_schema
    found = java.getColumnDataTypes()
    kinds = [found.get(i).getLogicalType().asSerializableString() for i in range(java.getColumnCount())]
    return [kind.replace(" NOT NULL", "").replace(" *ROWTIME*", "") for kind in kinds]


if __name__ == "__main__":
    main()
