//! What the machine can do at most: hash, write, send.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::mpsc::sync_channel;
use std::time::Instant;

use anyhow::{Context, ensure};
use blobcr_proto::Hash;
use rustix::thread::{CpuSet, sched_setaffinity};

use super::{CHUNK, MIB};
use crate::suite::Settings;

/// In MB/s.
pub(super) struct Limits {
    /// BLAKE3 of chunks that are in no cache of the processor, on core 1.
    pub(super) hash: f64,
    /// The same bytes to the disk, past the page cache, and an fdatasync.
    pub(super) disk: f64,
    pub(super) loopback: f64,
    /// All of that and nothing else: a thread on core 1 reads a file, hashes and sends it; others take
    /// it, hash it again, and write it past the page cache.
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

/// A new file past the page cache, and memory aligned as that asks for.
fn direct(dir: &Path, memory: usize) -> anyhow::Result<(File, Vec<u8>, usize)> {
    let direct = rustix::fs::OFlags::DIRECT.bits().cast_signed();
    let path = dir.join("direct");
    let file = OpenOptions::new().write(true).create_new(true).custom_flags(direct).open(path);
    let memory = blobcr_tests::disk_file::noise(6, memory + 4096);
    let start = memory.as_ptr().align_offset(4096);
    Ok((file.context("open a file past the page cache")?, memory, start))
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

/// Takes what comes, by MiB, hashes it by chunks, and writes it while the next comes.
fn take(dir: &Path, mut stream: TcpStream) -> anyhow::Result<()> {
    const BUFFERS: usize = 4;
    let (file, mut memory, start) = direct(dir, BUFFERS * MIB as usize)?;
    let (full, to_write) = sync_channel::<(usize, &mut [u8])>(BUFFERS);
    let (empty, free) = sync_channel(BUFFERS);
    for buffer in memory[start..start + BUFFERS * MIB as usize].chunks_mut(MIB as usize) {
        ensure!(empty.send(buffer).is_ok(), "there is room for all of them");
    }
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || -> anyhow::Result<()> {
            for (number, buffer) in to_write {
                file.write_all_at(buffer, number as u64 * MIB)?;
                // Nobody wants it any more at the end.
                let _ = empty.send(buffer);
            }
            Ok(file.sync_data()?)
        });
        for number in 0.. {
            let buffer = free.recv()?;
            match stream.read_exact(buffer) {
                Err(end) if end.kind() == std::io::ErrorKind::UnexpectedEof => break,
                read => read?,
            }
            for chunk in buffer.chunks(CHUNK as usize) {
                std::hint::black_box(Hash::of(chunk));
            }
            ensure!(full.send((number, buffer)).is_ok(), "the writer has ended");
        }
        drop(full);
        writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))?
    })
}

/// Reads `file` from the page cache by chunks, hashes and sends them.
fn send(file: &File, to: SocketAddr, bytes: u64) -> anyhow::Result<()> {
    stay_on_core_1()?;
    let mut stream = TcpStream::connect(to)?;
    let mut chunk = vec![0; CHUNK as usize];
    for offset in (0..bytes).step_by(CHUNK as usize) {
        file.read_exact_at(&mut chunk, offset)?;
        std::hint::black_box(Hash::of(&chunk));
        stream.write_all(&chunk)?;
    }
    Ok(())
}

fn bare(settings: &Settings, bytes: u64) -> anyhow::Result<f64> {
    let dir = settings.scratch(&settings.disk_dir)?;
    let path = dir.path().join("source");
    std::fs::write(&path, blobcr_tests::disk_file::noise(7, bytes as usize))?;
    let file = File::open(&path)?;
    file.sync_all()?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let began = Instant::now();
    let sender = std::thread::spawn(move || send(&file, address, bytes));
    take(dir.path(), listener.accept()?.0)?;
    let took = began.elapsed().as_secs_f64();
    sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
    Ok(took)
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
