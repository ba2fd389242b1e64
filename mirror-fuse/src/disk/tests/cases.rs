//! One behaviour each; those that the original prototype got wrong are named for it.

use std::time::Duration;

use super::super::*;
use super::crash_files::{Crash, CrashFiles};
use super::support::*;
use blobcr_proto::v1::SnapshotState;

const CHUNKS: u64 = 5;
const SIZE: u64 = CHUNKS * CHUNK as u64;

struct Setup {
    dir: tempfile::TempDir,
    world: Arc<World>,
    base: Vec<u8>,
    disk: Arc<Disk>,
}

impl Setup {
    fn new(base_len: usize, size: u64, room: (u64, u64)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let world = World::new();
        let mut base = pattern(1, base_len);
        // A chunk of zeros in the middle.
        if base.len() >= 3 * CHUNK {
            base[2 * CHUNK..3 * CHUNK].fill(0);
        }
        let source = world.image("base", &base);
        let spec = spec_of("disk", source, size);
        base.resize(size as usize, 0);
        let disk =
            Disk::create(&dir.path().join("disk"), spec, deps(&world, room, "boot")).unwrap();
        Self { dir, world, base, disk }
    }

    fn usual() -> Self {
        Self::new(SIZE as usize, SIZE, (16, 16))
    }

    async fn reopen(self, boot: &str) -> Self {
        let Self { dir, world, base, disk } = self;
        disk.crash().await;
        let disk = Disk::open(&dir.path().join("disk"), deps(&world, (16, 16), boot)).unwrap();
        Self { dir, world, base, disk }
    }

    fn image(&self) -> u64 {
        self.disk.checkpoint_image().unwrap().id
    }

    async fn stable(&self) -> Vec<u8> {
        let made = self.disk.commit().await.unwrap();
        assert_eq!(self.disk.wait_stable(made.number).await.unwrap(), Settled::Stable);
        self.world.bytes(made.image_id, made.number)
    }
}

async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..20_000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("never: {what}");
}

#[tokio::test]
async fn a_fresh_disk_reads_as_its_snapshot_and_behind_it_as_zeros() {
    let setup = Setup::new(3 * CHUNK + 1000, SIZE + 777, (1, 1));
    assert_eq!(setup.disk.all().await, setup.base);
    // Now that all is here, nothing waits.
    let mut out = vec![1; setup.base.len()];
    assert_eq!(setup.disk.try_read(0, &mut out).unwrap(), Attempt::Done);
    assert_eq!(out, setup.base);
    assert_eq!(setup.world.fetches(), 4, "each chunk of the snapshot once, none behind it");
}

#[tokio::test]
async fn requests_beyond_the_end_are_refused_and_change_nothing() {
    let setup = Setup::new(SIZE as usize, SIZE + 100, (1, 1));
    let end = SIZE + 100;
    for (offset, len) in [(end, 1), (end - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 4)] {
        let data = vec![9; len];
        assert!(matches!(setup.disk.try_write(offset, &data), Err(DiskError::OutOfRange { .. })));
        assert!(setup.disk.write(offset, data.clone().into()).await.is_err());
        assert!(setup.disk.try_read(offset, &mut data.clone()).is_err());
        assert!(setup.disk.try_zero(offset, len as u64, Zero::WriteZeroes).is_err());
    }
    setup.disk.put(end - 1, &[7]).await;
    setup.disk.put(end, &[]).await;
    let all = setup.disk.all().await;
    assert_eq!((all.len() as u64, all.last()), (end, Some(&7)));
    assert_eq!(all[..SIZE as usize], setup.base[..SIZE as usize]);
}

/// The prototype marked a chunk complete when a write began on its border and ended inside it, and
/// the next chunk when a write ended on the border.
#[tokio::test]
async fn partial_writes_at_every_border_of_chunks_never_fetched() {
    let chunk = CHUNK as u64;
    let mut borders = vec![0];
    for at in [chunk, 2 * chunk, chunk + 4096, 2 * chunk - 4096, SIZE - 300] {
        borders.extend([at - 4096, at - 513, at - 1, at, at + 1, at + 512]);
    }
    borders.retain(|at| *at < SIZE);
    borders.sort_unstable();
    borders.dedup();
    let size = SIZE - 300;
    for (n, from) in borders.iter().enumerate() {
        for to in &borders[n + 1..] {
            let to = (*to).min(size);
            if to <= *from || (to - from > 2 * 4096 && to - from < chunk - 4096) {
                continue;
            }
            let setup = Setup::new(size as usize, size, (0, 0));
            let data = pattern(to ^ from << 20, (to - from) as usize);
            setup.disk.put(*from, &data).await;
            let mut expected = setup.base.clone();
            expected[*from as usize..to as usize].copy_from_slice(&data);
            assert!(setup.disk.all().await == expected, "{from}..{to}");
            assert!(setup.stable().await == expected, "snapshot after {from}..{to}");
        }
    }
}

#[tokio::test]
async fn a_write_of_whole_sectors_to_an_absent_chunk_fetches_nothing() {
    let setup = Setup::usual();
    assert_eq!(setup.disk.try_write(4096, &pattern(2, 8192)).unwrap(), Attempt::Done);
    assert_eq!(setup.disk.try_zero(16384, 4096, Zero::Discard).unwrap(), Attempt::Done);
    assert_eq!(setup.world.fetches(), 0);
    assert_eq!(setup.disk.status().local_bytes, 3 * 4096);
    let partial = setup.disk.try_write(40_000, &[1; 100]).unwrap();
    assert_eq!(partial, Attempt::NeedsAsync { done: 0 });
}

/// The prototype published a version for each run of dirty chunks.
#[tokio::test]
async fn a_commit_is_one_version() {
    let setup = Setup::usual();
    for chunk in [0, 2, 4] {
        setup.disk.put(chunk * CHUNK as u64 + 100, &pattern(chunk, 5000)).await;
    }
    let expected = setup.disk.all().await;
    assert_eq!(setup.stable().await, expected);
    let records = setup.world.records(setup.image());
    assert_eq!(records.keys().copied().collect::<Vec<_>>(), [1, 2], "the clone and the COMMIT");
    assert_eq!(records[&2].dirty_chunks, 3);
    // Nothing has changed: a version all the same, of nothing.
    assert_eq!(setup.stable().await, expected);
    assert_eq!(setup.world.record(setup.image(), 3).unwrap().dirty_chunks, 0);
    assert_eq!(setup.disk.status().last_stable, 3);
    assert_eq!(setup.disk.status().dirty_bytes, 0);
}

#[tokio::test]
async fn commit_before_clone_is_refused_and_the_clone_is_made_once() {
    let setup = Setup::usual();
    assert!(matches!(setup.disk.try_commit(), Err(DiskError::NotCloned(_))));
    setup.world.fail_next("clone_image", Failure::AnswerLost);
    assert!(setup.disk.ensure_clone().await.is_err());
    let image = setup.disk.ensure_clone().await.unwrap();
    assert_eq!(setup.disk.ensure_clone().await.unwrap(), image);
    assert_eq!(setup.world.calls("clone_image"), 2);
    assert!(image.name.starts_with("disk-"));
    assert_eq!(setup.disk.try_commit().unwrap().unwrap().number, 2);
    let setup = setup.reopen("boot").await;
    assert_eq!(setup.disk.checkpoint_image(), Some(image));
}

#[tokio::test]
async fn two_commits_are_pending_at_most_and_the_third_waits() {
    let setup = Setup::usual();
    setup.disk.ensure_clone().await.unwrap();
    setup.world.hold();
    let mut versions = Vec::new();
    for n in 0..2 {
        setup.disk.put(n * 4096, &pattern(n, 4096)).await;
        versions.push((setup.disk.try_commit().unwrap().unwrap(), setup.disk.all().await));
    }
    assert_eq!(setup.disk.try_commit().unwrap(), None);
    assert_eq!(setup.disk.status().pending, [2, 3]);
    setup.disk.put(8192, &pattern(7, 4096)).await;
    let disk = Arc::clone(&setup.disk);
    let third = tokio::spawn(async move { disk.commit().await.unwrap() });
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert!(!third.is_finished());
    setup.world.release();
    let third = third.await.unwrap();
    assert_eq!(third.number, 4);
    setup.disk.settle().await.unwrap();
    for (made, expected) in versions {
        assert_eq!(setup.world.bytes(made.image_id, made.number), expected);
    }
    assert_eq!(setup.world.bytes(third.image_id, 4), setup.disk.all().await);
}

#[tokio::test]
async fn who_waits_for_a_commit_is_answered_before_it_is_persisted() {
    let setup = Setup::usual();
    // The persister waits for work after that.
    setup.disk.commit().await.unwrap();
    setup.disk.settle().await.unwrap();
    let begun = setup.world.calls("begin");
    setup.disk.put(0, &pattern(1, 4096)).await;
    let (made, persist) = setup.disk.try_commit_held().unwrap().unwrap();
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(setup.world.calls("begin"), begun);
    drop(persist);
    setup.disk.settle().await.unwrap();
    assert_eq!(setup.world.bytes(made.image_id, made.number), setup.disk.all().await);
}

/// A disk that has committed once already, whose persister wakes so long after a COMMIT.
async fn unhurried(persist_after: Duration) -> (tempfile::TempDir, Arc<World>, Arc<Disk>) {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new();
    let source = world.image("base", &pattern(1, SIZE as usize));
    let deps = DiskDeps { persist_after, ..deps(&world, (16, 16), "boot") };
    let disk = Disk::create(&dir.path().join("disk"), spec_of("disk", source, SIZE), deps).unwrap();
    let made = disk.commit().await.unwrap();
    assert_eq!(disk.wait_stable(made.number).await.unwrap(), Settled::Stable);
    eventually("it rests again", || disk.shared.alarm.get().is_some()).await;
    (dir, world, disk)
}

#[tokio::test]
async fn a_commit_is_persisted_a_while_after_it() {
    let after = Duration::from_millis(100);
    let (_dir, world, disk) = unhurried(after).await;
    let begun = world.calls("begin");
    let began = std::time::Instant::now();
    disk.try_commit().unwrap().unwrap();
    disk.put(0, &pattern(3, 4096)).await;
    Disk::commit_all(&[Arc::clone(&disk)], "").await.unwrap();
    eventually("both are stable", || disk.status().pending.is_empty()).await;
    assert!(began.elapsed() >= after);
    assert_eq!(world.calls("begin"), begun + 2);
}

#[tokio::test]
async fn whoever_waits_for_a_snapshot_has_it_persisted_at_once() {
    let (_dir, _world, disk) = unhurried(Duration::from_secs(100_000)).await;
    let made = disk.try_commit().unwrap().unwrap();
    assert_eq!(disk.wait_stable(made.number).await.unwrap(), Settled::Stable);
    disk.try_commit().unwrap().unwrap();
    disk.settle().await.unwrap();
    disk.try_commit().unwrap().unwrap();
    disk.rollback(0).await.unwrap();
    // The third one waits for the first.
    for _ in 0..3 {
        disk.commit().await.unwrap();
    }
}

/// The prototype copied whole runs of chunks, under a global lock and without a bound.
#[tokio::test]
async fn copy_on_write_is_by_sector_and_once() {
    let setup = Setup::usual();
    setup.disk.put(0, &pattern(3, 4 * CHUNK)).await;
    setup.disk.ensure_clone().await.unwrap();
    setup.world.hold();
    let expected = setup.disk.all().await;
    let made = setup.disk.try_commit().unwrap().unwrap();
    for n in 0..10 {
        setup.disk.put(CHUNK as u64 + n * 512, &pattern(n, 512)).await;
    }
    let status = setup.disk.status();
    assert_eq!(status.aside_bytes, 8192, "two sectors were touched, two copied");
    assert_eq!(status.dirty_bytes, CHUNK as u64);
    setup.world.release();
    setup.disk.settle().await.unwrap();
    assert_eq!(setup.world.bytes(made.image_id, made.number), expected);
    assert_eq!(setup.disk.status().aside_bytes, 0);
}

#[tokio::test]
async fn only_present_sectors_are_copied_aside() {
    let setup = Setup::usual();
    setup.disk.put(4096, &pattern(3, 4096)).await;
    setup.disk.ensure_clone().await.unwrap();
    setup.world.hold();
    let expected = setup.disk.all().await;
    let made = setup.disk.try_commit().unwrap().unwrap();
    setup.disk.put(0, &pattern(4, CHUNK)).await;
    assert_eq!(setup.disk.status().aside_bytes, 4096);
    setup.world.release();
    setup.disk.settle().await.unwrap();
    assert_eq!(setup.world.bytes(made.image_id, made.number), expected);
}

#[tokio::test]
async fn copies_go_to_memory_then_to_the_spill_file_then_the_writer_waits() {
    let setup = Setup::new(SIZE as usize, SIZE, (1, 1));
    setup.disk.put(0, &pattern(3, SIZE as usize)).await;
    setup.disk.ensure_clone().await.unwrap();
    setup.world.hold();
    let expected = setup.disk.all().await;
    let made = setup.disk.try_commit().unwrap().unwrap();
    let chunk = CHUNK as u64;
    assert_eq!(setup.disk.try_write(0, &[1; CHUNK]).unwrap(), Attempt::Done);
    assert_eq!(setup.disk.try_write(chunk, &[2; 10]).unwrap(), Attempt::NeedsAsync { done: 0 });
    setup.disk.put(chunk, &[2; 10]).await;
    let status = setup.disk.status();
    assert_eq!((status.aside_bytes, status.spill_bytes), (chunk, chunk));
    // A write over two chunks stops before the one for which there is no room.
    let disk = Arc::clone(&setup.disk);
    let writer = tokio::spawn(async move { disk.put(2 * chunk - 5, &[3; 10]).await });
    eventually("the writer waits", || setup.disk.status().throttled_writes > 0).await;
    assert!(!writer.is_finished());
    let mut out = [0; 10];
    assert_eq!(setup.disk.try_read(2 * chunk - 5, &mut out).unwrap(), Attempt::Done);
    assert_eq!((out[..5].to_vec(), out[5..] != [3; 5]), (vec![3; 5], true));
    setup.world.release();
    writer.await.unwrap();
    setup.disk.settle().await.unwrap();
    assert_eq!(setup.world.bytes(made.image_id, made.number), expected);
    let status = setup.disk.status();
    assert_eq!((status.aside_bytes, status.spill_bytes), (0, 0));
    let mut now = expected;
    for (at, byte, len) in [(0, 1, CHUNK), (chunk, 2, 10), (2 * chunk - 5, 3, 10)] {
        now[at as usize..][..len].fill(byte);
    }
    assert_eq!(setup.disk.all().await, now);
    assert_eq!(setup.stable().await, now);
}

/// In the prototype, the commit after a failed one waited for ever.
#[tokio::test]
async fn a_failed_persist_leaves_its_changes_to_the_next_commit() {
    for call in ["begin", "chunk", "persist", "publish"] {
        let setup = Setup::usual();
        setup.disk.put(100, &pattern(3, 100_000)).await;
        setup.disk.ensure_clone().await.unwrap();
        setup.world.fail_next(call, Failure::Permanent);
        let made = setup.disk.commit().await.unwrap();
        let Settled::Failed { reason } = setup.disk.wait_stable(made.number).await.unwrap() else {
            panic!("{call}: it cannot be stable");
        };
        assert_eq!(reason, "planned");
        eventually("reported", || setup.world.calls("fail") == 1).await;
        let record = setup.world.record(made.image_id, made.number).unwrap();
        assert_eq!(record.state, SnapshotState::Failed);
        assert!(setup.disk.status().dirty_bytes >= 2 * CHUNK as u64, "{call}");
        setup.disk.put(3 * CHUNK as u64, &[5; 10]).await;
        assert_eq!(setup.stable().await, setup.disk.all().await, "{call}");
    }
}

#[tokio::test]
async fn calls_that_fail_for_a_while_are_tried_again() {
    let setup = Setup::usual();
    setup.disk.ensure_clone().await.unwrap();
    for call in ["begin", "publish", "fetch"] {
        setup.world.fail_next(call, Failure::Transient);
    }
    for call in ["begin", "publish"] {
        setup.world.fail_next(call, Failure::AnswerLost);
    }
    // A partial sector of a chunk that is not here: the persister must fetch the rest.
    setup.disk.put(0, &pattern(1, 4096)).await;
    assert_eq!(setup.stable().await, setup.disk.all().await);
    assert_eq!((setup.world.calls("begin"), setup.world.calls("publish")), (3, 3));
    assert_eq!(setup.disk.status().stalled, "");
}

/// S1 fails while S2 is pending behind it: S2 takes over, with its own version of shared chunks,
/// and with S1's copies of chunks that were overwritten after S2's cut only.
#[tokio::test]
async fn the_snapshot_behind_a_failed_one_takes_its_changes_over() {
    let setup = Setup::usual();
    let chunk = CHUNK as u64;
    setup.disk.put(0, &pattern(3, 4 * CHUNK)).await;
    setup.disk.ensure_clone().await.unwrap();
    setup.world.hold();
    let first = setup.disk.try_commit().unwrap().unwrap();
    // Chunk 0: in both. Chunk 1: overwritten before the second cut and after it.
    setup.disk.put(10, &[1; 100]).await;
    setup.disk.put(chunk + 10, &[2; 100]).await;
    let expected = setup.disk.all().await;
    let second = setup.disk.try_commit().unwrap().unwrap();
    // Chunk 1 again, and chunk 2 for the first time: only after both cuts.
    setup.disk.put(chunk + 10, &[3; 100]).await;
    setup.disk.put(2 * chunk + 10, &[4; 100]).await;
    setup.world.fail_next("persist", Failure::Permanent);
    setup.world.release();
    let failed = setup.disk.wait_stable(first.number).await.unwrap();
    assert_eq!(failed, Settled::Failed { reason: "planned".into() });
    assert_eq!(setup.disk.wait_stable(second.number).await.unwrap(), Settled::Stable);
    assert_eq!(setup.world.bytes(second.image_id, second.number), expected);
    assert_eq!(setup.stable().await, setup.disk.all().await);
    let status = setup.disk.status();
    assert_eq!((status.aside_bytes, status.spill_bytes), (0, 0));
}

/// As above, but S1 had read a chunk already when it was overwritten, so nothing was copied: the
/// bytes of S2's moment are gone, and S2 must fail rather than hold other ones.
#[tokio::test]
async fn a_snapshot_whose_bytes_are_gone_fails_and_the_next_is_whole() {
    let setup = Setup::usual();
    setup.disk.put(0, &pattern(3, 2 * CHUNK)).await;
    setup.disk.ensure_clone().await.unwrap();
    setup.world.hold();
    let first = setup.disk.try_commit().unwrap().unwrap();
    let second = setup.disk.try_commit().unwrap().unwrap();
    // begin, chunk 0
    for _ in 0..2 {
        setup.world.permit();
    }
    eventually("chunk 0 was read", || setup.disk.shared.generation.load().map.mark(0).captured)
        .await;
    setup.disk.put(0, &[9; 4096]).await;
    assert_eq!(setup.disk.status().aside_bytes, 0, "what was read needs no copy");
    setup.world.fail_next("persist", Failure::Permanent);
    setup.world.release();
    assert!(matches!(setup.disk.wait_stable(first.number).await.unwrap(), Settled::Failed { .. }));
    let Settled::Failed { reason } = setup.disk.wait_stable(second.number).await.unwrap() else {
        panic!("its bytes are gone");
    };
    assert!(reason.contains("chunk 0 was overwritten"), "{reason}");
    assert_eq!(setup.stable().await, setup.disk.all().await);
}

#[tokio::test]
async fn a_discarded_disk_is_a_snapshot_of_holes() {
    let setup = Setup::usual();
    setup.disk.put(100, &pattern(3, 200_000)).await;
    setup.disk.wipe(0, SIZE, Zero::Discard).await;
    assert_eq!(setup.disk.all().await, vec![0; SIZE as usize]);
    assert_eq!(setup.disk.seek_data(0), None);
    assert_eq!(setup.stable().await, vec![0; SIZE as usize]);
    assert_eq!(setup.disk.seek_hole(5), 5);
}

#[tokio::test]
async fn discard_leaves_partial_sectors_alone_and_write_zeroes_does_not() {
    let setup = Setup::usual();
    let (from, to) = (4096 + 100, CHUNK + 8192 + 7);
    let mut expected = setup.base.clone();
    setup.disk.wipe(from as u64, (to - from) as u64, Zero::Discard).await;
    expected[8192..CHUNK + 8192].fill(0);
    assert!(setup.disk.all().await == expected);
    setup.disk.wipe(from as u64, (to - from) as u64, Zero::WriteZeroes).await;
    expected[from..to].fill(0);
    assert!(setup.disk.all().await == expected);
    assert!(setup.stable().await == expected);
}

#[tokio::test]
async fn zeroing_what_is_zeros_already_takes_no_room() {
    // 100 chunks behind the end of the attached snapshot.
    let setup = Setup::new(CHUNK, 100 * CHUNK as u64, (1, 1));
    let chunk = CHUNK as u64;
    let all = setup.disk.try_zero(chunk, 99 * chunk, Zero::Discard).unwrap();
    assert_eq!(all, Attempt::Done, "not even long");
    let status = setup.disk.status();
    assert_eq!((status.local_bytes, status.dirty_bytes), (0, 0));
}

#[tokio::test]
async fn holes_are_found() {
    let setup = Setup::new(2 * CHUNK, 8 * CHUNK as u64, (1, 1));
    let (disk, chunk) = (&setup.disk, CHUNK as u64);
    assert_eq!((disk.seek_data(5), disk.seek_hole(5)), (Some(5), 2 * chunk));
    assert_eq!((disk.seek_data(2 * chunk), disk.seek_hole(2 * chunk)), (None, 2 * chunk));
    disk.put(5 * chunk + 8192, &[1; 100]).await;
    assert_eq!(disk.seek_data(2 * chunk), Some(5 * chunk + 8192));
    assert_eq!(disk.seek_hole(5 * chunk + 8192 + 5), 5 * chunk + 8192 + 4096);
    disk.wipe(0, 2 * chunk, Zero::Discard).await;
    assert_eq!(disk.seek_data(0), Some(5 * chunk + 8192));
    assert_eq!((disk.seek_data(8 * chunk), disk.seek_hole(8 * chunk)), (None, 8 * chunk));
}

#[tokio::test]
async fn rollback_goes_back_and_on() {
    let setup = Setup::usual();
    setup.disk.put(100, &pattern(3, 1000)).await;
    // Before the first CLONE: to the attached snapshot.
    setup.disk.rollback(0).await.unwrap();
    assert_eq!(setup.disk.all().await, setup.base);
    assert!(matches!(setup.disk.rollback(5).await, Err(DiskError::NoSnapshot { .. })));
    setup.disk.put(100, &pattern(4, 1000)).await;
    let second = setup.stable().await;
    setup.disk.put(70_000, &pattern(5, 100_000)).await;
    let third = setup.stable().await;
    setup.disk.put(0, &pattern(6, SIZE as usize)).await;
    setup.disk.rollback(0).await.unwrap();
    assert_eq!(setup.disk.all().await, third);
    // What is below the disk, and the clone, are kept; nothing else is.
    assert_eq!(setup.world.pins(), [(setup.image(), 1), (setup.image(), 3)]);
    setup.disk.rollback(2).await.unwrap();
    assert_eq!(setup.disk.all().await, second);
    assert_eq!(setup.world.pins(), [(setup.image(), 1), (setup.image(), 2)]);
    setup.world.fail_next("pin", Failure::AnswerLost);
    assert!(setup.disk.rollback(3).await.is_err());
    assert_eq!(setup.disk.all().await, second, "without a pin the disk stays as it is");
    setup.disk.drop_pin_if_unneeded((setup.image(), 3)).await;
    setup.disk.drop_pin_if_unneeded((setup.image(), 2)).await;
    assert_eq!(setup.world.pins(), [(setup.image(), 1), (setup.image(), 2)]);
    assert_eq!(setup.disk.status().dirty_bytes, 0);
    // What is committed now is a change of snapshot 2, not of 3.
    setup.disk.put(200_000, &pattern(7, 10)).await;
    let fourth = setup.stable().await;
    assert_eq!(fourth, setup.disk.all().await);
    assert_eq!(setup.world.record(setup.image(), 4).unwrap().dirty_chunks, 1);
    // It is what the next process finds.
    let setup = setup.reopen("boot").await;
    assert_eq!(setup.disk.all().await, fourth);
    let setup = setup.reopen("another").await;
    setup.disk.rollback(1).await.unwrap();
    assert_eq!(setup.disk.all().await, setup.base);
    assert_eq!(setup.world.pins(), [(setup.image(), 1)]);
    eventually("old generations are deleted", || {
        std::fs::read_dir(setup.dir.path().join("disk"))
            .unwrap()
            .filter(|entry| {
                entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("gen-")
            })
            .count()
            == 1
    })
    .await;
}

#[tokio::test]
async fn rollback_waits_for_what_is_pending() {
    let setup = Setup::usual();
    setup.disk.ensure_clone().await.unwrap();
    setup.world.hold();
    setup.disk.put(0, &[1; 4096]).await;
    let expected = setup.disk.all().await;
    setup.disk.try_commit().unwrap().unwrap();
    setup.disk.put(0, &[2; 4096]).await;
    let disk = Arc::clone(&setup.disk);
    let rollback = tokio::spawn(async move { disk.rollback(0).await });
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert!(!rollback.is_finished());
    assert_eq!(setup.disk.try_commit().unwrap(), None, "not while somebody rolls back");
    setup.world.release();
    rollback.await.unwrap().unwrap();
    assert_eq!(setup.disk.all().await, expected);
}

#[tokio::test]
async fn a_repeated_key_returns_the_first_answer() {
    let setup = Setup::usual();
    let disks = [Arc::clone(&setup.disk)];
    setup.disk.put(0, &[1; 10]).await;
    let first = Disk::commit_all(&disks, "key").await.unwrap();
    setup.disk.put(0, &[2; 10]).await;
    let again = Disk::commit_all(&disks, "key").await.unwrap();
    assert_eq!((again[0].number, again[0].dirty_bytes), (first[0].number, CHUNK as u64));
    drop(disks);
    // Not even the death of the daemon makes a second one.
    let setup = setup.reopen("boot").await;
    let disks = [Arc::clone(&setup.disk)];
    let again = Disk::commit_all(&disks, "key").await.unwrap();
    assert_eq!(again[0].number, first[0].number);
    let other = Disk::commit_all(&disks, "other").await.unwrap();
    assert_eq!(other[0].number, first[0].number + 1);
    let none =
        [Disk::commit_all(&disks, "").await.unwrap(), Disk::commit_all(&disks, "").await.unwrap()];
    assert_eq!((none[0][0].number, none[1][0].number), (4, 5));
    let long = "k".repeat(KEY_BYTES_MAX + 1);
    assert!(matches!(Disk::commit_all(&disks, &long).await, Err(DiskError::KeyTooLong)));
    let most = "k".repeat(KEY_BYTES_MAX);
    assert_eq!(Disk::commit_all(&disks, &most).await.unwrap()[0].number, 6);
    setup.disk.settle().await.unwrap();
}

#[tokio::test]
async fn acknowledged_writes_and_pending_snapshots_survive_the_daemon() {
    let setup = Setup::usual();
    setup.disk.ensure_clone().await.unwrap();
    setup.world.hold();
    setup.disk.put(100, &pattern(3, 150_000)).await;
    let expected = setup.disk.all().await;
    let made = setup.disk.try_commit().unwrap().unwrap();
    // begin, chunk 0
    setup.world.permit();
    setup.world.permit();
    eventually("chunk 0 was read", || setup.disk.shared.generation.load().map.mark(0).captured)
        .await;
    // Not a chunk of the snapshot: it stays whole.
    setup.disk.put(4 * CHUNK as u64, &[7; 5000]).await;
    let now = setup.disk.all().await;
    let setup = setup.reopen("boot").await;
    assert_eq!(setup.disk.all().await, now);
    assert_eq!(setup.disk.status().pending, [made.number]);
    setup.world.release();
    assert_eq!(setup.disk.wait_stable(made.number).await.unwrap(), Settled::Stable);
    assert_eq!(setup.world.bytes(made.image_id, made.number), expected);
    assert_eq!(setup.stable().await, now);
}

#[tokio::test]
async fn a_snapshot_whose_copies_died_with_the_daemon_has_failed() {
    let setup = Setup::usual();
    setup.disk.ensure_clone().await.unwrap();
    setup.world.hold();
    setup.disk.put(100, &pattern(3, 150_000)).await;
    let first = setup.disk.try_commit().unwrap().unwrap();
    setup.disk.put(0, &[7; 100]).await;
    let expected = setup.disk.all().await;
    let second = setup.disk.try_commit().unwrap().unwrap();
    let setup = setup.reopen("boot").await;
    setup.world.release();
    let settled = setup.disk.wait_stable(first.number).await.unwrap();
    assert!(matches!(settled, Settled::Failed { .. }));
    // The second one was not touched since: it takes over.
    assert_eq!(setup.disk.wait_stable(second.number).await.unwrap(), Settled::Stable);
    assert_eq!(setup.world.bytes(second.image_id, second.number), expected);
    eventually("reported", || {
        setup.world.record(first.image_id, first.number).unwrap().state == SnapshotState::Failed
    })
    .await;
}

#[tokio::test]
async fn a_snapshot_published_just_before_the_daemon_died_is_stable() {
    let setup = Setup::usual();
    setup.disk.ensure_clone().await.unwrap();
    setup.disk.put(0, &pattern(3, 3 * CHUNK)).await;
    let expected = setup.disk.all().await;
    setup.world.fail_next("publish", Failure::AnswerLost);
    setup.world.hold();
    let made = setup.disk.try_commit().unwrap().unwrap();
    // begin, three chunks, persist, publish: then it wants to publish again.
    for _ in 0..6 {
        setup.world.permit();
    }
    eventually("published", || {
        let record = setup.world.record(made.image_id, made.number);
        record.is_some_and(|record| record.state == SnapshotState::Stable)
    })
    .await;
    setup.disk.put(0, &[7; 100]).await;
    let setup = setup.reopen("boot").await;
    setup.world.release();
    assert_eq!(setup.disk.wait_stable(made.number).await.unwrap(), Settled::Stable);
    assert_eq!(setup.world.bytes(made.image_id, made.number), expected);
    assert_eq!(setup.stable().await, setup.disk.all().await);
    assert_eq!(setup.world.record(setup.image(), 3).unwrap().dirty_chunks, 1);
}

#[tokio::test]
async fn a_clean_stop_is_quick_to_start_even_after_a_reboot() {
    let setup = Setup::usual();
    setup.disk.put(100, &pattern(3, 150_000)).await;
    setup.stable().await;
    setup.disk.put(200_000, &pattern(4, 10)).await;
    let expected = setup.disk.all().await;
    setup.disk.shutdown().await.unwrap();
    assert!(matches!(setup.disk.try_write(0, &[1]), Err(DiskError::Stopped(_))));
    assert!(matches!(setup.disk.try_commit(), Err(DiskError::Stopped(_))));
    let setup = setup.reopen("another boot").await;
    assert_eq!(setup.disk.all().await, expected);
    assert_eq!(setup.disk.status().dirty_bytes, CHUNK as u64, "only what was dirty is");
    assert_eq!(setup.stable().await, expected);
}

#[tokio::test]
async fn numbers_are_never_reused_even_after_a_host_crash() {
    let setup = Setup::usual();
    setup.stable().await;
    setup.disk.flush().unwrap();
    let setup = setup.reopen("second boot").await;
    let made = setup.disk.commit().await.unwrap();
    assert!(made.number > 2, "{}", made.number);
    assert_eq!(setup.disk.wait_stable(made.number).await.unwrap(), Settled::Stable);
    assert!(matches!(
        setup.disk.wait_stable(made.number - 1).await.unwrap(),
        Settled::Failed { .. }
    ));
    assert_eq!(setup.disk.wait_stable(2).await.unwrap(), Settled::Stable);
    assert!(matches!(
        setup.disk.wait_stable(made.number + 1).await,
        Err(DiskError::NoSnapshot { .. })
    ));
}

#[tokio::test]
async fn a_disk_has_one_process_at_a_time() {
    let setup = Setup::usual();
    let path = setup.dir.path().join("disk");
    let open = || Disk::open(&path, deps(&setup.world, (1, 1), "boot"));
    assert!(matches!(open(), Err(DiskError::Locked(_))));
    let spec = setup.disk.spec().clone();
    let again = Disk::create(&path, spec.clone(), deps(&setup.world, (1, 1), "boot"));
    assert!(matches!(again, Err(DiskError::Exists(_))));
    setup.disk.shutdown().await.unwrap();
    let disk = open().unwrap();
    assert_eq!(disk.spec(), &spec);
    disk.remove().await.unwrap();
    assert!(!path.exists());
    assert!(matches!(open(), Err(DiskError::Absent(_))));
}

#[tokio::test]
async fn specifications_that_make_no_sense_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new();
    let source = world.image("base", &pattern(1, 2 * CHUNK));
    let create = |spec| Disk::create(&dir.path().join("d"), spec, deps(&world, (1, 1), "b"));
    let smaller = spec_of("d", source.clone(), CHUNK as u64);
    assert!(matches!(create(smaller), Err(DiskError::Invalid { .. })));
    let huge = spec_of("d", source.clone(), 9 << 40);
    assert!(matches!(create(huge), Err(DiskError::Invalid { .. })));
    let mut odd = spec_of("d", source.clone(), 1 << 20);
    odd.source.root.chunk_size = 5000;
    assert!(matches!(create(odd), Err(DiskError::Invalid { .. })));
    // What is left of a making that was interrupted is in nobody's way.
    std::fs::create_dir_all(dir.path().join("d/gen-1")).unwrap();
    let disk = create(spec_of("d", source, 8 << 40)).unwrap();
    disk.put((8 << 40) - 10, &[1; 10]).await;
    assert_eq!(disk.status().local_bytes, 4096);
}
/// In the prototype, fsync was a request to the kernel that nobody waited for, and which chunks were
/// local was written down when the daemon ended.
#[tokio::test]
async fn a_flush_syncs_what_it_must_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new();
    let files = CrashFiles::new(1);
    let source = world.image("base", &pattern(1, SIZE as usize));
    let path = dir.path().join("disk");
    let io = Arc::clone(&files) as Arc<dyn FileIo>;
    let deps = DiskDeps { io, ..deps(&world, (16, 16), "boot") };
    let disk = Disk::create(&path, spec_of("disk", source, SIZE), deps.clone()).unwrap();
    let syncs = || (files.syncs(Which::Delta), files.syncs(Which::Journal));
    let start = syncs();
    let since = || {
        let (delta, journal) = syncs();
        (delta - start.0, journal - start.1)
    };
    disk.flush().unwrap();
    assert_eq!(since(), (0, 0), "nothing was written");
    disk.put(0, &pattern(2, 10_000)).await;
    disk.flush().unwrap();
    assert_eq!(since(), (1, 1));
    disk.put(5000, &pattern(3, 100)).await;
    disk.flush().unwrap();
    assert_eq!(since(), (2, 1), "the map is as it was");
    disk.flush().unwrap();
    assert_eq!(since(), (2, 1));
    // A COMMIT syncs nothing at all, once there are numbers.
    disk.ensure_clone().await.unwrap();
    let state = files.syncs(Which::State);
    world.hold();
    disk.try_commit().unwrap().unwrap();
    assert_eq!((since(), files.syncs(Which::State)), ((2, 1), state));
}

#[tokio::test]
async fn a_write_that_is_likely_to_be_flushed_is_begun_to_be_written_out() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new();
    let files = CrashFiles::new(1);
    let source = world.image("base", &pattern(1, SIZE as usize));
    let io = Arc::clone(&files) as Arc<dyn FileIo>;
    let deps = DiskDeps { io, ..deps(&world, (16, 16), "boot") };
    let disk = Disk::create(&dir.path().join("disk"), spec_of("disk", source, SIZE), deps).unwrap();
    for _ in 0..100 {
        disk.put(0, &pattern(2, 4096)).await;
        disk.write_out_early();
    }
    assert_eq!(files.started(Which::Delta), 0, "nobody flushes");
    // Four flushes in a row that come soon: on a busy machine some do not.
    while files.started(Which::Delta) == 0 {
        disk.flush().unwrap();
        disk.put(0, &pattern(2, 4096)).await;
        disk.write_out_early();
    }
    disk.write_out_early();
    assert_eq!(files.started(Which::Delta), 1, "once for each flush");
    let syncs = files.syncs(Which::Delta);
    disk.flush().unwrap();
    assert_eq!(files.syncs(Which::Delta), syncs + 1, "a flush syncs as ever");
}

#[tokio::test]
async fn a_failed_fsync_stops_the_disk_until_it_is_opened_again() {
    for which in [Which::Delta, Which::Journal] {
        let dir = tempfile::tempdir().unwrap();
        let world = World::new();
        let files = CrashFiles::new(1);
        let source = world.image("base", &pattern(1, SIZE as usize));
        let path = dir.path().join("disk");
        let io = Arc::clone(&files) as Arc<dyn FileIo>;
        let deps = DiskDeps { io, ..deps(&world, (16, 16), "boot") };
        let disk = Disk::create(&path, spec_of("disk", source, SIZE), deps.clone()).unwrap();
        disk.ensure_clone().await.unwrap();
        disk.put(0, &pattern(2, 10_000)).await;
        let expected = disk.all().await;
        files.fail_next_sync(which);
        let poisoned = |result: Result<(), DiskError>| match result {
            Err(DiskError::Poisoned { file, .. }) => assert_eq!(file, which.name()),
            other => panic!("{other:?}"),
        };
        poisoned(disk.flush());
        // The next fsync would succeed, and prove nothing.
        poisoned(disk.flush());
        poisoned(disk.try_write(0, &[1]).map(|_| ()));
        poisoned(disk.try_zero(0, 4096, Zero::Discard).map(|_| ()));
        poisoned(disk.try_commit().map(|_| ()));
        poisoned(disk.rollback(0).await);
        poisoned(disk.shutdown().await);
        assert_eq!(disk.all().await, expected, "what is there can be read");
        drop(disk);
        let disk = Disk::open(&path, deps).unwrap();
        assert_eq!(disk.all().await, expected);
        disk.flush().unwrap();
    }
}

#[tokio::test]
async fn a_full_host_fails_the_write_that_needs_room_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new();
    let files = CrashFiles::new(1);
    let source = world.image("base", &pattern(1, SIZE as usize));
    let path = dir.path().join("disk");
    let io = Arc::clone(&files) as Arc<dyn FileIo>;
    let deps = DiskDeps { io, ..deps(&world, (0, 100), "boot") };
    let disk = Disk::create(&path, spec_of("disk", source, SIZE), deps.clone()).unwrap();
    let before = disk.all().await;
    let no_space = |error: DiskError, which: Which| match error {
        DiskError::NoSpace { file, .. } => assert_eq!(file, which.name()),
        other => panic!("{other:?}"),
    };
    // The map's first extent is there from the start; the delta has nothing.
    files.set_full(&[Which::Delta]);
    no_space(disk.try_write(0, &pattern(2, 4096)).unwrap_err(), Which::Delta);
    files.set_full(&[]);
    assert_eq!(disk.all().await[4096..], before[4096..]);
    disk.put(0, &pattern(3, 4096)).await;
    files.set_full(&[Which::Journal]);
    no_space(disk.flush().unwrap_err(), Which::Journal);
    no_space(disk.flush().unwrap_err(), Which::Journal);
    files.set_full(&[]);
    disk.flush().unwrap();
    // With no room for copies, a writer waits for the persister, as with a full budget.
    disk.ensure_clone().await.unwrap();
    world.hold();
    let expected = disk.all().await;
    let made = disk.try_commit().unwrap().unwrap();
    files.set_full(&[Which::Spill]);
    let writing = Arc::clone(&disk);
    let writer = tokio::spawn(async move { writing.put(100, &[9; 10]).await });
    eventually("the writer waits", || disk.status().throttled_writes > 0).await;
    world.release();
    writer.await.unwrap();
    assert_eq!(disk.wait_stable(made.number).await.unwrap(), Settled::Stable);
    assert_eq!(world.bytes(made.image_id, made.number), expected);
    // What failed for want of room was not flushed, what succeeded was.
    let now = disk.all().await;
    files.set_full(&[]);
    disk.flush().unwrap();
    let left = dir.path().join("left");
    files.crash(Crash::Host, &path, &left);
    let disk = Disk::open(&left, DiskDeps { boot_id: "next".into(), ..deps }).unwrap();
    assert_eq!(disk.all().await, now);
}

/// A map of a large disk takes space as it is touched; the kernel would kill the process that
/// stores to a page for which there is none.
#[tokio::test]
async fn a_full_host_is_noticed_before_the_map_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new();
    let files = CrashFiles::new(1);
    let source = world.image("base", &pattern(1, CHUNK));
    let io = Arc::clone(&files) as Arc<dyn FileIo>;
    let deps = DiskDeps { io, ..deps(&world, (0, 100), "boot") };
    // Records beyond the map's first extent. Host files of such a size are not read by this test.
    let spec = spec_of("disk", source, 1 << 30);
    let disk = Disk::create(&dir.path().join("disk"), spec, deps).unwrap();
    let far = (1 << 30) - 4096;
    files.set_full(&[Which::Map]);
    for result in [
        disk.try_write(far, &[1; 4096]),
        disk.try_zero(far, 4096, Zero::Discard).and_then(|_| disk.try_write(far, &[2; 4096])),
    ] {
        let Err(DiskError::NoSpace { file, .. }) = result else { panic!("{result:?}") };
        assert_eq!(file, Which::Map.name());
    }
    assert_eq!(disk.status().local_bytes, 0);
    files.set_full(&[]);
    assert_eq!(disk.try_write(far, &[3; 4096]).unwrap(), Attempt::Done);
    let mut out = [0; 4096];
    assert_eq!(disk.try_read(far, &mut out).unwrap(), Attempt::Done);
    assert_eq!(out, [3; 4096]);
}

#[tokio::test]
async fn a_flush_during_a_rollback_is_no_error() {
    let setup = Setup::usual();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let flusher = {
        let (disk, stop) = (Arc::clone(&setup.disk), Arc::clone(&stop));
        std::thread::spawn(move || {
            let mut n = 0;
            while !stop.load(Ordering::Acquire) {
                let _ = disk.try_write(n % CHUNKS * CHUNK as u64, &[n as u8; 4096]).unwrap();
                disk.flush().unwrap();
                n += 1;
            }
        })
    };
    for _ in 0..30 {
        setup.disk.rollback(0).await.unwrap();
    }
    stop.store(true, Ordering::Release);
    flusher.join().unwrap();
    setup.disk.rollback(0).await.unwrap();
    assert_eq!(setup.disk.all().await, setup.base);
}

#[tokio::test]
async fn a_panic_behind_the_persister_fails_the_snapshot_and_no_more() {
    let setup = Setup::usual();
    setup.disk.put(100, &pattern(3, 100_000)).await;
    setup.disk.ensure_clone().await.unwrap();
    setup.world.fail_next("chunk", Failure::Panic);
    let made = setup.disk.commit().await.unwrap();
    let Settled::Failed { reason } = setup.disk.wait_stable(made.number).await.unwrap() else {
        panic!("it cannot be stable");
    };
    assert!(reason.contains("panicked"), "{reason}");
    assert_eq!(setup.stable().await, setup.disk.all().await);
}

#[tokio::test]
async fn copies_of_one_disk_wait_for_no_other_disks_snapshot() {
    // One budget for two disks.
    let dir = tempfile::tempdir().unwrap();
    let world = World::new();
    let deps = deps(&world, (1, 0), "boot");
    let mut disks = Vec::new();
    for name in ["one", "two"] {
        let source = world.image(name, &pattern(1, SIZE as usize));
        let spec = spec_of(name, source, SIZE);
        disks.push(Disk::create(&dir.path().join(name), spec, deps.clone()).unwrap());
    }
    for disk in &disks {
        disk.put(0, &pattern(5, CHUNK)).await;
    }
    world.hold();
    let made = Disk::commit_all(&disks, "").await.unwrap();
    assert_eq!(disks[0].try_write(0, &[1; CHUNK]).unwrap(), Attempt::Done);
    let second = Arc::clone(&disks[1]);
    let writer = tokio::spawn(async move { second.put(0, &[2; 10]).await });
    eventually("the writer waits", || disks[1].status().throttled_writes > 0).await;
    world.release();
    writer.await.unwrap();
    for (disk, made) in disks.iter().zip(&made) {
        assert_eq!(disk.wait_stable(made.number).await.unwrap(), Settled::Stable);
        assert_eq!(world.bytes(made.image_id, made.number)[..CHUNK], pattern(5, CHUNK));
    }
}
