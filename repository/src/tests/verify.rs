use std::sync::Mutex;

use blobcr_proto::ChunkSize;

use super::*;
use crate::Object;
use crate::testing::{MemoryPool, PoolOperation};
use crate::tree::{FanOut, Geometry};

const CHUNKS: u64 = 40;
const PATIENCE: Duration = Duration::from_secs(10);

/// A disk of 40 different chunks of which the last ten are holes, in a tree of fan-out 4.
async fn stored() -> (MemoryPool, Arc<dyn ObjectStore>, Root) {
    let pool = MemoryPool::default();
    let chunk_size = ChunkSize::MIN;
    let size = CHUNKS * chunk_size.bytes();
    let geometry = Geometry::new(size, chunk_size, FanOut::new(4).unwrap()).unwrap();
    let mut changes = Vec::new();
    for index in 0..CHUNKS - 10 {
        let plain = Bytes::from(vec![index as u8 + 1; chunk_size.len()]);
        let id = Hash::of(&plain);
        changes.push((index, Some(id)));
        pool.put(1, vec![Object { kind: RecordKind::Chunk, id, plain }]).await.unwrap();
    }
    let updated = tree::update(&pool, &Root::empty(geometry), geometry, &changes).await.unwrap();
    for node in updated.new_nodes {
        let (kind, id, plain) = (RecordKind::TreeNode, node.id, node.encoding);
        pool.put(1, vec![Object { kind, id, plain }]).await.unwrap();
    }
    let store: Arc<dyn ObjectStore> = Arc::new(pool.clone());
    (pool, store, updated.root)
}

async fn run(pool: &Arc<dyn ObjectStore>, root: &Root) -> Verification {
    verify(pool, root, PATIENCE, &|_, _| ()).await.unwrap()
}

#[tokio::test]
async fn a_whole_snapshot_is_read_to_the_last_byte() {
    let (pool, store, root) = stored().await;
    let steps = Mutex::new(Vec::new());
    let progress = |done, total| steps.lock().unwrap().push((done, total));
    let found = verify(&store, &root, PATIENCE, &progress).await.unwrap();
    assert!(found.is_whole());
    // 8 leaves over the 30 chunks, 2 above them, 1 on top.
    assert_eq!((found.chunks, found.nodes), (30, 11));
    assert_eq!(found.bytes, 30 * ChunkSize::MIN.bytes());
    assert_eq!(steps.into_inner().unwrap(), (1..=30).map(|at| (at, 30)).collect::<Vec<_>>());
    // Every chunk is really read, and every node at least once.
    assert!(pool.faults().calls(PoolOperation::Get) >= 41);
}

#[tokio::test]
async fn an_image_of_zeros_is_whole() {
    let (_, store, root) = stored().await;
    let found = run(&store, &Root::empty(root.geometry)).await;
    assert!(found.is_whole());
    assert_eq!((found.nodes, found.chunks), (0, 0));
}

#[tokio::test]
async fn all_damage_is_told_with_what_it_costs() {
    let (pool, store, root) = stored().await;
    let ids = tree::lookup(&pool, &root, 0, 30).await.unwrap();
    pool.lose(RecordKind::Chunk, &ids[2].unwrap());
    pool.damage(RecordKind::Chunk, &ids[29].unwrap());
    let mut leaves = Vec::new();
    let mut note = |reached| {
        if let Reached::Node { id, level: 0, first_chunk } = reached {
            leaves.push((first_chunk, id));
        }
        true
    };
    tree::for_each_node(&pool, &root, &mut note).await.unwrap();
    let leaf = |first| leaves.iter().find(|(chunk, _)| *chunk == first).unwrap().1;
    pool.lose(RecordKind::TreeNode, &leaf(8));
    pool.damage(RecordKind::TreeNode, &leaf(12));
    let found = run(&store, &root).await;
    assert_eq!(found.damaged, 4);
    let places: Vec<_> = found.damage.iter().map(|d| (d.kind, d.chunks.clone())).collect();
    assert_eq!(
        places,
        [
            (RecordKind::Chunk, 2..3),
            (RecordKind::TreeNode, 8..12),
            (RecordKind::TreeNode, 12..16),
            (RecordKind::Chunk, 29..30),
        ]
    );
    assert_eq!(found.damage[0].id, ids[2].unwrap());
    assert!(found.damage[3].detail.contains("on purpose"), "{}", found.damage[3].detail);
    // What is not below a lost node was read all the same.
    assert_eq!(found.chunks, 30 - 8);
}

#[tokio::test]
async fn a_lost_top_is_the_whole_disk() {
    let (pool, store, root) = stored().await;
    pool.lose(RecordKind::TreeNode, &root.node.unwrap());
    let found = run(&store, &root).await;
    assert_eq!((found.damaged, found.chunks), (1, 0));
    assert_eq!(found.damage[0].chunks, 0..CHUNKS);
}

#[tokio::test(start_paused = true)]
async fn absence_is_not_damage() {
    let (pool, store, root) = stored().await;
    pool.faults().fail_next(PoolOperation::Get, 5, StoreError::Unavailable("away".into()));
    assert!(run(&store, &root).await.is_whole(), "it came back in time");
    pool.faults().down(StoreError::Unavailable("away".into()));
    let error = verify(&store, &root, PATIENCE, &|_, _| ()).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
}
