//! A parallel job that knows nothing of checkpoints, and saves nothing, in two real VMs: CRIU saves all
//! of its processes on the disks. It loses a VM, and all processes go on where they were.

use std::time::Duration;

use anyhow::Result;
use blobcr_tests::cluster::Cluster;
use blobcr_tests::guest_image::GuestImage;
use blobcr_tests::job::{Heat, Job, Moment};

const HEAT: Heat = Heat { nx: 64, ny: 64, iterations: 80, every: 0 };

#[test]
fn processes_of_a_job_that_lost_a_vm_go_on_where_they_were() -> Result<()> {
    let (image, on_host) = GuestImage::with_mpi()?;
    let cluster = Cluster::start(&[])?;
    let undisturbed = HEAT.undisturbed(&on_host, &cluster.scratch().join("undisturbed"))?;
    let mut say = |line: &str| eprintln!("{line}");
    let mut job = Job::by_images(&cluster, &image, HEAT)?;
    let time = Duration::from_millis(u64::from(rand::random::<u16>()) % 1500);
    job.run_and_kill(1, Moment::After(time), &mut say)?;
    assert_eq!(job.resume(&mut say)?, undisturbed);
    Ok(())
}
