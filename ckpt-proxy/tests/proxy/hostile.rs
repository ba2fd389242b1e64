//! What a guest may do to its channel, and what it cannot do to anybody else by it.

use std::time::Duration;

use blobcr_ckpt_proxy::Limits;
use blobcr_proto::v1::channel_reply::Reply;
use blobcr_proto::v1::channel_request::Request;
use blobcr_proto::v1::{CheckpointRequest, VmStatusRequest, WaitStableRequest};
use bytes::{BufMut, BytesMut};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::io::AsyncWriteExt;
use tonic::Code;

use crate::peer::{Setup, checkpoint, frame, in_time, quick, raw_frame, status, until, wait};

#[tokio::test(flavor = "multi_thread")]
async fn a_request_in_the_name_of_another_vm_is_refused() {
    let setup = Setup::new().await;
    let mut peer = setup.peer("one").await;
    for vm in ["two", "none", "ONE", "one "] {
        let vm = vm.to_owned();
        let forged = [
            Request::Checkpoint(CheckpointRequest { vm: vm.clone(), ..Default::default() }),
            Request::WaitStable(WaitStableRequest { vm: vm.clone(), ..Default::default() }),
            Request::Status(VmStatusRequest { vm }),
        ];
        for (id, request) in forged.into_iter().enumerate() {
            peer.send(id as u64, request).await;
            let (answered, code, _) = peer.refusal().await;
            assert_eq!((answered, code), (id as u64, Code::PermissionDenied));
        }
    }
    assert!(setup.script.calls().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_understood_is_refused_by_its_id() {
    let setup = Setup::new().await;
    let mut peer = setup.peer("one").await;
    peer.raw(&raw_frame(5, vec![0xff; 40])).await;
    let (id, code, _) = peer.refusal().await;
    assert_eq!((id, code), (5, Code::InvalidArgument));
    // Empty, and a request of a later version.
    for (id, body) in [(6, vec![]), (7, vec![0x7a, 0x01, 0x00])] {
        peer.raw(&raw_frame(id, body)).await;
        let (answered, code, _) = peer.refusal().await;
        assert_eq!((answered, code), (id, Code::Unimplemented));
    }
    for key in ["k".repeat(65), "a b".into(), "schlüssel".into()] {
        peer.send(8, checkpoint(&key)).await;
        assert_eq!(peer.refusal().await.1, Code::InvalidArgument, "{key}");
    }
    assert!(setup.script.calls().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_oversized_frame_is_passed_over() {
    let setup = Setup::new().await;
    let mut peer = setup.peer("one").await;
    let mut oversized = BytesMut::from(&b"BCKF\x01\0\0\0"[..]);
    oversized.put_u64_le(1);
    oversized.put_u32_le(1 << 30);
    oversized.put_u32_le(0);
    oversized.put_bytes(0x42, 300_000);
    peer.raw(&oversized).await;
    assert_eq!(peer.checkpoint(2, "k").await.snapshots.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn half_a_frame_does_not_swallow_the_next_request() {
    let setup = Setup::new().await;
    let mut peer = setup.peer("one").await;
    // The program died after the head of a frame of 60 000 bytes.
    let half = raw_frame(1, vec![0; 60_000]);
    peer.raw(&half[..100]).await;
    assert_eq!(peer.checkpoint(2, "k").await.vm, "one");
    // And again, in the middle of a head.
    peer.raw(&half[..10]).await;
    assert_eq!(peer.checkpoint(3, "l").await.vm, "one");
    // One byte at a time is slow, but no fault.
    let whole = frame(4, status());
    for byte in &whole {
        peer.raw(&[*byte]).await;
    }
    assert_eq!(peer.answer().await.unwrap().0, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_came_before_a_request_is_answered() {
    let setup = Setup::new().await;
    for seed in 0..60 {
        let mut random = StdRng::seed_from_u64(seed);
        let mut peer = setup.peer("one").await;
        for _ in 0..random.random_range(1..6) {
            let mut piece = match random.random_range(0..3) {
                0 => frame(random.random(), status()),
                1 => raw_frame(random.random(), vec![7; random.random_range(0..3000)]),
                _ => BytesMut::from(&random.random::<[u8; 32]>()[..]),
            };
            for _ in 0..random.random_range(0..4) {
                let at = random.random_range(0..piece.len());
                piece[at] ^= 1 << random.random_range(0..8);
            }
            piece.truncate(random.random_range(0..=piece.len()));
            peer.raw(&piece).await;
        }
        peer.send(u64::MAX, status()).await;
        let answered = async {
            while let Some((id, _)) = peer.answer().await {
                if id == u64::MAX {
                    return true;
                }
            }
            false
        };
        assert!(in_time(&format!("seed {seed}"), answered).await, "seed {seed}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_requests_keeps_a_few_places_busy_and_no_more() {
    let setup = Setup::new().await;
    setup.script.hold();
    let mut flood = setup.peer("one").await;
    for id in 0..200u64 {
        flood.send(id, checkpoint(&format!("k{id}"))).await;
    }
    let mut refused = 0;
    while refused < 200 - 4 {
        let (id, code, _) = flood.refusal().await;
        assert_eq!(code, Code::ResourceExhausted, "{id}");
        refused += 1;
    }
    until("four run", || setup.script.running().0 == 4).await;
    // A second connection of the VM shares its places.
    let mut second = setup.peer("one").await;
    second.send(1, checkpoint("more")).await;
    assert_eq!(second.refusal().await.1, Code::ResourceExhausted);
    assert_eq!(setup.script.running(), (4, 4));
    setup.script.release();
    for _ in 0..4 {
        flood.answer().await.unwrap();
    }
    // The other VM never noticed.
    assert_eq!(setup.peer("two").await.checkpoint(1, "k").await.vm, "two");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flooded_vm_does_not_hold_up_another() {
    let setup = Setup::new().await;
    let mut flood = setup.peer("one").await;
    let flooding = tokio::spawn(async move {
        // Never reads an answer, until the proxy has had enough of it.
        let request = frame(1, status());
        while flood.stream.write_all(&request).await.is_ok() {}
    });
    let mut other = setup.peer("two").await;
    for id in 0..20 {
        assert_eq!(other.checkpoint(id, &format!("k{id}")).await.vm, "two");
    }
    in_time("the proxy closes a connection that takes no answers", flooding).await.unwrap();
    assert_eq!(setup.peer("one").await.checkpoint(1, "k").await.vm, "one");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_of_noise_is_closed_and_the_next_one_served() {
    let setup = Setup::new().await;
    let mut peer = setup.peer("one").await;
    // Every place looks like a frame of full length, which costs the most to find out.
    let mut head = BytesMut::from(&b"BCKF\x01\0\0\0"[..]);
    head.put_u64_le(1);
    head.put_u32_le(64 << 10);
    head.put_u32_le(0);
    let noise = head.repeat(20_000);
    drop(in_time("noise", peer.stream.write_all(&noise)).await);
    assert!(peer.answer().await.is_none(), "it is closed");
    assert_eq!(setup.peer("one").await.checkpoint(1, "k").await.vm, "one");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_bounded() {
    let limits = Limits { connections: 3, ..quick() };
    let setup = Setup::with(limits).await;
    let mut peers = Vec::new();
    for id in 0..3 {
        let mut peer = setup.peer("two").await;
        peer.checkpoint(id, "k").await;
        peers.push(peer);
    }
    assert!(setup.peer("two").await.answer().await.is_none(), "a fourth one is closed");
    peers.truncate(2);
    // The place is free as soon as the proxy has seen that the third one is gone.
    loop {
        let mut peer = setup.peer("two").await;
        drop(peer.stream.write_all(&frame(9, status())).await);
        if peer.answer().await.is_some() {
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn waits_are_bounded_and_end_with_their_connection() {
    let setup = Setup::new().await;
    setup.peer("two").await.checkpoint(0, "k").await;
    let (sender, mut refused) = tokio::sync::mpsc::unbounded_channel();
    let mut connections = tokio::task::JoinSet::new();
    for _ in 0..3 {
        let mut peer = setup.peer("two").await;
        let sender = sender.clone();
        connections.spawn(async move {
            for id in 0..8 {
                peer.send(id, wait(&[], 60_000)).await;
            }
            while let Some((_, Reply::Error(error))) = peer.answer().await {
                sender.send(Code::from(error.code)).unwrap();
            }
        });
    }
    for _ in 0..8 {
        let code = in_time("8 of 24 are refused", refused.recv()).await.unwrap();
        assert_eq!(code, Code::ResourceExhausted);
    }
    connections.shutdown().await;
    loop {
        let mut peer = setup.peer("two").await;
        peer.send(1, wait(&[], 1)).await;
        if peer.refusal().await.1 == Code::DeadlineExceeded {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_of_a_connection_are_bounded() {
    let setup = Setup::new().await;
    let mut peer = setup.peer("two").await;
    peer.checkpoint(0, "k").await;
    for id in 1..=8 {
        peer.send(id, wait(&[], 60_000)).await;
    }
    peer.send(9, status()).await;
    let (id, code, _) = peer.refusal().await;
    assert_eq!((id, code), (9, Code::ResourceExhausted));
}
