//! Reads that must wait for a device, many at once: one thread with an io_uring. A thread that waits
//! in `pread` is one request deep; this one is as deep as there are requests.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};

use io_uring::{IoUring, opcode, types};
use rustix::event::{EventfdFlags, PollFlags, eventfd};
use slab::Slab;

/// Requests under way at most; others wait their turn.
const DEPTH: usize = 128;
/// Entries of the submission queue: the requests, and the one that listens for more.
const ENTRIES: u32 = 256;
/// Tells the completion that listens from those of requests.
const WAKE: u64 = u64::MAX;

/// What is called with the bytes, or with why there are none.
type Done = Box<dyn FnOnce(io::Result<&[u8]>) + Send>;

/// A range of a file to read whole.
pub(crate) struct Request {
    pub(crate) file: Arc<dyn AsFd + Send + Sync>,
    pub(crate) offset: u64,
    pub(crate) len: usize,
    /// Runs on the ring's thread, so it must not block.
    pub(crate) done: Done,
}

/// A thread that reads. It ends, after what it was given, when this is dropped.
#[derive(Debug)]
pub(crate) struct Ring {
    /// `None`: it is being dropped.
    requests: Option<Sender<Request>>,
    bell: Arc<Bell>,
    /// Requests that were not answered yet.
    busy: Arc<AtomicUsize>,
}

/// Wakes the thread, which waits for completions only.
#[derive(Debug)]
struct Bell {
    event: File,
    /// The thread waits, or is about to.
    waits: AtomicBool,
}

impl Bell {
    fn ring(&self) {
        if self.waits.swap(false, Ordering::SeqCst) {
            // Fails only when the counter is full, and then the thread is awake.
            let _ = (&self.event).write(&1_u64.to_ne_bytes());
        }
    }
}

impl Ring {
    /// Starts the thread.
    ///
    /// # Errors
    /// When this kernel, or its settings, have no io_uring for us.
    pub(crate) fn start() -> io::Result<Self> {
        let event = File::from(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let bell = Arc::new(Bell { event, waits: AtomicBool::new(false) });
        let (requests, incoming) = channel();
        let (report, started) = channel();
        let busy = Arc::new(AtomicUsize::new(0));
        let (own, counted) = (Arc::clone(&bell), Arc::clone(&busy));
        let serve = move || {
            // Made here: a ring with one issuer belongs to the thread that made it.
            let ring = match open() {
                Ok(ring) => ring,
                Err(error) => return drop(report.send(Err(error))),
            };
            let _ = report.send(Ok(()));
            drop(report);
            Thread {
                ring,
                bell: own,
                busy: counted,
                incoming,
                under_way: Slab::with_capacity(DEPTH),
                again: VecDeque::new(),
                completed: Vec::with_capacity(DEPTH),
            }
            .run();
        };
        std::thread::Builder::new().name("cold-reads".to_owned()).spawn(serve)?;
        started.recv().map_err(|_| io::Error::other("the thread ended"))??;
        Ok(Self { requests: Some(requests), bell, busy })
    }

    /// Whether there is something that was not answered yet.
    pub(crate) fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Relaxed) > 0
    }

    /// Reads; returns at once.
    pub(crate) fn read(&self, request: Request) {
        let Some(requests) = &self.requests else { return };
        self.busy.fetch_add(1, Ordering::Relaxed);
        match requests.send(request) {
            Ok(()) => self.bell.ring(),
            Err(lost) => {
                let ended = io::Error::other("the reading thread has ended");
                answer(lost.0, Err(ended), &self.busy);
            }
        }
    }
}

fn answer(request: Request, read: io::Result<&[u8]>, busy: &AtomicUsize) {
    busy.fetch_sub(1, Ordering::Relaxed);
    (request.done)(read);
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.requests = None;
        self.bell.ring();
    }
}

fn open() -> io::Result<IoUring> {
    // From Linux 6.1 on; spares a wake-up for every completion.
    let lean = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(ENTRIES);
    lean.or_else(|_| IoUring::new(ENTRIES))
}

/// A request under way.
struct Reading {
    request: Request,
    /// As long as the request; the kernel writes into it.
    buffer: Vec<u8>,
    /// Bytes that are there already.
    have: usize,
}

struct Thread {
    ring: IoUring,
    bell: Arc<Bell>,
    busy: Arc<AtomicUsize>,
    incoming: Receiver<Request>,
    under_way: Slab<Reading>,
    /// Those that came back short.
    again: VecDeque<usize>,
    /// Keys and results of completions, between their taking and their handling.
    completed: Vec<(u64, i32)>,
}

impl Thread {
    fn run(mut self) {
        self.listen();
        loop {
            let ended = self.take();
            if ended && self.under_way.is_empty() {
                return;
            }
            // Whoever sends after this look finds that we wait, and rings.
            self.bell.waits.store(true, Ordering::SeqCst);
            let ready = self.under_way.len() < DEPTH && !ended;
            let more = ready && self.take_one() != Took::Nothing;
            let wanted = usize::from(!more);
            match self.ring.submit_and_wait(wanted) {
                Err(error) if !is_passing(&error) => return self.fail(&error),
                _ => {}
            }
            self.bell.waits.store(false, Ordering::SeqCst);
            self.complete();
        }
    }

    /// Begins what was asked for, as far as there is room. Returns whether nothing more can come.
    fn take(&mut self) -> bool {
        while let Some(key) = self.again.pop_front() {
            self.submit(key);
        }
        while self.under_way.len() < DEPTH {
            match self.take_one() {
                Took::One => {}
                Took::Nothing => return false,
                Took::End => return true,
            }
        }
        false
    }

    fn take_one(&mut self) -> Took {
        match self.incoming.try_recv() {
            Ok(request) => {
                let buffer = Vec::with_capacity(request.len);
                let key = self.under_way.insert(Reading { request, buffer, have: 0 });
                self.submit(key);
                Took::One
            }
            Err(TryRecvError::Empty) => Took::Nothing,
            Err(TryRecvError::Disconnected) => Took::End,
        }
    }

    fn submit(&mut self, key: usize) {
        let reading = &mut self.under_way[key];
        let fd = types::Fd(reading.request.file.as_fd().as_raw_fd());
        let rest = &mut reading.buffer.spare_capacity_mut()[..reading.request.len - reading.have];
        let len = u32::try_from(rest.len()).unwrap_or(u32::MAX);
        let entry = opcode::Read::new(fd, rest.as_mut_ptr().cast(), len)
            .offset(reading.request.offset + reading.have as u64)
            .build()
            .user_data(key as u64);
        self.push(&entry);
    }

    fn listen(&mut self) {
        let fd = types::Fd(self.bell.event.as_raw_fd());
        let readable = u32::from(PollFlags::IN.bits());
        self.push(&opcode::PollAdd::new(fd, readable).build().user_data(WAKE));
    }

    fn push(&mut self, entry: &io_uring::squeue::Entry) {
        // SAFETY: a request's file and buffer are in `under_way` until its completion was seen, and
        // the buffer is never grown; the entry that listens points to nothing.
        let pushed = unsafe { self.ring.submission().push(entry) };
        // There are more entries than requests under way, and each submit empties the queue.
        pushed.expect("the submission queue has room");
    }

    fn complete(&mut self) {
        let mut completed = std::mem::take(&mut self.completed);
        completed.extend(self.ring.completion().map(|entry| (entry.user_data(), entry.result())));
        for (key, result) in completed.drain(..) {
            if key == WAKE {
                // Never blocks; what it counted does not matter.
                let _ = (&self.bell.event).read(&mut [0; size_of::<u64>()]);
                self.listen();
            } else {
                self.completed(key as usize, result);
            }
        }
        self.completed = completed;
    }

    fn completed(&mut self, key: usize, result: i32) {
        let reading = &mut self.under_way[key];
        let outcome = match result {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            bytes if bytes > 0 => {
                reading.have += bytes as usize;
                // SAFETY: the kernel has written so many bytes behind those before.
                unsafe { reading.buffer.set_len(reading.have) };
                if reading.have < reading.request.len {
                    return self.again.push_back(key);
                }
                Ok(())
            }
            error => Err(io::Error::from_raw_os_error(-error)),
        };
        if outcome.as_ref().is_err_and(is_passing) {
            return self.again.push_back(key);
        }
        let Reading { request, buffer, .. } = self.under_way.remove(key);
        answer(request, outcome.map(|()| buffer.as_slice()), &self.busy);
    }

    /// The ring does not work any more. What it was given is answered, so that nobody waits for ever;
    /// the buffers stay, for the kernel may still write into them.
    fn fail(mut self, error: &io::Error) {
        tracing::error!(%error, "reads by io_uring have ended; others go on");
        for reading in self.under_way.drain() {
            std::mem::forget(reading.buffer);
            answer(reading.request, Err(io::Error::other(error.to_string())), &self.busy);
        }
        while let Ok(request) = self.incoming.recv() {
            answer(request, Err(io::Error::other(error.to_string())), &self.busy);
        }
    }
}

/// Whether the same may succeed when it is tried again.
fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, ResourceBusy, WouldBlock};
    matches!(error.kind(), Interrupted | WouldBlock | ResourceBusy)
}

#[derive(PartialEq, Eq)]
enum Took {
    One,
    Nothing,
    End,
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn file(bytes: &[u8]) -> Arc<File> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        Arc::new(file)
    }

    fn ask(
        ring: &Ring,
        file: &Arc<File>,
        offset: u64,
        len: usize,
    ) -> mpsc::Receiver<io::Result<Vec<u8>>> {
        let (answer, answers) = mpsc::channel();
        let done: Done = Box::new(move |read| {
            answer.send(read.map(<[u8]>::to_vec)).unwrap();
        });
        let file: Arc<File> = Arc::clone(file);
        ring.read(Request { file, offset, len, done });
        answers
    }

    #[test]
    fn many_reads_from_many_threads_are_all_answered_with_their_bytes() {
        let bytes: Vec<u8> =
            (0..1_u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let (ring, file) = (Ring::start().unwrap(), file(&bytes));
        std::thread::scope(|threads| {
            for thread in 0..4 {
                let (ring, file, bytes) = (&ring, &file, &bytes);
                threads.spawn(move || {
                    for round in 0..20 {
                        // More than the ring takes at once.
                        let asked: Vec<_> = (0..100)
                            .map(|i| {
                                let offset = (thread * 7919 + round * 104_729 + i * 4096) % 900_000;
                                (offset, ask(ring, file, offset as u64, 5000 + i))
                            })
                            .collect();
                        for (i, (offset, answer)) in asked.into_iter().enumerate() {
                            let read = answer.recv().unwrap().unwrap();
                            assert_eq!(read, bytes[offset..offset + 5000 + i]);
                        }
                    }
                });
            }
        });
    }

    #[test]
    fn what_is_not_there_is_an_error_and_the_next_read_is_none() {
        let (ring, file) = (Ring::start().unwrap(), file(b"0123456789"));
        let error = ask(&ring, &file, 5, 10).recv().unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(ask(&ring, &file, 5, 5).recv().unwrap().unwrap(), b"56789");
        let directory = Arc::new(File::open("/").unwrap());
        assert!(ask(&ring, &directory, 0, 10).recv().unwrap().is_err());
    }

    #[test]
    fn what_was_asked_for_is_answered_even_when_it_ends() {
        let file = file(&[7; 100_000]);
        let ring = Ring::start().unwrap();
        let asked: Vec<_> = (0..300).map(|_| ask(&ring, &file, 0, 100_000)).collect();
        drop(ring);
        for answer in asked {
            assert_eq!(answer.recv().unwrap().unwrap().len(), 100_000);
        }
    }
}
