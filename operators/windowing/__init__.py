"""Windows other than tumbling ones."""
