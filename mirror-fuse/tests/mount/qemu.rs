//! QEMU's own block layer on a disk: as a hypervisor opens it, in all its ways.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Output};

use rustix::fs::{FlockOperation, fcntl_lock};

use crate::support::{CHUNK, World, pattern};

const ENGINES: [&str; 3] = ["threads", "native", "io_uring"];

fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}; apt-get install qemu-utils"))
}

fn text(output: &Output) -> String {
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    format!("{out}{err}")
}

fn qemu_io(engine: &str, path: &Path, commands: &[&str]) -> Output {
    let mut arguments = vec!["-f", "raw", "-t", "none", "-i", engine, "-d", "unmap"];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    arguments.push(path.to_str().unwrap());
    run("qemu-io", &arguments)
}

#[test]
fn every_engine_reads_writes_discards_and_zeros() {
    let world = World::new();
    let mut model = pattern(32 * CHUNK);
    world.image("vm", model.clone());
    let mirror = world.start();
    let path = mirror.attach("vm", "d");
    for (round, engine) in ENGINES.into_iter().enumerate() {
        let (fill, at) = (0x10 + round as u8, round as u64 * 8 * CHUNK);
        let (write, odd) = (at + 4096, at + 3 * CHUNK - 512);
        let ran = qemu_io(
            engine,
            &path,
            &[
                &format!("write -P {fill} {write} 128k"),
                &format!("aio_write -P {fill} {odd} 1024"),
                "aio_flush",
                &format!("read -P {fill} {write} 128k"),
                &format!("discard {} 64k", at + 4 * CHUNK),
                &format!("write -z {} 32k", at + 5 * CHUNK + 4096),
                &format!("read -P 0 {} 32k", at + 5 * CHUNK + 4096),
                "flush",
            ],
        );
        let said = text(&ran);
        assert!(ran.status.success() && !said.contains("failed"), "{engine}: {said}");
        model[write as usize..][..128 << 10].fill(fill);
        model[odd as usize..][..1024].fill(fill);
        model[(at + 4 * CHUNK) as usize..][..64 << 10].fill(0);
        model[(at + 5 * CHUNK + 4096) as usize..][..32 << 10].fill(0);
        assert!(fs::read(&path).unwrap() == model, "{engine}");
    }
}

#[test]
fn its_benchmark_runs_in_every_engine_while_there_are_commits() {
    let world = World::new();
    world.image("vm", pattern(64 << 20));
    let mirror = world.start();
    let path = mirror.attach("vm", "d");
    for engine in ENGINES {
        for write in [true, false] {
            let mut arguments =
                vec!["bench", "-f", "raw", "-t", "none", "-i", engine, "-c", "2000", "-d", "16"];
            arguments.extend(["-s", "4096"]);
            if write {
                arguments.extend(["-w", "--pattern=7"]);
            }
            arguments.push(path.to_str().unwrap());
            let ran = std::thread::scope(|scope| {
                let bench = scope.spawn(|| run("qemu-img", &arguments));
                mirror.checkpoint("d");
                bench.join().unwrap()
            });
            assert!(ran.status.success(), "{engine}: {}", text(&ran));
        }
    }
    assert!(fs::read(&path).unwrap()[..2000 * 4096].iter().all(|byte| *byte == 7));
}

#[test]
fn its_locks_keep_it_out_of_a_disk_in_use() {
    let world = World::new();
    world.image("vm", pattern(CHUNK));
    let mirror = world.start();
    let path = mirror.attach("vm", "d");
    let held = File::open(&path).unwrap();
    // A running QEMU holds such locks on some bytes of the file.
    fcntl_lock(&held, FlockOperation::NonBlockingLockShared).unwrap();
    let ran = qemu_io("threads", &path, &["write -P 1 0 512"]);
    assert!(text(&ran).contains("lock"), "{}", text(&ran));
    drop(held);
    let ran = qemu_io("threads", &path, &["write -P 1 0 512"]);
    assert!(ran.status.success(), "{}", text(&ran));
}

#[test]
fn tools_copy_compare_and_map_snapshots() {
    let world = World::new();
    let bytes = pattern(9 * CHUNK);
    world.image("vm", bytes.clone());
    let mirror = world.start();
    let snapshot = mirror.path("images/vm/latest.raw");
    let copy = world.dir.path().join("copy.qcow2");
    let (from, to) = (snapshot.to_str().unwrap(), copy.to_str().unwrap());
    let ran = run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", from, to]);
    assert!(ran.status.success(), "{}", text(&ran));
    let ran = run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", from, to]);
    assert!(ran.status.success(), "{}", text(&ran));
    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", from]);
    let holes = text(&map).matches(r#""zero": true"#).count();
    assert_eq!(holes, 3, "every third chunk is a hole: {}", text(&map));
    // As the backing file of a new image.
    let overlay = world.dir.path().join("overlay.qcow2");
    let overlay = overlay.to_str().unwrap();
    let ran = run("qemu-img", &["create", "-f", "qcow2", "-b", from, "-F", "raw", overlay]);
    assert!(ran.status.success(), "{}", text(&ran));
    let ran = run("qemu-io", &["-c", "write -P 5 70000 10", "-c", "read 0 512k", overlay]);
    assert!(ran.status.success() && !text(&ran).contains("failed"), "{}", text(&ran));
    assert!(fs::read(snapshot).unwrap() == bytes);
}
