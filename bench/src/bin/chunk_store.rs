//! The chunk store beside a plain file: durable put, and how fast a node is back with a million
//! records.
//!
//! Puts of 256 KiB chunks that cannot be compressed, from several threads, each answered when
//! durable; and, in turn with them, the same bytes appended to one file with an fdatasync for each
//! group as large as the store's were. The store hashes and checksums every byte besides.
//!
//! `cargo run --release -p blobcr-bench --bin chunk_store`

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use blobcr_bench::spread::Spread;
use blobcr_proto::Hash;
use blobcr_proto::record::{RecordKey, whole};
use blobcr_proto::v1::{Codec, Record, RecordKind};
use blobcr_repo_node::{ChunkStore, Fetched, Options as StoreOptions};
use bytes::Bytes;
use clap::Parser;
use rand::RngCore;
use serde::Serialize;

const CHUNK_BYTES: usize = 256 << 10;
const MIB: f64 = (1 << 20) as f64;
/// Records of one put of the million.
const SMALL_BATCH: u64 = 4096;

/// The chunk store beside a plain file.
#[derive(Parser)]
struct Options {
    /// Directory on the file system to measure.
    #[arg(long, default_value = "target")]
    dir: PathBuf,
    /// MiB of chunks for each round.
    #[arg(long, default_value_t = 512)]
    mib: usize,
    /// Rounds, of which the medians are told.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Threads that put.
    #[arg(long, default_value_t = 4)]
    threads: usize,
    /// Chunks in one put.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Records of the index whose building is timed.
    #[arg(long, default_value_t = 1_000_000)]
    records: u64,
    /// Print JSON on stdout instead of lines.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    chunk_store_mib_s: f64,
    plain_file_mib_s: f64,
    ratio: f64,
    mib_per_sync: f64,
    records: u64,
    index_bytes_per_record: f64,
    start_from_listings_ms: f64,
    start_by_scan_ms: f64,
    scanned_mib: f64,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let dir = tempfile::tempdir_in(&options.dir).context("no directory to measure in")?;
    let (store, plain, mib_per_sync) = puts(&options, dir.path())?;
    let rebuilt = rebuild(&options, &dir.path().join("million"))?;
    let report = Report {
        chunk_store_mib_s: store,
        plain_file_mib_s: plain,
        ratio: store / plain,
        mib_per_sync,
        ..rebuilt
    };
    print(&report, options.json)
}

/// Rounds of both kinds in turn: medians in MiB/s, and what one sync of the store took on average.
fn puts(options: &Options, dir: &Path) -> anyhow::Result<(f64, f64, f64)> {
    let chunks = options.mib << 20 >> CHUNK_BYTES.trailing_zeros();
    let mut bytes = vec![0; chunks * CHUNK_BYTES];
    rand::rng().fill_bytes(&mut bytes);
    let bytes = Bytes::from(bytes);
    let records: Vec<Record> = (0..chunks)
        .map(|n| bytes.slice(n * CHUNK_BYTES..(n + 1) * CHUNK_BYTES))
        .map(|plain| whole(RecordKind::Chunk, Hash::of(&plain), Codec::Plain, plain.len(), plain))
        .collect();
    let (mut stores, mut plains, mut groups) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..options.rounds {
        let (time, syncs) = store_round(options, &dir.join("store"), &records)?;
        stores.push(bytes.len() as f64 / MIB / time.as_secs_f64());
        let group = bytes.len() / syncs as usize;
        groups.push(group as f64 / MIB);
        let time = plain_round(&dir.join("plain"), &bytes, group)?;
        plains.push(bytes.len() as f64 / MIB / time.as_secs_f64());
    }
    Ok((median(stores), median(plains), median(groups)))
}

fn store_round(
    options: &Options,
    dir: &Path,
    records: &[Record],
) -> anyhow::Result<(Duration, u64)> {
    let (store, _) = ChunkStore::open(dir, StoreOptions::default())?;
    // The first segment is made here.
    store.put(0, 1, &[small(0)])?;
    let syncs = store.counters().syncs;
    let batches: Vec<_> = records.chunks(options.batch).collect();
    let start = Instant::now();
    std::thread::scope(|scope| {
        let share = batches.len().div_ceil(options.threads);
        let put = |share: &[&[Record]]| {
            share.iter().try_for_each(|batch| store.put(1, 1, batch).map(drop))
        };
        let threads: Vec<_> =
            batches.chunks(share).map(|share| scope.spawn(move || put(share))).collect();
        threads.into_iter().try_for_each(|thread| {
            thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?.map_err(Into::into)
        })
    })
    .and_then(|()| {
        let time = start.elapsed();
        let syncs = store.counters().syncs - syncs;
        drop(store);
        std::fs::remove_dir_all(dir)?;
        Ok((time, syncs))
    })
}

fn plain_round(path: &Path, bytes: &[u8], group: usize) -> anyhow::Result<Duration> {
    let file = File::create(path)?;
    let start = Instant::now();
    for (n, piece) in bytes.chunks(group).enumerate() {
        file.write_all_at(piece, (n * group) as u64)?;
        file.sync_data()?;
    }
    let time = start.elapsed();
    std::fs::remove_file(path)?;
    Ok(time)
}

/// A record as small as the smallest tree nodes.
fn small(n: u64) -> Record {
    let plain = Bytes::copy_from_slice(&n.to_le_bytes());
    whole(RecordKind::TreeNode, Hash::of(&plain), Codec::Plain, plain.len(), plain)
}

/// Times the start with many small records: from listings, and by reading every segment.
fn rebuild(options: &Options, dir: &Path) -> anyhow::Result<Report> {
    let (store, _) = ChunkStore::open(dir, StoreOptions::default())?;
    for first in (0..options.records).step_by(SMALL_BATCH as usize) {
        let last = options.records.min(first + SMALL_BATCH);
        store.put(1, 1, &(first..last).map(small).collect::<Vec<_>>())?;
    }
    let index_bytes = store.counters().index_bytes;
    let scanned = store.status().segment_bytes;
    drop(store);
    let listings =
        median((0..options.rounds).map(|_| start(options, dir)).collect::<Result<_, _>>()?);
    let mut scans = Vec::new();
    for _ in 0..options.rounds {
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "idx") {
                std::fs::remove_file(path)?;
            }
        }
        scans.push(start(options, dir)?);
    }
    Ok(Report {
        chunk_store_mib_s: 0.0,
        plain_file_mib_s: 0.0,
        ratio: 0.0,
        mib_per_sync: 0.0,
        records: options.records,
        index_bytes_per_record: index_bytes as f64 / options.records as f64,
        start_from_listings_ms: listings,
        start_by_scan_ms: median(scans),
        scanned_mib: scanned as f64 / MIB,
    })
}

/// Opens the store; the time until it serves, in ms.
fn start(options: &Options, dir: &Path) -> anyhow::Result<f64> {
    let start = Instant::now();
    let (store, report) = ChunkStore::open(dir, StoreOptions::default())?;
    let time = start.elapsed();
    anyhow::ensure!(report.records == options.records, "{} records", report.records);
    let key = RecordKey::whole(RecordKind::TreeNode, Hash::of(&0u64.to_le_bytes()));
    anyhow::ensure!(matches!(store.get(1, key), Fetched::Found(_)), "a record is not there");
    Ok(time.as_secs_f64() * 1e3)
}

fn median(values: Vec<f64>) -> f64 {
    Spread::of(values).map_or(f64::NAN, |spread| spread.median)
}

#[expect(clippy::print_stdout, reason = "what a benchmark is for")]
fn print(report: &Report, json: bool) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(report)?);
        return Ok(());
    }
    println!(
        "durable put of 256 KiB chunks: chunk store {:.0} MiB/s, plain file {:.0} MiB/s, ratio {:.2} ({:.1} MiB a sync)",
        report.chunk_store_mib_s, report.plain_file_mib_s, report.ratio, report.mib_per_sync
    );
    println!(
        "start with {} records: {:.0} ms from listings, {:.0} ms by reading {:.0} MiB; {:.1} bytes of memory a record",
        report.records,
        report.start_from_listings_ms,
        report.start_by_scan_ms,
        report.scanned_mib,
        report.index_bytes_per_record
    );
    Ok(())
}
