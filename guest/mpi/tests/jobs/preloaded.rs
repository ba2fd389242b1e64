//! Global checkpoints of a program that calls nothing of blobcr: the library is preloaded.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::job::{Job, Mpi, hash, text, until};

const PLAIN: &[&str] = &["-DPLAIN", "-rdynamic"];
/// Nothing of it can be found from outside: it exports no function that saves its state.
const CLOSED: &[&str] = &["-DPLAIN"];
const HEAT: &str = "examples/heat.c";
/// More than any test waits for.
const ENDLESS: &str = "1000000000";

fn preloaded(mpi: Mpi, flags: &[&str]) -> (Job, PathBuf) {
    let mut job = Job::new(mpi);
    let heat = job.compile(HEAT, flags);
    let linked = Command::new("readelf").arg("-d").arg(&heat).output().unwrap();
    assert!(!text(&linked.stdout).contains("blobcr"), "it must know nothing of the library");
    job.preload();
    (job, heat)
}

#[test]
fn every_nth_call_takes_one_and_the_states_resume() {
    for mpi in Mpi::BOTH {
        let (mut job, heat) = preloaded(mpi, PLAIN);
        let (undisturbed, _) = {
            let job = Job::new(mpi);
            job.run(&heat, &["48", "48", "60", "0"])
        };
        job.set("BLOBCR_MPI_EVERY", "MPI_Allreduce:10");
        // Two calls before the first iteration, one in each.
        let (_, said) = job.run(&heat, &["48", "48", "35", "0"]);
        job.has_complete_sets(3);
        assert!(!said.contains("blobcr_mpi:"), "nothing went wrong: {said}");
        // The last of them was before the 30th call, that of the 28th iteration.
        let (printed, _) = job.run(&heat, &["48", "48", "60", "0"]);
        assert!(printed.contains("resumed at 28\n"), "{printed}");
        assert_eq!(hash(&printed), hash(&undisturbed));
        job.has_complete_sets(3 + 3);
    }
}

#[test]
fn calls_of_fortran_count_once_each() {
    for mpi in Mpi::BOTH {
        let mut job = Job::new(mpi);
        let steps = job.compile_by("mpif90", "mpi/tests/steps.f90", &[]);
        job.preload();
        job.set("BLOBCR_MPI_EVERY", "MPI_Allreduce:5");
        job.set("BLOBCR_MPI_SAVE", "true");
        let (_, said) = job.run(&steps, &[]);
        job.has_complete_sets(4);
        assert!(!said.contains("blobcr_mpi:"), "nothing went wrong: {said}");
    }
}

#[test]
fn an_interval_takes_them_by_a_command() {
    for mpi in Mpi::BOTH {
        let (mut job, heat) = preloaded(mpi, CLOSED);
        job.set("BLOBCR_MPI_INTERVAL_S", "0.3");
        let command = "echo $BLOBCR_RANK of $BLOBCR_SIZE, $(readlink /proc/$BLOBCR_PID/exe) \
                       ${LD_PRELOAD-alone} >> $BLOBCR_MPI_DIR/saved.$BLOBCR_RANK";
        job.set("BLOBCR_MPI_SAVE", command);
        let mut child = job.start(&heat, &["40", "40", ENDLESS, "0"]);
        until("three sets", || job.joined().iter().all(|sets| sets.len() >= 3));
        terminate(&mut child);
        job.end(child);
        for rank in 0..4 {
            let saved = job.disk(rank / 2).join(format!("saved.{rank}"));
            let saved = fs::read_to_string(saved).unwrap();
            let line = format!("{rank} of 4, {} alone", heat.display());
            assert!(saved.lines().count() >= 3 && saved.lines().all(|l| l == line), "{saved}");
        }
    }
}

#[test]
fn a_signal_takes_one_by_a_library() {
    for mpi in Mpi::BOTH {
        let (mut job, heat) = preloaded(mpi, CLOSED);
        let (code, hook) = (job.path("hook.c"), job.path("hook.so"));
        fs::write(
            &code,
            r#"#include <stdio.h>
            int blobcr_mpi_save(int rank, int size, const char *dir)
            {
                char path[4096];
                FILE *file;
                snprintf(path, sizeof path, "%s/hooked.%d", dir, rank);
                file = fopen(path, "w");
                return file == 0 || fprintf(file, "%d\n", size) < 0 || fclose(file) != 0 ? -5 : 0;
            }"#,
        )
        .unwrap();
        let status =
            Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&hook, &code]).status();
        assert!(status.unwrap().success());
        job.set("BLOBCR_MPI_SIGNAL", "USR1");
        job.set("BLOBCR_MPI_HOOK", &hook.display().to_string());
        let mut child = job.start(&heat, &["40", "40", ENDLESS, "0"]);
        let log = job.disk(0).join("log");
        until("running", || fs::metadata(&log).is_ok_and(|found| found.len() > 0));
        assert_eq!(job.begun(), [0, 0], "nobody asked for it yet");
        // Both launchers hand it on to the ranks.
        send(&child, libc::SIGUSR1);
        until("the set", || job.joined().iter().all(|sets| !sets.is_empty()));
        terminate(&mut child);
        job.end(child);
        for rank in 0..4 {
            let saved = job.disk(rank / 2).join(format!("hooked.{rank}"));
            assert_eq!(fs::read_to_string(saved).unwrap(), "4\n");
        }
    }
}

#[test]
fn a_save_that_fails_takes_none_and_is_said() {
    for mpi in Mpi::BOTH {
        let (mut job, heat) = preloaded(mpi, CLOSED);
        job.set("BLOBCR_MPI_EVERY", "MPI_Allreduce:4");
        job.set("BLOBCR_MPI_SAVE", "test $BLOBCR_RANK != 1");
        let (printed, said) = job.run(&heat, &["40", "40", "4", "0"]);
        hash(&printed);
        assert_eq!(job.begun(), [0, 0]);
        let line =
            "blobcr_mpi: no checkpoint could be taken: rank 1: BLOBCR_MPI_SAVE: exit status: 1";
        assert!(said.lines().any(|l| l == line), "{said}");
        assert!(said.contains("no checkpoint was taken of this job; its calls"), "{said}");
    }
}

#[test]
fn what_would_never_take_one_ends_the_job_at_its_start() {
    for mpi in Mpi::BOTH {
        let (_compiled, heat) = preloaded(mpi, CLOSED);
        for (settings, line) in [
            (&[][..], "nothing tells when to take checkpoints"),
            (&[("BLOBCR_MPI_EVERY", "MPI_Allreduce:5")][..], "nothing saves the state"),
            (&[("BLOBCR_MPI_EVERY", "MPI_Send:5")], "BLOBCR_MPI_EVERY=MPI_Send:5"),
            (&[("BLOBCR_MPI_EVREY", "MPI_Bcast:5")], "BLOBCR_MPI_EVREY is none of"),
            (
                &[("BLOBCR_MPI_SIGNAL", "USR1"), ("BLOBCR_MPI_HOOK", "/no/such.so")],
                "BLOBCR_MPI_HOOK: /no/such.so",
            ),
        ] {
            let mut job = Job::new(mpi);
            job.preload();
            for (name, value) in settings {
                job.set(name, value);
            }
            let output = job.end(job.start(&heat, &["40", "40", "10", "0"]));
            let said = text(&output.stderr);
            assert!(!output.status.success(), "{said}");
            let lines = said.lines().filter(|l| l.starts_with("blobcr_mpi: ")).count();
            assert_eq!(lines, 1, "{said}");
            assert!(said.contains(line), "{said}");
            assert!(!job.disk(0).join("log").exists(), "it must not begin");
        }
    }
}

/// What could be saved but not restored is refused before anything is saved.
#[test]
fn process_images_that_could_not_be_restored_end_the_job_at_its_start() {
    for (mpi, transports, line) in [
        (Mpi::Open, Some("tcp,self"), "works with MPICH over UCX"),
        (Mpi::Mpich, None, "UCX_TLS is not set, set it to tcp,self"),
        (Mpi::Mpich, Some("tcp,sysv,self"), "UCX_TLS is tcp,sysv,self, set it to tcp,self"),
        (Mpi::Mpich, Some("tcp,self"), "wants the job to be started by \"blobcr-criu run\""),
    ] {
        let (mut job, heat) = preloaded(mpi, CLOSED);
        job.set("BLOBCR_MPI_EVERY", "MPI_Allreduce:5");
        job.set("BLOBCR_MPI_SAVE", "criu");
        if let Some(transports) = transports {
            job.set("UCX_TLS", transports);
        }
        let output = job.end(job.start(&heat, &["40", "40", "10", "0"]));
        let said = text(&output.stderr);
        assert!(!output.status.success(), "{said}");
        assert!(said.contains(line), "{said}");
        assert!(!job.disk(0).join("log").exists(), "it must not begin");
    }
}

#[test]
fn ranks_that_would_wait_for_each_other_end_at_their_start() {
    for mpi in Mpi::BOTH {
        let (mut job, heat) = preloaded(mpi, PLAIN);
        job.set_on(0, "BLOBCR_MPI_EVERY", "MPI_Allreduce:5");
        job.set_on(1, "BLOBCR_MPI_EVERY", "MPI_Allreduce:6");
        let output = job.end(job.start(&heat, &["40", "40", "10", "0"]));
        let said = text(&output.stderr);
        assert!(!output.status.success(), "{said}");
        assert!(said.contains("the ranks have different BLOBCR_MPI_EVERY"), "{said}");
    }
}

fn send(child: &std::process::Child, signal: i32) {
    // SAFETY: the child is ours and was not waited for.
    unsafe { libc::kill(child.id() as i32, signal) };
}

/// Ends the ranks too: each launcher does that on this signal.
fn terminate(child: &mut std::process::Child) {
    send(child, libc::SIGTERM);
}
