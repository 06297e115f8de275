"""The contracts of operators, sources and sinks, by subject; `rayflow.operators.base` has all of their names."""
