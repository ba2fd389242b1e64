//! Benchmarks: us and the alternatives in the same run.
