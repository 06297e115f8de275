"""Joins of two keyed streams: by interval, by window, and with the version of a time."""
