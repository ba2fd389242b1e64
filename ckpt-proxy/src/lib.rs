//! Takes CHECKPOINT requests from the guests of its own host, and from nobody else.
