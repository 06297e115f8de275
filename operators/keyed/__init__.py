"""Steps on a keyed stream without windows: running aggregates, reduce, deduplicate, top n."""
