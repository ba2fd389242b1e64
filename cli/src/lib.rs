//! The `blobcr` command: every role and every operator verb.
//!
//! | module | holds |
//! |---|---|
//! | [`args`] | what the command line may say |
//! | [`verbs`] | the operator's verbs, one file per noun |
//! | [`role`] | the processes: `up`, metadata, repo-node, mirror, proxy, steward |
//! | [`doctor`] | what this machine needs, and how to mend what it lacks |
//! | [`image_file`] | raw and qcow2 files, in and out |
//! | [`session`], [`endpoint`] | from `--endpoint` to the roles that a verb needs |
//! | [`output`], [`view`], [`progress`] | stdout and stderr |
//! | [`exit`] | exit codes: the one place that maps errors to them |

#![expect(missing_docs, reason = "the fields of arguments and views are documented by their names")]

pub mod args;
pub mod channel;
pub mod doctor;
pub mod endpoint;
pub mod exit;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod image_file;
pub mod interrupt;
pub mod output;
pub mod progress;
pub mod role;
pub mod session;
pub mod size;
pub mod verbs;
pub mod view;

use blobcr_steward::ScrubOptions;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use args::{Cli, Command, Global, VmCommand};
use output::Output;
use session::Session;

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => return end(Err(anyhow::Error::new(e).context("no threads can be started"))),
    };
    let code = end(start_logging(&cli).and_then(|()| runtime.block_on(run(cli))));
    // A thread that waits for stdin, or for a disk that hangs, must not hold the command back.
    runtime.shutdown_background();
    code
}

fn end(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => ExitCode::from(output::failed(&failure) as u8),
    }
}

/// Roles tell what they do; verbs only what went wrong.
fn start_logging(cli: &Cli) -> anyhow::Result<()> {
    let filter = match (&cli.global.log, cli.command.is_role()) {
        (Some(filter), _) => filter.as_str(),
        (None, true) => "info",
        (None, false) => "error",
    };
    let filter = EnvFilter::try_new(filter).map_err(|e| {
        exit::Refusal::new(exit::Exit::Usage, format!("--log {filter:?} is no filter: {e}"))
    })?;
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        // Whoever closes stderr loses the log, not the role.
        .log_internal_errors(false)
        .with_ansi(output::coloured())
        .with_env_filter(filter)
        .init();
    Ok(())
}

async fn run(cli: Cli) -> anyhow::Result<()> {
    let Cli { global, command } = cli;
    let output = Output::new(global.json);
    let open = || open(&global);
    match command {
        Command::Image(verb) => Box::pin(verbs::image::run(verb, &open().await?, output)).await,
        Command::Disk(verb) => verbs::disk::run(verb, &open().await?, output).await,
        Command::Snapshot(verb) => {
            Box::pin(verbs::snapshot::run(verb, &open().await?, output)).await
        }
        Command::Vm(VmCommand::Relay { socket }) => verbs::relay::run(&socket),
        Command::Vm(verb) => verbs::vm::run(verb, &open().await?, output).await,
        Command::Set(verb) => Box::pin(verbs::set::run(verb, &open().await?, output)).await,
        Command::Pool(verb) => verbs::pool::run(verb, &open().await?, output).await,
        Command::Node(verb) => verbs::node::run(verb, &open().await?, output).await,
        Command::Gc { dry_run } => Box::pin(verbs::gc::run(&open().await?, dry_run, output)).await,
        Command::Scrub { rate, quick } => {
            let options = ScrubOptions { bytes_per_second: rate, quick };
            Box::pin(verbs::scrub::run(&open().await?, options, output)).await
        }
        Command::Status => verbs::status::run(&open().await?, output).await,
        Command::Doctor(args) => doctor::run(&args, global.endpoint.as_deref(), output).await,
        Command::Proxy(args) => role::proxy::run(args, output).await,
        Command::Metadata(args) => Box::pin(role::metadata::run(args, output)).await,
        Command::RepoNode(args) => role::repo_node::run(args, output).await,
        Command::Mirror(args) => Box::pin(role::mirror::run(args, output)).await,
        Command::Steward(args) => role::steward::run(args, output).await,
        Command::Up(args) => Box::pin(role::up::run(args, output)).await,
    }
}

async fn open(global: &Global) -> anyhow::Result<Session> {
    Session::open(global.endpoint.as_deref()).await
}
