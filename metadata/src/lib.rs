//! The metadata service: the few mutable facts of the repository.
