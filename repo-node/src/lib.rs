//! The chunk server: an append-only chunk store behind gRPC.
