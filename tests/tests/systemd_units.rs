//! The units of `docs/systemd`: what they start is there, and systemd takes them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use blobcr_tests::cluster::Ran;
use blobcr_tests::daemon::blobcr;
use blobcr_tests::guest_image::repository_root;

const UNITS: [&str; 5] = [
    "blobcr-metadata.service",
    "blobcr-mirror.service",
    "blobcr-proxy.service",
    "blobcr-repo-node@.service",
    "blobcr-steward.service",
];
/// Where the units have the program.
const PROGRAM: &str = "/usr/local/bin/blobcr";
const ENVIRONMENT: &str = "/etc/blobcr/blobcr.env";
const INSTANCE: &str = "7401";

fn folder() -> PathBuf {
    repository_root().join("docs/systemd")
}

fn read(unit: &str) -> Result<String> {
    fs::read_to_string(folder().join(unit)).with_context(|| unit.to_owned())
}

/// The lines of a file that set something.
fn settings(text: &str) -> BTreeMap<&str, &str> {
    let lines = text.lines().filter(|line| !line.starts_with(['#', '[']));
    lines.filter_map(|line| line.split_once('=')).collect()
}

/// What the unit starts on a machine with the environment that is shipped.
fn command(unit: &str) -> Result<Vec<String>> {
    let (text, shipped) = (read(unit)?, read("blobcr.env")?);
    let mut line = settings(&text)["ExecStart"].replace("%i", INSTANCE);
    for (name, value) in settings(&shipped) {
        line = line.replace(&format!("${{{name}}}"), value);
    }
    ensure!(!line.contains(['$', '%']), "{unit}: {line}");
    Ok(line.split(' ').map(str::to_owned).collect())
}

#[test]
fn what_units_start_is_a_role_with_its_options() -> Result<()> {
    for unit in UNITS {
        let words = command(unit)?;
        let (program, args) = words.split_first().context("nothing is started")?;
        ensure!(program == PROGRAM, "{unit}: {program}");
        let role = unit.trim_start_matches("blobcr-").split(['.', '@']).next();
        ensure!(args.first().map(String::as_str) == role, "{unit} starts {args:?}");
        // Everything before it is parsed: options and values must be right.
        let ran = Ran::from(Command::new(blobcr()?).args(args).arg("--help").output()?);
        ensure!(ran.code == 0, "{unit}: {}", ran.stderr);
        for option in args.iter().filter(|word| word.starts_with("--")) {
            ensure!(ran.stdout.contains(&format!("{option} ")), "{unit}: {role:?} has no {option}");
        }
    }
    Ok(())
}

#[test]
fn units_say_how_a_role_is_stopped_and_started_again() -> Result<()> {
    for unit in UNITS {
        let text = read(unit)?;
        let set = settings(&text);
        for (name, value) in [
            ("Type", "exec"),
            ("Restart", "on-failure"),
            ("KillSignal", "SIGTERM"),
            ("EnvironmentFile", ENVIRONMENT),
            ("WantedBy", "multi-user.target"),
        ] {
            ensure!(set.get(name) == Some(&value), "{unit}: {name} is {:?}", set.get(name));
        }
        ensure!(set["After"].contains("network-online.target"), "{unit}");
        ensure!(set.contains_key("LimitNOFILE") && set.contains_key("TimeoutStopSec"), "{unit}");
        let own_file_systems = ["ProtectSystem", "ProtectHome", "PrivateTmp", "PrivateDevices"];
        let hides = own_file_systems.iter().any(|name| set.contains_key(name));
        ensure!(hides != unit.contains("mirror"), "{unit}: a mount must be seen by others");
        // What it keeps is where systemd makes it a directory.
        let own = set.get("StateDirectory").map(|dir| format!("/var/lib/{dir}"));
        let starts = set["ExecStart"];
        let keeps = ["--dir ", "--sockets "]
            .iter()
            .find_map(|option| Some(starts.split_once(option)?.1.split(' ').next()?.to_owned()));
        ensure!(own == keeps, "{unit}: {own:?} and {keeps:?}");
    }
    Ok(())
}

/// The units in a directory of their own, made to name what is there on this machine.
fn installed(dir: &Path) -> Result<Vec<PathBuf>> {
    let environment = dir.join("blobcr.env");
    fs::copy(folder().join("blobcr.env"), &environment)?;
    let environment = environment.to_str().context("ASCII")?;
    let program = blobcr()?;
    let program = program.to_str().context("ASCII")?;
    let install = |unit: &&str| {
        let text = read(unit)?.replace(PROGRAM, program).replace(ENVIRONMENT, environment);
        let path = dir.join(unit.replace('@', &format!("@{INSTANCE}")));
        fs::write(&path, text)?;
        Ok(path)
    };
    UNITS.iter().map(install).collect()
}

#[test]
fn systemd_takes_the_units() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let units = installed(dir.path())?;
    let mut verify = Command::new("systemd-analyze");
    let ran = match verify.args(["verify", "--man=no"]).args(&units).output() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            println!("left out: systemd-analyze is not installed");
            return Ok(());
        }
        ran => Ran::from(ran?),
    };
    let own = dir.path().to_string_lossy().into_owned();
    let about_ours: Vec<_> = ran.stderr.lines().filter(|line| line.contains("blobcr")).collect();
    ensure!(ran.code == 0 && about_ours.is_empty(), "in {own}: {ran:?}");
    Ok(())
}
