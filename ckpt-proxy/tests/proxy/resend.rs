//! Ends that go away and come back: the guest's, the proxy's and the mirror's.

use std::time::{Duration, Instant};

use blobcr_ckpt_proxy::testing::ScriptedHost;
use blobcr_proto::v1::channel_reply::Reply;
use tonic::{Code, Status};

use crate::peer::{Setup, checkpoint, quick, until};

#[tokio::test(flavor = "multi_thread")]
async fn whoever_comes_back_while_it_runs_gets_the_one_answer() {
    let setup = Setup::new().await;
    setup.script.hold();
    let mut peer = setup.peer("one").await;
    peer.send(1, checkpoint("k")).await;
    until("it runs", || setup.script.running().0 == 1).await;
    drop(peer);
    let mut peer = setup.peer("one").await;
    peer.send(1, checkpoint("k")).await;
    // Again on the same connection, as a guest does when it hears nothing.
    peer.send(1, checkpoint("k")).await;
    peer.send(2, checkpoint("k")).await;
    setup.script.release();
    let mut answers = vec![peer.answer().await.unwrap(), peer.answer().await.unwrap()];
    answers.sort_by_key(|(id, _)| *id);
    let [(1, Reply::Checkpoint(first)), (2, Reply::Checkpoint(second))] = &answers[..] else {
        panic!("{answers:?}");
    };
    assert_eq!(first, second);
    assert_eq!(peer.checkpoint(3, "k").await, *first, "and whoever comes later as well");
    assert_eq!(setup.script.calls(), ["one/k"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_proxy_gets_the_first_answer_from_the_mirror() {
    let mut setup = Setup::new().await;
    let first = setup.peer("one").await.checkpoint(1, "k").await;
    setup.restart_proxy().await;
    assert_eq!(setup.peer("one").await.checkpoint(1, "k").await, first);
    assert_eq!(setup.script.calls(), ["one/k", "one/k"]);
    assert_eq!(setup.peer("one").await.checkpoint(1, "l").await.snapshots[0].number, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_answers_nobody_falsely() {
    let mut setup = Setup::new().await;
    setup.script.hold();
    let mut peer = setup.peer("one").await;
    peer.send(1, checkpoint("k")).await;
    until("it runs", || setup.script.running().0 == 1).await;
    setup.restart_proxy().await;
    assert!(peer.answer().await.is_none(), "closed without an answer");
    let mut peer = setup.peer("one").await;
    peer.send(1, checkpoint("k")).await;
    setup.script.release();
    let Some((1, Reply::Checkpoint(reply))) = peer.answer().await else { panic!("no answer") };
    assert_eq!(reply.snapshots[0].number, 1, "it was one checkpoint all along");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_mirror_the_answer_is_unavailable_and_soon() {
    let mut setup = Setup::new().await;
    let mut peer = setup.peer("one").await;
    let address = std::mem::replace(
        &mut setup.host,
        ScriptedHost::start(&blobcr_ckpt_proxy::testing::Script::new(&[]), None),
    )
    .kill();
    let began = Instant::now();
    peer.send(1, checkpoint("k")).await;
    let (_, code, message) = peer.refusal().await;
    assert_eq!(code, Code::Unavailable);
    assert!(message.contains(&address.to_string()), "{message}");
    assert!(message.contains("see that"), "it says what to do: {message}");
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    // It is back, and nothing else has to be done about it.
    setup.host = ScriptedHost::start(&setup.script, Some(address));
    assert_eq!(peer.checkpoint(2, "k").await.snapshots[0].number, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_restarts_in_the_middle_is_asked_again() {
    let mut limits = quick();
    limits.unreachable = Duration::from_secs(20);
    let mut setup = Setup::with(limits).await;
    setup.script.hold();
    let mut peer = setup.peer("one").await;
    peer.send(1, checkpoint("k")).await;
    until("it runs", || setup.script.running().0 == 1).await;
    let spare = ScriptedHost::start(&blobcr_ckpt_proxy::testing::Script::new(&[]), None);
    let address = std::mem::replace(&mut setup.host, spare).kill();
    until("it is gone", || setup.script.running().0 == 0).await;
    setup.script.release();
    setup.host = ScriptedHost::start(&setup.script, Some(address));
    let Some((1, Reply::Checkpoint(reply))) = peer.answer().await else { panic!("no answer") };
    assert_eq!(reply.snapshots[0].number, 1);
    assert_eq!(setup.script.calls(), ["one/k", "one/k"], "with the same key");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_without_its_repository_is_quoted() {
    let setup = Setup::new().await;
    let mut peer = setup.peer("one").await;
    for _ in 0..100 {
        setup.script.fail_next(Status::unavailable("the repository cannot be reached: start it"));
    }
    peer.send(1, checkpoint("k")).await;
    let (_, code, message) = peer.refusal().await;
    assert_eq!(code, Code::Unavailable);
    assert_eq!(message, "the repository cannot be reached: start it");
    let calls = setup.script.calls().len();
    assert!((2..60).contains(&calls), "tried again with pauses: {calls}");
}
