//! A proxy over real Unix sockets, with a scripted host behind it and scripted peers before it.

#![expect(clippy::unwrap_used, reason = "a failure in a test is a failed test")]

mod channel;
mod hostile;
mod peer;
mod resend;
mod service;
mod sets;
mod tcp;
mod vsock;
