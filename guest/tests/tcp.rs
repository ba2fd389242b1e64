//! The guest's side of a channel over TCP, and checkpoint sets.

#![expect(clippy::unwrap_used, reason = "a failure in a test is a failed test")]

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread::spawn;
use std::time::{Duration, Instant};

use blobcr_guest::{Ask, Client, Credentials, Deadline, GuestError, Target};
use blobcr_guest_fake_host::{Connection, FakeHost, Sets, encode, refusal};
use blobcr_proto::v1::channel_reply::Reply;
use blobcr_proto::v1::channel_request::Request;
use blobcr_proto::v1::{CheckpointReply, HelloReply, SetMembership, SetState, VmStatusReply};

const SOON: Duration = Duration::from_secs(30);

fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

fn accept(listener: &TcpListener) -> Connection<TcpStream> {
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    Connection::new(stream)
}

fn with_token(address: SocketAddr) -> Client {
    let credentials = Credentials { vm: "web".into(), token: "s3cret".into() };
    Client::new(Target::tcp(address, Some(credentials)))
}

fn greet(connection: &mut Connection<TcpStream>) {
    let Some((id, Request::Hello(hello))) = connection.request() else { panic!("no greeting") };
    assert_eq!((hello.vm.as_str(), hello.token.as_str()), ("web", "s3cret"));
    connection.reply(id, Reply::Hello(HelloReply { vm: "web".into() }));
}

fn key(connection: &mut Connection<TcpStream>) -> (u64, String) {
    match connection.request() {
        Some((id, Request::Checkpoint(request))) => (id, request.idempotency_key),
        other => panic!("no checkpoint: {other:?}"),
    }
}

fn taken() -> CheckpointReply {
    CheckpointReply { vm: "web".into(), snapshots: Vec::new() }
}

#[test]
fn each_connection_begins_with_who_it_is_and_goes_on_with_the_same_request() {
    let (listener, address) = listen();
    let asking = spawn(move || with_token(address).checkpoint(&Ask::new(), Deadline::after(SOON)));
    let mut first = accept(&listener);
    greet(&mut first);
    let sent = key(&mut first);
    // It goes away in the middle of the answer, and for a while nobody listens.
    let answer = encode(sent.0, Reply::Checkpoint(taken()));
    first.send(&answer[..answer.len() / 2]);
    drop((first, listener));
    std::thread::sleep(Duration::from_millis(100));
    let listener = TcpListener::bind(address).unwrap();
    let mut second = accept(&listener);
    greet(&mut second);
    assert_eq!(key(&mut second), sent);
    // Nobody answers, nobody hangs up: the same again, but no second greeting.
    assert_eq!(key(&mut second), sent);
    second.reply(sent.0, Reply::Checkpoint(taken()));
    assert_eq!(asking.join().unwrap().unwrap(), taken());
    assert!(second.request().is_none(), "it asks for nothing else");
}

#[test]
fn a_greeting_that_nobody_answers_is_said_again_on_another_connection() {
    let (listener, address) = listen();
    let asking = spawn(move || with_token(address).status(Deadline::after(SOON)));
    let mut first = accept(&listener);
    assert!(matches!(first.request(), Some((_, Request::Hello(_)))));
    assert!(first.request().is_none(), "it must hang up");
    let mut second = accept(&listener);
    greet(&mut second);
    let Some((id, Request::Status(_))) = second.request() else { panic!("no status") };
    second.reply(id, Reply::Status(VmStatusReply::default()));
    assert_eq!(asking.join().unwrap().unwrap(), VmStatusReply::default());
}

#[test]
fn a_refused_token_ends_it_at_once() {
    let (listener, address) = listen();
    let began = Instant::now();
    let asking = spawn(move || with_token(address).status(Deadline::after(SOON)));
    let mut connection = accept(&listener);
    let Some((id, Request::Hello(_))) = connection.request() else { panic!("no greeting") };
    connection.reply(id, refusal(16, "no such VM or another token"));
    let error = asking.join().unwrap().unwrap_err();
    assert!(matches!(error, GuestError::Refused { code: 16, .. }), "{error}");
    assert_eq!(error.errno(), 13, "EACCES");
    assert!(connection.request().is_none(), "it must not ask for anything");
    assert!(began.elapsed() < SOON / 2, "{:?}", began.elapsed());
}

#[test]
fn a_forwarded_address_needs_no_greeting() {
    let sets = Sets::default();
    let host = FakeHost::new("web", &sets);
    let client = Client::new(Target::tcp(host.address().parse().unwrap(), None));
    let mut asking = Ask::new();
    let set = client.begin_set("", 1, Deadline::after(SOON)).unwrap();
    assert_eq!((set.group.as_str(), set.sequence, set.expected_vms), ("only", 1, 1));
    asking.set = Some(SetMembership {
        group: set.group.clone(),
        sequence: set.sequence,
        expected_vms: set.expected_vms,
    });
    client.checkpoint(&asking, Deadline::after(SOON)).unwrap();
    for sequence in [0, 1] {
        let set = client.set_status("", sequence, Deadline::after(SOON)).unwrap();
        assert_eq!((set.sequence, set.joined_vms, set.state()), (1, 1, SetState::Stable));
    }
    let error = client.set_status("", 9, Deadline::after(SOON)).unwrap_err();
    assert_eq!((error.exit_code(), error.errno()), (3, 2), "{error}");
    assert_eq!(host.asked().len(), 5);
}

#[test]
fn an_address_where_nobody_listens_is_given_up_in_time() {
    let (listener, address) = listen();
    drop(listener);
    let began = Instant::now();
    let error = with_token(address).status(Deadline::after(Duration::from_millis(100)));
    let error = error.unwrap_err();
    assert!(error.to_string().contains(&format!("nobody listens on {address}")), "{error}");
    assert_eq!((error.exit_code(), error.errno()), (5, 110));
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}
