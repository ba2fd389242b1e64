//! A job whose ranks are killed while sets are joined, one of them half-way, and that goes on from the
//! newest complete one. A made-up host's snapshot is a copy of the machine's directory.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use blobcr_guest_fake_host::refusal;
use blobcr_proto::v1::channel_request::Request;

use crate::job::{Job, Mpi, hash, until};

const ITERATIONS: usize = 60;

/// When a rank is killed.
struct Moment {
    /// The set that a machine is asked to join, ...
    set: u64,
    /// ... that machine, ...
    vm: usize,
    /// ... and whether it does.
    joins: bool,
}

/// A run after the other; each takes three sets or more before it ends.
const MOMENTS: [Moment; 3] = [
    Moment { set: 3, vm: 1, joins: false },
    Moment { set: 6, vm: 0, joins: true },
    Moment { set: 9, vm: 1, joins: true },
];
const ARGUMENTS: [&str; 4] = ["48", "48", "60", "5"];

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

fn snapshot(job: &Path, vm: usize, sequence: u64) -> std::path::PathBuf {
    job.join(format!("snapshot.{vm}.{sequence}"))
}

/// Kills one of the processes that run the program; whether there was one.
fn kill_one(program: &Path, which: usize) -> bool {
    let mut ranks = Vec::new();
    for entry in fs::read_dir("/proc").unwrap() {
        let path = entry.unwrap().path();
        let pid = path.file_name().and_then(|name| name.to_str()?.parse::<i32>().ok());
        if let Some(pid) = pid
            && fs::read_link(path.join("exe")).is_ok_and(|exe| exe == program)
        {
            ranks.push(pid);
        }
    }
    ranks.sort_unstable();
    let Some(pid) = ranks.get(which % ranks.len().max(1)) else { return false };
    // SAFETY: it runs this test's own program.
    unsafe { libc::kill(*pid, libc::SIGKILL) == 0 }
}

/// Both machines' disks become what they were in the newest set that both joined.
fn roll_back(job: &Job) {
    let complete = job.sets.begun().into_iter().rev().find(|set| set.joined_vms == 2);
    for vm in [0, 1] {
        fs::remove_dir_all(job.disk(vm)).unwrap();
        match &complete {
            Some(set) => copy(&snapshot(&job.path(""), vm, set.sequence), &job.disk(vm)),
            None => fs::create_dir(job.disk(vm)).unwrap(),
        }
    }
}

#[test]
fn a_killed_job_goes_on_from_the_newest_complete_set() {
    for mpi in Mpi::BOTH {
        let undisturbed = Job::new(mpi);
        let heat = undisturbed.compile("examples/heat.c", &["-lblobcr_mpi"]);
        let (expected, _) = undisturbed.run(&heat, &ARGUMENTS);

        // The moments are those of the host's calls, so that no run is quicker than its killer.
        let kills = Arc::new(AtomicUsize::new(0));
        let (killed, program) = (kills.clone(), heat.clone());
        let job = Job::refused(mpi, move |disk, vm, request| {
            let Request::Checkpoint(request) = request else { return None };
            let sequence = request.set.as_ref().unwrap().sequence;
            let moment =
                MOMENTS.iter().position(|moment| (moment.set, moment.vm) == (sequence, vm));
            let joins = moment.is_none_or(|at| MOMENTS[at].joins);
            if joins {
                copy(disk, &snapshot(disk.parent().unwrap(), vm, sequence));
            }
            if let Some(at) = moment {
                assert!(kill_one(&program, at));
                killed.fetch_add(1, Ordering::SeqCst);
            }
            (!joins).then(|| refusal(14, "the machine is gone"))
        });
        for round in 1..=MOMENTS.len() {
            job.end(job.start(&heat, &ARGUMENTS));
            // The killed may be gone before the killer has counted.
            until("killed", || kills.load(Ordering::SeqCst) == round);
            roll_back(&job);
        }
        let (printed, _) = job.run(&heat, &ARGUMENTS);
        assert!(printed.contains("resumed at "), "{printed}");
        assert_eq!(hash(&printed), hash(&expected), "{mpi:?}");
        let log = fs::read_to_string(job.disk(0).join("log")).unwrap();
        let lines: Vec<&str> = log.lines().filter_map(|line| line.split(' ').next()).collect();
        let all: Vec<String> = (1..=ITERATIONS).map(|line| line.to_string()).collect();
        assert_eq!(lines, all, "{mpi:?}: every line exactly once");
        let whole = fs::read_to_string(undisturbed.disk(0).join("log")).unwrap();
        assert_eq!(log, whole, "{mpi:?}");
    }
}
