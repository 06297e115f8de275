"""rayflow: stateful, parallel dataflow on Ray."""
