//! Fuzzers for every decoder of disk and wire formats. `./do fuzz` in the root runs them.
//!
//! | module | decoders |
//! |---|---|
//! | [`wire`] | frames of a channel, records and their codecs, messages, names and other texts |
//! | [`tree`] | tree nodes, trees of hostile nodes, shards, placement tables |
//! | [`store`] | the files of a repository node, up to the recovery of a whole store |
//! | [`metadata`] | records, and the files of a metadata directory |
//! | [`mirror`] | the files of a disk, up to its opening; journal, cache, kept nodes; ioctls |
//! | [`parts`] | VM records, cluster and endpoint files, qcow2 headers, the worker's state, texts |
//!
//! A target is a property of a decoder beside *it takes any bytes*, and the seeds that it begins
//! with: mostly the golden files. Where a checksum would stop every mutated input, the property
//! first makes the checksums right ("seals" them) when a byte of the input says so.

pub mod input;
pub mod metadata;
pub mod mirror;
pub mod parts;
pub mod store;
pub mod tree;
pub mod wire;

use std::path::{Path, PathBuf};

/// A decoder with its property.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Panics when the property does not hold for these bytes.
    pub check: fn(&[u8]),
    /// What to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// Where a target leaves its seeds before it begins: a directory that exists.
const SEEDS_DIR: &str = "BLOBCR_FUZZ_SEEDS";

impl Target {
    /// Writes the seeds to where the environment says, once per process.
    pub fn write_seeds(&self) {
        let Some(dir) = std::env::var_os(SEEDS_DIR) else { return };
        for (n, seed) in (self.seeds)().iter().enumerate() {
            let path = Path::new(&dir).join(format!("seed-{n:02}"));
            std::fs::write(path, seed).expect("the directory of the seeds can be written");
        }
    }
}

/// The main program of a target.
#[macro_export]
macro_rules! target {
    ($target:expr) => {
        libfuzzer_sys::fuzz_target!(init: $target.write_seeds(), |input: &[u8]| {
            ($target.check)(input);
        });
    };
}

/// The bytes of a golden file in hex.
pub(crate) fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.trim().bytes().collect();
    let pairs = digits.chunks(2).map(|pair| std::str::from_utf8(pair).expect("ASCII"));
    pairs.map(|pair| u8::from_str_radix(pair, 16).expect("a golden file is hex")).collect()
}

/// Runs what is asynchronous for the sake of a network that is not here.
pub(crate) fn block_on<T>(work: impl Future<Output = T>) -> T {
    thread_local! {
        static RUNTIME: tokio::runtime::Runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a clock needs nothing of the system");
    }
    RUNTIME.with(|runtime| runtime.block_on(work))
}

/// An empty directory of this process, made anew each time. `TMPDIR` says where: best in memory.
pub(crate) fn scratch(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("blobcr-fuzz-{}-{name}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).expect("the temporary directory can be written");
    dir
}

/// A seed of several parts.
pub(crate) fn joined(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

/// Every target, by the name of its file in `fuzz_targets`.
pub const TARGETS: &[(&str, Target)] = &[
    ("store_recovery", store::RECOVERY),
    ("disk_journal", mirror::JOURNAL),
    ("tree_node", tree::NODE),
    ("codec", wire::CODEC),
    ("frame", wire::FRAME),
    ("record", wire::RECORD),
    ("disk_open", mirror::DISK),
    ("store_listing", store::LISTING),
    ("shards", tree::SHARDS),
    ("tree_walk", tree::WALK),
    ("metadata_record", metadata::RECORD),
    ("metadata_files", metadata::FILES),
    ("disk_files", mirror::FILES),
    ("cache", mirror::CACHE),
    ("kept_nodes", mirror::NODES),
    ("messages", wire::MESSAGES),
    ("placement", tree::PLACEMENT),
    ("names", wire::NAMES),
    ("vm_record", parts::VM_RECORD),
    ("cluster_file", parts::CLUSTER),
    ("qcow2", parts::QCOW2),
    ("texts", parts::TEXTS),
    ("worker_state", parts::WORKER),
    ("ioctl", mirror::IOCTL),
];

#[cfg(test)]
mod tests {
    use super::{TARGETS, hex};

    /// Golden files are seeds, so this holds the properties to what was ever written.
    #[test]
    fn every_seed_has_its_property() {
        for (name, target) in TARGETS {
            (target.check)(&[]);
            for (n, seed) in (target.seeds)().iter().enumerate() {
                println!("{name}, seed {n}");
                (target.check)(seed);
            }
        }
    }

    #[test]
    fn every_target_has_a_program() {
        let manifest = include_str!("../Cargo.toml");
        for (name, _) in TARGETS {
            assert!(manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")), "{name}");
        }
        assert_eq!(manifest.matches("[[bin]]").count(), TARGETS.len());
    }

    #[test]
    fn hex_is_read() {
        assert_eq!(hex("00ff7a\n"), [0, 0xff, 0x7a]);
    }
}
