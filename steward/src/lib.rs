//! What keeps the repository healthy, one file per task and one runner.
//!
//! | module | holds |
//! |---|---|
//! | [`collect`] | garbage collection: what no live root needs and no writer may need goes |
//! | [`repair`] | pays debts, and copies what moves; says when a partition has moved |
//! | [`scrub`] | reads every copy and shard, and mends what is damaged or missing |
//! | [`retention`] | which snapshots of an image a policy keeps |
//! | [`retire`] | gives up the checkpoint sets that a group keeps no longer |
//! | [`runner`] | runs the tasks side by side, for the role, while this steward leads |
//!
//! Below them: `layout` (where records belong), `members` (the nodes), `walk` (what they hold, object
//! after object), `mend` (completes one object), `pass` (all objects of some partitions).
//!
//! The steward has no state of its own: killed anywhere, it loses nothing, and two of them at the
//! same time do no harm.

pub mod collect;
mod layout;
mod lead;
mod members;
mod mend;
mod node;
mod pace;
mod pass;
mod progress;
pub mod repair;
pub mod retention;
pub mod retire;
pub mod runner;
pub mod scrub;
mod walk;

pub use collect::{CollectError, CollectOptions, Collection, NodeCollection, collect};
pub use layout::LayoutError;
pub use mend::Tally;
pub use node::NodeError;
pub use repair::{RepairError, RepairOptions, Repaired, Repairer};
pub use retention::{Candidate, Policy, Reason, Verdict};
pub use retire::{Retired, retire};
pub use scrub::{NodeScrub, Scrub, ScrubError, ScrubOptions, scrub};
