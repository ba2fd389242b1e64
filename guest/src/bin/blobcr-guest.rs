//! Asks the host of this VM for a CHECKPOINT of its disks.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use blobcr_guest::freeze::{self, Scope};
use blobcr_guest::report::{self, Spent};
use blobcr_guest::{Ask, Client, Deadline, GuestError, PORT_NAME, Place, Target, flush};
use blobcr_proto::v1::{CheckpointReply, SetMembership};
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
    /// An address and port to ask over TCP instead, or vsock:PORT of the host
    #[arg(long, global = true, env = "BLOBCR_CONNECT", value_name = "ADDRESS:PORT")]
    connect: Option<String>,
    /// This VM's name, which goes with the token
    #[arg(long, global = true, env = "BLOBCR_VM", value_name = "VM")]
    vm: Option<String>,
    /// The file with this VM's token for TCP, where the hypervisor forwards nothing
    #[arg(long, global = true, env = "BLOBCR_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
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
    /// Begin a checkpoint set, and print what `checkpoint --set` takes
    BeginSet(BeginSetArgs),
    /// Show a checkpoint set
    SetStatus(SetStatusArgs),
}

#[derive(Args)]
struct BeginSetArgs {
    /// How many VMs the set has
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    vms: u32,
    /// One of this VM's groups; left out: its only one
    #[arg(default_value = "", hide_default_value = true)]
    group: String,
}

#[derive(Args)]
struct SetStatusArgs {
    /// One of this VM's groups; left out: its only one
    #[arg(default_value = "", hide_default_value = true)]
    group: String,
    /// Its number; left out: the newest set that is complete and stable
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "S")]
    sequence: u64,
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
    /// Freeze file systems around the request: all, or those mounted at PATH (again for each)
    #[arg(
        long,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = ALL,
        value_name = "PATH"
    )]
    freeze: Vec<PathBuf>,
    /// Thaw them after so many seconds at the latest
    #[arg(long, default_value_t = 10.0, value_name = "SECONDS", value_parser = seconds)]
    freeze_limit: f64,
}

impl CheckpointArgs {
    fn scope(&self, target: &Target) -> Result<Option<Scope>, GuestError> {
        if self.freeze.is_empty() {
            return Ok(None);
        }
        if !self.freeze.iter().any(|path| path.as_os_str() == ALL) {
            return Ok(Some(Scope::Only(self.freeze.clone())));
        }
        if target.is_this_machine() {
            return Err(GuestError::Usage(
                "the host is asked on this machine: with all of its file systems frozen it could \
                 not answer; name those to freeze by --freeze=PATH"
                    .to_owned(),
            ));
        }
        Ok(Some(Scope::All))
    }
}

/// Stands for no path at all: clap wants one, and not an empty one.
const ALL: &str = "all";

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
    let group = parts.next().ok_or_else(wrong)?;
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

fn show(json: bool, value: &serde_json::Value, lines: &[String]) {
    if json {
        say(&[value.to_string()]);
    } else {
        say(lines);
    }
}

fn run(cli: &Cli) -> Result<(), GuestError> {
    let target = Place {
        port: Some(cli.port.clone()),
        socket: cli.socket.clone(),
        connect: cli.connect.clone(),
        vm: cli.vm.clone(),
        token_file: cli.token_file.clone(),
    }
    .target()?;
    let client = Client::new(target.clone());
    let deadline = Deadline::after(Duration::from_secs_f64(cli.timeout));
    match &cli.verb {
        Verb::Checkpoint(args) => {
            let scope = args.scope(&target)?;
            return checkpoint(&client, args, scope.as_ref(), deadline, cli.json);
        }
        Verb::Wait => {
            let began = Instant::now();
            let stable = client.wait_stable(&[], deadline)?;
            let lines = report::stable_lines(&stable, began.elapsed());
            show(cli.json, &report::stable_json(&stable), &lines);
        }
        Verb::Status => {
            let status = client.status(deadline)?;
            show(cli.json, &report::status_json(&status), &report::status_lines(&status));
        }
        Verb::BeginSet(args) => {
            let set = client.begin_set(&args.group, args.vms, deadline)?;
            let argument = format!("{}:{}:{}", set.group, set.sequence, set.expected_vms);
            show(cli.json, &report::set_json(&set), &[argument]);
        }
        Verb::SetStatus(args) => {
            let set = client.set_status(&args.group, args.sequence, deadline)?;
            show(cli.json, &report::set_json(&set), &[report::set_line(&set)]);
        }
    }
    Ok(())
}

/// What was taken is printed even when the wait for it fails.
fn checkpoint(
    client: &Client,
    args: &CheckpointArgs,
    scope: Option<&Scope>,
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
    let (taken, mut spent) = match scope {
        None => take(client, &ask, deadline, began)?,
        Some(scope) => {
            let limit = Duration::from_secs_f64(args.freeze_limit);
            let frozen = freeze::freeze(scope, limit)?;
            if !args.no_flush {
                flush::disks()?;
            }
            let taken = take(client, &ask, deadline.or_after(limit), began);
            let thawed = frozen.thaw();
            let taken = taken?;
            thawed?;
            taken
        }
    };
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

/// The request itself, after a flush that began then.
fn take(
    client: &Client,
    ask: &Ask,
    deadline: Deadline,
    flush_began: Instant,
) -> Result<(CheckpointReply, Spent), GuestError> {
    let flush = flush_began.elapsed();
    let asked = Instant::now();
    let taken = client.checkpoint(ask, deadline)?;
    Ok((taken, Spent { flush, call: asked.elapsed(), wait: None }))
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
    fn a_machine_does_not_freeze_its_own_host() {
        let scope = |args: &[&str]| {
            let all = ["blobcr-guest", "checkpoint"].iter().chain(args);
            let Verb::Checkpoint(args) = Cli::parse_from(all).verb else { panic!("{args:?}") };
            args.scope(&Target::Socket("/s".into())).map(|here| (here, args))
        };
        assert!(matches!(scope(&[]), Ok((None, _))));
        assert!(matches!(scope(&["--freeze"]), Err(GuestError::Usage(_))));
        assert!(matches!(scope(&["--freeze=/a", "--freeze"]), Err(GuestError::Usage(_))));
        let (here, args) = scope(&["--freeze=/a", "--freeze=/b"]).unwrap();
        assert_eq!(here, Some(Scope::Only(vec!["/a".into(), "/b".into()])));
        assert_eq!(args.scope(&Target::port()).unwrap(), here);
        let Verb::Checkpoint(all) =
            Cli::parse_from(["blobcr-guest", "checkpoint", "--freeze"]).verb
        else {
            panic!("another verb")
        };
        assert_eq!(all.scope(&Target::port()).unwrap(), Some(Scope::All));
    }

    #[test]
    fn sets_are_read() {
        let found = set("mpi:12:4").unwrap();
        assert_eq!((found.group.as_str(), found.sequence, found.expected_vms), ("mpi", 12, 4));
        assert_eq!(set(":1:2").unwrap().group, "", "the VM's only one");
        for bad in ["", "mpi", "mpi:1", "mpi:x:1", "mpi:1:x"] {
            assert!(set(bad).is_err(), "{bad:?}");
        }
    }
}
