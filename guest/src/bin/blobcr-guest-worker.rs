//! Computes step by step, writes what it computed, and CHECKPOINTs on the way.
//!
//! Started again on the same directory, or on the same disk as of a checkpoint, it resumes from its
//! state file and says whether everything it finds is what an undisturbed computation would have
//! left there. Every line that it prints begins with `worker: `.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use blobcr_guest::report::{self, Spent};
use blobcr_guest::worker::{Found, Options, Worker};
use blobcr_guest::{Ask, Client, Deadline, GuestError, PORT_NAME, Target, flush};
use blobcr_proto::v1::DiskSnapshot;
use clap::Parser;

#[derive(Parser)]
#[command(version, about = "A computation for the demo and the tests of blobcr")]
struct Cli {
    /// Where it keeps its state, its log and its files
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Milliseconds between two steps
    #[arg(long, default_value_t = 100, value_name = "MS")]
    every: u64,
    /// End after so many steps, counted from the very first; 0: never
    #[arg(long, default_value_t = 0, value_name = "N")]
    steps: u64,
    /// CHECKPOINT after step N; may be given several times
    #[arg(long, value_name = "N")]
    checkpoint_at: Vec<u64>,
    /// CHECKPOINT after every N steps
    #[arg(long, value_name = "N")]
    checkpoint_every: Option<u64>,
    /// Bytes of the file that each step writes
    #[arg(long, default_value_t = 16384, value_name = "BYTES")]
    file_bytes: usize,
    /// How many of those files are kept
    #[arg(long, default_value_t = 64, value_name = "N")]
    keep: u64,
    /// Print every Nth step
    #[arg(long, default_value_t = 10, value_name = "N")]
    print_every: u64,
    /// Seconds that a checkpoint may take until it is stable
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    timeout: u64,
    /// The name of the virtio-serial port to the host
    #[arg(long, default_value = PORT_NAME, value_name = "NAME")]
    port: String,
    /// A Unix socket to ask instead of the port, outside of a VM
    #[arg(long, value_name = "PATH", conflicts_with = "port")]
    socket: Option<PathBuf>,
}

fn say(line: &str) {
    // One write for the whole line: threads of this program and the kernel share the console.
    // Nobody is left to tell that standard output is closed.
    drop(std::io::stdout().lock().write_all(format!("worker: {line}\n").as_bytes()));
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("error: {error}"));
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(cli: &Cli) -> Result<(), GuestError> {
    let options =
        Options { dir: cli.dir.clone(), file_bytes: cli.file_bytes, keep: cli.keep.max(1) };
    let (mut worker, found) = Worker::open(options)?;
    greet(cli, &worker, &found)?;
    let client = Client::new(match &cli.socket {
        Some(path) => Target::Socket(path.clone()),
        None => Target::Port(cli.port.clone()),
    });
    let at = Arc::new(AtomicU64::new(worker.state().step));
    let mut waits = Vec::new();
    while cli.steps == 0 || worker.state().step < cli.steps {
        let state = worker.step()?;
        at.store(state.step, Ordering::Relaxed);
        if cli.print_every > 0 && state.step.is_multiple_of(cli.print_every) {
            say(&format!("step {} hash={}", state.step, state.hash));
        }
        let wanted = cli.checkpoint_at.contains(&state.step)
            || cli.checkpoint_every.is_some_and(|n| n > 0 && state.step.is_multiple_of(n));
        if wanted {
            waits.push(checkpoint(cli, &client, state.step, &at)?);
        }
        sleep(Duration::from_millis(cli.every));
    }
    for wait in waits {
        wait.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    }
    let state = worker.state();
    say(&format!("done at step {} hash={}", state.step, state.hash));
    Ok(())
}

fn greet(cli: &Cli, worker: &Worker, found: &Found) -> Result<(), GuestError> {
    if found.step == 0 {
        say(&format!("fresh start in {}", cli.dir.display()));
        return Ok(());
    }
    for difference in &found.differences {
        say(&format!("differs: {difference}"));
    }
    say(&format!(
        "resumed from step {} hash={} newest_file={} files_beyond={} log_lines={} identical={}",
        found.step,
        worker.state().hash,
        found.newest_file,
        found.files_beyond,
        found.log_lines,
        if found.differences.is_empty() { "yes" } else { "no" }
    ));
    match found.differences.first() {
        None => Ok(()),
        Some(first) => Err(GuestError::BadState { path: cli.dir.clone(), detail: first.clone() }),
    }
}

/// Asks for a checkpoint and leaves the waiting to a thread: the computation goes on meanwhile.
fn checkpoint(
    cli: &Cli,
    client: &Client,
    step: u64,
    at: &Arc<AtomicU64>,
) -> Result<JoinHandle<Result<(), GuestError>>, GuestError> {
    let deadline = Deadline::after(Duration::from_secs(cli.timeout));
    let began = Instant::now();
    flush::everything()?;
    let flushed = began.elapsed();
    let asked = Instant::now();
    let taken = client.checkpoint(&Ask::new(), deadline)?;
    let spent = Spent { flush: flushed, call: asked.elapsed(), wait: None };
    for line in report::checkpoint_lines(&taken, spent) {
        say(&format!("checkpoint at step {step}: {line}"));
    }
    let (client, at) = (client.clone(), Arc::clone(at));
    Ok(spawn(move || wait(&client, &taken.snapshots, deadline, &at)))
}

fn wait(
    client: &Client,
    snapshots: &[DiskSnapshot],
    deadline: Deadline,
    at: &AtomicU64,
) -> Result<(), GuestError> {
    let began = Instant::now();
    let stable = client.wait_stable(snapshots, deadline);
    match &stable {
        Ok(stable) => {
            let step = at.load(Ordering::Relaxed);
            for line in report::stable_lines(stable, began.elapsed()) {
                say(&format!("at step {step}: {line}"));
            }
        }
        Err(error) => say(&format!("error: {error}")),
    }
    stable.map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
