//! The least that any program does which persists: one thread reads a file by chunks, hashes and
//! sends it over loopback; others take it, hash it again, and write it past the page cache.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::time::Instant;

use anyhow::{Context, ensure};
use blobcr_proto::Hash;

const MIB: u64 = 1 << 20;
const CHUNK: u64 = 256 << 10;

/// A file to persist, in the page cache, and where to.
pub(super) struct BarePipeline {
    source: File,
    dir: PathBuf,
    bytes: u64,
}

impl BarePipeline {
    /// Makes the file, of random bytes, in `dir`.
    pub(super) fn prepare(dir: &Path, bytes: u64) -> anyhow::Result<Self> {
        let path = dir.join("source");
        std::fs::write(&path, blobcr_tests::disk_file::noise(7, bytes as usize))?;
        let source = File::open(&path)?;
        source.sync_all()?;
        Ok(Self { source, dir: dir.to_owned(), bytes })
    }

    /// Persists it once; returns how many seconds that took. `as_sender` is called by the thread
    /// that reads and sends, before.
    pub(super) fn run(
        self,
        as_sender: impl FnOnce() -> anyhow::Result<()> + Send + 'static,
    ) -> anyhow::Result<f64> {
        let Self { source, dir, bytes } = self;
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let began = Instant::now();
        let sender = std::thread::spawn(move || {
            as_sender()?;
            send(&source, address, bytes)
        });
        take(&dir, listener.accept()?.0)?;
        let took = began.elapsed().as_secs_f64();
        sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        Ok(took)
    }
}

/// A new file past the page cache, and memory aligned as that asks for.
pub(super) fn direct(dir: &Path, memory: usize) -> anyhow::Result<(File, Vec<u8>, usize)> {
    let direct = rustix::fs::OFlags::DIRECT.bits().cast_signed();
    let path = dir.join("direct");
    let file = OpenOptions::new().write(true).create_new(true).custom_flags(direct).open(path);
    let memory = blobcr_tests::disk_file::noise(6, memory + 4096);
    let start = memory.as_ptr().align_offset(4096);
    Ok((file.context("open a file past the page cache")?, memory, start))
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
    let mut stream = TcpStream::connect(to)?;
    let mut chunk = vec![0; CHUNK as usize];
    for offset in (0..bytes).step_by(CHUNK as usize) {
        file.read_exact_at(&mut chunk, offset)?;
        std::hint::black_box(Hash::of(&chunk));
        stream.write_all(&chunk)?;
    }
    Ok(())
}
