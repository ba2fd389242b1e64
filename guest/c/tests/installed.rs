//! What a person gets who installs the libraries and compiles against them.

#![expect(clippy::unwrap_used, reason = "a failure in a test is a failed test")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use blobcr_guest_fake_host::{FakeHost, Sets, refusal};
use blobcr_proto::v1::channel_request::Request;
use tempfile::TempDir;

/// Uses every function, and prints what came of it.
const PROGRAM: &str = r#"
#include <blobcr-guest.h>
#include <stdio.h>

int main(int argc, char **argv)
{
    struct blobcr_options options;
    struct blobcr_result taken;
    struct blobcr_vm vm;
    struct blobcr_set set;
    int rc;
    BLOBCR_INIT(&options);
    BLOBCR_INIT(&taken);
    BLOBCR_INIT(&vm);
    BLOBCR_INIT(&set);
    if (argc != 2)
        return 2;
    options.connect = argv[1];
    options.flags = BLOBCR_NO_FLUSH;
    options.timeout_ms = 20000;
    options.expected_vms = 1;
    rc = blobcr_begin_set(&options, &set);
    if (rc < 0) {
        printf("%d %s\n", rc, blobcr_last_error());
        return 1;
    }
    printf("begun %s:%llu:%u\n", set.group, (unsigned long long)set.sequence, set.expected_vms);
    options.group = set.group;
    options.sequence = set.sequence;
    options.key = "key-1";
    rc = blobcr_checkpoint(&options, &taken);
    printf("checkpoint %d\n", rc);
    printf("%s: %u of %s, %s, state %u, dirty %llu\n", taken.vm, taken.count,
           taken.snapshots[0].disk, taken.snapshots[0].image, taken.snapshots[0].state,
           (unsigned long long)taken.snapshots[0].dirty_bytes);
    rc = blobcr_wait(&options, &taken);
    printf("wait %d, state %u\n", rc, taken.snapshots[0].state);
    rc = blobcr_set_status(&options, &set);
    printf("set %d, state %u, joined %u\n", rc, set.state, set.joined_vms);
    rc = blobcr_status(&options, &vm);
    printf("status %d, %s, group %s\n", rc, vm.vm, vm.group);
    vm.size--;
    rc = blobcr_status(&options, &vm);
    printf("%d %s\n", rc, blobcr_last_error());
    printf("NULL %d\n", blobcr_status(&options, NULL));
    return 0;
}
"#;

const PRINTED: &str = "\
begun only:1:1
checkpoint 0
web: 1 of web-d0, web-ckpt, state 1, dirty 4096
wait 0, state 2
set 0, state 3, joined 1
status 0, web, group only
-22 struct blobcr_vm is of version 1 and ";

/// The same from Python.
const PYTHON: &str = r#"
import blobcr, sys
host = {"connect": sys.argv[1], "flush": False, "timeout": 20}
try:
    begun = blobcr.begin_set(1, **host)
except blobcr.Error as error:
    sys.exit(f"{error.errno} {error.strerror}")
print(f"begun {begun.group}:{begun.sequence}:{begun.expected_vms}")
of = {"group": begun.group, "sequence": begun.sequence, **host}
taken = blobcr.checkpoint(key="key-1", expected_vms=1, **of)
one, = taken.snapshots
print(f"{taken.vm}: {one.disk}, {one.image}@{one.number}, {one.state.name}, {one.dirty_bytes}")
blobcr.wait(taken, **host)
print(taken.snapshots[0].state.name)
joined = blobcr.set_status(**of)
print(joined.state.name, joined.joined_vms)
vm = blobcr.status(**host)
print(vm.vm, vm.group, vm.disks)
try:
    blobcr.status(prot="x")
except TypeError as error:
    print(error)
"#;

const PYTHON_PRINTED: &str = "\
begun only:1:1
web: web-d0, web-ckpt@2, PENDING, 4096
STABLE
STABLE 1
web only [Disk(disk='web-d0', checkpoint_image='web-ckpt', size_bytes=1073741824, \
dirty_bytes=4096, last_stable=2, pending=1, stalled='why not')]
prot is no option
";

struct Installed {
    dir: TempDir,
}

impl Installed {
    /// In a directory of the tests' own, once for all of them.
    fn get() -> &'static Self {
        static INSTALLED: OnceLock<Installed> = OnceLock::new();
        INSTALLED.get_or_init(|| {
            let dir = tempfile::tempdir().unwrap();
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../install.sh");
            run(Command::new(script).arg(dir.path()).env("BLOBCR_PROFILE", "dev"));
            Self { dir }
        })
    }

    fn path(&self, of: &str) -> PathBuf {
        self.dir.path().join(of)
    }

    fn flags(&self, of: &[&str]) -> Vec<String> {
        let output = run(Command::new("pkg-config")
            .args(of)
            .env("PKG_CONFIG_PATH", self.path("lib/pkgconfig")));
        text(&output.stdout).split_whitespace().map(str::to_owned).collect()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|e| {
        panic!("{:?}: {e}; tests/setup.sh installs what is missing", command.get_program())
    });
    assert!(output.status.success(), "{command:?}: {}", text(&output.stderr));
    output
}

fn compile(compiler: &[&str], flags: &[String], name: &str) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let (source, program) = (dir.path().join(name), dir.path().join("program"));
    std::fs::write(&source, PROGRAM).unwrap();
    run(Command::new(compiler[0])
        .args(&compiler[1..])
        .args(["-Wall", "-Wextra", "-Werror", "-o"])
        .args([&program, &source])
        .args(flags));
    (dir, program)
}

fn runs_against_a_host(program: &Path) {
    let host = FakeHost::new("web", &Sets::default());
    let output = run(Command::new(program)
        .arg(host.address())
        .env("LD_LIBRARY_PATH", Installed::get().path("lib")));
    let printed = text(&output.stdout);
    assert!(printed.starts_with(PRINTED), "{printed}");
    assert!(printed.ends_with("NULL -22\n"), "{printed}");
    let asked = host.asked();
    assert_eq!(asked.len(), 5, "{asked:?}");
    let Request::Checkpoint(request) = &asked[1] else { panic!("{asked:?}") };
    assert_eq!(request.idempotency_key, "key-1");
    let set = request.set.as_ref().unwrap();
    assert_eq!((set.group.as_str(), set.sequence, set.expected_vms), ("only", 1, 1));
    let refusing =
        FakeHost::refusing("web", &Sets::default(), |_| Some(refusal(5, "no such group")));
    let output = Command::new(program)
        .arg(refusing.address())
        .env("LD_LIBRARY_PATH", Installed::get().path("lib"))
        .output()
        .unwrap();
    assert_eq!(text(&output.stdout), "-2 the host refused: no such group\n");
}

#[test]
fn a_c_program_is_compiled_with_pkg_config_and_runs() {
    let flags = Installed::get().flags(&["--cflags", "--libs", "blobcr"]);
    let (_dir, program) = compile(&["cc", "-std=c99", "-pedantic"], &flags, "program.c");
    runs_against_a_host(&program);
}

#[test]
fn a_c_plus_plus_program_is_linked_with_the_static_library() {
    let installed = Installed::get();
    let mut flags = installed.flags(&["--cflags", "blobcr"]);
    flags.push(installed.path("lib/libblobcr.a").display().to_string());
    flags.extend(installed.flags(&["--static", "--libs-only-l", "blobcr"]));
    flags.retain(|flag| flag != "-lblobcr");
    let (_dir, program) = compile(&["c++", "-std=c++11", "-pedantic"], &flags, "program.cc");
    runs_against_a_host(&program);
}

fn python(host: &FakeHost) -> Output {
    Command::new("python3")
        .args(["-c", PYTHON, &host.address()])
        .env("PYTHONPATH", Installed::get().path("lib/python3/dist-packages"))
        .env("LD_LIBRARY_PATH", Installed::get().path("lib"))
        .output()
        .unwrap()
}

#[test]
fn a_python_program_imports_the_module() {
    let output = python(&FakeHost::new("web", &Sets::default()));
    assert_eq!(text(&output.stdout), PYTHON_PRINTED, "{}", text(&output.stderr));
    let refusing =
        FakeHost::refusing("web", &Sets::default(), |_| Some(refusal(5, "no such group")));
    let output = python(&refusing);
    assert_eq!(text(&output.stderr), "2 the host refused: no such group\n");
}

#[test]
fn the_libraries_export_their_own_names_and_nothing_else() {
    let exported = |library: &str| -> Vec<String> {
        let path = Installed::get().path("lib").join(library);
        let output = run(Command::new("nm").args(["-D", "--defined-only"]).arg(path));
        let names = text(&output.stdout);
        names.lines().filter_map(|l| l.split_whitespace().last()).map(str::to_owned).collect()
    };
    let mut found = exported("libblobcr.so");
    found.sort();
    let ours = ["begin_set", "checkpoint", "last_error", "set_status", "status", "wait"];
    assert_eq!(found, ours.map(|name| format!("blobcr_{name}")));
    for name in exported("libblobcr_mpi.so") {
        let ours = ["blobcr_mpi_", "MPI_", "mpi_"];
        let expected = ours.iter().any(|prefix| name.starts_with(prefix));
        assert!(expected, "libblobcr_mpi.so exports {name}");
    }
    for (library, soname) in
        [("libblobcr.so", "libblobcr.so.1"), ("libblobcr_mpi.so", "libblobcr_mpi.so.1")]
    {
        let path = Installed::get().path("lib").join(library);
        let dynamic = text(&run(Command::new("readelf").arg("-d").arg(path)).stdout);
        assert!(dynamic.contains(&format!("soname: [{soname}]")), "{dynamic}");
        assert!(!dynamic.contains("libmpi"), "no MPI of its own: {dynamic}");
    }
}

#[test]
fn all_that_a_guest_needs_is_there() {
    let installed = Installed::get();
    for path in [
        "bin/blobcr-guest",
        "bin/blobcr-job",
        "bin/blobcr-criu",
        "include/blobcr.h",
        "include/blobcr-guest.h",
        "include/blobcr_mpi.h",
        "share/man/man1/blobcr-guest.1",
        "share/man/man3/blobcr_checkpoint.3",
        "share/man/man3/blobcr_wait.3",
        "lib/systemd/system/blobcr-checkpoint.timer",
    ] {
        assert!(installed.path(path).exists(), "{path}");
    }
    let unit = installed.path("lib/systemd/system/blobcr-checkpoint.service");
    let unit = std::fs::read_to_string(unit).unwrap();
    let program = installed.path("bin/blobcr-guest");
    assert!(unit.contains(&format!("ExecStart={} ", program.display())), "{unit}");
    run(Command::new(program).arg("--version"));
}
