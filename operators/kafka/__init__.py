"""Kafka: the source and the sink, on the client `confluent-kafka` (the extra ``rayflow[kafka]``)."""
