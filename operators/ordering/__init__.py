"""Steps that order rows: the best of each key and window, and all by event time."""
