//! A real guest under QEMU asks a real proxy through its virtio-serial port. Only the mirror behind
//! the proxy is scripted, so that the test decides when an answer may go.

#![expect(clippy::unwrap_used, reason = "a failure in a test is a failed test")]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blobcr_ckpt_proxy::testing::{Script, ScriptedHost};
use blobcr_ckpt_proxy::{Limits, NewVm, Proxy, ProxyOptions};
use blobcr_guest::worker::State;
use blobcr_tests::guest_image::GuestImage;
use blobcr_tests::vm::{Vm, VmSpec};
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// A guest boots in 3 s on an idle machine; this is for a very busy one.
const BOOT: Duration = Duration::from_secs(180);
/// For anything that a running guest does.
const SOON: Duration = Duration::from_secs(60);

/// A proxy in a runtime of its own, so that it can be killed like a process.
struct ProxyProcess {
    runtime: Runtime,
    proxy: Proxy,
}

impl ProxyProcess {
    fn start(dir: &Path, host: &ScriptedHost) -> Self {
        let runtime = Runtime::new().unwrap();
        let limits = Limits { unreachable: Duration::from_secs(2), ..Limits::default() };
        let options = ProxyOptions { limits, ..ProxyOptions::new(dir, host.address().to_string()) };
        let proxy = runtime.block_on(async { Proxy::start(options) }).unwrap();
        Self { runtime, proxy }
    }

    fn add_vm(&self, name: &str) {
        self.runtime
            .block_on(self.proxy.add_vm(NewVm {
                name: name.to_owned(),
                disks: vec!["d0".to_owned()],
                groups: vec!["job".to_owned()],
                ..NewVm::default()
            }))
            .unwrap();
    }

    /// Nothing is closed in order: its socket stays where it is, and leads nowhere.
    fn kill(self) {
        self.runtime.shutdown_timeout(SOON);
    }
}

struct Setup {
    dir: TempDir,
    script: Script,
    host: ScriptedHost,
    image: GuestImage,
}

impl Setup {
    fn new() -> Self {
        let script = Script::new(&["d0"]);
        let host = ScriptedHost::start(&script, None);
        let dir = tempfile::tempdir().unwrap();
        Self { dir, script, host, image: GuestImage::get().unwrap() }
    }

    fn sockets(&self) -> PathBuf {
        self.dir.path().join("sockets")
    }

    fn disk(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn boot(&self, disk: &str, run: &str) -> Vm {
        let disk = self.disk(disk);
        if !disk.exists() {
            self.image.copy_disk(&disk).unwrap();
        }
        let spec = VmSpec {
            channel: Some(self.sockets().join("vm1.sock")),
            ..VmSpec::new(&self.image, disk, run)
        };
        Vm::start(&spec, &self.dir.path().join("vm")).unwrap()
    }

    fn until(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let began = Instant::now();
        while !condition() {
            assert!(began.elapsed() < SOON, "hung: {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn a_guest_is_answered_and_programs_take_turns_at_its_port() {
    let setup = Setup::new();
    let proxy = ProxyProcess::start(&setup.sockets(), &setup.host);
    proxy.add_vm("vm1");
    let mut vm = setup.boot(
        "disk",
        "blobcr-guest status; \
         blobcr-guest checkpoint --set job:3:2; \
         blobcr-guest wait --timeout 60 & \
         blobcr-guest --json checkpoint --key again; \
         blobcr-guest checkpoint --key again; \
         wait; \
         blobcr-guest checkpoint --wait --timeout 0.5; echo exit=$?; \
         blobcr-guest --port org.other checkpoint; echo exit=$?",
    );
    let line = vm.wait_for("d0 image=debian@1", BOOT).unwrap();
    assert!(line.contains("checkpoint_image=- "), "{line}");
    let line = vm.wait_for("d0-ckpt@1 disk=d0", SOON).unwrap();
    assert!(line.contains(" downtime_us=2 dirty_bytes=4096 elapsed_us="), "{line}");
    assert_eq!(setup.script.sets()[0].members[0].vm, "vm1");
    // A wait is going on meanwhile, and does not keep the port to itself.
    let line = vm.wait_for("\"snapshots\"", SOON).unwrap();
    let json: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(json["snapshots"][0]["snapshot"], 2);
    assert_eq!(json["snapshots"][0]["state"], "pending");
    vm.wait_for("d0-ckpt@2 disk=d0", SOON).unwrap();
    assert_eq!(setup.script.calls()[1..], ["vm1/again"], "the second one was remembered");
    setup.script.settle(blobcr_ckpt_proxy::testing::STABLE, "");
    vm.wait_for(" stable stored_bytes=", SOON).unwrap();
    // This one is never settled.
    vm.wait_for("d0-ckpt@3 disk=d0", SOON).unwrap();
    vm.wait_for("not stable yet", SOON).unwrap();
    vm.wait_for("exit=5", SOON).unwrap();
    vm.wait_for("no virtio-serial port named org.other", SOON).unwrap();
    vm.wait_for("exit=3", SOON).unwrap();
    vm.wait_until_down(SOON).unwrap();
}

#[test]
fn a_guest_gets_its_one_answer_though_the_proxy_dies_and_comes_back() {
    let setup = Setup::new();
    // QEMU starts before there is a proxy at all.
    let mut vm = setup.boot(
        "disk",
        "blobcr-guest checkpoint --timeout 1; echo exit=$?; \
         echo ready; blobcr-guest checkpoint; echo exit=$?; blobcr-guest checkpoint; echo exit=$?",
    );
    vm.wait_for("nobody is at the host end", BOOT).unwrap();
    vm.wait_for("exit=5", SOON).unwrap();
    vm.wait_for("ready", SOON).unwrap();
    setup.script.hold();
    let proxy = ProxyProcess::start(&setup.sockets(), &setup.host);
    proxy.add_vm("vm1");
    setup.until("the guest asks", || setup.script.running().0 == 1);
    proxy.kill();
    setup.until("the call ends", || setup.script.running().0 == 0);
    let proxy = ProxyProcess::start(&setup.sockets(), &setup.host);
    setup.until("the guest asks again", || setup.script.running().0 == 1);
    // And once more, with an answer on its way.
    proxy.kill();
    setup.script.release();
    let _proxy = ProxyProcess::start(&setup.sockets(), &setup.host);
    let line = vm.wait_for("d0-ckpt@", SOON).unwrap();
    assert!(
        line.starts_with("d0-ckpt@1 "),
        "one checkpoint however often it was asked for: {line}"
    );
    vm.wait_for("exit=0", SOON).unwrap();
    vm.wait_for("d0-ckpt@2 ", SOON).unwrap();
    vm.wait_for("exit=0", SOON).unwrap();
    let calls = setup.script.calls();
    let first = calls.iter().filter(|key| **key == calls[0]).count();
    assert!(first >= 3 && calls.len() == first + 1, "{calls:?}");
    vm.wait_until_down(SOON).unwrap();
}

#[test]
fn what_a_program_wrote_before_its_checkpoint_is_on_the_disk_by_then() {
    let setup = Setup::new();
    let proxy = ProxyProcess::start(&setup.sockets(), &setup.host);
    proxy.add_vm("vm1");
    setup.script.hold();
    let mut vm = setup.boot(
        "disk",
        "echo late > /root/note; \
         blobcr-guest-worker --dir /data/work --every 20 --checkpoint-at 5 --print-every 1",
    );
    vm.wait_for("worker: fresh start", BOOT).unwrap();
    setup.until("the guest asks", || setup.script.running().0 == 1);
    // What a mirror would have in the snapshot: the disk as it is while the guest waits.
    std::fs::copy(setup.disk("disk"), setup.disk("snapshot")).unwrap();
    setup.script.release();
    vm.wait_for("worker: checkpoint at step 5: d0-ckpt@1 ", SOON).unwrap();
    let line = vm.wait_for("worker: step 12 ", SOON).unwrap();
    assert!(line.ends_with(&State::after(12).hash.to_string()), "{line}");
    // It computes on while the checkpoint is pending.
    setup.script.settle(blobcr_ckpt_proxy::testing::STABLE, "");
    vm.wait_for("d0-ckpt@1 stable", SOON).unwrap();
    vm.kill().unwrap();
    drop(vm);

    let mut vm = setup.boot(
        "snapshot",
        "cat /root/note; blobcr-guest-worker --dir /data/work --every 1 --steps 8 --print-every 1",
    );
    vm.wait_for("late", BOOT).unwrap();
    let line = vm.wait_for("worker: resumed from step ", SOON).unwrap();
    let expected = format!(
        "worker: resumed from step 5 hash={} newest_file=5 files_beyond=0 log_lines=5 identical=yes",
        State::after(5).hash
    );
    assert_eq!(line, expected);
    let line = vm.wait_for("worker: done at step 8 ", SOON).unwrap();
    assert!(line.ends_with(&State::after(8).hash.to_string()), "{line}");
    vm.wait_until_down(SOON).unwrap();
}
