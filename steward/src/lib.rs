//! What keeps the repository healthy, one file per task and one runner.
//!
//! | module | holds |
//! |---|---|
//! | [`collect`] | garbage collection: what no live root needs and no writer may need goes |
//! | [`retention`] | which snapshots of an image a policy keeps |
//! | [`scrub`] | reads every copy on every node, and mends what is damaged or missing |
//! | [`runner`] | runs the tasks in turn, for the role |
//!
//! The steward has no state of its own: killed anywhere, it loses nothing, and two of them at the
//! same time do no harm.

pub mod collect;
mod node;
pub mod retention;
pub mod runner;
pub mod scrub;

pub use collect::{CollectError, CollectOptions, Collection, NodeCollection, collect};
pub use node::NodeError;
pub use retention::{Candidate, Policy, Reason, Verdict};
pub use scrub::{NodeScrub, Scrub, ScrubError, ScrubOptions, scrub};
