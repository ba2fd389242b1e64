//! What the machine can do at most: hash, write, send.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::time::Instant;

use blobcr_proto::Hash;
use rustix::thread::{CpuSet, sched_setaffinity};

use super::{CHUNK, MIB};
use crate::suite::Settings;
use crate::suite::bare_pipeline::{BarePipeline, direct};

/// In MB/s.
pub(super) struct Limits {
    /// BLAKE3 of chunks that are in no cache of the processor, on core 1.
    pub(super) hash: f64,
    /// The same bytes to the disk, past the page cache, and an fdatasync.
    pub(super) disk: f64,
    pub(super) loopback: f64,
    /// All of that and nothing else, with the sender on core 1.
    pub(super) bare: f64,
}

impl Limits {
    pub(super) fn measure(settings: &Settings, bytes: u64) -> anyhow::Result<Self> {
        let rate = |seconds: f64| bytes as f64 / 1e6 / seconds;
        Ok(Self {
            hash: rate(hash(bytes)?),
            disk: rate(disk(settings, bytes)?),
            loopback: rate(loopback(bytes)?),
            bare: rate(bare(settings, bytes)?),
        })
    }
}

/// Binds the calling thread, as the mirror is bound.
fn stay_on_core_1() -> anyhow::Result<()> {
    let mut one = CpuSet::new();
    one.set(1.min(std::thread::available_parallelism()?.get() - 1));
    Ok(sched_setaffinity(None, &one)?)
}

fn hash(bytes: u64) -> anyhow::Result<f64> {
    let work = move || -> anyhow::Result<f64> {
        stay_on_core_1()?;
        let memory = blobcr_tests::disk_file::noise(5, bytes as usize);
        let began = Instant::now();
        for chunk in memory.chunks(CHUNK as usize) {
            std::hint::black_box(Hash::of(chunk));
        }
        Ok(began.elapsed().as_secs_f64())
    };
    // A thread of its own: the others keep their cores.
    std::thread::spawn(work).join().map_err(|_| anyhow::anyhow!("hashing panicked"))?
}

fn disk(settings: &Settings, bytes: u64) -> anyhow::Result<f64> {
    const BLOCK: usize = 8 * MIB as usize;
    let dir = settings.scratch(&settings.disk_dir)?;
    let (file, memory, start) = direct(dir.path(), BLOCK)?;
    let block = &memory[start..start + BLOCK];
    let began = Instant::now();
    for offset in (0..bytes).step_by(BLOCK) {
        file.write_all_at(block, offset)?;
    }
    file.sync_data()?;
    Ok(began.elapsed().as_secs_f64())
}

fn bare(settings: &Settings, bytes: u64) -> anyhow::Result<f64> {
    let dir = settings.scratch(&settings.disk_dir)?;
    BarePipeline::prepare(dir.path(), bytes)?.run(stay_on_core_1)
}

fn loopback(bytes: u64) -> anyhow::Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let sender = std::thread::spawn(move || -> std::io::Result<()> {
        let mut stream = TcpStream::connect(address)?;
        let block = vec![1; MIB as usize];
        (0..bytes / MIB).try_for_each(|_| stream.write_all(&block))
    });
    let (mut stream, _) = listener.accept()?;
    let mut block = vec![0; MIB as usize];
    let began = Instant::now();
    while stream.read(&mut block)? > 0 {}
    let took = began.elapsed().as_secs_f64();
    sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
    Ok(took)
}
