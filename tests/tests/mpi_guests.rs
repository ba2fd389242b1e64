//! A parallel job in two real VMs loses one of them and goes on, bit for bit and line for line.

use std::time::Duration;

use anyhow::Result;
use blobcr_tests::cluster::Cluster;
use blobcr_tests::guest_image::GuestImage;
use blobcr_tests::job::{Heat, Job, Moment};

const HEAT: Heat = Heat { nx: 64, ny: 64, iterations: 240, every: 20 };

#[expect(clippy::print_stderr, reason = "what a failed test did until then")]
fn goes_on(victim: usize, moment: Moment, program: &'static str) -> Result<()> {
    let (image, on_host) = GuestImage::with_mpi()?;
    let cluster = Cluster::start(&[])?;
    let undisturbed = HEAT.undisturbed(&on_host, &cluster.scratch().join("undisturbed"))?;
    let mut say = |line: &str| eprintln!("{line}");
    let mut job = Job::new(&cluster, &image, HEAT, program)?;
    job.run_and_kill(victim, moment, &mut say)?;
    assert_eq!(job.resume(&mut say)?, undisturbed);
    Ok(())
}

#[test]
fn a_job_that_lost_a_vm_ends_as_if_it_had_not() -> Result<()> {
    let time = Duration::from_millis(u64::from(rand::random::<u16>()) % 1500);
    goes_on(1, Moment::After(time), "heat")
}

#[test]
fn a_set_that_only_one_vm_joined_does_not_count() -> Result<()> {
    goes_on(1, Moment::BetweenJoins, "heat")
}

#[test]
fn a_vm_that_dies_while_its_set_is_pending_is_no_loss() -> Result<()> {
    goes_on(0, Moment::WhilePending, "heat")
}

/// The program knows nothing of checkpoints; the library that is loaded before it does.
#[test]
fn a_job_that_knows_nothing_of_checkpoints_goes_on_too() -> Result<()> {
    let time = Duration::from_millis(u64::from(rand::random::<u16>()) % 1500);
    goes_on(0, Moment::After(time), "job-plain")
}
