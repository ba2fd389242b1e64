//! A job whose ranks are killed at random, and in the middle of a set, and that goes on from the
//! newest complete one. A made-up host's snapshot is a copy of the machine's directory.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::Duration;

use blobcr_guest_fake_host::refusal;
use blobcr_proto::v1::channel_request::Request;

use crate::job::{Job, Mpi, hash};

const ITERATIONS: usize = 60;
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

        // Once, a rank dies when one machine has joined a set and the other has not.
        let killed_half_way = Arc::new(AtomicBool::new(false));
        let (half_way, program) = (killed_half_way.clone(), heat.clone());
        let job = Job::refused(mpi, move |disk, vm, request| {
            let Request::Checkpoint(request) = request else { return None };
            let sequence = request.set.as_ref().unwrap().sequence;
            if vm == 1 && sequence == 3 && !half_way.swap(true, Ordering::SeqCst) {
                assert!(kill_one(&program, 0));
                return Some(refusal(14, "the machine is gone"));
            }
            copy(disk, &snapshot(disk.parent().unwrap(), vm, sequence));
            None
        });
        // The first time until it is killed half-way, then at moments of a fixed sequence.
        let pauses = [60_000, 900, 500];
        let mut kills = 0;
        for (round, pause) in pauses.into_iter().enumerate() {
            let mut child = job.start(&heat, &ARGUMENTS);
            for _ in 0..pause / 10 {
                if child.try_wait().unwrap().is_some() {
                    break;
                }
                sleep(Duration::from_millis(10));
            }
            kills += usize::from(child.try_wait().unwrap().is_none() && kill_one(&heat, round));
            job.end(child);
            roll_back(&job);
        }
        assert!(killed_half_way.load(Ordering::SeqCst));
        assert!(kills > 0, "it was always quicker than its killer");
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
