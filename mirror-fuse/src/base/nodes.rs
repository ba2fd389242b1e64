//! The tree nodes that this host has read, kept over restarts: what is cached of an image can be
//! served while the repository is away.
//!
//! Two files of the same form, `young` and `old`. Nodes are appended to `young`; when it is full it
//! takes the place of `old`, so a node that was not read for a whole filling is forgotten.
//!
//! ```text
//! offset  bytes  file
//!      0      4  magic "BCTN"
//!      4      4  version, 1
//!      8      …  records
//!
//! offset  bytes  record
//!      0     32  identity of the node
//!     32      4  length of its encoding
//!     36      4  CRC-32C of the record with zeros in this field
//!     40      …  encoding
//! ```
//!
//! Numbers are little endian. Nothing is synced: a record that does not check ends the file, and a
//! node is compared with its identity when it is read. So nothing here can make a wrong tree.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use blobcr_proto::Hash;
use blobcr_proto::codec::crc32c;
use blobcr_repository::tree::NodeSource;
use blobcr_repository::{CatalogError, Repository, StoreError};
use bytes::Bytes;

const MAGIC: [u8; 4] = *b"BCTN";
const VERSION: u32 = 1;
const FILE_HEADER: u64 = 8;
const RECORD_HEADER: usize = 40;
const CRC_AT: usize = 36;
/// A full node of the largest fan-out has 33 KB.
const NODE_BYTES_MAX: usize = 64 << 10;
/// Bytes of one file. The whole tree of a terabyte of 256 KiB chunks has 130 MB, so that the trees
/// of a host's images all fit; the index of a full file takes about 10 MB of memory.
const FILE_BYTES_MAX: u64 = 256 << 20;

#[derive(Clone, Copy, Debug)]
struct Place {
    old: bool,
    at: u64,
    len: u32,
}

#[derive(Debug)]
struct State {
    young: File,
    young_len: u64,
    old: Option<File>,
    index: HashMap<Hash, Place>,
}

#[derive(Debug)]
struct Log {
    dir: PathBuf,
    bytes_max: u64,
    state: Mutex<State>,
}

/// Tree nodes, from this host where it has them.
#[derive(Clone, Debug)]
pub(super) struct LocalNodes(Arc<Log>);

fn file_header() -> [u8; FILE_HEADER as usize] {
    let mut header = [0; FILE_HEADER as usize];
    header[..4].copy_from_slice(&MAGIC);
    header[4..].copy_from_slice(&VERSION.to_le_bytes());
    header
}

fn encode(id: &Hash, node: &[u8]) -> Vec<u8> {
    let mut record = Vec::with_capacity(RECORD_HEADER + node.len());
    record.extend_from_slice(&id.0);
    record.extend_from_slice(&(node.len() as u32).to_le_bytes());
    record.extend_from_slice(&[0; 4]);
    record.extend_from_slice(node);
    let crc = record_crc(&record);
    record[CRC_AT..RECORD_HEADER].copy_from_slice(&crc.to_le_bytes());
    record
}

/// Of a whole record, whatever its CRC field holds.
fn record_crc(record: &[u8]) -> u32 {
    let mut bytes = record.to_vec();
    bytes[CRC_AT..RECORD_HEADER].fill(0);
    crc32c(&bytes)
}

/// Reads the records of a file up to the first that does not check. Returns how long the good part
/// is; 0 when not even the header is ours.
fn scan(file: &File, mut found: impl FnMut(Hash, u64, u32)) -> io::Result<u64> {
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut &*file, &mut bytes)?;
    if !bytes.starts_with(&file_header()) {
        return Ok(0);
    }
    let mut at = FILE_HEADER as usize;
    while let Some(header) = bytes.get(at..at + RECORD_HEADER) {
        let id = Hash::from_slice(&header[..Hash::LEN]).expect("a slice of 32 bytes");
        let number = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let (len, crc) = (number(Hash::LEN), number(CRC_AT));
        let end = at + RECORD_HEADER + len as usize;
        let Some(record) = bytes.get(at..end) else { break };
        if len as usize > NODE_BYTES_MAX || record_crc(record) != crc {
            break;
        }
        found(id, (at + RECORD_HEADER) as u64, len);
        at = end;
    }
    Ok(at as u64)
}

fn open_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
}

impl LocalNodes {
    /// Opens the nodes kept in `dir`, which is made if it is not there.
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        Self::open_bounded(dir, FILE_BYTES_MAX)
    }

    fn open_bounded(dir: &Path, bytes_max: u64) -> io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let mut index = HashMap::new();
        let old = open_file(&dir.join("nodes.old"))?;
        scan(&old, |id, at, len| {
            index.insert(id, Place { old: true, at, len });
        })?;
        let young = open_file(&dir.join("nodes.young"))?;
        let mut young_len = scan(&young, |id, at, len| {
            index.insert(id, Place { old: false, at, len });
        })?;
        young.set_len(young_len)?;
        if young_len == 0 {
            young.write_all_at(&file_header(), 0)?;
            young_len = FILE_HEADER;
        }
        let state = Mutex::new(State { young, young_len, old: Some(old), index });
        Ok(Self(Arc::new(Log { dir: dir.to_owned(), bytes_max, state })))
    }

    /// The nodes of a pool: from here, or else from the pool, and then from here the next time.
    pub(super) fn of_pool(&self, pool: u32, repository: Repository) -> PoolNodes {
        PoolNodes { local: self.clone(), pool, repository }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic half way leaves at worst an index entry for bytes that then do not check.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those of `ids` that are here, in order. Blocks on the disk.
    pub(super) fn get(&self, ids: &[Hash]) -> Vec<Option<Bytes>> {
        let mut state = self.state();
        let mut touched = Vec::new();
        let found = ids
            .iter()
            .map(|id| {
                let place = *state.index.get(id)?;
                let node = state.read(place).filter(|node| Hash::of(node) == *id);
                match &node {
                    None => drop(state.index.remove(id)),
                    Some(node) if place.old => touched.push((*id, node.clone())),
                    Some(_) => {}
                }
                node
            })
            .collect();
        drop(state);
        self.put(&touched);
        found
    }

    /// Keeps nodes whose identity was checked. Blocks on the disk; without space they are not kept.
    fn put(&self, nodes: &[(Hash, Bytes)]) {
        let mut state = self.state();
        for (id, node) in nodes {
            let known = state.index.get(id).is_some_and(|place| !place.old);
            if known || node.len() > NODE_BYTES_MAX {
                continue;
            }
            if let Err(error) = self.append(&mut state, id, node) {
                tracing::debug!(%error, "tree nodes are not kept locally");
                return;
            }
        }
    }

    fn append(&self, state: &mut State, id: &Hash, node: &[u8]) -> io::Result<()> {
        let record = encode(id, node);
        if state.young_len + record.len() as u64 > self.0.bytes_max {
            self.rotate(state)?;
        }
        let at = state.young_len;
        state.young.write_all_at(&record, at)?;
        state.young_len += record.len() as u64;
        let place = Place { old: false, at: at + RECORD_HEADER as u64, len: node.len() as u32 };
        state.index.insert(*id, place);
        Ok(())
    }

    fn rotate(&self, state: &mut State) -> io::Result<()> {
        let (young, old) = (self.0.dir.join("nodes.young"), self.0.dir.join("nodes.old"));
        std::fs::rename(&young, &old)?;
        let fresh = open_file(&young)?;
        fresh.write_all_at(&file_header(), 0)?;
        state.old = Some(std::mem::replace(&mut state.young, fresh));
        state.young_len = FILE_HEADER;
        state.index.retain(|_, place| !std::mem::replace(&mut place.old, true));
        Ok(())
    }
}

impl State {
    fn read(&self, place: Place) -> Option<Bytes> {
        let file = if place.old { self.old.as_ref()? } else { &self.young };
        let mut node = vec![0; place.len as usize];
        file.read_exact_at(&mut node, place.at).ok()?;
        Some(node.into())
    }
}

/// See [`LocalNodes::of_pool`].
#[derive(Debug)]
pub(super) struct PoolNodes {
    local: LocalNodes,
    pool: u32,
    repository: Repository,
}

impl PoolNodes {
    async fn fetch(&self, ids: &[Hash]) -> Result<Vec<Bytes>, StoreError> {
        let source = self.repository.nodes(self.pool).await.map_err(|error| match error {
            CatalogError::Timeout(text) => StoreError::Unavailable(text),
            error if error.is_transient() => StoreError::Unavailable(error.to_string()),
            error => StoreError::Refused {
                node: "metadata service".to_owned(),
                detail: error.to_string(),
            },
        })?;
        source.nodes(ids).await
    }
}

#[async_trait]
impl NodeSource for PoolNodes {
    async fn nodes(&self, ids: &[Hash]) -> Result<Vec<Bytes>, StoreError> {
        let (local, asked) = (self.local.clone(), ids.to_vec());
        let mut nodes = tokio::task::spawn_blocking(move || local.get(&asked))
            .await
            .unwrap_or_else(|_| vec![None; ids.len()]);
        let missing: Vec<Hash> =
            ids.iter().zip(&nodes).filter(|(_, node)| node.is_none()).map(|(id, _)| *id).collect();
        if !missing.is_empty() {
            let fetched = self.fetch(&missing).await?;
            let mut arrived: Vec<(Hash, Bytes)> = missing.into_iter().zip(fetched).collect();
            let gaps = nodes.iter_mut().filter(|node| node.is_none());
            for (gap, (_, node)) in gaps.zip(&arrived) {
                *gap = Some(node.clone());
            }
            // A node that a faulty source gave a wrong name must not be kept under it.
            arrived.retain(|(id, node)| Hash::of(node) == *id);
            let local = self.local.clone();
            let kept = tokio::task::spawn_blocking(move || local.put(&arrived)).await;
            if let Err(error) = kept {
                tracing::warn!(%error, "keeping tree nodes locally failed");
            }
        }
        Ok(nodes.into_iter().flatten().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(n: u64) -> (Hash, Bytes) {
        let bytes = Bytes::from(n.to_le_bytes().repeat(100));
        (Hash::of(&bytes), bytes)
    }

    #[test]
    fn the_format_of_version_1_does_not_change() {
        let id = Hash(std::array::from_fn(|i| i as u8));
        let mut file = file_header().to_vec();
        file.extend(encode(&id, b"sixteen bytes!!!"));
        let hex: String = file.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, include_str!("../../golden/nodes-v1.hex").trim());
    }

    #[test]
    fn nodes_survive_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let nodes: Vec<_> = (0..50).map(node).collect();
        LocalNodes::open(dir.path()).unwrap().put(&nodes);
        let ids: Vec<_> = (0..51).map(|n| node(n).0).collect();
        let local = LocalNodes::open(dir.path()).unwrap();
        let found = local.get(&ids);
        assert!(found.iter().zip(&nodes).all(|(found, (_, node))| found.as_ref() == Some(node)));
        assert_eq!(found[50], None);
    }

    #[test]
    fn what_is_read_stays_and_the_rest_goes_when_the_files_are_full() {
        let dir = tempfile::tempdir().unwrap();
        let local = LocalNodes::open_bounded(dir.path(), 10_000).unwrap();
        let (hot, bytes) = node(0);
        local.put(&[(hot, bytes.clone())]);
        for n in 1..200 {
            local.put(&[node(n)]);
            assert_eq!(local.get(&[hot]), [Some(bytes.clone())], "after {n} others");
        }
        assert_eq!(local.get(&[node(1).0]), [None]);
        for name in ["nodes.young", "nodes.old"] {
            assert!(std::fs::metadata(dir.path().join(name)).unwrap().len() <= 10_000);
        }
        let again = LocalNodes::open_bounded(dir.path(), 10_000).unwrap();
        assert_eq!(again.get(&[hot]), [Some(bytes)]);
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig { cases: 64, ..Default::default() })]
        #[test]
        fn a_damaged_file_never_gives_a_wrong_node(at in 0usize..9000, bit in 0u8..8, cut: bool) {
            let dir = tempfile::tempdir().unwrap();
            let nodes: Vec<_> = (0..10).map(node).collect();
            LocalNodes::open(dir.path()).unwrap().put(&nodes);
            let path = dir.path().join("nodes.young");
            let mut bytes = std::fs::read(&path).unwrap();
            let at = at % bytes.len();
            if cut {
                bytes.truncate(at);
            } else {
                bytes[at] ^= 1 << bit;
            }
            std::fs::write(&path, &bytes).unwrap();
            let local = LocalNodes::open(dir.path()).unwrap();
            let ids: Vec<_> = nodes.iter().map(|(id, _)| *id).collect();
            for (found, (_, node)) in local.get(&ids).iter().zip(&nodes) {
                proptest::prop_assert!(found.is_none() || found.as_ref() == Some(node));
            }
            // And it can be written to again.
            local.put(&nodes);
            drop(local);
            let local = LocalNodes::open(dir.path()).unwrap();
            proptest::prop_assert!(local.get(&ids).iter().all(Option::is_some));
        }
    }
}
