//! libblobcr_mpi: global checkpoints of an MPI job in several virtual machines; `blobcr_mpi.h` is
//! what programs see of it, and `docs/mpi.md` what people set.
//!
//! | module | holds |
//! |---|---|
//! | `mpi` | the process's own MPI, MPICH or Open MPI, found at run time |
//! | `global` | the protocol of a global checkpoint |
//! | `host` | this machine and its host |
//! | `api` | what programs call |
//! | `output` | the calls in the shape of SCR |
//! | `wrap`, `fortran` | functions of MPI that are wrapped |
//! | `trigger` | when a wrapped call takes a checkpoint |
//! | `save` | who saves the state of a program that knows nothing of it |
//! | `images`, `probes` | process images, saved from outside; connections that outlive it |
//! | `signal` | signals that were received |
//! | `settings` | what the environment says |

mod api;
mod failure;
mod fortran;
mod global;
mod host;
mod images;
mod mpi;
mod output;
mod probes;
mod save;
mod settings;
mod signal;
mod trigger;
mod wrap;

use std::io::Write;

use crate::settings::Settings;

/// Says what was done to whoever asked for it.
fn say(settings: &Settings, line: impl FnOnce() -> String) {
    if settings.verbose {
        complain(&line());
    }
}

/// Says what went wrong in a job that nobody else can be told of.
fn complain(line: &str) {
    // One write, so that lines of several ranks do not mix; nobody is left to tell that it failed.
    drop(std::io::stderr().write_all(format!("blobcr_mpi: {line}\n").as_bytes()));
}
