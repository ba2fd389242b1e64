//! The guest's side of a channel against a host that is scripted byte by byte.

#![expect(clippy::unwrap_used, reason = "a failure in a test is a failed test")]

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::{JoinHandle, spawn};
use std::time::{Duration, Instant};

use blobcr_guest::{Ask, Client, Deadline, GuestError, Target};
use blobcr_guest_fake_host::{Connection, encode};
use blobcr_proto::channel::Frame;
use blobcr_proto::v1::channel_reply::Reply;
use blobcr_proto::v1::channel_request::Request;
use blobcr_proto::v1::{
    ChannelError, CheckpointReply, DiskSnapshot, Snapshot, SnapshotState, VmStatusReply,
    WaitStableReply,
};
use bytes::BytesMut;
use tempfile::TempDir;

const SOON: Duration = Duration::from_secs(30);

/// A host: a socket, and what it does with each connection.
struct Host {
    _dir: TempDir,
    path: PathBuf,
}

impl Host {
    fn new() -> (Self, UnixListener) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.sock");
        let listener = UnixListener::bind(&path).unwrap();
        (Self { _dir: dir, path }, listener)
    }

    fn client(&self) -> Client {
        Client::new(Target::Socket(self.path.clone()))
    }
}

fn accept(listener: &UnixListener) -> Connection<UnixStream> {
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    Connection::new(stream)
}

fn checkpoint(connection: &mut Connection<UnixStream>) -> (u64, String) {
    match connection.request() {
        Some((id, Request::Checkpoint(request))) => {
            assert!(request.vm.is_empty(), "a guest does not say which VM it is");
            (id, request.idempotency_key)
        }
        other => panic!("no checkpoint: {other:?}"),
    }
}

fn taken(number: u64) -> CheckpointReply {
    let snapshot =
        DiskSnapshot { disk: "d0".into(), image: "c".into(), number, ..DiskSnapshot::default() };
    CheckpointReply { vm: "vm".into(), snapshots: vec![snapshot] }
}

fn snapshot(state: SnapshotState, reason: &str) -> Snapshot {
    let mut snapshot =
        Snapshot { image: "c".into(), number: 1, reason: reason.into(), ..Snapshot::default() };
    snapshot.set_state(state);
    snapshot
}

fn ask(client: Client) -> JoinHandle<Result<CheckpointReply, GuestError>> {
    spawn(move || client.checkpoint(&Ask::new(), Deadline::after(SOON)))
}

#[test]
fn a_request_is_sent_again_to_a_host_that_went_away() {
    let (host, listener) = Host::new();
    let asking = ask(host.client());
    let mut first = accept(&listener);
    let sent = checkpoint(&mut first);
    drop((first, listener));
    std::fs::remove_file(&host.path).unwrap();
    // It is away for a while, then there, but does not listen to the end.
    std::thread::sleep(Duration::from_millis(50));
    let listener = UnixListener::bind(&host.path).unwrap();
    let mut second = accept(&listener);
    assert_eq!(checkpoint(&mut second), sent, "the same request, the same key");
    // It dies in the middle of its answer.
    let answer = encode(sent.0, Reply::Checkpoint(taken(1)));
    second.send(&answer[..answer.len() - 3]);
    drop(second);
    let mut third = accept(&listener);
    assert_eq!(checkpoint(&mut third), sent);
    third.reply(sent.0, Reply::Checkpoint(taken(2)));
    assert_eq!(asking.join().unwrap().unwrap(), taken(2));
    assert!(third.request().is_none(), "it asks for nothing else");
}

#[test]
fn a_request_that_was_lost_without_notice_is_sent_again() {
    let (host, listener) = Host::new();
    let asking = ask(host.client());
    let mut connection = accept(&listener);
    let sent = checkpoint(&mut connection);
    // Nobody answers, nobody hangs up.
    let began = Instant::now();
    assert_eq!(checkpoint(&mut connection), sent);
    assert_eq!(checkpoint(&mut connection), sent);
    assert!(began.elapsed() > Duration::from_millis(500), "not all the time");
    connection.reply(sent.0, Reply::Checkpoint(taken(1)));
    assert_eq!(asking.join().unwrap().unwrap(), taken(1));
}

#[test]
fn answers_to_others_and_noise_are_passed_over() {
    let (host, listener) = Host::new();
    let asking = ask(host.client());
    let mut connection = accept(&listener);
    let (id, _) = checkpoint(&mut connection);
    connection.send(b"the end of an answer to a program that is no more BCKF\x01\0\0\0");
    connection.reply(id.wrapping_add(1), Reply::Checkpoint(taken(7)));
    let answer = encode(id, Reply::Checkpoint(taken(1)));
    for byte in &answer {
        connection.send(&[*byte]);
    }
    assert_eq!(asking.join().unwrap().unwrap(), taken(1));
}

#[test]
fn refusals_and_nonsense_have_their_exit_codes() {
    let (host, listener) = Host::new();
    let error = |code, message: &str| Reply::Error(ChannelError { code, message: message.into() });
    for (reply, exit_code, text) in [
        (error(3, "no such key"), 2, "no such key"),
        (error(5, "no such disk"), 3, "no such disk"),
        (error(6, "there already"), 4, "there already"),
        (error(9, "rolling back"), 4, "rolling back"),
        (error(10, "lost a race"), 4, "lost a race"),
        (error(14, "start the mirror"), 5, "start the mirror"),
        (error(15, "damaged"), 6, "damaged"),
        (error(8, "too many"), 1, "too many"),
        (error(-1, "?"), 1, "?"),
        (Reply::Status(VmStatusReply::default()), 1, "was not asked for"),
    ] {
        let asking = ask(host.client());
        let mut connection = accept(&listener);
        let (id, _) = checkpoint(&mut connection);
        connection.reply(id, reply);
        let error = asking.join().unwrap().unwrap_err();
        assert_eq!(error.exit_code(), exit_code, "{error}");
        assert!(error.to_string().contains(text), "{error}");
    }
    for body in [&b"\xff\xff"[..], b""] {
        let asking = ask(host.client());
        let mut connection = accept(&listener);
        let (request_id, _) = checkpoint(&mut connection);
        let mut bytes = BytesMut::new();
        Frame { request_id, body: body.to_vec().into() }.encode(&mut bytes).unwrap();
        connection.send(&bytes);
        let error = asking.join().unwrap().unwrap_err();
        assert!(matches!(error, GuestError::BadAnswer(_)), "{error}");
    }
}

#[test]
fn a_host_that_is_not_there_or_says_nothing_is_given_up_in_time() {
    let (host, listener) = Host::new();
    let short = || Deadline::after(Duration::from_millis(100));
    let began = Instant::now();
    let error = host.client().checkpoint(&Ask::new(), short()).unwrap_err();
    assert!(matches!(error, GuestError::NoAnswer { .. }), "{error}");
    assert_eq!(error.exit_code(), 5);
    drop(listener);
    let error = host.client().checkpoint(&Ask::new(), short()).unwrap_err();
    assert!(error.to_string().contains("nobody listens"), "{error}");
    std::fs::remove_file(&host.path).unwrap();
    let error = host.client().status(short()).unwrap_err();
    assert!(error.to_string().contains("nobody listens"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    // What can never be a socket is no matter of time.
    std::fs::write(&host.path, b"").unwrap();
    let client = Client::new(Target::Socket(host.path.join("vm.sock")));
    let error = client.status(Deadline::after(SOON)).unwrap_err();
    assert!(matches!(error, GuestError::Io { .. }), "{error}");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

/// An address that the hypervisor forwards is always listened on; each connection to it costs the host a
/// process, though there may be no proxy behind it.
#[test]
fn a_host_that_hangs_up_at_once_is_not_called_all_the_time() {
    let (host, listener) = Host::new();
    let hanging_up = spawn(move || {
        // Until one says nothing: the last one does not.
        let said = |stream: &UnixStream| Connection::new(stream).request().is_some();
        listener.incoming().map_while(Result::ok).take_while(said).count()
    });
    let error = host.client().status(Deadline::after(Duration::from_secs(2))).unwrap_err();
    assert!(matches!(error, GuestError::NoAnswer { .. }), "{error}");
    drop(UnixStream::connect(&host.path));
    let calls = hanging_up.join().unwrap();
    assert!(calls < 20, "{calls} calls in two seconds");
}

/// Answers each question of a wait with the next of the replies, the last one for ever.
fn answer_waits(listener: UnixListener, replies: Vec<Reply>) -> JoinHandle<usize> {
    spawn(move || {
        let mut asked = 0;
        loop {
            let mut connection = accept(&listener);
            let Some((id, Request::WaitStable(request))) = connection.request() else {
                return asked;
            };
            assert_eq!(request.snapshots.len(), 1);
            let reply = replies.get(asked).or(replies.last()).unwrap().clone();
            asked += 1;
            let last = asked == replies.len();
            connection.reply(id, reply);
            if last {
                return asked;
            }
        }
    })
}

fn stable(state: SnapshotState, reason: &str) -> Reply {
    Reply::WaitStable(WaitStableReply { snapshots: vec![snapshot(state, reason)] })
}

#[test]
fn a_wait_goes_on_until_the_snapshot_is_settled() {
    let (host, listener) = Host::new();
    let later = |code| Reply::Error(ChannelError { code, message: "later".into() });
    let replies = vec![
        later(4),
        later(14),
        stable(SnapshotState::Pending, ""),
        later(4),
        stable(SnapshotState::Stable, ""),
    ];
    let answering = answer_waits(listener, replies);
    let found = host.client().wait_stable(&taken(1).snapshots, Deadline::after(SOON)).unwrap();
    assert_eq!(found, [snapshot(SnapshotState::Stable, "")]);
    assert_eq!(answering.join().unwrap(), 5);
}

#[test]
fn a_wait_for_what_is_lost_says_why() {
    for (state, reason, text) in [
        (SnapshotState::Failed, "the pool is full", "the pool is full"),
        (SnapshotState::Obsolete, "", "it is obsolete"),
    ] {
        let (host, listener) = Host::new();
        let answering = answer_waits(listener, vec![stable(state, reason)]);
        let error = host.client().wait_stable(&taken(1).snapshots, Deadline::after(SOON));
        let error = error.unwrap_err();
        assert!(matches!(error, GuestError::Lost { .. }), "{error}");
        assert!(error.to_string().contains(text), "{error}");
        answering.join().unwrap();
    }
}

#[test]
fn a_wait_that_runs_out_is_told_from_a_loss() {
    let (host, listener) = Host::new();
    let answering = spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let mut connection = Connection::new(stream);
            let Some((id, _)) = connection.request() else { continue };
            connection.reply(id, stable(SnapshotState::Pending, ""));
        }
    });
    let deadline = Deadline::after(Duration::from_millis(60));
    let error = host.client().wait_stable(&taken(1).snapshots, deadline).unwrap_err();
    assert!(matches!(error, GuestError::NotYet { .. }), "{error}");
    assert_eq!(error.exit_code(), 5);
    drop(answering);
}

#[test]
fn keys_are_never_the_same() {
    let keys: std::collections::HashSet<String> = (0..1000).map(|_| Ask::new().key).collect();
    assert_eq!(keys.len(), 1000);
    assert!(keys.iter().all(|key| key.len() == 32));
}
