"""Sinks to databases: PostgreSQL in four ways, and any target with transactions through a write-ahead log."""
