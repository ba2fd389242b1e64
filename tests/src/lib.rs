//! End-to-end tests: real processes, real mounts, real guests.
//!
//! | module | holds |
//! |---|---|
//! | [`guest_image`] | the smallest real guest, built from Debian's packages |
//! | [`vm`] | a virtual machine under QEMU |

pub mod guest_image;
pub mod vm;
