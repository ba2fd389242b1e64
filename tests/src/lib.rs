//! End-to-end tests: real processes, real mounts, real guests.
