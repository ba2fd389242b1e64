//! Read traces.

use blobcr_metadata::Error;
use blobcr_metadata::records::{KeyKind, ReadTraceRecord};
use blobcr_proto::v1;

use crate::fixture::{Fixture, Kind, at, begin, clone, named, refused};

impl Fixture {
    async fn put(&self, image_id: u64, number: u64, chunks: &[u64]) -> Result<(), Error> {
        let trace = Some(v1::ReadTrace::of(chunks.iter().copied()));
        let r = v1::PutReadTraceRequest { image_id, number, trace };
        self.manager.put_read_trace(r).await.map(|_| ())
    }

    /// The image and snapshot that it was kept for, and what is in it.
    async fn trace(&self, name: &str, number: u64) -> Option<(u64, u64, Vec<u64>)> {
        match self.manager.get_read_trace(at(name, number)).await {
            Ok(found) => {
                let chunks = found.trace.unwrap().chunks().collect();
                Some((found.image_id, found.number, chunks))
            }
            Err(Error::NotFound { .. }) => None,
            Err(error) => panic!("{error}"),
        }
    }

    async fn kept(&self) -> Vec<(u64, u64)> {
        let all = self.records::<ReadTraceRecord>(KeyKind::ReadTrace).await;
        all.into_iter().map(|trace| (trace.image_id, trace.number)).collect()
    }
}

#[tokio::test]
async fn the_longest_trace_stays_whoever_puts_it_and_how_often() {
    let f = Fixture::new().await;
    let id = f.image_with("base", "", 2).await.id;
    assert_eq!(f.trace("base", 1).await, None);
    f.put(id, 1, &[5, 6, 1]).await.unwrap();
    f.put(id, 1, &[5, 6, 1]).await.unwrap();
    f.put(id, 1, &[1, 2, 3]).await.unwrap();
    assert_eq!(f.trace("base", 1).await, Some((id, 1, vec![5, 6, 1])));
    f.put(id, 1, &[5, 6, 1, 2]).await.unwrap();
    f.put(id, 1, &[9]).await.unwrap();
    assert_eq!(f.restarted().trace("base", 1).await, Some((id, 1, vec![5, 6, 1, 2])));
}

#[tokio::test]
async fn a_snapshot_without_one_borrows_from_those_before_it() {
    let f = Fixture::new().await;
    let base = f.image_with("base", "", 3).await.id;
    f.put(base, 2, &[2]).await.unwrap();
    assert_eq!(f.trace("base", 1).await, None, "what is newer says nothing");
    assert_eq!(f.trace("base", 3).await, Some((base, 2, vec![2])));
    let made = f.manager.clone_image(clone(at("base", 3), "job", "")).await.unwrap();
    let job = made.image.unwrap().id;
    assert_eq!(f.trace("job", 1).await, Some((base, 2, vec![2])));
    // The source of a clone may be gone, and its traces with it.
    f.put(job, 1, &[1, 7]).await.unwrap();
    f.manager.remove_image(named("base")).await.unwrap();
    assert_eq!(f.kept().await, [(job, 1)]);
    f.manager.clone_image(clone(at("job", 1), "again", "")).await.unwrap();
    assert_eq!(f.trace("again", 1).await, Some((job, 1, vec![1, 7])));
}

#[tokio::test]
async fn it_goes_with_its_snapshot_and_is_kept_with_no_other() {
    let f = Fixture::new().await;
    let id = f.image_with("base", "", 3).await.id;
    for number in 1..=3 {
        f.put(id, number, &[number]).await.unwrap();
    }
    f.manager.remove_snapshot(at("base", 2)).await.unwrap();
    assert_eq!(f.kept().await, [(id, 1), (id, 3)]);
    refused(f.put(id, 2, &[1]).await, Kind::Precondition, &["base@2", "stable"]);
    let lease = f.lease().await;
    f.manager.begin_snapshot(begin(id, 4, lease, "")).await.unwrap();
    refused(f.put(id, 4, &[1]).await, Kind::Precondition, &["base@4"]);
    refused(f.put(id, 9, &[1]).await, Kind::NotFound, &["base@9"]);
    refused(f.put(99, 1, &[1]).await, Kind::NotFound, &["99"]);
    refused(f.put(id, 1, &[]).await, Kind::Invalid, &["chunks"]);
    refused(f.put(id, 0, &[1]).await, Kind::Invalid, &["number"]);
    f.manager.remove_image(named("base")).await.unwrap();
    assert_eq!(f.kept().await, []);
}

/// More than one page of its removal.
#[tokio::test]
async fn an_image_keeps_the_traces_of_its_newest_snapshots() {
    let f = Fixture::new().await;
    let id = f.image_with("base", "", 70).await.id;
    for number in 1..=70 {
        f.put(id, number, &[number, 0]).await.unwrap();
    }
    assert_eq!(f.kept().await, (63..=70).map(|number| (id, number)).collect::<Vec<_>>());
    f.manager.remove_image(named("base")).await.unwrap();
    assert_eq!(f.kept().await, []);
}

/// Whatever comes first, no trace is left without its snapshot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trace_that_is_put_while_its_snapshot_goes_is_not_left_behind() {
    for round in 0..50 {
        let f = Fixture::new().await;
        let id = f.image_with("base", "", 2).await.id;
        let other = f.restarted();
        let puts = tokio::spawn(async move {
            let put = f.put(id, 1, &[1]).await;
            (f, put)
        });
        let removes = tokio::spawn(async move {
            if round % 2 == 0 {
                other.manager.remove_snapshot(at("base", 1)).await.map(|_| ())
            } else {
                other.manager.remove_image(named("base")).await.map(|_| ())
            }
        });
        let (f, _) = puts.await.unwrap();
        removes.await.unwrap().unwrap();
        assert_eq!(f.kept().await, []);
    }
}
