use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicBool;

use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;

const SMALL: ChunkSize = ChunkSize::MIN;

fn limits(capacity_bytes: u64) -> CacheLimits {
    CacheLimits { capacity_bytes, keep_free_bytes: 0 }
}

/// The bytes of the `n`-th chunk of a size: its number is everywhere in it.
fn content(n: u64, chunk_size: ChunkSize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(chunk_size.len());
    for word in 0..chunk_size.bytes() / 8 {
        bytes.extend_from_slice(&(n.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ word).to_le_bytes());
    }
    bytes
}

fn chunk(n: u64, chunk_size: ChunkSize) -> (Hash, Vec<u8>) {
    let bytes = content(n, chunk_size);
    (Hash::of(&bytes), bytes)
}

fn read(
    cache: &ChunkCache,
    id: &Hash,
    size: ChunkSize,
    within: usize,
    len: usize,
) -> Option<Vec<u8>> {
    let mut out = vec![0xEE; len];
    cache.read(id, size, within, &mut out).then_some(out)
}

#[test]
fn what_was_put_in_comes_out_in_any_part() {
    let dir = tempfile::tempdir().unwrap();
    let cache = ChunkCache::open(dir.path(), limits(64 << 20)).unwrap();
    for size in [SMALL, ChunkSize::DEFAULT, ChunkSize::MAX] {
        let (id, bytes) = chunk(1, size);
        assert_eq!(read(&cache, &id, size, 0, 10), None);
        cache.insert(id, &bytes);
        for (within, len) in [(0, size.len()), (1, 1), (4095, 4098), (size.len() - 3, 3), (7, 0)] {
            let part = read(&cache, &id, size, within, len).unwrap();
            assert_eq!(part, bytes[within..within + len]);
        }
    }
    let held = SMALL.bytes() + ChunkSize::DEFAULT.bytes() + ChunkSize::MAX.bytes();
    assert_eq!(cache.status().used_bytes, held);
}

#[test]
fn chunks_survive_a_restart_and_are_verified_before_they_are_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let chunks: Vec<_> = (0..20).map(|n| chunk(n, SMALL)).collect();
    let cache = ChunkCache::open(dir.path(), limits(64 << 20)).unwrap();
    chunks.iter().for_each(|(id, bytes)| cache.insert(*id, bytes));
    drop(cache);

    let cache = ChunkCache::open(dir.path(), limits(64 << 20)).unwrap();
    assert_eq!(cache.status().used_bytes, 20 * SMALL.bytes());
    for (id, bytes) in &chunks {
        assert_eq!(read(&cache, id, SMALL, 0, 100), None, "not compared with its identity yet");
        assert_eq!(cache.read_verified(id, SMALL).unwrap(), bytes);
        assert_eq!(read(&cache, id, SMALL, 5, 100).unwrap(), bytes[5..105]);
    }
}

#[test]
fn a_damaged_chunk_is_dropped_and_can_be_put_in_again() {
    let dir = tempfile::tempdir().unwrap();
    let (id, bytes) = chunk(1, SMALL);
    let other = chunk(2, SMALL);
    let cache = ChunkCache::open(dir.path(), limits(64 << 20)).unwrap();
    cache.insert(id, &bytes);
    cache.insert(other.0, &other.1);
    drop(cache);
    let data = File::options().write(true).open(dir.path().join("chunks-64k.data")).unwrap();
    data.write_all_at(&[!bytes[777]], 777).unwrap();

    let cache = ChunkCache::open(dir.path(), limits(64 << 20)).unwrap();
    assert!(cache.holds(&id, SMALL));
    assert_eq!(cache.read_verified(&id, SMALL), None);
    assert!(!cache.holds(&id, SMALL), "it is dropped");
    assert_eq!(cache.status().used_bytes, SMALL.bytes());
    assert_eq!(cache.read_verified(&other.0, SMALL).unwrap(), other.1, "the other one is whole");
    cache.insert(id, &bytes);
    assert_eq!(read(&cache, &id, SMALL, 700, 100).unwrap(), bytes[700..800]);
}

#[test]
fn any_damage_of_the_files_costs_only_fetches() {
    let dir = tempfile::tempdir().unwrap();
    let chunks: Vec<_> = (0..10).map(|n| chunk(n, SMALL)).collect();
    let index = dir.path().join("chunks-64k.index");
    let data = dir.path().join("chunks-64k.data");
    let damages: [&dyn Fn(); 5] = [
        &|| std::fs::write(&index, b"").unwrap(),
        &|| std::fs::write(&index, [0xFF; 5000]).unwrap(),
        &|| File::options().write(true).open(&index).unwrap().set_len(4096 + 101).unwrap(),
        &|| File::options().write(true).open(&data).unwrap().set_len(3 * 65536 + 5).unwrap(),
        &|| std::fs::remove_file(&index).unwrap(),
    ];
    for damage in damages {
        let cache = ChunkCache::open(dir.path(), limits(64 << 20)).unwrap();
        chunks.iter().for_each(|(id, bytes)| cache.insert(*id, bytes));
        drop(cache);
        damage();
        let cache = ChunkCache::open(dir.path(), limits(64 << 20)).unwrap();
        for (id, bytes) in &chunks {
            let found = cache.read_verified(id, SMALL);
            assert!(found.is_none_or(|found| found == bytes));
            cache.insert(*id, bytes);
            assert_eq!(&cache.read_verified(id, SMALL).unwrap(), bytes);
        }
    }
}

#[test]
fn the_bound_holds_over_all_chunk_sizes_and_a_smaller_bound_is_kept_to() {
    let dir = tempfile::tempdir().unwrap();
    let capacity = 6 << 20;
    let cache = ChunkCache::open(dir.path(), limits(capacity)).unwrap();
    for n in 0..100 {
        for size in [SMALL, ChunkSize::DEFAULT, ChunkSize::MAX] {
            let (id, bytes) = chunk(n, size);
            cache.insert(id, &bytes);
            assert!(cache.status().used_bytes <= capacity);
        }
    }
    assert_eq!(cache.status().refused, 0, "every chunk size found room");
    assert!(cache.status().evicted > 0);
    let on_disk = |dir: &Path| -> u64 {
        let files = std::fs::read_dir(dir).unwrap();
        files
            .map(|file| rustix::fs::stat(file.unwrap().path()).unwrap().st_blocks as u64 * 512)
            .sum()
    };
    assert!(on_disk(dir.path()) <= capacity + (1 << 20), "what is evicted takes no space");
    drop(cache);
    let cache = ChunkCache::open(dir.path(), limits(1 << 20)).unwrap();
    assert!(cache.status().used_bytes <= 1 << 20);
    assert!(on_disk(dir.path()) <= 2 << 20);
}

#[test]
fn what_is_read_often_stays() {
    let dir = tempfile::tempdir().unwrap();
    let cache = ChunkCache::open(dir.path(), limits(16 * SMALL.bytes())).unwrap();
    let (hot, bytes) = chunk(0, SMALL);
    cache.insert(hot, &bytes);
    for n in 1..200 {
        assert!(read(&cache, &hot, SMALL, 0, 8).is_some(), "before chunk {n}");
        let (id, bytes) = chunk(n, SMALL);
        cache.insert(id, &bytes);
    }
}

#[test]
fn without_space_nothing_is_cached_and_space_is_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let (id, bytes) = chunk(0, SMALL);
    let none = ChunkCache::open(&dir.path().join("none"), limits(0)).unwrap();
    none.insert(id, &bytes);
    assert!(!none.holds(&id, SMALL));

    let dir = dir.path().join("full");
    let cache = ChunkCache::open(&dir, limits(64 << 20)).unwrap();
    cache.insert(id, &bytes);
    assert_eq!(cache.yield_space(), 0);
    drop(cache);
    let all = CacheLimits { capacity_bytes: 64 << 20, keep_free_bytes: u64::MAX };
    let cache = ChunkCache::open(&dir, all).unwrap();
    let (second, bytes) = chunk(1, SMALL);
    cache.insert(second, &bytes);
    assert!(cache.holds(&second, SMALL), "an old chunk's place can be taken without new space");
    assert!(!cache.holds(&id, SMALL));
    assert_eq!(cache.yield_space(), SMALL.bytes());
    assert_eq!(cache.status().used_bytes, 0);
    cache.insert(id, &bytes_of(0));
    assert!(!cache.holds(&id, SMALL));
    assert_eq!(cache.status().refused, 1);
}

#[test]
fn space_is_given_back_as_far_as_there_is_any() {
    let dir = tempfile::tempdir().unwrap();
    let cache = ChunkCache::open(dir.path(), limits(64 << 20)).unwrap();
    for n in 0..10 {
        let (id, bytes) = chunk(n, SMALL);
        cache.insert(id, &bytes);
    }
    assert_eq!(cache.give_back(SMALL.bytes() + 1), 2 * SMALL.bytes());
    assert_eq!(cache.give_back(u64::MAX), 8 * SMALL.bytes());
    assert_eq!(cache.give_back(1), 0);
}

fn bytes_of(n: u64) -> Vec<u8> {
    content(n, SMALL)
}

/// Readers, inserters and droppers at once, in a cache that has room for few of the chunks: bytes
/// that come out are always those of the chunk that was asked for.
fn storm(seed: u64, chunks: u64, slots: u64) {
    let dir = tempfile::tempdir().unwrap();
    let cache = ChunkCache::open(dir.path(), limits(slots * SMALL.bytes())).unwrap();
    let chunks: Vec<_> = (0..chunks).map(|n| chunk(n, SMALL)).collect();
    let done = AtomicBool::new(false);
    let hits = AtomicU64::new(0);
    let (cache, chunks, done, hits) = (&cache, &chunks, &done, &hits);
    std::thread::scope(|scope| {
        for reader in 0..3 {
            let mut random = StdRng::seed_from_u64(seed ^ (reader << 32));
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    let (id, bytes) = &chunks[random.random_range(0..chunks.len())];
                    let within = random.random_range(0..SMALL.len());
                    let len = random.random_range(0..=SMALL.len() - within);
                    if let Some(part) = read(cache, id, SMALL, within, len) {
                        assert!(part == bytes[within..within + len], "foreign bytes of {id}");
                        hits.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        let writers: Vec<_> = (0..2)
            .map(|writer| {
                let mut random = StdRng::seed_from_u64(seed ^ (writer << 48) ^ 1);
                scope.spawn(move || {
                    for _ in 0..400 {
                        let (id, bytes) = &chunks[random.random_range(0..chunks.len())];
                        cache.insert(*id, bytes);
                        if random.random_ratio(1, 50) {
                            cache.shrink_largest();
                        }
                        assert!(cache.status().used_bytes <= cache.limits.capacity_bytes);
                    }
                })
            })
            .collect();
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        done.store(true, Ordering::Relaxed);
    });
    assert!(hits.load(Ordering::Relaxed) > 0, "the readers must have read something");
    assert!(cache.status().evicted > 0, "chunks must have made room for others");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, max_shrink_iters: 0, ..ProptestConfig::default() })]
    #[test]
    fn no_eviction_hands_out_foreign_bytes(seed: u64, chunks in 10u64..40, slots in 4u64..9) {
        storm(seed, chunks, slots);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    /// Against a plain map: a hit is always right, and a chunk just put in is always there.
    #[test]
    fn it_behaves_like_a_map_that_may_forget(
        steps in proptest::collection::vec((0u8..4, 0u64..12, 0usize..65536), 1..120),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = ChunkCache::open(dir.path(), limits(5 * SMALL.bytes())).unwrap();
        for (what, n, within) in steps {
            let (id, bytes) = chunk(n, SMALL);
            match what {
                0 => {
                    cache.insert(id, &bytes);
                    prop_assert!(cache.holds(&id, SMALL));
                }
                1 => {
                    let len = (SMALL.len() - within).min(5000);
                    if let Some(part) = read(&cache, &id, SMALL, within, len) {
                        prop_assert_eq!(&part[..], &bytes[within..within + len]);
                    }
                }
                2 => {
                    let held = cache.holds(&id, SMALL);
                    let found = cache.read_verified(&id, SMALL);
                    prop_assert_eq!(found.is_some(), held);
                    prop_assert!(found.is_none_or(|found| found == bytes));
                }
                _ => {
                    let used = cache.status().used_bytes;
                    drop(cache);
                    cache = ChunkCache::open(dir.path(), limits(5 * SMALL.bytes())).unwrap();
                    prop_assert_eq!(cache.status().used_bytes, used);
                }
            }
        }
    }
}
