//! A job of four ranks in two machines: processes of this machine under both MPIs of Debian, told
//! apart by a setting, and a made-up host for each.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use blobcr_guest_fake_host::{FakeHost, Sets};
use blobcr_proto::v1::VmSet;
use blobcr_proto::v1::channel_reply::Reply;
use blobcr_proto::v1::channel_request::Request;
use tempfile::TempDir;

/// A job that takes longer hangs; ranks that wait in turns on a busy machine are slow.
const LONG: Duration = Duration::from_secs(300);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mpi {
    Mpich,
    Open,
}

impl Mpi {
    pub(crate) const BOTH: [Self; 2] = [Self::Mpich, Self::Open];

    fn name(self) -> &'static str {
        match self {
            Self::Mpich => "mpich",
            Self::Open => "openmpi",
        }
    }

    fn tool(self, tool: &str) -> Command {
        let path = PathBuf::from(format!("/usr/bin/{tool}.{}", self.name()));
        assert!(path.exists(), "there is no {}; tests/setup.sh installs it", path.display());
        Command::new(path)
    }
}

pub(crate) fn source(of: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(of)
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub(crate) fn until(what: &str, mut test: impl FnMut() -> bool) {
    let began = Instant::now();
    while !test() {
        assert!(began.elapsed() < LONG, "not {what} in time");
        sleep(Duration::from_millis(20));
    }
}

pub(crate) struct Job {
    mpi: Mpi,
    dir: TempDir,
    pub(crate) sets: Sets,
    pub(crate) hosts: [FakeHost; 2],
    environment: [Vec<(String, String)>; 2],
}

impl Job {
    pub(crate) fn new(mpi: Mpi) -> Self {
        Self::refused(mpi, |_, _, _| None)
    }

    /// With what each host, by its machine's directory and number, refuses.
    pub(crate) fn refused(
        mpi: Mpi,
        refuse: impl Fn(&Path, usize, &Request) -> Option<Reply> + Clone + Send + Sync + 'static,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        // By the name that programs look for.
        let built = std::env::current_exe().unwrap().with_file_name("libblobcr_mpi.so");
        fs::create_dir(dir.path().join("lib")).unwrap();
        for name in ["libblobcr_mpi.so", "libblobcr_mpi.so.1"] {
            std::os::unix::fs::symlink(&built, dir.path().join("lib").join(name)).unwrap();
        }
        let sets = Sets::default();
        let hosts = [0, 1].map(|vm| {
            let (refuse, disk) = (refuse.clone(), dir.path().join(format!("vm{vm}")));
            FakeHost::refusing(&format!("vm{vm}"), &sets, move |request| refuse(&disk, vm, request))
        });
        for vm in [0, 1] {
            fs::create_dir(dir.path().join(format!("vm{vm}"))).unwrap();
        }
        let mut job = Self { mpi, dir, sets, hosts, environment: Default::default() };
        let libraries = job.path("lib").display().to_string();
        job.set("LD_LIBRARY_PATH", &libraries);
        // Not this whole machine, which has other things to do: one test does it.
        job.set("BLOBCR_MPI_FLUSH", "none");
        job
    }

    pub(crate) fn set(&mut self, name: &str, value: &str) {
        self.set_on(0, name, value);
        self.set_on(1, name, value);
    }

    /// For the ranks of one machine.
    pub(crate) fn set_on(&mut self, vm: usize, name: &str, value: &str) {
        self.environment[vm].retain(|(known, _)| known != name);
        self.environment[vm].push((name.to_owned(), value.to_owned()));
    }

    pub(crate) fn preload(&mut self) {
        let library = self.path("lib/libblobcr_mpi.so").display().to_string();
        self.set("LD_PRELOAD", &library);
    }

    pub(crate) fn path(&self, of: &str) -> PathBuf {
        self.dir.path().join(of)
    }

    /// The directory on a machine's disk.
    pub(crate) fn disk(&self, vm: usize) -> PathBuf {
        self.path(&format!("vm{vm}"))
    }

    pub(crate) fn compile(&self, from: &str, flags: &[&str]) -> PathBuf {
        let mut all = vec!["-std=c99", "-O2", "-Wall", "-Wextra", "-Werror"];
        all.extend(flags);
        self.compile_by("mpicc", from, &all)
    }

    pub(crate) fn compile_by(&self, compiler: &str, from: &str, flags: &[&str]) -> PathBuf {
        let program = self.path("program");
        let mut command = self.mpi.tool(compiler);
        command.arg("-I").arg(source("include"));
        command.arg(source(from)).arg("-o").arg(&program).arg("-L").arg(self.path("lib"));
        let output = command.args(flags).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        program
    }

    /// Starts it with the arguments, and its machine's directory as the last one.
    pub(crate) fn start(&self, program: &Path, arguments: &[&str]) -> Child {
        let mut command = self.mpi.tool("mpirun");
        if self.mpi == Mpi::Open {
            command.args(["--allow-run-as-root", "--oversubscribe"]);
            // Copies between processes need a permission that containers do not give.
            command.args(["--mca", "btl_vader_single_copy_mechanism", "none"]);
        }
        for vm in [0, 1] {
            if vm == 1 {
                command.arg(":");
            }
            command.args(["-n", "2"]);
            let own = [
                ("BLOBCR_MPI_VM_ID", format!("vm{vm}")),
                ("BLOBCR_MPI_DIR", self.disk(vm).display().to_string()),
                ("BLOBCR_CONNECT", self.hosts[vm].address()),
            ];
            let own = own.iter().map(|(name, value)| (*name, value));
            let all = self.environment[vm].iter().map(|(name, value)| (name.as_str(), value));
            for (name, value) in own.chain(all) {
                match self.mpi {
                    Mpi::Mpich => command.args(["-env", name, value]),
                    Mpi::Open => command.args(["-x".to_owned(), format!("{name}={value}")]),
                };
            }
            command.arg(program).args(arguments).arg(self.disk(vm));
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    /// Its end, which must come.
    pub(crate) fn end(&self, mut child: Child) -> Output {
        let began = Instant::now();
        // Their outputs are short: they fit into the pipes.
        while child.try_wait().unwrap().is_none() {
            if began.elapsed() > LONG {
                child.kill().unwrap();
                let output = child.wait_with_output().unwrap();
                panic!("{:?} hangs: {}{}", self.mpi, text(&output.stdout), text(&output.stderr));
            }
            sleep(Duration::from_millis(10));
        }
        child.wait_with_output().unwrap()
    }

    /// What it printed, and said on stderr, when all went well.
    pub(crate) fn run(&self, program: &Path, arguments: &[&str]) -> (String, String) {
        let output = self.end(self.start(program, arguments));
        let said = text(&output.stderr);
        assert!(output.status.success(), "{:?}: {}{said}", self.mpi, text(&output.stdout));
        (text(&output.stdout), said)
    }

    /// The sets that each machine joined, by their numbers, in order.
    pub(crate) fn joined(&self) -> [Vec<u64>; 2] {
        [0, 1].map(|vm| {
            let asked = self.hosts[vm].asked();
            let joined = asked.iter().filter_map(|request| match request {
                Request::Checkpoint(request) => {
                    let set = request.set.as_ref().unwrap();
                    assert_eq!((set.group.as_str(), set.expected_vms), ("only", 2));
                    Some(set.sequence)
                }
                _ => None,
            });
            joined.collect()
        })
    }

    /// How often each host was asked to begin a set.
    pub(crate) fn begun(&self) -> [usize; 2] {
        [0, 1].map(|vm| {
            let asked = self.hosts[vm].asked();
            asked.iter().filter(|request| matches!(request, Request::BeginSet(_))).count()
        })
    }

    /// Fails unless so many sets were begun by the first host, each joined by both, once.
    pub(crate) fn has_complete_sets(&self, count: usize) {
        let all: Vec<u64> = (1..=count as u64).collect();
        assert_eq!(self.begun(), [count, 0], "{:?}", self.mpi);
        assert_eq!(self.joined(), [all.clone(), all], "{:?}", self.mpi);
        let complete = |set: &VmSet| set.joined_vms == 2;
        assert!(self.sets.begun().iter().all(complete), "{:?}", self.sets.begun());
    }
}

pub(crate) fn hash(printed: &str) -> &str {
    let line = printed.lines().find(|line| line.starts_with("hash "));
    line.unwrap_or_else(|| panic!("no hash: {printed}"))
}
