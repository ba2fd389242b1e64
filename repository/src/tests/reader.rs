use std::sync::Mutex;

use blobcr_proto::ChunkSize;
use proptest::prelude::*;

use super::*;
use crate::testing::{MemoryPool, PoolOperation};
use crate::tree::{FanOut, Geometry};
use crate::{Object, nodes::CachedNodes};

const CHUNK: ChunkSize = ChunkSize::MIN;
const CHUNK_LEN: usize = CHUNK.len();

/// Stores a disk whose chunk `i` is filled with `fill[i]` (0: a hole), a few bytes short of whole
/// chunks.
async fn stored(fill: &[u8]) -> (MemoryPool, SnapshotReader, Vec<u8>) {
    let pool = MemoryPool::default();
    let size = fill.len() * CHUNK_LEN - 100;
    let geometry = Geometry::new(size as u64, CHUNK, FanOut::new(4).unwrap()).unwrap();
    let mut changes = Vec::new();
    let mut objects = Vec::new();
    let mut model = Vec::new();
    for (index, byte) in fill.iter().enumerate() {
        let mut chunk = vec![*byte; CHUNK_LEN];
        if *byte != 0 {
            // Chunks of the same byte differ.
            chunk[..8].copy_from_slice(&(index as u64).to_le_bytes());
            if index + 1 == fill.len() {
                chunk[CHUNK_LEN - 100..].fill(0);
            }
            let plain = Bytes::from(chunk.clone());
            let id = Hash::of(&plain);
            objects.push(Object { kind: RecordKind::Chunk, id, plain });
            changes.push((index as u64, Some(id)));
        }
        model.extend(chunk);
    }
    model.truncate(size);
    let updated = tree::update(&pool, &Root::empty(geometry), geometry, &changes).await.unwrap();
    objects.extend(updated.new_nodes.into_iter().map(|node| Object {
        kind: RecordKind::TreeNode,
        id: node.id,
        plain: node.encoding,
    }));
    pool.put(1, objects).await.unwrap();
    let store: Arc<dyn ObjectStore> = Arc::new(pool.clone());
    let nodes = Arc::new(CachedNodes::new(Arc::clone(&store)));
    (pool, SnapshotReader::new(updated.root, nodes, store), model)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn any_range_reads_as_the_disk_was(
        fill in proptest::collection::vec(0u8..3, 1..30),
        ranges in proptest::collection::vec((0usize..2_000_000, 0usize..400_000), 10),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let (_, reader, model) = stored(&fill).await;
            for (start, len) in ranges {
                let start = start % (model.len() + 1);
                let len = len.min(model.len() - start);
                let mut out = vec![0xEE; len];
                reader.read(start as u64, &mut out).await.unwrap();
                assert!(out == model[start..start + len], "{len} bytes from {start}");
            }
            let chunks: Vec<_> = reader.present(0..u64::MAX).try_collect().await.unwrap();
            let mut rebuilt = vec![0; fill.len() * CHUNK_LEN];
            assert!(chunks.is_sorted_by(|(a, _), (b, _)| a < b));
            for (index, plain) in chunks {
                assert_ne!(fill[index as usize], 0);
                rebuilt[index as usize * CHUNK_LEN..][..CHUNK_LEN].copy_from_slice(&plain);
            }
            rebuilt.truncate(model.len());
            assert!(rebuilt == model);
        });
    }
}

#[tokio::test]
async fn bytes_beyond_the_end_are_refused() {
    let (_, reader, model) = stored(&[1, 2]).await;
    let size = model.len() as u64;
    for (start, len) in [(size, 1), (0, model.len() + 1), (size + 5, 0), (u64::MAX, 2)] {
        let error = reader.read(start, &mut vec![0; len]).await.unwrap_err();
        assert!(matches!(error, ReadError::BeyondEnd { .. }), "{error}");
    }
    reader.read(size, &mut []).await.unwrap();
}

#[tokio::test]
async fn one_read_fetches_each_chunk_once_and_no_more_at_once_than_it_may() {
    let (pool, reader, model) = stored(&[1; 40]).await;
    let reader = reader.with_prefetch(5);
    // The nodes come into the cache.
    reader.read(0, &mut [0; 1]).await.unwrap();
    reader.present(0..40).try_collect::<Vec<_>>().await.unwrap();
    pool.faults().reset_calls();
    let held = pool.faults().hold_next(PoolOperation::Get, 5);
    let mut out = vec![0; model.len()];
    {
        let mut reading = Box::pin(reader.read(0, &mut out));
        tokio::select! {
            _ = &mut reading => panic!("it cannot end while it is held"),
            () = held.arrived(5) => {}
        }
        assert_eq!(pool.faults().calls(PoolOperation::Get), 5);
        held.release();
        reading.await.unwrap();
    }
    assert_eq!(pool.faults().calls(PoolOperation::Get), 40);
    assert!(out == model);
}

#[tokio::test]
async fn a_stream_keeps_order_and_fetches_nothing_outside_its_range() {
    let (pool, reader, _) = stored(&[3; 20]).await;
    let reader = reader.with_prefetch(4);
    let order = Mutex::new(Vec::new());
    reader
        .present(5..15)
        .try_for_each(|(index, _)| {
            order.lock().unwrap().push(index);
            futures::future::ready(Ok(()))
        })
        .await
        .unwrap();
    assert_eq!(order.into_inner().unwrap(), (5..15).collect::<Vec<_>>());
    // The chunks, and of the tree of fan-out 4: leaves 1 to 3, the node above them, the top.
    assert_eq!(pool.faults().calls(PoolOperation::Get), 10 + 5);
}

#[tokio::test]
async fn failures_say_which_chunk_and_whether_to_try_again() {
    let (pool, reader, _) = stored(&[1, 1, 1]).await;
    let ids = tree::lookup(&pool, reader.root(), 0, 3).await.unwrap();
    let lost = ids[1].unwrap();
    pool.lose(RecordKind::Chunk, &lost);
    let error = reader.chunk(1).await.unwrap_err();
    assert!(error.is_damage() && !error.is_transient());
    assert!(error.to_string().contains("chunk 1"), "{error}");
    assert!(error.to_string().contains(&lost.to_string()), "{error}");
    assert!(reader.chunk(0).await.unwrap().is_some());
    assert!(reader.chunk(99).await.unwrap().is_none(), "nothing is beyond the end");
    let away = StoreError::Unavailable("away".into());
    pool.faults().fail_next(PoolOperation::Get, 1, away);
    assert!(reader.chunk(0).await.unwrap_err().is_transient());
}

#[tokio::test]
async fn a_chunk_of_the_wrong_length_is_damage() {
    let pool = MemoryPool::default();
    let plain = Bytes::from_static(b"far too short");
    let id = Hash::of(&plain);
    pool.put(1, vec![Object { kind: RecordKind::Chunk, id, plain }]).await.unwrap();
    let error = fetch_chunk(&pool, id, CHUNK_LEN).await.unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
}
