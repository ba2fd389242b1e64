//! A parallel job that loses a VM again and again, each time at another moment: `./do job-soak`.

use std::fmt;
use std::time::Duration;

use anyhow::{Result, ensure};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::cluster::Cluster;
use crate::guest_image::GuestImage;
use crate::job::{Heat, Job, Moment};
use crate::scenario::Say;

/// The most VMs that one job loses.
const KILLS_MAX: usize = 3;
/// A job lives on for so long after the set that was waited for, at most.
const AFTER_MAX_MS: u64 = 2000;
/// Enough for the sets that each kill waits for.
const ITERATIONS_PER_KILL: u64 = 300;
const EVERY: u64 = 20;

/// What a seed chooses. The same seed chooses the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The command of the guest that is the job.
    pub program: &'static str,
    /// Which VM is killed, and when; one after the other.
    pub kills: Vec<(usize, Moment)>,
}

impl Choice {
    /// What this seed chooses.
    #[must_use]
    pub fn of(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let program = ["heat", "job-plain"][random.random_range(0..2)];
        let kills = random.random_range(1..=KILLS_MAX);
        let kills = (0..kills).map(|number| {
            let victim = random.random_range(0..2);
            let time = Duration::from_millis(random.random_range(0..AFTER_MAX_MS));
            // Before the first set there is nothing to go back to.
            match random.random_range(0..if number == 0 { 3 } else { 4 }) {
                0 => (victim, Moment::After(time)),
                // The first VM begins the sets: without it there is none for the other to join.
                1 => (1, Moment::BetweenJoins),
                2 => (victim, Moment::WhilePending),
                _ => (victim, Moment::BeforeASet),
            }
        });
        Self { program, kills: kills.collect() }
    }

    /// Runs the job with these losses to its end.
    ///
    /// # Errors
    /// When it does not end as one that lost nothing.
    pub fn run(&self, say: Say<'_>) -> Result<()> {
        let (image, on_host) = GuestImage::with_mpi()?;
        let cluster = Cluster::start(&[])?;
        let iterations = ITERATIONS_PER_KILL * self.kills.len() as u64;
        let heat = Heat { nx: 64, ny: 64, iterations, every: EVERY };
        let undisturbed = heat.undisturbed(&on_host, &cluster.scratch().join("undisturbed"))?;
        let mut job = Job::new(&cluster, &image, heat, self.program)?;
        for (number, (victim, moment)) in self.kills.iter().enumerate() {
            match number {
                0 => job.run_and_kill(*victim, *moment, say)?,
                _ => job.resume_and_kill(*victim, *moment, say)?,
            }
        }
        let hash = job.resume(say)?;
        ensure!(hash == undisturbed, "it ended with {hash}, and undisturbed with {undisturbed}");
        Ok(())
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.program)?;
        for (victim, moment) in &self.kills {
            write!(f, ", kill VM {victim} {moment:?}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_chooses_the_same_again_and_seeds_choose_everything() {
        let all: Vec<_> = (0..100).map(Choice::of).collect();
        assert!(all.iter().zip(0..).all(|(choice, seed)| *choice == Choice::of(seed)));
        let kills: Vec<_> = all.iter().flat_map(|choice| &choice.kills).collect();
        for moment in [Moment::BetweenJoins, Moment::WhilePending, Moment::BeforeASet] {
            assert!(kills.iter().any(|kill| kill.1 == moment), "{moment:?}");
        }
        assert!(all.iter().all(|choice| choice.kills[0].1 != Moment::BeforeASet));
        assert!(all.iter().any(|choice| choice.kills.len() == KILLS_MAX));
    }
}
