"""Sinks: the ends of a flow. See `rayflow.operators.base.SinkFactory` and `Committer` for the contract."""
