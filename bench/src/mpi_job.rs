//! What an MPI job says of itself, and what became of its checkpoint sets.

use std::ops::RangeInclusive;
use std::time::Duration;

use anyhow::{Result, ensure};
use blobcr_proto::v1;
use blobcr_repository::client::RemoteCatalog;
use blobcr_repository::{Catalog, ConnectOptions};
use blobcr_tests::cluster::Cluster;

/// Between two looks at a set.
const PAUSE: Duration = Duration::from_millis(10);

/// How long a job was held up, and how long it ran.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Times {
    /// Each call for a checkpoint, on each rank.
    pub calls: Vec<Duration>,
    /// From its begin to its end, of the rank that took longest.
    pub ran: Duration,
}

impl Times {
    /// From lines `timed: RANK call MICROSECONDS` and `timed: RANK ran MICROSECONDS`, among others.
    ///
    /// # Errors
    /// When no rank says how long it ran.
    pub fn said(text: &str) -> Result<Self> {
        let mut times = Self { calls: Vec::new(), ran: Duration::ZERO };
        for line in text.split("timed: ").skip(1) {
            let words: Vec<&str> = line.split_whitespace().take(3).collect();
            let [_, what, us] = words[..] else { continue };
            let Ok(time) = us.parse().map(Duration::from_micros) else { continue };
            match what {
                "call" => times.calls.push(time),
                "ran" => times.ran = times.ran.max(time),
                _ => {}
            }
        }
        ensure!(times.ran > Duration::ZERO, "the job does not say how long it ran:\n{text}");
        Ok(times)
    }
}

/// How long these sets of the group took from their begin until they were stable. Waits for all of
/// them.
///
/// # Errors
/// When one of them fails, or the metadata does not answer.
pub fn times_to_stable(
    cluster: &Cluster,
    group: &str,
    sets: RangeInclusive<u64>,
) -> Result<Vec<Duration>> {
    let endpoint = std::fs::read_to_string(cluster.dir().join("endpoint"))?;
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let servers = [endpoint.trim().to_owned()];
        let catalog = RemoteCatalog::new(&servers, &ConnectOptions::default())?;
        let mut all = Vec::new();
        for sequence in sets {
            let request = v1::GetSetRequest { group: group.to_owned(), sequence };
            let mut set = catalog.get_set(request.clone()).await?;
            while set.state() == v1::SetState::Pending {
                tokio::time::sleep(PAUSE).await;
                set = catalog.get_set(request.clone()).await?;
            }
            ensure!(set.stable, "set {sequence} is {:?}", set.state());
            let mut last = 0;
            for member in &set.members {
                let image = v1::ImageRef { name: member.image.clone(), id: 0 };
                let number = member.number;
                let snapshot = v1::SnapshotRef { image: Some(image), number };
                last = last.max(catalog.get_snapshot(snapshot).await?.stable_unix_ms);
            }
            all.push(Duration::from_millis(last.saturating_sub(set.created_unix_ms)));
        }
        Ok(all)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_ran_as_long_as_its_slowest_rank() {
        let us = Duration::from_micros;
        let text = "noise\ntimed: 0 call 7\ntimed: 1 call 9\ntimed: 0 ran 20\nnoise timed: 1 ran 30\n\
                    timed: 2 ran soon\ntimed: 3";
        let times = Times::said(text).unwrap();
        assert_eq!(times, Times { calls: vec![us(7), us(9)], ran: us(30) });
        Times::said("timed: 0 call 7").unwrap_err();
    }
}
