//! `blobcr steward`: what keeps the repository healthy, while it runs.

use std::time::Duration;

use blobcr_repository::{ConnectOptions, Repository};
use blobcr_steward::runner::{Schedule, resign, run as work};
use blobcr_steward::{RepairOptions, ScrubOptions};
use serde::Serialize;
use tokio::task::JoinHandle;

use super::serve::until_stopped;
use crate::args::{StewardArgs, StewardSchedule};
use crate::interrupt::Interrupts;
use crate::output::{Output, say};

/// What the role says on stdout with `--json` when it is ready. It serves at no address.
#[derive(Debug, Serialize)]
struct Ready {
    role: &'static str,
}

/// Runs the role until it is told to stop.
///
/// # Errors
/// When an address makes no sense.
pub async fn run(args: StewardArgs, output: Output) -> anyhow::Result<()> {
    let interrupts = Interrupts::listen()?;
    let repository = Repository::connect(&args.metadata, ConnectOptions::default()).await?;
    let steward = Steward::start(repository, &args.schedule);
    say("steward is ready");
    output.data(&Ready { role: "steward" }, |_| String::new())?;
    until_stopped(interrupts, || {}).await?;
    steward.stop().await;
    Ok(())
}

/// A steward at work. It stops when it is dropped; wherever that is, nothing is lost.
pub(super) struct Steward {
    work: JoinHandle<()>,
    repository: Repository,
    holder: String,
}

impl Steward {
    pub(super) fn start(repository: Repository, schedule: &StewardSchedule) -> Self {
        let schedule = Schedule {
            collect_every: Duration::from_secs(schedule.collect_every),
            scrub_every: Duration::from_secs(schedule.scrub_every),
            scrub: ScrubOptions { bytes_per_second: schedule.scrub_rate, quick: false },
            repair: RepairOptions { bytes_per_second: schedule.repair_rate },
        };
        let holder = format!("steward-{}-{:016x}", std::process::id(), rand::random::<u64>());
        let work = tokio::spawn(work(repository.clone(), holder.clone(), schedule));
        Self { work, repository, holder }
    }

    /// Returns when it has stopped, and another one may lead.
    pub(super) async fn stop(mut self) {
        self.work.abort();
        // Cancelled: nothing else ends it but a panic, which was reported where it happened.
        drop((&mut self.work).await);
        let resigned = resign(&self.repository, self.holder.clone());
        drop(tokio::time::timeout(RESIGN_DEADLINE, resigned).await);
    }
}

/// When the metadata service does not answer in time, the lead runs out by itself.
const RESIGN_DEADLINE: Duration = Duration::from_secs(1);

impl Drop for Steward {
    fn drop(&mut self) {
        self.work.abort();
    }
}
