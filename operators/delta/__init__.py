"""Delta Lake tables as sinks: Parquet files by the subtasks, one commit a checkpoint by the coordinator."""
