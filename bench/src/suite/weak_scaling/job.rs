//! `bench/guest/weak_scaling.c`, run by Open MPI: a rank for each disk. Ranks that share cores are to
//! leave them to others while they wait: MPICH's do not.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blobcr_tests::guest_image::repository_root;
use tempfile::TempDir;

use crate::mpi_job::Times;

/// A job that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(900);
const PAUSE: Duration = Duration::from_millis(10);
const LIBRARY: &str = "libblobcr_mpi.so";
/// As its interface names it.
const SONAME: &str = "libblobcr_mpi.so.1";

/// What the job does three times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Goes on.
    Nothing,
    /// Each rank writes its state to its disk and syncs it.
    State,
    /// The same, and a global checkpoint.
    Checkpoint,
}

impl Way {
    const fn word(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::State => "state",
            Self::Checkpoint => "checkpoint",
        }
    }
}

/// What each rank works on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    /// Points in a row, of 8 bytes.
    pub(super) row: u64,
    pub(super) rows: u64,
    pub(super) steps: u64,
    /// From one summary to the next, in steps.
    pub(super) summary: u64,
}

impl Size {
    /// What a rank writes for a checkpoint.
    pub(super) const fn state_bytes(&self) -> u64 {
        self.row * self.rows * 8
    }

    /// What a rank writes for a summary.
    pub(super) const fn summary_bytes(&self) -> u64 {
        self.row * self.rows.div_ceil(4) * 8
    }
}

/// The disk of a rank, and the channel of the VM that it stands for.
#[derive(Clone, Debug)]
pub(super) struct Rank {
    pub(super) disk: PathBuf,
    pub(super) channel: PathBuf,
}

/// The program, and the library that it is linked with.
pub(super) struct Program {
    dir: TempDir,
    size: Size,
}

impl Program {
    /// Compiles it.
    pub(super) fn compile(size: Size) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("blobcr-bench-").tempdir()?;
        let library = std::env::current_exe()?.with_file_name(LIBRARY);
        ensure!(library.is_file(), "there is no {}; ./do bench builds it", library.display());
        for name in [LIBRARY, SONAME] {
            std::os::unix::fs::symlink(&library, dir.path().join(name))?;
        }
        let root = repository_root();
        let source = root.join("bench/guest/weak_scaling.c");
        let compiled = Command::new("mpicc.openmpi")
            .args(["-std=c99", "-O3", "-o"])
            .args([&dir.path().join("weak_scaling"), &source])
            .arg("-I")
            .arg(root.join("guest/include"))
            .arg("-L")
            .arg(dir.path())
            .arg(format!("-Wl,-rpath,{}", dir.path().display()))
            .arg("-lblobcr_mpi")
            .status()
            .context("cannot run mpicc.openmpi; run tests/setup.sh as root")?;
        ensure!(compiled.success(), "cannot compile {}", source.display());
        Ok(Self { dir, size })
    }

    /// Runs it from its begin to its end.
    pub(super) fn run(&self, way: Way, ranks: &[Rank]) -> Result<Times> {
        let said = self.dir.path().join("said");
        let mut command = Command::new("mpirun.openmpi");
        command.args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]);
        // Copies between processes need a permission that containers do not give.
        command.args(["--mca", "btl_vader_single_copy_mechanism", "none"]);
        for (number, rank) in ranks.iter().enumerate() {
            if number > 0 {
                command.arg(":");
            }
            command.args(self.words(way, number, rank));
        }
        let output = fs::File::create(&said)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = command.spawn().context("cannot run mpirun.openmpi")?;
        let ended = end(child);
        let said = fs::read_to_string(&said)?;
        ensure!(ended.with_context(|| said.clone())?, "the job failed:\n{said}");
        let times = Times::said(&said)?;
        let calls = if way == Way::Checkpoint { 3 * ranks.len() } else { 0 };
        ensure!(times.calls.len() == calls, "{} calls, not {calls}:\n{said}", times.calls.len());
        Ok(times)
    }

    /// The part of a rank in mpirun's words.
    fn words(&self, way: Way, number: usize, rank: &Rank) -> Vec<String> {
        let mut words = vec!["-n".to_owned(), "1".to_owned()];
        let environment = [
            ("BLOBCR_SOCKET", rank.channel.display().to_string()),
            // Each is a machine of its own, of which all but its disk is left alone.
            ("BLOBCR_MPI_VM_ID", format!("vm{number}")),
            ("BLOBCR_MPI_FLUSH", "none".to_owned()),
        ];
        for (name, value) in environment {
            words.extend(["-x".to_owned(), format!("{name}={value}")]);
        }
        words.push(self.dir.path().join("weak_scaling").display().to_string());
        let Size { row, rows, steps, summary } = self.size;
        words.extend([row, rows, steps, summary].map(|number| number.to_string()));
        words.extend([way.word().to_owned(), rank.disk.display().to_string()]);
        words
    }
}

/// Waits for its end; whether it was a good one.
fn end(mut child: Child) -> Result<bool> {
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.success());
        }
        if began.elapsed() > LIMIT {
            child.kill()?;
            child.wait()?;
            bail!("the job hangs");
        }
        std::thread::sleep(PAUSE);
    }
}
