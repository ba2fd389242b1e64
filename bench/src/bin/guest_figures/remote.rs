//! The remote end of what a job may do instead of a CHECKPOINT: a directory that takes copies of state
//! files, and a host that stops its machines to copy what changed on their disks.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blobcr_tests::qmp::Qmp;
use serde_json::{Value, json};

/// Between two looks at whether a disk is copied.
const PAUSE: Duration = Duration::from_millis(2);
/// What QEMU calls the first disk of a VM, and the record of what changed on it.
const DISK: &str = "disk0";
const CHANGES: &str = "changes";

/// Serves the VMs of one job.
pub(crate) struct Remote {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    dir: PathBuf,
    /// Bytes of a machine's disk.
    disk_bytes: u64,
    /// The machines, once they are started.
    machines: OnceLock<Vec<Mutex<Qmp>>>,
    /// All of them are stopped, or all copied, before one goes on.
    together: Barrier,
    copies: AtomicU64,
    errors: Mutex<Vec<String>>,
}

impl Remote {
    /// Keeps what it is given in a directory.
    pub(crate) fn start(dir: &Path, machines: usize, disk_bytes: u64) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            dir: dir.to_owned(),
            disk_bytes,
            machines: OnceLock::new(),
            together: Barrier::new(machines),
            copies: AtomicU64::new(0),
            errors: Mutex::default(),
        });
        let serving = Arc::clone(&shared);
        // It ends with the process: nobody connects any more when the machines are gone.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&serving);
                std::thread::spawn(move || shared.serve(stream));
            }
        });
        Ok(Self { address, shared })
    }

    pub(crate) fn port(&self) -> u16 {
        self.address.port()
    }

    /// Watches from now on what changes on the disks of these machines.
    pub(crate) fn watch(&self, sockets: &[PathBuf]) -> Result<()> {
        let watch = |socket: &PathBuf| -> Result<_> {
            let mut qmp = Qmp::connect(socket)?;
            qmp.ask("block-dirty-bitmap-add", json!({ "node": DISK, "name": CHANGES }))?;
            Ok(Mutex::new(qmp))
        };
        let machines = sockets.iter().map(watch).collect::<Result<_>>()?;
        ensure!(self.shared.machines.set(machines).is_ok(), "they are watched already");
        Ok(())
    }

    /// What went wrong so far.
    pub(crate) fn check(&self) -> Result<()> {
        let errors = self.shared.errors.lock().expect("no panic");
        ensure!(errors.is_empty(), "the remote end: {errors:?}");
        Ok(())
    }
}

impl Shared {
    fn serve(&self, stream: TcpStream) {
        if let Err(error) = self.answer(stream) {
            self.errors.lock().expect("no panic").push(format!("{error:#}"));
        }
    }

    fn answer(&self, mut stream: TcpStream) -> Result<()> {
        let mut input = BufReader::new(stream.try_clone()?);
        let mut line = String::new();
        input.read_line(&mut line)?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let stopped = match words[..] {
            ["copy", rank, bytes] => {
                self.take(rank.parse()?, bytes.parse()?, &mut input)?;
                Duration::ZERO
            }
            ["stop", vm] => self.stop(vm.parse()?)?,
            _ => bail!("asked for {line:?}"),
        };
        Ok(writeln!(stream, "ok {}", stopped.as_micros())?)
    }

    /// A rank's state replaces the one before when all of it is durable.
    fn take(&self, rank: u32, bytes: u64, input: &mut impl Read) -> Result<()> {
        let (new, name) = (format!("{rank}.state.new"), format!("{rank}.state"));
        let mut file = File::create(self.dir.join(&new))?;
        let copied = std::io::copy(&mut input.take(bytes), &mut file)?;
        ensure!(copied == bytes, "rank {rank} sent {copied} bytes of {bytes}");
        file.sync_all()?;
        std::fs::rename(self.dir.join(&new), self.dir.join(&name))?;
        Ok(File::open(&self.dir)?.sync_all()?)
    }

    /// Stops a machine together with the others, copies what changed on its disk since the last time, and
    /// lets it go on. Returns for how long it stood still.
    fn stop(&self, vm: usize) -> Result<Duration> {
        let name = format!("copy{}", self.copies.fetch_add(1, Ordering::Relaxed));
        // Before the machines are stopped: none of it needs them to stand still.
        let target = self.dir.join(&name);
        let machine = self.machines.get().and_then(|all| all.get(vm));
        let mut qmp = machine.context("no such machine is watched")?.lock().expect("no panic");
        File::create(&target)?.set_len(self.disk_bytes)?;
        let file = target.to_str().context("a path")?;
        let add = json!({ "driver": "file", "node-name": name, "filename": file, "cache": { "direct": true } });
        qmp.ask("blockdev-add", add)?;
        self.together.wait();
        let begun = Instant::now();
        qmp.ask("stop", Value::Null)?;
        self.together.wait();
        let copied = copy(&mut qmp, &name).and_then(|()| Ok(File::open(&target)?.sync_all()?));
        self.together.wait();
        qmp.ask("cont", Value::Null)?;
        let stood = begun.elapsed();
        copied?;
        qmp.ask("blockdev-del", json!({ "node-name": name }))?;
        Ok(stood)
    }
}

/// Copies what changed on a machine's disk into a node of its QEMU.
fn copy(qmp: &mut Qmp, node: &str) -> Result<()> {
    let backup = json!({
        "job-id": node, "device": DISK, "target": node, "sync": "incremental", "bitmap": CHANGES,
        "auto-dismiss": false,
    });
    qmp.ask("blockdev-backup", backup)?;
    loop {
        let jobs = qmp.ask("query-jobs", Value::Null)?;
        let job = jobs.as_array().and_then(|jobs| jobs.iter().find(|job| job["id"] == node));
        let job = job.context("the copy is none of QEMU's jobs")?;
        if job["status"] == "concluded" {
            ensure!(job["error"].is_null(), "the copy failed: {}", job["error"]);
            qmp.ask("job-dismiss", json!({ "id": node }))?;
            return Ok(());
        }
        std::thread::sleep(PAUSE);
    }
}
