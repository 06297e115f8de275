"""The text sources under one name; see `text_files` for what they share."""

from rayflow.operators.sources.csv_files import CsvSource
from rayflow.operators.sources.json_files import JsonSource

__all__ = ["CsvSource", "JsonSource"]
