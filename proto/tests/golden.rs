//! The bytes of messages that programs of two versions exchange: a guest's program may be older
//! than its host by years, and nodes are upgraded one by one. What is stored of them is in the
//! golden files of the parts that store it.

#![expect(clippy::unwrap_used, reason = "a failure in a test is a failed test")]

use blobcr_proto::codec::compress;
use blobcr_proto::v1::{self, channel_reply, channel_request};
use blobcr_proto::{Hash, record};
use bytes::Bytes;
use prost::Message;

/// One line: what it is, and its bytes; they are read back too.
fn line<M: Message + Default + PartialEq + std::fmt::Debug>(name: &str, message: &M) -> String {
    let bytes = message.encode_to_vec();
    assert_eq!(M::decode(&bytes[..]).as_ref(), Ok(message), "{name}");
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{name} {hex}\n")
}

fn request(request: channel_request::Request) -> v1::ChannelRequest {
    v1::ChannelRequest { request: Some(request) }
}

fn reply(reply: channel_reply::Reply) -> v1::ChannelReply {
    v1::ChannelReply { reply: Some(reply) }
}

fn disk_snapshot() -> v1::DiskSnapshot {
    v1::DiskSnapshot {
        disk: "web0".into(),
        image: "web0-ckpt".into(),
        image_id: 7,
        number: 3,
        dirty_bytes: 4096,
        downtime_ns: 1500,
    }
}

fn root() -> v1::TreeRoot {
    v1::TreeRoot {
        size_bytes: 10 << 30,
        chunk_size: 256 << 10,
        fan_out: 256,
        node: Bytes::from_static(&[0xab; 32]),
    }
}

fn snapshot() -> v1::Snapshot {
    v1::Snapshot {
        image_id: 7,
        image: "web0-ckpt".into(),
        number: 3,
        state: v1::SnapshotState::Stable.into(),
        root: Some(root()),
        created_unix_ms: 1_700_000_000_000,
        stable_unix_ms: 1_700_000_000_009,
        stats: Some(v1::SnapshotStats { dirty_chunks: 9, ..v1::SnapshotStats::default() }),
        reason: "none".into(),
    }
}

fn channel() -> String {
    let set = v1::SetMembership { group: "app".into(), sequence: 2, expected_vms: 4 };
    let key = "0123456789abcdef".to_owned();
    let (vm, snapshots) = (String::new(), vec![disk_snapshot()]);
    let checkpoint = v1::CheckpointRequest { vm, set: Some(set), idempotency_key: key };
    let wait = v1::WaitStableRequest { vm: String::new(), snapshots, timeout_ms: 1 };
    let taken = v1::CheckpointReply { vm: "web".into(), snapshots: vec![disk_snapshot()] };
    let disk = v1::Disk { name: "web0".into(), size_bytes: 1 << 30, ..v1::Disk::default() };
    let status = v1::VmStatusReply { vm: "web".into(), disks: vec![disk], groups: vec![] };
    let error = v1::ChannelError { code: 9, message: "it is busy".into() };
    let stable = v1::WaitStableReply { snapshots: vec![snapshot()] };
    [
        line("request.checkpoint", &request(channel_request::Request::Checkpoint(checkpoint))),
        line("request.wait_stable", &request(channel_request::Request::WaitStable(wait))),
        line(
            "request.status",
            &request(channel_request::Request::Status(v1::VmStatusRequest::default())),
        ),
        line("reply.checkpoint", &reply(channel_reply::Reply::Checkpoint(taken))),
        line("reply.wait_stable", &reply(channel_reply::Reply::WaitStable(stable))),
        line("reply.status", &reply(channel_reply::Reply::Status(status))),
        line("reply.error", &reply(channel_reply::Reply::Error(error))),
    ]
    .concat()
}

fn records() -> String {
    let plain = b"the same sixteen".repeat(20);
    [v1::Codec::Plain, v1::Codec::Lz4, v1::Codec::Zstd]
        .into_iter()
        .map(|codec| {
            let payload = compress(codec, &plain).unwrap_or_else(|| plain.clone());
            let kind = v1::RecordKind::Chunk;
            let whole = record::whole(kind, Hash::of(&plain), codec, plain.len(), payload.into());
            assert_eq!(record::open(&whole).unwrap().1, plain);
            line(&format!("record.{codec:?}"), &whole)
        })
        .collect()
}

#[test]
fn golden_messages_of_version_1() {
    let shown = [channel(), records(), line("root", &root()), line("snapshot", &snapshot())];
    let shown = shown.concat();
    assert_eq!(shown, include_str!("../golden/messages-v1.txt"), "this program writes:\n{shown}");
}
