//! README's first command: the main job, shown step by step.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use blobcr_tests::cluster::Cluster;
use blobcr_tests::scenario::{self, Hypervisor};
use blobcr_tests::vm::Aio;
use rustix::process::Signal;

const USAGE: &str = "usage: blobcr-demo [IMAGE]    (IMAGE: a raw or qcow2 file that boots)";

#[expect(clippy::print_stdout, reason = "it shows what it does")]
fn demo(own_image: Option<PathBuf>) -> Result<()> {
    let began = Instant::now();
    let mut say = |line: &str| println!("[{:6.2} s] {line}", began.elapsed().as_secs_f64());
    say("start blobcr up: metadata, one repository node, a mirror and a proxy");
    let mut cluster = Cluster::start(&[])?;
    say(&format!("it is ready in {}", cluster.dir().display()));
    let figures = match own_image {
        Some(file) => scenario::own_image::resume(&cluster, &file, &mut say).map(|()| None)?,
        None => {
            let hypervisor = Hypervisor { aio: Aio::Native, uid: None };
            Some(scenario::resume(&cluster, hypervisor, &mut say)?)
        }
    };
    cluster.stop(Signal::TERM).context("stop blobcr up")?;
    say("stopped: nothing is left mounted or running");
    if let Some(figures) = figures {
        println!("\n{figures}");
    }
    println!("\nThe guest resumed from its checkpoint; what it wrote later is gone.");
    Ok(())
}

#[expect(clippy::print_stderr, reason = "a program says why it failed")]
fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let image = args.next().map(PathBuf::from);
    if args.next().is_some() || image.as_ref().is_some_and(|i| i.to_string_lossy().starts_with('-'))
    {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    }
    match demo(image) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("blobcr-demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}
