//! A guest that does to its channels what it can, and a well-behaved one beside it at the same proxy.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use blobcr_proto::channel::Frame;
use blobcr_proto::v1::channel_request::Request;
use blobcr_proto::v1::{
    BeginVmSetRequest, ChannelRequest, CheckpointRequest, DiskSnapshot, Hello, SetMembership,
    VmStatusRequest, WaitStableRequest,
};
use blobcr_tests::hosted::{Added, BOOT, Hosted, PROXY, SOON};
use blobcr_tests::vm::Vm;
use bytes::BytesMut;
use prost::Message;
use serde_json::json;

/// Requests in one round of the flood; the guest sends round after round.
const FLOOD: u64 = 2000;
/// What the proxy may need more than before for all that one guest does.
const MEMORY_KIB: u64 = 16 << 10;
/// Lines of the log that a VM can cause within [`LINES_TIME`].
const LINES: u64 = 100;
const LINES_TIME: Duration = Duration::from_secs(10);

/// What the hostile guest runs: `send` writes bytes to the port, while what comes back is kept.
const ATTACK: &str = "\
for d in /sys/class/virtio-ports/*; do
    [ \"$(cat $d/name)\" = org.blobcr.checkpoint.0 ] && port=/dev/${d##*/}
done
ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0
listen() { exec 3<>$port; cat <&3 >$1 & listener=$!; }
leave() { kill $listener; wait $listener; exec 3>&-; }
send() { cat /run/attack/$1 >&3; }
listen /run/answers
for file in forged oversized noise; do send $file; done
until [ $(strings /run/answers | grep -c -e 'of no other' -e 'not in the group' -e 'no checkpoint of') -ge 6 ]
do sleep 0.1; done
echo all are refused
await 0
send half; echo half a request
await 1
leave
blobcr-guest checkpoint --wait; echo honest=$?
listen /dev/null
(for i in $(seq 24); do (cat /run/attack/flood; sleep 1000) | nc 10.0.2.100 7000 >/dev/null & done) 3>&-
until raised 2; do
    send flood
    for i in 1 2 3; do nc -w 1 10.0.2.100 7000 </run/attack/flood >/dev/null 2>&1 3>&- & done
done
leave; echo the flood is over
blobcr-guest checkpoint --wait --timeout 100; echo honest=$?
killall nc sleep
blobcr-guest --connect 10.0.2.100:7000 checkpoint --timeout 100; echo honest=$?
";

/// What the well-behaved one runs.
const GOOD: &str = "\
n=0
until raised 0; do
    if blobcr-guest checkpoint --wait >/dev/null; then n=$((n + 1)); echo good=$n; else echo bad; fi
done";

fn frame(id: u64, request: Request) -> BytesMut {
    let body = ChannelRequest { request: Some(request) }.encode_to_vec().into();
    let mut bytes = BytesMut::new();
    Frame { request_id: id, body }.encode(&mut bytes).expect("a request is short");
    bytes
}

/// Requests for what is the other VM's.
fn forged(good: &Added, image: &str) -> Result<Vec<Request>> {
    let vm = || good.name.clone();
    let snapshot =
        DiskSnapshot { disk: vm(), image: image.to_owned(), number: 2, ..DiskSnapshot::default() };
    let set = SetMembership { group: "job".to_owned(), sequence: 1, expected_vms: 1 };
    Ok(vec![
        Request::Checkpoint(CheckpointRequest { vm: vm(), ..CheckpointRequest::default() }),
        Request::Status(VmStatusRequest { vm: vm() }),
        Request::Hello(Hello { vm: vm(), token: good.text("token")?.to_owned() }),
        Request::WaitStable(WaitStableRequest { snapshots: vec![snapshot], ..Default::default() }),
        Request::Checkpoint(CheckpointRequest { set: Some(set), ..CheckpointRequest::default() }),
        Request::BeginSet(BeginVmSetRequest {
            group: "job".to_owned(),
            expected_vms: 1,
            ..BeginVmSetRequest::default()
        }),
    ])
}

/// The attack as the hostile guest finds it on a disk: an archive.
fn archive(dir: &Path, good: &Added, image: &str) -> Result<PathBuf> {
    let attack = dir.join("attack");
    fs::create_dir(&attack)?;
    fs::write(attack.join("run.sh"), ATTACK)?;
    let all = forged(good, image)?.into_iter().zip(1..).map(|(one, id)| frame(id, one));
    fs::write(attack.join("forged"), all.collect::<Vec<_>>().concat())?;
    // A head that announces a GiB, and then some of it.
    let mut oversized = b"BCKF\x01\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\x40\0\0\0\0".to_vec();
    oversized.resize(300_000, b'B');
    fs::write(attack.join("oversized"), oversized)?;
    // Magics in places, each of which has to be looked at.
    let mut noise: Vec<u8> = (0..200_000).map(|_| rand::random()).collect();
    for piece in noise.chunks_exact_mut(1000) {
        piece[..8].copy_from_slice(b"BCKF\x01\0\0\0");
    }
    fs::write(attack.join("noise"), noise)?;
    let key = "k".repeat(60_000);
    let ask = |idempotency_key| {
        Request::Checkpoint(CheckpointRequest { idempotency_key, ..CheckpointRequest::default() })
    };
    fs::write(attack.join("half"), &frame(7, ask(key))[..100])?;
    let flood = (0..FLOOD).map(|id| frame(id, ask(format!("flood{id}"))));
    fs::write(attack.join("flood"), flood.collect::<Vec<_>>().concat())?;
    let archive = dir.join("attack.tar");
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(dir).arg("-cf").arg(&archive).arg("attack");
    ensure!(tar.status()?.success(), "tar failed");
    Ok(archive)
}

/// A figure of the proxy's memory, in KiB.
fn memory(hosted: &Hosted, figure: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", hosted.roles.pid(PROXY)?))?;
    let line = status.lines().find_map(|line| line.strip_prefix(figure));
    let words = line.with_context(|| format!("no {figure}"))?;
    Ok(words.trim_matches(|c: char| !c.is_ascii_digit()).parse()?)
}

/// Waits until the well-behaved VM has made three more checkpoints, from their request to stable.
fn goes_on(good: &mut Vm) -> Result<()> {
    let made = good.console().matches("good=").count();
    drop(good.wait_for(&format!("good={}", made + 3), SOON)?);
    ensure!(!good.console().contains("bad"), "a checkpoint failed:\n{}", good.console());
    Ok(())
}

#[test]
fn a_hostile_guest_is_refused_and_bounded_and_disturbs_no_other() -> Result<()> {
    let hosted = Hosted::start(false)?;
    let good = hosted.add("good", &["--group", "job", "--tcp"])?;
    let mallory = hosted.add("mallory", &["--group", "other"])?;
    let mut beside = hosted.boot(&good, good.words("qemu_args")?, &[], GOOD)?;
    beside.wait_for("good=1", BOOT)?;
    let disk = hosted.roles.json(&["disk", "info", "good"])?;
    let image = disk["checkpoint_image"].as_str().context("no checkpoint image")?;
    let attack = archive(hosted.roles.dir(), &good, image)?;
    let channels = [mallory.words("qemu_args")?, mallory.words("qemu_forward_args")?].concat();
    let run = "tar -xf /dev/vdc -C /run; . /run/attack/run.sh";
    let mut hostile = hosted.boot(&mallory, channels, &[attack], run)?;

    hostile.wait_for("all are refused", BOOT)?;
    let about = |what: &[&str]| hosted.logged(&[&["vm=mallory"], what].concat());
    assert_eq!(about(&["request refused", "PermissionDenied"])?, 6, "{}", hosted.roles.log());
    ensure!(about(&["skipped what is no frame"])? > 0, "{}", hosted.roles.log());
    ensure!(hosted.snapshots(&mallory).is_err(), "a refused request committed something");
    goes_on(&mut beside)?;

    // It hangs in the middle of a request.
    mallory.raise(0)?;
    hostile.wait_for("half a request", SOON)?;
    hostile.qmp("stop", json!(null))?;
    hosted.wait_logged(1, &["vm=mallory", "a frame was left unfinished"])?;
    goes_on(&mut beside)?;
    hostile.qmp("cont", json!(null))?;
    let before = memory(&hosted, "VmRSS:")?;
    let began = Instant::now();
    mallory.raise(1)?;
    hostile.wait_for("honest=0", SOON)?;

    hosted.wait_logged(1, &["vm=mallory", "request refused", "ResourceExhausted"])?;
    hosted.wait_logged(1, &["vm=mallory", "too many connections"])?;
    for _ in 0..2 {
        goes_on(&mut beside)?;
    }
    hosted.wait_logged(1, &["of=\"mallory\"", "lines were left out"])?;
    ensure!(!hostile.console().contains("the flood is over"));
    let (peak, windows) =
        (memory(&hosted, "VmHWM:")?, began.elapsed().div_duration_f64(LINES_TIME));
    let refused = about(&["request refused"])? as u64;
    eprintln!("memory {before} KiB, at most {peak} KiB; {refused} lines of refusals");
    ensure!(peak < before + MEMORY_KIB, "{before} KiB before and {peak} KiB at most");
    ensure!(refused <= 10 + LINES * (windows as u64 + 2), "{refused} lines");
    mallory.raise(2)?;
    hostile.wait_for("the flood is over", SOON)?;
    for _ in 0..2 {
        hostile.wait_for("honest=0", SOON)?;
    }

    hostile.wait_until_down(SOON)?;
    good.raise(0)?;
    beside.wait_until_down(SOON)?;
    // The first one is what it was cloned from.
    let made = beside.console().matches("good=").count() + 1;
    assert_eq!(hosted.snapshots(&good)?.len(), made, "its own, and no others");
    hosted.roles.stop()
}
