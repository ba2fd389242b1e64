//! What `proto` decodes.

use blobcr_proto::channel::{BODY_BYTES_MAX, Decoded, Frame, decode};
use blobcr_proto::codec::{self, PLAIN_LEN_MAX, crc32c, decode_into};
use blobcr_proto::name::{
    DiskName, GroupName, ImageName, ImageSpec, NAME_BYTES_MAX, PoolName, RepositoryName, VmName,
};
use blobcr_proto::policy::{Compression, Policy};
use blobcr_proto::record::{RecordKey, check_payload, open};
use blobcr_proto::v1::{self, Codec, RecordKind};
use blobcr_proto::{ChunkSize, Hash};
use bytes::{Bytes, BytesMut};
use prost::Message;

use crate::input::Input;
use crate::{Target, hex, joined};

/// Frames of a VM's channel: none is invented, none depends on how the stream was cut, and each is
/// the bytes that it was read from.
pub const FRAME: Target = Target { check: frame, seeds: frame_seeds };

const FRAME_HEADER: usize = 24;

fn frame(input: &[u8]) {
    let mut input = Input(input);
    let (flags, cut) = (input.u8(), input.u16());
    let mut stream = input.0.to_vec();
    if flags & 1 != 0 {
        seal_frames(&mut stream);
    }
    let whole = frames_of(&stream, stream.len());
    for (at, frame) in &whole {
        let mut again = BytesMut::new();
        frame.encode(&mut again).expect("it was short enough to be decoded");
        assert_eq!(stream[*at..at + again.len()], again, "a frame is what it was read from");
    }
    assert_eq!(frames_of(&stream, usize::from(cut).min(stream.len())), whole, "cut at {cut}");
}

/// Every frame with where it begins, when the first `cut` bytes come before the others.
fn frames_of(stream: &[u8], cut: usize) -> Vec<(usize, Frame)> {
    let mut found = Vec::new();
    let mut buffer = BytesMut::new();
    let mut at = 0;
    for part in [&stream[..cut], &stream[cut..]] {
        buffer.extend_from_slice(part);
        loop {
            let before = buffer.len();
            match decode(&mut buffer) {
                Decoded::Frame(frame) => {
                    let taken = before - buffer.len();
                    assert_eq!(taken, FRAME_HEADER + frame.body.len());
                    found.push((at, frame));
                    at += taken;
                }
                Decoded::Skipped(skipped) => {
                    assert_eq!(before - buffer.len(), skipped);
                    assert!(skipped > 0, "it would be called for ever");
                    at += skipped;
                }
                Decoded::Incomplete => {
                    assert_eq!(before, buffer.len());
                    assert!(before < FRAME_HEADER + BODY_BYTES_MAX, "it would wait for ever");
                    break;
                }
            }
        }
    }
    found
}

fn seal_frames(stream: &mut [u8]) {
    for at in 0..stream.len().saturating_sub(FRAME_HEADER - 1) {
        if !stream[at..].starts_with(b"BCKF") {
            continue;
        }
        let header = &stream[at..at + FRAME_HEADER];
        let len = u32::from_le_bytes([header[16], header[17], header[18], header[19]]) as usize;
        let body = at + FRAME_HEADER;
        if let Some(bytes) = body.checked_add(len).and_then(|end| stream.get(body..end)) {
            let crc = crc32c(&[&header[..20], bytes].concat());
            stream[at + 20..body].copy_from_slice(&crc.to_le_bytes());
        }
    }
}

fn frame_seeds() -> Vec<Vec<u8>> {
    let golden = hex(include_str!("../../../proto/golden/frame-v1.hex"));
    let request = v1::ChannelRequest {
        request: Some(v1::channel_request::Request::Status(v1::VmStatusRequest::default())),
    };
    let mut frame = BytesMut::new();
    let body = request.encode_to_vec().into();
    Frame { request_id: 9, body }.encode(&mut frame).expect("it is short");
    vec![
        joined(&[&[0, 0, 0], &golden]),
        joined(&[&[1, 30, 0], &golden, &golden]),
        joined(&[&[1, 7, 0], &golden[..20], &frame, b"BCKF\x01\0\0", &golden]),
    ]
}

/// Records: what opens has the identity that it says, and what was made right opens.
pub const RECORD: Target = Target { check: record, seeds: record_seeds };

fn record(input: &[u8]) {
    let mut input = Input(input);
    let flags = input.u8();
    let mut record = if flags & 1 != 0 {
        let Ok(record) = v1::Record::decode(input.0) else { return };
        record
    } else {
        let (kind, codec, shard) = (input.u8(), input.u8(), input.u8());
        let plain_len = input.u32();
        v1::Record {
            r#ref: Some(v1::RecordRef {
                kind: kind.into(),
                id: Bytes::copy_from_slice(&[7; Hash::LEN]),
                shard: shard.into(),
            }),
            codec: codec.into(),
            plain_len,
            payload_crc32c: 0,
            payload: Bytes::copy_from_slice(input.0),
        }
    };
    let sealed = flags & 2 != 0 && seal_record(&mut record);
    let opened = open(&record);
    if sealed && check_payload(&record).is_ok_and(|key| key.shard == 0) {
        assert!(opened.is_ok(), "{opened:?}");
    }
    if let Ok((key, plain)) = opened {
        assert_eq!(Hash::of(&plain), key.id);
        assert_eq!(plain.len(), record.plain_len as usize);
        assert_eq!(Some(key.to_ref()), record.r#ref);
        assert_eq!(RecordKey::whole(key.kind, key.id), key);
    }
    let again = v1::Record::decode(&record.encode_to_vec()[..]);
    assert_eq!(again.as_ref(), Ok(&record));
}

/// Makes checksum and identity right; says whether there are bytes whose identity that is.
fn seal_record(record: &mut v1::Record) -> bool {
    record.payload_crc32c = crc32c(&record.payload);
    let len = record.plain_len as usize;
    let (Ok(codec), true) = (Codec::try_from(record.codec), len <= PLAIN_LEN_MAX) else {
        return false;
    };
    let mut plain = vec![0; len];
    let decoded = decode_into(codec, &record.payload, &mut plain).is_ok();
    if let (true, Some(wire)) = (decoded, &mut record.r#ref) {
        wire.id = Hash::of(&plain).to_bytes();
    }
    decoded
}

fn record_seeds() -> Vec<Vec<u8>> {
    let plain = b"the same sixteen".repeat(20);
    [Codec::Plain, Codec::Lz4, Codec::Zstd]
        .into_iter()
        .flat_map(|codec| {
            let payload = codec::compress(codec, &plain).unwrap_or_else(|| plain.clone());
            let fields = joined(&[&[2, 1, codec as u8, 0], &320u32.to_le_bytes(), &payload]);
            let kind = RecordKind::Chunk;
            let id = Hash::of(&plain);
            let record = blobcr_proto::record::whole(kind, id, codec, 320, payload.into());
            [fields, joined(&[&[3], &record.encode_to_vec()])]
        })
        .collect()
}

/// Codecs: what decodes does not depend on what was in the buffer, and what was compressed comes
/// back.
pub const CODEC: Target = Target { check: codec, seeds: codec_seeds };

/// Plain bytes that a compressed input is decoded to: larger ones make no other code run.
const DECODED_MAX: usize = 256 << 10;

fn codec(input: &[u8]) {
    let mut input = Input(input);
    let flags = input.u8();
    let codec = match flags % 3 {
        0 => Codec::Plain,
        1 => Codec::Lz4,
        _ => Codec::Zstd,
    };
    let len = input.u32() as usize % DECODED_MAX;
    let (mut zeros, mut ones) = (vec![0; len], vec![0xff; len]);
    let first = decode_into(codec, input.0, &mut zeros);
    assert_eq!(first, decode_into(codec, input.0, &mut ones));
    if first.is_ok() {
        assert!(zeros == ones, "bytes that nobody wrote came out");
    }
    if let Some(payload) = codec::compress(codec, input.0) {
        let mut plain = vec![0; input.0.len()];
        decode_into(codec, &payload, &mut plain).expect("it was just made");
        assert_eq!(plain, input.0);
    }
}

fn codec_seeds() -> Vec<Vec<u8>> {
    let plain: Vec<u8> = (0..600u32).flat_map(|n| (n / 7 * 31).to_le_bytes()).collect();
    let len = (plain.len() as u32).to_le_bytes();
    [(1, Codec::Lz4), (2, Codec::Zstd)]
        .into_iter()
        .filter_map(|(flag, codec)| {
            Some(joined(&[&[flag], &len, &codec::compress(codec, &plain)?]))
        })
        .chain([joined(&[&[0, 5, 0, 0, 0], b"plain"])])
        .collect()
}

/// Messages of services, and those that are in files: what was read is written the same way again.
pub const MESSAGES: Target = Target { check: messages, seeds: message_seeds };

fn again<M: Message + Default>(bytes: &[u8]) {
    let Ok(read) = M::decode(bytes) else { return };
    let written = read.encode_to_vec();
    let read_again = M::decode(&written[..]).expect("it was just written");
    assert_eq!(read_again.encode_to_vec(), written);
}

/// Checks a message by its number in the list.
macro_rules! messages {
    ($($message:ident),* $(,)?) => {
        const MESSAGE: &[fn(&[u8])] = &[$(again::<v1::$message>),*];
    };
}

messages!(
    ChannelRequest,
    ChannelReply,
    Record,
    TreeRoot,
    PlacementTable,
    PutRequest,
    GetResponse,
    TouchRequest,
    DeleteRequest,
    ListRequest,
    ListResponse,
    NodeStatus,
    Snapshot,
    Pin,
    Pool,
    Node,
    Lease,
    CheckpointSet,
    CreateImageRequest,
    CloneImageResponse,
    BeginSnapshotRequest,
    PublishSnapshotRequest,
    FailSnapshotRequest,
    ListSnapshotsResponse,
    PinSnapshotRequest,
    ListPinsResponse,
    ListRootsResponse,
    AcquireLeaseRequest,
    CreatePoolRequest,
    RegisterNodeRequest,
    SettlePartitionsRequest,
    ReportDebtRequest,
    Debt,
    AddToSetRequest,
    Description,
    Disk,
    AttachDiskRequest,
    CheckpointDisksRequest,
    CheckpointDisksResponse,
    CheckpointReply,
    WaitStableRequest,
    WaitStableReply,
    VmStatusReply,
    AddVmRequest,
    GetPlacementRequest,
    SettleDebtsRequest,
    LeadStewardRequest,
    Steward,
    CheckRequest,
    CheckResponse,
    BeginSetRequest,
    PinSetRequest,
    KeepSetsRequest,
    RetireSetsRequest,
    RetireSetsResponse,
    ListGroupsResponse,
);

fn messages(input: &[u8]) {
    let mut input = Input(input);
    let number = usize::from(input.u8()) % MESSAGE.len();
    MESSAGE[number](input.0);
    if let Ok(wire) = v1::RecordRef::decode(input.0)
        && let Ok(key) = RecordKey::try_from(&wire)
    {
        assert_eq!(key.to_ref(), wire);
    }
}

fn message_seeds() -> Vec<Vec<u8>> {
    let snapshot = v1::Snapshot {
        image: "base".into(),
        number: 3,
        root: Some(v1::TreeRoot {
            size_bytes: 1 << 30,
            chunk_size: 1 << 18,
            fan_out: 256,
            node: Bytes::from_static(&[7; 32]),
        }),
        ..v1::Snapshot::default()
    };
    let reply = v1::WaitStableReply { snapshots: vec![snapshot] };
    let reply = v1::ChannelReply { reply: Some(v1::channel_reply::Reply::WaitStable(reply)) };
    (0..MESSAGE.len() as u8).map(|n| joined(&[&[n], &reply.encode_to_vec()])).collect()
}

/// Names and other texts: what is accepted reads back from how it is shown, and a name is fit to be
/// a file's.
pub const NAMES: Target = Target { check: names, seeds: name_seeds };

fn names(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    macro_rules! reads_back {
        ($($kind:ident),*) => {$(
            if let Ok(read) = text.parse::<$kind>() {
                assert_eq!(read.to_string().parse::<$kind>().as_ref(), Ok(&read));
            }
        )*};
    }
    reads_back!(ImageName, DiskName, VmName, PoolName, GroupName, RepositoryName, ImageSpec);
    reads_back!(Policy, Compression);
    if let Ok(name) = text.parse::<ImageName>() {
        let name = name.as_str();
        assert_eq!(name, text);
        assert!(name.len() <= NAME_BYTES_MAX && !name.starts_with(['.', '-']));
        assert!(!name.contains(['/', '\0', '@', ' ', '\n']));
    }
    if let Ok(policy) = text.parse::<Policy>() {
        assert_eq!(policy.to_string(), text);
        assert!((1..=policy.nodes()).contains(&policy.write_least()));
        assert!(policy.of_tree_nodes().nodes() <= policy.nodes());
    }
    if let Ok(size) = text.parse().map(ChunkSize::new).unwrap_or(ChunkSize::new(0)) {
        assert_eq!(ChunkSize::new(size.bytes()), Ok(size));
    }
}

fn name_seeds() -> Vec<Vec<u8>> {
    ["base", "base@7", "replica:3", "ec:16+8", "adaptive", "262144", "a.b_c-d+e"]
        .map(|text| text.as_bytes().to_vec())
        .to_vec()
}
