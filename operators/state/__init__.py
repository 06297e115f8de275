"""Keyed state: tables of rows by key, the same on every back end (DESIGN: `memory`, `fs`, `rocksdb`)."""
