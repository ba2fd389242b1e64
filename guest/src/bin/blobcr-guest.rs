//! Asks the host of this VM for a CHECKPOINT of its disks.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use blobcr_guest::report::{self, Spent};
use blobcr_guest::{Ask, Client, Deadline, GuestError, PORT_NAME, Target, flush};
use blobcr_proto::v1::SetMembership;
use clap::{Args, Parser, Subcommand};

#[derive(Parser)]
#[command(version, about = "Asks the host of this VM for a CHECKPOINT of its disks")]
struct Cli {
    /// The name of the virtio-serial port to the host
    #[arg(long, global = true, default_value = PORT_NAME, value_name = "NAME")]
    port: String,
    /// A Unix socket to ask instead of the port, outside of a VM
    #[arg(long, global = true, value_name = "PATH", conflicts_with = "port")]
    socket: Option<PathBuf>,
    /// Print one JSON value
    #[arg(long, global = true)]
    json: bool,
    /// Give up after so many seconds
    #[arg(long, global = true, default_value_t = 60.0, value_name = "SECONDS", value_parser = seconds)]
    timeout: f64,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Flush this guest's file systems and make a snapshot of its disks
    Checkpoint(CheckpointArgs),
    /// Wait until the newest checkpoint is stable
    Wait,
    /// Show this VM's disks as the host sees them
    Status,
}

#[derive(Args)]
struct CheckpointArgs {
    /// Also wait until the snapshots are stable
    #[arg(long)]
    wait: bool,
    /// Make it a member of a checkpoint set of N VMs
    #[arg(long, value_name = "GROUP:SEQUENCE:N", value_parser = set)]
    set: Option<SetMembership>,
    /// Asking again with the same key gives the first answer and no second checkpoint
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    /// Do not flush file systems and disks first
    #[arg(long)]
    no_flush: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.0..=1e9).contains(&seconds) => Ok(seconds),
        _ => Err("write a number of seconds, 0 or more".to_owned()),
    }
}

fn set(text: &str) -> Result<SetMembership, String> {
    let wrong = || "write GROUP:SEQUENCE:N, such as mpi:12:4".to_owned();
    let mut parts = text.rsplitn(3, ':');
    let expected_vms = parts.next().and_then(|n| n.parse().ok()).ok_or_else(wrong)?;
    let sequence = parts.next().and_then(|n| n.parse().ok()).ok_or_else(wrong)?;
    let group = parts.next().filter(|g| !g.is_empty()).ok_or_else(wrong)?;
    Ok(SetMembership { group: group.to_owned(), sequence, expected_vms })
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            drop(writeln!(std::io::stderr(), "blobcr-guest: {error}"));
            ExitCode::from(error.exit_code())
        }
    }
}

fn say(lines: &[String]) {
    // Nobody is left to tell that standard output is closed.
    drop(writeln!(std::io::stdout(), "{}", lines.join("\n")));
}

fn run(cli: &Cli) -> Result<(), GuestError> {
    let target = match &cli.socket {
        Some(path) => Target::Socket(path.clone()),
        None => Target::Port(cli.port.clone()),
    };
    let client = Client::new(target);
    let deadline = Deadline::after(Duration::from_secs_f64(cli.timeout));
    match &cli.verb {
        Verb::Checkpoint(args) => return checkpoint(&client, args, deadline, cli.json),
        Verb::Wait => {
            let began = Instant::now();
            let stable = client.wait_stable(&[], deadline)?;
            if cli.json {
                say(&[report::stable_json(&stable).to_string()]);
            } else {
                say(&report::stable_lines(&stable, began.elapsed()));
            }
        }
        Verb::Status => {
            let status = client.status(deadline)?;
            if cli.json {
                say(&[report::status_json(&status).to_string()]);
            } else {
                say(&report::status_lines(&status));
            }
        }
    }
    Ok(())
}

/// What was taken is printed even when the wait for it fails.
fn checkpoint(
    client: &Client,
    args: &CheckpointArgs,
    deadline: Deadline,
    json: bool,
) -> Result<(), GuestError> {
    let mut ask = Ask::new();
    ask.set.clone_from(&args.set);
    if let Some(key) = &args.key {
        ask.key.clone_from(key);
    }
    let began = Instant::now();
    if !args.no_flush {
        flush::everything()?;
    }
    let flush = began.elapsed();
    let asked = Instant::now();
    let taken = client.checkpoint(&ask, deadline)?;
    let mut spent = Spent { flush, call: asked.elapsed(), wait: None };
    if !json {
        say(&report::checkpoint_lines(&taken, spent));
    }
    let waiting = Instant::now();
    let waited = args.wait.then(|| client.wait_stable(&taken.snapshots, deadline));
    let stable = waited.as_ref().and_then(|waited| waited.as_ref().ok());
    spent.wait = stable.map(|_| waiting.elapsed());
    if json {
        let stable = stable.map(Vec::as_slice);
        say(&[report::checkpoint_json(&taken, stable, &ask.key, spent).to_string()]);
    } else if let Some(stable) = stable {
        say(&report::stable_lines(stable, waiting.elapsed()));
    }
    waited.map_or(Ok(()), |waited| waited.map(|_| ()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn sets_are_read() {
        let found = set("mpi:12:4").unwrap();
        assert_eq!((found.group.as_str(), found.sequence, found.expected_vms), ("mpi", 12, 4));
        for bad in ["", "mpi", "mpi:1", "mpi:x:1", "mpi:1:x", ":1:2"] {
            assert!(set(bad).is_err(), "{bad:?}");
        }
    }
}
