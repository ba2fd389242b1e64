//! What tests put under a store.

mod disk;
mod file;

pub use disk::{Fault, SimDisk};
