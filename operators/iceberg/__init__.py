"""Iceberg tables as sinks: Parquet files by the subtasks, one snapshot of the table a checkpoint by the coordinator."""
