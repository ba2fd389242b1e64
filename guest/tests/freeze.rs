//! File systems that are frozen around a request: on an ext4 of the test's own, in a namespace of
//! mounts of its own.

#![expect(clippy::unwrap_used, reason = "a failure in a test is a failed test")]
#![expect(clippy::print_stdout, reason = "what is left out must be said")]

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use blobcr_guest::GuestError;
use blobcr_guest::freeze::{Scope, freeze};
use blobcr_guest_fake_host::{FakeHost, Sets, refusal};
use blobcr_proto::v1::channel_request::Request;
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::{UnshareFlags, unshare_unsafe};

const SOON: Duration = Duration::from_secs(30);
const FIFREEZE: libc::Ioctl = 0xC004_5877_u32 as libc::Ioctl;
const FITHAW: libc::Ioctl = 0xC004_5878_u32 as libc::Ioctl;

/// An ext4 that only this thread and its children see.
struct Ext4 {
    _dir: tempfile::TempDir,
    mount: PathBuf,
}

impl Ext4 {
    fn frozen(&self) -> bool {
        is_frozen(&self.mount)
    }
}

/// Asks for another freeze, which a frozen file system refuses.
fn is_frozen(mount: &Path) -> bool {
    let file = File::open(mount).unwrap();
    // SAFETY: the requests take an int that they do not use.
    unsafe {
        if libc::ioctl(file.as_raw_fd(), FIFREEZE, 0) == 0 {
            // The process that thaws may have been quicker.
            libc::ioctl(file.as_raw_fd(), FITHAW, 0);
            return false;
        }
    }
    assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EBUSY));
    true
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        if let Ok(file) = File::open(&self.mount) {
            // SAFETY: as above. A test that failed leaves nothing frozen behind.
            unsafe { libc::ioctl(file.as_raw_fd(), FITHAW, 0) };
        }
        drop(Command::new("umount").arg("-l").arg(&self.mount).status());
    }
}

/// Runs the test with a mounted file system, or says why it cannot.
fn with_ext4(test: impl FnOnce(&Ext4) + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        println!("left out: mounting a file system needs root");
        return;
    }
    thread::spawn(move || {
        // SAFETY: this thread alone gets other mounts; no descriptors are unshared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let (image, mount) = (dir.path().join("image"), dir.path().join("mnt"));
        fs::create_dir(&mount).unwrap();
        File::create(&image).unwrap().set_len(16 << 20).unwrap();
        run(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(&image));
        run(Command::new("mount").args(["-o", "loop"]).args([&image, &mount]));
        test(&Ext4 { _dir: dir, mount });
    })
    .join()
    .unwrap();
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn until(what: &str, mut test: impl FnMut() -> bool) {
    let began = Instant::now();
    while !test() {
        assert!(began.elapsed() < SOON, "not {what} in time");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A write that a frozen file system would hold up for ever.
fn writable(mount: &Path) {
    let (done, wait) = mpsc::channel();
    let path = mount.join("file");
    thread::spawn(move || done.send(fs::write(path, b"x")));
    wait.recv_timeout(SOON).expect("the file system is still frozen").unwrap();
}

fn only(ext4: &Ext4) -> Scope {
    Scope::Only(vec![ext4.mount.clone()])
}

#[test]
fn it_is_frozen_until_thawed_dropped_or_too_long() {
    with_ext4(|ext4| {
        let frozen = freeze(&only(ext4), SOON).unwrap();
        assert_eq!(frozen.count(), 1);
        assert!(ext4.frozen());
        frozen.thaw().unwrap();
        assert!(!ext4.frozen());
        drop(freeze(&only(ext4), SOON).unwrap());
        assert!(!ext4.frozen());
        // A panic drops it as well.
        let scope = only(ext4);
        let panicked = std::panic::catch_unwind(|| {
            let _frozen = freeze(&scope, SOON).unwrap();
            panic!("on purpose");
        });
        assert!(panicked.is_err());
        assert!(!ext4.frozen());
        let frozen = freeze(&only(ext4), Duration::from_millis(50)).unwrap();
        until("thawed by the limit", || !ext4.frozen());
        let error = frozen.thaw().unwrap_err();
        assert!(matches!(error, GuestError::Thawed { .. }), "{error}");
        writable(&ext4.mount);
    });
}

#[test]
fn what_cannot_be_frozen_freezes_nothing() {
    with_ext4(|ext4| {
        let error = freeze(&Scope::Only(vec!["/proc".into(), ext4.mount.clone()]), SOON);
        let error = error.unwrap_err();
        assert!(error.to_string().contains("/proc is no mount point"), "{error}");
        assert!(!ext4.frozen());
        let held = freeze(&only(ext4), SOON).unwrap();
        let error = freeze(&only(ext4), SOON).unwrap_err();
        assert_eq!(error.errno(), libc::EBUSY, "{error}");
        assert!(ext4.frozen(), "the one who froze it thaws it");
        held.thaw().unwrap();
        writable(&ext4.mount);
    });
}

/// Begins `blobcr-guest checkpoint --freeze` and returns when the host has its request.
fn start(ext4: &Ext4, host: &FakeHost, more: &[&str]) -> Child {
    let child = Command::new(env!("CARGO_BIN_EXE_blobcr-guest"))
        .args(["--connect", &host.address(), "checkpoint", "--no-flush"])
        .arg(format!("--freeze={}", ext4.mount.display()))
        .args(more)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    until("asked", || !host.asked().is_empty());
    child
}

#[test]
fn the_program_freezes_around_the_request_and_thaws_whatever_happens() {
    with_ext4(|ext4| {
        // Answered, and refused.
        for (refused, code) in [(false, 0), (true, 4)] {
            let mount = ext4.mount.clone();
            let seen = Arc::new(AtomicBool::new(false));
            let see = seen.clone();
            // The thread that answers was made in this namespace, so it sees the mount.
            let host = FakeHost::refusing("web", &Sets::default(), move |_| {
                see.store(is_frozen(&mount), Ordering::SeqCst);
                refused.then(|| refusal(9, "not now"))
            });
            let output = start(ext4, &host, &[]).wait_with_output().unwrap();
            assert_eq!(output.status.code(), Some(code), "{output:?}");
            assert!(seen.load(Ordering::SeqCst), "it was not frozen when the host was asked");
            assert!(!ext4.frozen());
        }
        // Killed by every signal that somebody may send, while the host is silent.
        for signal in [libc::SIGKILL, libc::SIGTERM, libc::SIGINT] {
            let host = silent();
            let mut child = start(ext4, &host, &[]);
            assert!(ext4.frozen());
            // SAFETY: the child is ours and was not waited for.
            unsafe { libc::kill(child.id() as i32, signal) };
            child.wait().unwrap();
            until("thawed after a kill", || !ext4.frozen());
            writable(&ext4.mount);
        }
        // Given up because of the limit.
        let host = silent();
        let child = start(ext4, &host, &["--freeze-limit", "0.2"]);
        let output = child.wait_with_output().unwrap();
        assert!(matches!(output.status.code(), Some(1 | 5)), "{output:?}");
        assert!(!ext4.frozen());
        writable(&ext4.mount);
    });
}

/// A host that hears and never answers.
fn silent() -> FakeHost {
    FakeHost::refusing("web", &Sets::default(), |request| {
        assert!(matches!(request, Request::Checkpoint(_)));
        thread::sleep(Duration::from_secs(3600));
        None
    })
}
