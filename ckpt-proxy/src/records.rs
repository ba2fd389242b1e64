//! `DIR/VM.json`: which VMs this host has and which disks each of them has.
//!
//! ```json
//! {"magic":"blobcr-vm","version":3,"crc32c":"0f0f0f0f",
//!  "vm":{"name":"web","disks":["web0"],"groups":["job"],"token":"0f…","vsock_cid":42}}
//! ```
//! `token` is the BLAKE3 of the VM's token, or empty. A record without a CID is of version 2, which
//! had none, so that older programs read it. Version 1 had neither groups nor token. The CRC is of `vm` as compact JSON with its fields in this order. A record is replaced as a
//! whole (written beside, synced, renamed, directory synced), so it is there or not.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use blobcr_proto::name::GroupName;
use blobcr_proto::{DiskName, Hash, VmName};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::ProxyError;
use crate::limits::{DISKS_PER_VM_MAX, GROUPS_PER_VM_MAX};
use crate::vsock::Cid;

const MAGIC: &str = "blobcr-vm";
/// The newest version.
const VERSION: u32 = 3;
const VERSION_WITHOUT_CID: u32 = 2;
/// A record with the most disks and the longest names takes 9 KiB.
const RECORD_BYTES_MAX: u64 = 64 << 10;

/// A VM as it is recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VmRecord {
    pub(crate) name: VmName,
    pub(crate) disks: Vec<DiskName>,
    /// The groups of whose sets it may be a member.
    pub(crate) groups: Vec<GroupName>,
    /// What is kept of its token, if it has one.
    pub(crate) token: Option<Hash>,
    /// By which it is known over vsock, if it is.
    pub(crate) cid: Option<Cid>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope<B> {
    magic: String,
    version: u32,
    crc32c: String,
    vm: B,
}

/// Read before the rest, because a later version may have other fields.
#[derive(Deserialize)]
struct Preamble {
    magic: String,
    version: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    name: String,
    disks: Vec<String>,
    groups: Vec<String>,
    token: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    vsock_cid: Option<u32>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BodyV1 {
    name: String,
    disks: Vec<String>,
}

/// Why a record cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error("it is longer than {RECORD_BYTES_MAX} bytes")]
    TooLong,
    #[error("it is no record of a VM: {0}")]
    Malformed(String),
    #[error("it is of version {0}, and this program knows version {VERSION}")]
    Version(u32),
    #[error("its checksum is {found}, and its contents have {expected}")]
    Checksum { found: String, expected: String },
}

fn checksum(body: &impl Serialize) -> String {
    let text = serde_json::to_vec(body).expect("strings always have a JSON form");
    let crc = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, &text) as u32;
    format!("{crc:08x}")
}

/// The bytes of a record.
pub(crate) fn encode(record: &VmRecord) -> Vec<u8> {
    let vm = Body {
        name: record.name.to_string(),
        disks: record.disks.iter().map(ToString::to_string).collect(),
        groups: record.groups.iter().map(ToString::to_string).collect(),
        token: record.token.map(|hash| hash.to_string()).unwrap_or_default(),
        vsock_cid: record.cid.map(Cid::get),
    };
    let version = if vm.vsock_cid.is_some() { VERSION } else { VERSION_WITHOUT_CID };
    let envelope = Envelope { magic: MAGIC.to_owned(), version, crc32c: checksum(&vm), vm };
    let mut text = serde_json::to_vec(&envelope).expect("strings always have a JSON form");
    text.push(b'\n');
    text
}

/// Reads a record's bytes, of which nothing is believed.
pub(crate) fn decode(bytes: &[u8]) -> Result<VmRecord, RecordError> {
    let malformed = |e: serde_json::Error| RecordError::Malformed(e.to_string());
    let preamble: Preamble = serde_json::from_slice(bytes).map_err(malformed)?;
    if preamble.magic != MAGIC {
        return Err(RecordError::Malformed(format!("its magic is {:?}", preamble.magic)));
    }
    let vm = match preamble.version {
        1 => {
            let BodyV1 { name, disks } = checked(bytes)?;
            Body { name, disks, groups: Vec::new(), token: String::new(), vsock_cid: None }
        }
        VERSION_WITHOUT_CID | VERSION => checked(bytes)?,
        version => return Err(RecordError::Version(version)),
    };
    let bad = |e: blobcr_proto::name::NameError| RecordError::Malformed(e.to_string());
    let disks =
        vm.disks.into_iter().map(DiskName::new).collect::<Result<Vec<_>, _>>().map_err(bad)?;
    if disks.is_empty() || disks.len() > DISKS_PER_VM_MAX {
        return Err(RecordError::Malformed(format!("it names {} disks", disks.len())));
    }
    let groups =
        vm.groups.into_iter().map(GroupName::new).collect::<Result<Vec<_>, _>>().map_err(bad)?;
    if groups.len() > GROUPS_PER_VM_MAX {
        return Err(RecordError::Malformed(format!("it names {} groups", groups.len())));
    }
    let token = match vm.token.as_str() {
        "" => None,
        text => Some(text.parse().map_err(|_| {
            RecordError::Malformed("what is kept of its token is no hash".to_owned())
        })?),
    };
    let reserved = |cid| RecordError::Malformed(format!("no VM has its CID, {cid}"));
    let cid = vm.vsock_cid.map(|cid| Cid::new(cid).ok_or_else(|| reserved(cid))).transpose()?;
    Ok(VmRecord { name: VmName::new(vm.name).map_err(bad)?, disks, groups, token, cid })
}

/// What an envelope holds, when its checksum is that of it.
fn checked<B: Serialize + DeserializeOwned>(bytes: &[u8]) -> Result<B, RecordError> {
    let envelope: Envelope<B> =
        serde_json::from_slice(bytes).map_err(|e| RecordError::Malformed(e.to_string()))?;
    let (found, expected) = (envelope.crc32c, checksum(&envelope.vm));
    if found == expected { Ok(envelope.vm) } else { Err(RecordError::Checksum { found, expected }) }
}

/// A record's file, and the record or why it cannot be used.
pub(crate) type Loaded = (PathBuf, Result<VmRecord, RecordError>);

/// Where the record of a VM is.
pub(crate) fn path(dir: &Path, name: &VmName) -> PathBuf {
    dir.join(format!("{name}.json"))
}

/// Writes a record so that it is there as a whole, and still after a crash, once this returns.
pub(crate) fn save(dir: &Path, record: &VmRecord) -> Result<(), ProxyError> {
    let target = path(dir, &record.name);
    let beside = dir.join(".record.new");
    let fail = |what, path: &Path| {
        let path = path.to_owned();
        move |source| ProxyError::Io { what, path, source }
    };
    let mut file = File::create(&beside).map_err(fail("create", &beside))?;
    file.write_all(&encode(record)).map_err(fail("write", &beside))?;
    file.sync_all().map_err(fail("sync", &beside))?;
    fs::rename(&beside, &target).map_err(fail("replace", &target))?;
    sync_dir(dir)
}

/// Removes a record; that it is not there is no error.
pub(crate) fn remove(dir: &Path, name: &VmName) -> Result<(), ProxyError> {
    let path = path(dir, name);
    match fs::remove_file(&path) {
        Ok(()) => sync_dir(dir),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(ProxyError::Io { what: "remove", path, source }),
    }
}

fn sync_dir(dir: &Path) -> Result<(), ProxyError> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(|source| ProxyError::Io {
        what: "sync",
        path: dir.to_owned(),
        source,
    })
}

fn load(path: &Path) -> Result<VmRecord, RecordError> {
    let mut bytes = Vec::new();
    File::open(path)?.take(RECORD_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > RECORD_BYTES_MAX {
        return Err(RecordError::TooLong);
    }
    let record = decode(&bytes)?;
    if path.file_stem().is_none_or(|stem| stem != record.name.as_str()) {
        return Err(RecordError::Malformed(format!("it is the record of the VM {}", record.name)));
    }
    Ok(record)
}

/// Every record of the directory, in order of name; one that cannot be used comes with its reason.
pub(crate) fn load_all(dir: &Path) -> Result<Vec<Loaded>, ProxyError> {
    let fail = |source| ProxyError::Io { what: "list", path: dir.to_owned(), source };
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        if path.extension().is_some_and(|e| e == "json") {
            let record = load(&path);
            found.push((path, record));
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> VmRecord {
        VmRecord {
            name: VmName::new("web").unwrap(),
            disks: vec![DiskName::new("web0").unwrap(), DiskName::new("data.1").unwrap()],
            groups: vec![GroupName::new("job").unwrap(), GroupName::new("all").unwrap()],
            token: Some(Hash::of(b"secret")),
            cid: None,
        }
    }

    fn with_cid() -> VmRecord {
        VmRecord { cid: Cid::new(42), ..sample() }
    }

    #[test]
    fn golden_record_of_version_1_is_still_read() {
        let golden = include_str!("../golden/vm-v1.json");
        let plain = VmRecord { groups: Vec::new(), token: None, ..sample() };
        assert_eq!(decode(golden.as_bytes()).unwrap(), plain);
        assert_eq!(decode(&encode(&plain)).unwrap(), plain);
    }

    #[test]
    fn golden_record_of_version_2() {
        let golden = include_str!("../golden/vm-v2.json");
        assert_eq!(String::from_utf8(encode(&sample())).unwrap(), golden);
        assert_eq!(decode(golden.as_bytes()).unwrap(), sample());
    }

    #[test]
    fn golden_record_of_version_3() {
        let golden = include_str!("../golden/vm-v3.json");
        assert_eq!(String::from_utf8(encode(&with_cid())).unwrap(), golden);
        assert_eq!(decode(golden.as_bytes()).unwrap(), with_cid());
    }

    #[test]
    fn every_flipped_bit_is_found_or_harmless() {
        for sample in [sample(), with_cid()] {
            let good = encode(&sample);
            for at in 0..good.len() {
                for bit in 0..8 {
                    let mut bad = good.clone();
                    bad[at] ^= 1 << bit;
                    if let Ok(record) = decode(&bad) {
                        assert_eq!(record, sample, "byte {at} bit {bit}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_reserved_cid_is_refused() {
        for reserved in [0, 1, 2, u32::MAX] {
            let (name, token) = ("web".to_owned(), String::new());
            let (disks, groups) = (vec!["web0".to_owned()], Vec::new());
            let vm = Body { name, disks, groups, token, vsock_cid: Some(reserved) };
            let crc32c = checksum(&vm);
            let bad = Envelope { magic: MAGIC.to_owned(), version: VERSION, crc32c, vm };
            let found = decode(&serde_json::to_vec(&bad).unwrap());
            assert!(matches!(found, Err(RecordError::Malformed(_))), "{reserved}: {found:?}");
        }
    }

    #[test]
    fn another_version_is_named_before_anything_else_is_read() {
        let later = br#"{"magic":"blobcr-vm","version":4,"anything":[]}"#;
        assert!(matches!(decode(later), Err(RecordError::Version(4))));
        assert!(matches!(
            decode(b"{\"magic\":\"x\",\"version\":1}"),
            Err(RecordError::Malformed(_))
        ));
        assert!(matches!(decode(b""), Err(RecordError::Malformed(_))));
    }

    #[test]
    fn records_survive_and_damaged_ones_are_told() {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), &sample()).unwrap();
        fs::write(dir.path().join("bad.json"), b"{").unwrap();
        fs::write(dir.path().join("copy.json"), encode(&sample())).unwrap();
        fs::write(dir.path().join("long.json"), vec![b' '; (64 << 10) + 1]).unwrap();
        let found = load_all(dir.path()).unwrap();
        assert_eq!(found.len(), 4);
        assert!(matches!(found[0].1, Err(RecordError::Malformed(_))));
        assert!(matches!(found[1].1, Err(RecordError::Malformed(_))), "another VM's record");
        assert!(matches!(found[2].1, Err(RecordError::TooLong)));
        assert_eq!(*found[3].1.as_ref().unwrap(), sample());
        remove(dir.path(), &sample().name).unwrap();
        remove(dir.path(), &sample().name).unwrap();
        assert_eq!(load_all(dir.path()).unwrap().len(), 3);
    }

    proptest::proptest! {
        #[test]
        fn rubbish_never_panics(bytes in proptest::collection::vec(0u8..=255, 0..300)) {
            proptest::prop_assert!(decode(&bytes).is_err());
        }
    }
}
