//! The local mirror of a snapshot, and the file system that serves it to a hypervisor.
