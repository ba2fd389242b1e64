//! Imports and exports that do not end well: signals, kills, and disks that are full.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use blobcr_tests::cluster::Cluster;
use blobcr_tests::daemon::wait_until;
use blobcr_tests::disk_file::{noise, same, sparse};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

fn text(path: &Path) -> &str {
    path.to_str().expect("a temporary path is ASCII")
}

fn spawn(cluster: &Cluster, args: &[&str]) -> Result<Child> {
    let mut command = cluster.command(args)?;
    Ok(command.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
}

fn names(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}

fn live_bytes(cluster: &Cluster) -> Result<u64> {
    cluster.json(&["status"])?["live_bytes"].as_u64().context("no live_bytes")
}

#[test]
fn an_import_that_is_interrupted_leaves_no_image() -> Result<()> {
    const BIG: usize = 384 << 20;
    let cluster = Cluster::start(&[])?;
    let raw = sparse(&cluster.scratch().join("big"), BIG as u64, &[(0, &noise(1, BIG))])?;
    for signal in [Signal::INT, Signal::TERM, Signal::KILL] {
        let before = live_bytes(&cluster)?;
        let mut import = spawn(&cluster, &["image", "import", text(&raw), "image"])?;
        // Well into it, and far from its end: what was stored before is not stored again, and some
        // of that may still have been on its way.
        wait_until("chunks arrive", || Ok(live_bytes(&cluster)? > before + (16 << 20)))?;
        kill_process(Pid::from_child(&import), signal)?;
        let code = import.wait()?.code();
        assert_eq!(code, (signal != Signal::KILL).then_some(1));
        assert_eq!(cluster.json(&["image", "list"])?, serde_json::json!([]), "{signal:?}");
        assert_eq!(cluster.run(&["snapshot", "list", "image"])?.code, 3);
    }
    // The name was never taken, and what is stored already is not sent again.
    let made = cluster.import(&raw, "image")?;
    assert!(made["stored_bytes"].as_u64() < Some(BIG as u64), "{made}");
    assert_eq!(cluster.json(&["snapshot", "verify", "image@1"])?["intact"], true);
    Ok(())
}

#[test]
fn an_import_from_a_pipe_that_is_interrupted_leaves_nothing() -> Result<()> {
    let cluster = Cluster::start(&[])?;
    let temp = cluster.scratch().join("temp");
    fs::create_dir(&temp)?;
    let args = ["image", "import", "-", "image", "--temp-dir", text(&temp)];
    let mut import = spawn(&cluster, &args)?;
    let mut stdin = import.stdin.take().context("no stdin")?;
    stdin.write_all(&noise(1, 8 << 20))?;
    kill_process(Pid::from_child(&import), Signal::INT)?;
    assert_eq!(import.wait()?.code(), Some(1));
    assert!(names(&temp)?.is_empty());
    assert_eq!(cluster.json(&["image", "list"])?, serde_json::json!([]));
    Ok(())
}

#[test]
fn an_export_that_is_interrupted_leaves_no_file() -> Result<()> {
    const BIG: usize = 256 << 20;
    let cluster = Cluster::start(&[])?;
    let raw = sparse(&cluster.scratch().join("big"), BIG as u64, &[(0, &noise(1, BIG))])?;
    cluster.import(&raw, "image")?;
    let dir = cluster.scratch().join("out");
    fs::create_dir(&dir)?;
    for format in ["raw", "qcow2"] {
        let out = dir.join("file");
        let args = ["image", "export", "image", text(&out), "--format", format];
        let mut export = spawn(&cluster, &args)?;
        wait_until("the export has begun", || Ok(!names(&dir)?.is_empty()))?;
        kill_process(Pid::from_child(&export), Signal::TERM)?;
        assert_eq!(export.wait()?.code(), Some(1));
        assert!(names(&dir)?.is_empty(), "{:?}", names(&dir)?);
    }
    Ok(())
}

/// A file system of its own that is quickly full.
struct SmallDisk {
    dir: Option<TempDir>,
}

impl SmallDisk {
    /// `None` when this user may not mount.
    fn mount(size: &str) -> Result<Option<Self>> {
        let dir = tempfile::Builder::new().prefix("blobcr-small-").tempdir()?;
        let options = std::ffi::CString::new(format!("size={size}"))?;
        match mount("small", dir.path(), "tmpfs", MountFlags::empty(), options.as_c_str()) {
            Err(rustix::io::Errno::PERM) => Ok(None),
            Err(e) => Err(e.into()),
            Ok(()) => Ok(Some(Self { dir: Some(dir) })),
        }
    }

    fn path(&self) -> &Path {
        self.dir.as_ref().map_or(Path::new("/"), |dir| dir.path())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if let Some(dir) = self.dir.take() {
            // Nothing more can be done; the directory then stays, and tells.
            let _ = unmount(dir.path(), UnmountFlags::DETACH);
        }
    }
}

#[test]
fn a_full_disk_is_a_clear_refusal_and_everything_goes_on() -> Result<()> {
    let Some(small) = SmallDisk::mount("192M")? else {
        println!("only root can mount a small file system: not tried");
        return Ok(());
    };
    let files = tempfile::tempdir()?;
    let base = sparse(&files.path().join("base"), 32 << 20, &[(0, &noise(1, 1 << 20))])?;
    let big = sparse(&files.path().join("big"), 400 << 20, &[(0, &noise(2, 400 << 20))])?;
    let scratch = tempfile::Builder::new().prefix("blobcr-test-").tempdir_in(small.path())?;
    let cluster = Cluster::start_in(scratch, &[])?;
    cluster.import(&base, "base")?;

    let refused = cluster.run(&["image", "import", text(&big), "big"])?;
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(refused.stderr.contains("full") && refused.stderr.contains("space"), "{refused:?}");
    let images = cluster.json(&["image", "list"])?;
    assert_eq!(images.as_array().map(Vec::len), Some(1));
    assert_eq!(cluster.json(&["node", "list"])?[0]["health"], "full");

    // What is there can be read, and small things can be done.
    let out = files.path().join("out");
    cluster.json(&["image", "export", "base", text(&out)])?;
    same(&base, &out)?;
    cluster.json(&["image", "clone", "base", "copy"])?;
    let path = cluster.attach("base", "d1")?;
    same(&base, &path)?;

    // No room to unpack a qcow2 file, or to write an export: told before, or cleaned up.
    let qcow2 = files.path().join("big.qcow2");
    let convert = ["convert", "-f", "raw", "-O", "qcow2", text(&big), text(&qcow2)];
    ensure!(Command::new("qemu-img").args(convert).status()?.success());
    let args = ["image", "import", text(&qcow2), "q", "--temp-dir", text(cluster.scratch())];
    let refused = cluster.run(&args)?;
    assert!(refused.code == 1 && refused.stderr.contains("--temp-dir"), "{refused:?}");
    let out = cluster.scratch().join("exported");
    let args = ["image", "export", "base", text(&out), "--format", "raw"];
    let exported = cluster.run(&args)?;
    assert!(exported.code == 0 || (exported.code == 1 && !out.exists()), "{exported:?}");
    Ok(())
}
