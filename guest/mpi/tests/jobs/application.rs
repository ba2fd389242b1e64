//! Global checkpoints that a program asks for, under MPICH and Open MPI.

use std::fs;

use crate::job::{Job, Mpi, hash};
use blobcr_guest_fake_host::refusal;
use blobcr_proto::v1::channel_request::Request;

const LIBRARY: &[&str] = &["-lblobcr_mpi"];
const HEAT: &str = "examples/heat.c";

fn count(said: &str, of: &str) -> usize {
    said.lines().filter(|line| line.contains(of)).count()
}

#[test]
fn each_set_is_begun_once_and_joined_once_by_each_machine() {
    for mpi in Mpi::BOTH {
        let job = Job::new(mpi);
        let heat = job.compile(HEAT, LIBRARY);
        let (_, said) = job.run(&heat, &["40", "40", "20", "5"]);
        job.has_complete_sets(4);
        for (set, at) in [(1, 5), (2, 10), (3, 15), (4, 20)] {
            assert_eq!(count(&said, &format!("set {set} at {at}")), 4, "on every rank: {said}");
        }
    }
}

#[test]
fn each_machine_is_flushed_once() {
    for mpi in Mpi::BOTH {
        let mut job = Job::new(mpi);
        job.set("BLOBCR_MPI_FLUSH", "all");
        job.set("BLOBCR_MPI_VERBOSE", "1");
        let heat = job.compile(HEAT, LIBRARY);
        let (_, said) = job.run(&heat, &["40", "40", "5", "5"]);
        job.has_complete_sets(1);
        assert_eq!(count(&said, "blobcr_mpi: flushed"), 2, "{said}");
        assert_eq!(count(&said, "joined the set only:1"), 2, "{said}");
    }
}

#[test]
fn a_rank_that_could_not_write_keeps_all_from_asking() {
    for mpi in Mpi::BOTH {
        let job = Job::new(mpi);
        let heat = job.compile(HEAT, LIBRARY);
        // Rank 2 cannot make a file of this name.
        fs::create_dir(job.disk(1).join("2.state.new")).unwrap();
        let (printed, said) = job.run(&heat, &["40", "40", "10", "5"]);
        assert_eq!(job.begun(), [0, 0]);
        assert_eq!(job.joined(), [vec![], vec![]]);
        let same = format!("no checkpoint: {} rank 2: it could not write its state", -libc::EISDIR);
        assert_eq!(count(&said, &same), 8, "twice on each rank: {said}");
        hash(&printed);
    }
}

#[test]
fn a_host_that_refuses_leaves_the_set_incomplete_and_every_rank_knows() {
    for mpi in Mpi::BOTH {
        let job = Job::refused(mpi, |_, vm, request| {
            let refuses = vm == 1 && matches!(request, Request::Checkpoint(_));
            refuses.then(|| refusal(9, "rolling back"))
        });
        let heat = job.compile(HEAT, LIBRARY);
        let (_, said) = job.run(&heat, &["40", "40", "5", "5"]);
        let same =
            format!("no checkpoint: {} rank 2: the host refused: rolling back", -libc::EBUSY);
        assert_eq!(count(&said, &same), 4, "{said}");
        assert_eq!(job.joined(), [vec![1], vec![1]], "asked once each");
        assert_eq!(job.sets.begun()[0].joined_vms, 1);

        let job = Job::refused(mpi, |_, _, request| {
            matches!(request, Request::BeginSet(_)).then(|| refusal(5, "no such group"))
        });
        let heat = job.compile(HEAT, LIBRARY);
        let (_, said) = job.run(&heat, &["40", "40", "5", "5"]);
        let same = format!("{} rank 0: the host refused: no such group", -libc::ENOENT);
        assert_eq!(count(&said, &same), 4, "{said}");
        assert_eq!(job.joined(), [vec![], vec![]]);
    }
}

#[test]
fn a_host_that_is_not_there_is_given_up_by_all() {
    for mpi in Mpi::BOTH {
        let mut job = Job::new(mpi);
        job.set("BLOBCR_MPI_TIMEOUT_S", "0.5");
        // Nobody listens on the port of TCP's own testing.
        job.set("BLOBCR_CONNECT", "127.0.0.1:9");
        let heat = job.compile(HEAT, LIBRARY);
        let (_, said) = job.run(&heat, &["40", "40", "5", "5"]);
        let same = format!("{} rank 0: the host did not answer in time", -libc::ETIMEDOUT);
        assert_eq!(count(&said, &same), 4, "{said}");
    }
}

#[test]
fn a_restarted_job_comes_to_the_same_to_the_last_bit() {
    let mut hashes = Vec::new();
    for mpi in Mpi::BOTH {
        let undisturbed = Job::new(mpi);
        let heat = undisturbed.compile(HEAT, LIBRARY);
        let (printed, _) = undisturbed.run(&heat, &["64", "50", "30", "0"]);
        hashes.push(hash(&printed).to_owned());
        let job = Job::new(mpi);
        for (iterations, resumed) in [("10", None), ("20", Some(10)), ("30", Some(20))] {
            let (printed, _) = job.run(&heat, &["64", "50", iterations, "5"]);
            let line = resumed.map(|at| format!("resumed at {at}"));
            assert_eq!(printed.lines().find(|l| l.starts_with("resumed")), line.as_deref());
            hashes.push(hash(&printed).to_owned());
        }
        let ended = hashes.len() - 1;
        assert_eq!(hashes[ended], hashes[0], "{hashes:?}");
        assert_ne!(hashes[ended - 1], hashes[0], "the field does not change: {hashes:?}");
        job.has_complete_sets(6);
    }
}

#[test]
fn a_program_for_scr_goes_on_from_its_newest_complete_output() {
    for mpi in Mpi::BOTH {
        let mut job = Job::new(mpi);
        let exit = job.path("exit").display().to_string();
        job.set("BLOBCR_MPI_EXIT_FILE", &exit);
        let program = job.compile("mpi/tests/scr.c", LIBRARY);
        let (printed, _) = job.run(&program, &["3"]);
        assert_eq!(printed, "fresh\nstep-1 set 1\nstep-2 set 2\nstep-3 set 3\nstable 0\n");
        job.has_complete_sets(3);
        // What a rank has half-written, or what one machine alone has, counts for nothing.
        fs::create_dir(job.disk(0).join("00000009.half.partial")).unwrap();
        fs::create_dir(job.disk(1).join("00000010.alone")).unwrap();
        let (printed, _) = job.run(&program, &["4"]);
        assert_eq!(printed, "restarted step-3\nstep-4 set 4\nstable 0\n");
        // One that a rank cannot read is passed over for the one before.
        let mut found = fs::read_dir(job.disk(1)).unwrap().map(|e| e.unwrap().path());
        let newest = found.find(|p| p.to_string_lossy().ends_with("step-4")).unwrap();
        fs::remove_file(newest.join("rank-3")).unwrap();
        fs::write(&exit, b"").unwrap();
        let (printed, _) = job.run(&program, &["9"]);
        assert_eq!(printed, "unreadable step-4\nrestarted step-3\nstep-4 set 5\nends\nstable 0\n");
    }
}
