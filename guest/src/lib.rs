//! What runs in a guest: the program that asks its host for a CHECKPOINT.
