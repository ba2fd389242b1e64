//! What `ckpt-proxy`, `cli` and `guest` decode.

use blobcr_ckpt_proxy::fuzzing::vm_record;
use blobcr_cli::args::MetadataStore;
use blobcr_cli::endpoint;
use blobcr_cli::fuzzing::{qcow2, read_cluster, write_cluster};
use blobcr_cli::size::{human_size, parse_size};
use blobcr_guest::worker::{Options, Worker};
use blobcr_proto::Hash;
use blobcr_proto::codec::crc32c;

use crate::input::Input;
use crate::{Target, joined, scratch};

/// The record of a VM at a proxy.
pub const VM_RECORD: Target = Target { check: vm, seeds: vm_seeds };

fn vm(input: &[u8]) {
    let mut input = Input(input);
    let flags = input.u8();
    let bytes = if flags & 1 != 0 {
        let crc = format!("{:08x}", crc32c(input.0));
        let head = format!(r#"{{"magic":"blobcr-vm","version":1,"crc32c":"{crc}","vm":"#);
        joined(&[head.as_bytes(), input.0, b"}"])
    } else {
        input.0.to_vec()
    };
    let Some(written) = vm_record(&bytes) else { return };
    assert_eq!(vm_record(&written), Some(written));
}

fn vm_seeds() -> Vec<Vec<u8>> {
    let golden = include_bytes!("../../../ckpt-proxy/golden/vm-v1.json");
    let newest = include_bytes!("../../../ckpt-proxy/golden/vm-v3.json");
    vec![
        joined(&[&[0], golden]),
        joined(&[&[0], newest]),
        joined(&[&[1], br#"{"name":"web","disks":["web0","data.1"]}"#]),
    ]
}

/// The file that tells a node's repository, and that of a `blobcr up`.
pub const CLUSTER: Target = Target { check: cluster, seeds: cluster_seeds };

fn cluster(input: &[u8]) {
    let mut input = Input(input);
    let flags = input.u8();
    let mut line = input.0.to_vec();
    if flags & 1 != 0 {
        line.extend(format!(" {:08x}\n", crc32c(&line)).bytes());
    }
    let dir = scratch("cluster");
    let path = dir.join("cluster");
    std::fs::write(&path, &line).expect("the scratch directory can be written");
    if let Some(id) = read_cluster(&dir) {
        assert!(write_cluster(&dir, &id));
        assert_eq!(std::fs::read(&path).expect("it was just written"), line);
    }
    std::fs::write(dir.join("endpoint"), input.0).expect("the scratch directory can be written");
    if let Ok(address) = endpoint::resolve(dir.to_str()) {
        assert_eq!(endpoint::checked_address(&address).ok().as_ref(), Some(&address));
        assert!(!address.contains(['\n', '/', ' ']));
    }
}

fn cluster_seeds() -> Vec<Vec<u8>> {
    vec![
        joined(&[&[0], include_bytes!("../../../cli/golden/cluster-v1")]),
        joined(&[&[1], b"blobcr-cluster 1 0123456789abcdef0123456789abcdef"]),
        joined(&[&[0], b"127.0.0.1:7000\n"]),
        joined(&[&[0], b"[::1]:7000\n"]),
    ]
}

/// The header of a qcow2 file: one that names other files is never let through.
pub const QCOW2: Target = Target { check: header, seeds: header_seeds };

fn header(input: &[u8]) {
    let Some(size) = qcow2(input) else { return };
    let u64_at = |at: usize| u64::from_be_bytes(std::array::from_fn(|n| input[at + n]));
    assert_eq!(size, u64_at(24));
    assert_eq!(u64_at(8), 0, "a backing file");
    assert_eq!(input[32..36], [0; 4], "encrypted");
    assert!(input[7] == 2 || input[79] & 4 == 0, "a file of data");
}

fn header_seeds() -> Vec<Vec<u8>> {
    let of = |version: u8, len: usize| {
        let mut bytes = vec![0; len];
        bytes[..8].copy_from_slice(&[b'Q', b'F', b'I', 0xfb, 0, 0, 0, version]);
        bytes[24..32].copy_from_slice(&(10u64 << 30).to_be_bytes());
        bytes
    };
    vec![of(2, 72), of(3, 104)]
}

/// What an operator writes: sizes, addresses, stores.
pub const TEXTS: Target = Target { check: texts, seeds: text_seeds };

fn texts(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Ok(bytes) = parse_size(text) {
        assert_eq!(parse_size(&bytes.to_string()), Ok(bytes));
        assert!(!human_size(bytes).is_empty());
    }
    if let Ok(address) = endpoint::checked_address(text) {
        assert_eq!(address, text);
    }
    if let Ok(MetadataStore::Etcd(target)) = text.parse() {
        let shown = target.to_string();
        assert_eq!(shown.parse(), Ok(MetadataStore::Etcd(target)));
        assert!(!shown.contains(['\n', ' ']), "it is written into a line of words");
    }
}

fn text_seeds() -> Vec<Vec<u8>> {
    ["10G", "2TiB", "4096", "127.0.0.1:7000", "etcd:http://a:2379,b:1,http://[::1]:2/#prod"]
        .map(|text| text.as_bytes().to_vec())
        .to_vec()
}

/// The state of the demo's program.
pub const WORKER: Target = Target { check: worker, seeds: worker_seeds };

/// Steps that are done again to compare: the checksum is there for damage, not for an enemy.
const STEPS_MAX: u64 = 64;

fn worker(input: &[u8]) {
    let mut input = Input(input);
    let flags = input.u8();
    let mut state = input.counted().to_vec();
    let step = || std::str::from_utf8(&state).ok()?.split(' ').nth(2)?.parse::<u64>().ok();
    if step().is_some_and(|step| step > STEPS_MAX) {
        return;
    }
    if flags & 1 != 0 {
        state.extend(format!(" {:016x}\n", Hash::of(&state).prefix()).bytes());
    }
    let dir = scratch("worker");
    let write = |name: &str, bytes: &[u8]| {
        std::fs::write(dir.join(name), bytes).expect("the scratch directory can be written");
    };
    write("state", &state);
    write("log", input.0);
    let open = || Worker::open(Options { dir: dir.clone(), file_bytes: 16, keep: 1 });
    let Ok((mut worker, found)) = open() else { return };
    assert_eq!(found.step, worker.state().step);
    let next = worker.step().expect("a file system in memory does not fail");
    let (worker, _) = open().expect("it was just written");
    assert_eq!(worker.state(), next);
}

fn worker_seeds() -> Vec<Vec<u8>> {
    let golden = include_bytes!("../../../guest/golden/worker-state-v1.txt");
    let unsealed = &golden[..golden.len() - 18];
    vec![
        joined(&[&[0], &crate::input::counted(golden), b"1 x\n"]),
        joined(&[&[1], &crate::input::counted(unsealed)]),
    ]
}
