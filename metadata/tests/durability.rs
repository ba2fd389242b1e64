//! What was acknowledged survives: seen in the system calls, and after kill -9.
//!
//! Both tests run this very binary again as a child, which opens the store named in its environment
//! and prints each swap that was acknowledged.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use blobcr_metadata::store::sled::SledStore;
use blobcr_metadata::store::{Expect, Key, MetaStore, Swap};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const DIR: &str = "BLOBCR_DURABILITY_CHILD_DIR";
const MODE: &str = "BLOBCR_DURABILITY_CHILD_MODE";
const SEED: &str = "BLOBCR_DURABILITY_SEED";

const SEQUENTIAL: u64 = 25;
const CONCURRENT: u64 = 60;
const TASKS: u64 = 6;

/// Does nothing unless it runs as a child.
#[test]
fn child() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let store = Arc::new(runtime.block_on(SledStore::open(Path::new(&dir))).unwrap());
    match std::env::var(MODE).unwrap().as_str() {
        "trace" => runtime.block_on(traced(store)),
        "kill" => runtime.block_on(killed(store)),
        other => panic!("no mode {other:?}"),
    }
}

fn command(dir: &Path, mode: &str) -> Vec<(String, String)> {
    let dir = dir.to_str().unwrap().to_owned();
    vec![(DIR.to_owned(), dir), (MODE.to_owned(), mode.to_owned())]
}

fn key(name: String) -> Key {
    Key::new(name)
}

/// One line, written by one system call.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("{line}\n").as_bytes()).unwrap();
    out.flush().unwrap();
}

async fn traced(store: Arc<SledStore>) {
    say("READY");
    for n in 0..SEQUENTIAL {
        let value = vec![n as u8; 100 * n as usize];
        let swap = Swap::new().put(key(format!("s{}", n % 7)), Expect::Any, value);
        store.swap(swap).await.unwrap();
        say(&format!("ACK {n}"));
    }
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..CONCURRENT {
        let store = Arc::clone(&store);
        tasks.spawn(async move {
            store.swap(Swap::new().put(key(format!("c{n}")), Expect::Any, "v")).await.unwrap();
        });
    }
    tasks.join_all().await;
    say("ALL");
    // Without the last words of sled, which sync as well.
    std::process::exit(0);
}

/// A system call of the trace, from the line where it began to the line where it had ended.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Call {
    name: String,
    args: String,
    result: String,
    begun: usize,
    ended: usize,
}

impl Call {
    fn on(&self, path: &str) -> bool {
        // With -y, the first argument is FD</the/path>.
        let file = self.args.split_once('<').and_then(|(_, rest)| rest.split_once('>'));
        file.is_some_and(|(file, _)| file == path)
    }

    fn says(&self, text: &str) -> bool {
        self.name == "write" && self.args.contains(&format!("\"{text}\\n\""))
    }
}

/// Reads the output of `strace -f -y -o`.
fn parse(trace: &str) -> Vec<Call> {
    let mut open: HashMap<&str, Call> = HashMap::new();
    let mut calls = Vec::new();
    for (at, line) in trace.lines().enumerate() {
        let Some((pid, event)) = line.split_once(char::is_whitespace) else { continue };
        let event = event.trim_start();
        if let Some(rest) = event.strip_prefix("<... ") {
            let Some(mut call) = open.remove(pid) else { continue };
            let (_, rest) = rest.split_once(" resumed>").unwrap();
            let (args, result) = rest.rsplit_once(" = ").unwrap_or((rest, "?"));
            call.args.push_str(args);
            call.result = result.trim().to_owned();
            call.ended = at;
            calls.push(call);
        } else if let Some((name, rest)) = event.split_once('(') {
            let call = |args: &str, result: &str| Call {
                name: name.to_owned(),
                args: args.to_owned(),
                result: result.trim().to_owned(),
                begun: at,
                ended: at,
            };
            if let Some(args) = rest.strip_suffix("<unfinished ...>") {
                open.insert(pid, call(args, ""));
            } else if let Some((args, result)) = rest.rsplit_once(" = ") {
                calls.push(call(args, result));
            }
        }
    }
    // A call that never ended has written, perhaps.
    calls.extend(open.into_values().map(|call| Call { ended: usize::MAX, ..call }));
    calls.sort_unstable_by_key(|call| call.begun);
    calls
}

const WRITES: [&str; 5] = ["pwrite64", "pwritev", "pwritev2", "write", "writev"];

/// Why what was said at line `said` was not durable by then, if so.
fn not_durable(calls: &[Call], db: &str, said: usize) -> Result<(), String> {
    let writes = calls.iter().filter(|c| WRITES.contains(&c.name.as_str()) && c.on(db));
    let last = writes.filter(|c| c.begun < said).map(|c| c.ended).max();
    let last = last.ok_or("nothing was written")?;
    let synced = calls.iter().any(|c| {
        ["fdatasync", "fsync"].contains(&c.name.as_str())
            && c.on(db)
            && c.result == "0"
            && c.begun > last
            && c.ended < said
    });
    if synced { Ok(()) } else { Err(format!("written at line {last}, said at {said}, not synced")) }
}

/// Runs a child under strace.
fn trace(store: &Path, trace: &Path) -> Vec<Call> {
    let traced =
        "trace=fsync,fdatasync,sync_file_range,pwrite64,pwritev,pwritev2,write,writev,pread64";
    let run = Command::new("strace")
        .args(["-f", "-y", "-s", "64", "-o"])
        .arg(trace)
        .args(["-e", traced, "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .envs(command(store, "trace"))
        .output();
    let run = run.expect("this test needs strace: install it (Debian: apt install strace)");
    assert!(run.status.success(), "{run:?}");
    parse(&std::fs::read_to_string(trace).unwrap())
}

/// sled trusts what it reads, so what an earlier process left in the page cache is synced first.
#[test]
fn what_is_there_is_synced_before_it_is_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().canonicalize().unwrap().join("store");
    trace(&store, &dir.path().join("first"));
    let calls = trace(&store, &dir.path().join("second"));
    let db = store.join("db").to_str().unwrap().to_owned();
    let first = |names: &[&str]| {
        calls.iter().find(|c| names.contains(&c.name.as_str()) && c.on(&db)).cloned().unwrap()
    };
    let (synced, read) = (first(&["fsync"]), first(&["pread64"]));
    assert!(synced.result == "0" && synced.ended < read.begun, "{synced:?} {read:?}");
    let written = first(&WRITES);
    assert!(synced.ended < written.begun, "{synced:?} {written:?}");
}

#[test]
fn every_acknowledged_swap_was_synced_before() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().canonicalize().unwrap().join("store");
    let calls = trace(&store, &dir.path().join("trace"));
    let db = store.join("db").to_str().unwrap().to_owned();
    let said = |text: &str| {
        calls
            .iter()
            .find(|call| call.says(text))
            .unwrap_or_else(|| panic!("never said {text}"))
            .begun
    };

    // Before the store was ready: its files, its directory, and the name of that were synced.
    let ready = said("READY");
    for path in [db.as_str(), store.to_str().unwrap(), store.parent().unwrap().to_str().unwrap()] {
        let synced =
            |c: &&Call| c.name == "fsync" && c.on(path) && c.result == "0" && c.ended < ready;
        assert!(calls.iter().any(|c| synced(&c)), "{path} was not synced");
    }
    let mut before = ready;
    for n in 0..SEQUENTIAL {
        let now = said(&format!("ACK {n}"));
        let own = calls
            .iter()
            .any(|c| c.name == "pwrite64" && c.on(&db) && (before..now).contains(&c.begun));
        assert!(own, "swap {n} wrote nothing");
        assert_eq!(not_durable(&calls, &db, now), Ok(()), "swap {n}");
        before = now;
    }
    let all = said("ALL");
    assert_eq!(not_durable(&calls, &db, all), Ok(()));
    let syncs = |from, to| {
        let sync = |c: &&Call| c.name == "fdatasync" && c.on(&db) && (from..to).contains(&c.begun);
        calls.iter().filter(sync).count() as u64
    };
    // One sync each when they come one by one, far fewer when they come at once.
    assert_eq!(syncs(ready, before), SEQUENTIAL);
    assert!(syncs(before, all) < CONCURRENT / 2, "{} syncs", syncs(before, all));
    // Nothing else of sled's was written: no side files.
    let blobs = store.join("blobs").to_str().unwrap().to_owned();
    assert!(!calls.iter().any(|c| c.args.contains(&blobs) && WRITES.contains(&c.name.as_str())));
}

#[test]
fn the_check_of_the_trace_finds_what_is_missing() {
    let good = r#"
10 pwrite64(9</d/db>, "x"..., 100, 0) = 100
10 sync_file_range(9</d/db>, 0, 100, 7) = 0
10 fdatasync(8</d/db> <unfinished ...>
11 write(1<pipe:[5]>, "other\n", 6) = 6
10 <... fdatasync resumed>) = 0
11 write(1<pipe:[5]>, "ACK 0\n", 6) = 6
"#;
    let check = |trace: &str| {
        let calls = parse(trace);
        let said = calls.iter().find(|call| call.says("ACK 0")).unwrap().begun;
        not_durable(&calls, "/d/db", said)
    };
    assert_eq!(check(good), Ok(()));
    let bad = [
        // As sled leaves it.
        good.replace("fdatasync(8</d/db> <unfin", "sync_file_range(8</d/db>, 0, 1, 7 <unfin")
            .replace("fdatasync resumed", "sync_file_range resumed"),
        // Another file, a failure, too late, before the last write, a write that has not ended.
        good.replace("8</d/db>", "8</d/db2>"),
        good.replace("resumed>) = 0", "resumed>) = -1 EIO (Input/output error)"),
        good.replace("other", "ACK 0"),
        good.replace("11 write(1<pipe:[5]>, \"other", "11 pwrite64(9</d/db>, \"other"),
        good.replace("0) = 100\n", "0 <unfinished ...>\n")
            .replace("10 sync_file", "12 sync_file")
            .replace("10 fdata", "12 fdata")
            .replace("10 <", "12 <"),
        good.replace("pwrite64", "getpid"),
    ];
    for trace in bad {
        assert!(check(&trace).is_err(), "{trace}");
    }
}

/// Each task counts up in a record of its own and leaves a pair of records behind each time.
async fn killed(store: Arc<SledStore>) {
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..TASKS {
        let store = Arc::clone(&store);
        let mut next = current(&store, task).await + 1;
        tasks.spawn(async move {
            loop {
                let value = next.to_string();
                let pad = "x".repeat((next % 50 * 40) as usize);
                let swap = Swap::new()
                    .put(key(format!("current/{task}")), Expect::Any, value.clone())
                    .put(
                        key(format!("left/{task}/{next:08}")),
                        Expect::Absent,
                        value.clone() + &pad,
                    )
                    .put(key(format!("right/{task}/{next:08}")), Expect::Absent, value)
                    .delete(key(format!("left/{task}/{:08}", next.saturating_sub(20))), Expect::Any)
                    .delete(
                        key(format!("right/{task}/{:08}", next.saturating_sub(20))),
                        Expect::Any,
                    );
                store.swap(swap).await.unwrap();
                say(&format!("ACK {task} {next}"));
                next += 1;
            }
        });
    }
    tasks.join_all().await;
}

async fn current(store: &SledStore, task: u64) -> u64 {
    let entry = store.get(&key(format!("current/{task}"))).await.unwrap();
    entry.map_or(0, |entry| std::str::from_utf8(&entry.value).unwrap().parse().unwrap())
}

fn spawn(dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .envs(command(dir, "kill"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Lets a child work for a random time, kills it, and returns the newest acknowledged of each task.
fn kill_at_random(dir: &Path, random: &mut StdRng) -> BTreeMap<u64, u64> {
    let mut child = spawn(dir);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut acknowledged = BTreeMap::new();
    let mut note = |line: String| {
        // The harness's own words come on the same line as the first of ours.
        let Some((_, ack)) = line.split_once("ACK ") else { return false };
        let (task, number) = ack.split_once(' ').unwrap();
        acknowledged.insert(task.parse().unwrap(), number.parse().unwrap());
        true
    };
    let wanted = random.random_range(1..150);
    let mut seen = 0;
    while seen < wanted {
        let line = lines.next().expect("the child works until it is killed").unwrap();
        seen += u32::from(note(line));
    }
    std::thread::sleep(Duration::from_micros(random.random_range(0..3000)));
    child.kill().unwrap();
    child.wait().unwrap();
    // What it had said before it died, but nobody had read; the last line may be cut.
    for line in lines.map_while(Result::ok) {
        note(line);
    }
    acknowledged
}

async fn check(dir: &Path, acknowledged: &BTreeMap<u64, u64>, context: &str) {
    let store = SledStore::open(dir).await.unwrap_or_else(|e| panic!("{context}: {e}"));
    let list = async |side: &str, task: u64| {
        let prefix = format!("{side}/{task}/");
        let page = store.list(prefix.as_bytes(), None, 1000).await.unwrap();
        let number = |e: &blobcr_metadata::store::Entry| {
            let text = std::str::from_utf8(&e.value).unwrap().trim_end_matches('x').to_owned();
            let key = std::str::from_utf8(e.key.as_slice()).unwrap();
            let number: u64 = text.parse().unwrap();
            assert!(key.ends_with(&format!("/{number:08}")), "{context}: {key} holds {number}");
            number
        };
        page.entries.iter().map(number).collect::<Vec<u64>>()
    };
    for (task, newest) in acknowledged {
        let current = current(&store, *task).await;
        // The one after it may have happened, without an answer.
        assert!((*newest..=newest + 1).contains(&current), "{context}: {newest} then {current}");
        let expected: Vec<u64> = (current.saturating_sub(19).max(1)..=current).collect();
        assert_eq!(list("left", *task).await, expected, "{context}: task {task}");
        assert_eq!(list("right", *task).await, expected, "{context}: task {task}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_acknowledged_swap_survives_kill_9() {
    let seed = std::env::var(SEED).map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    println!("{SEED}={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    for round in 0..15 {
        let store = dir.path().to_owned();
        let acknowledged = tokio::task::block_in_place(|| kill_at_random(&store, &mut random));
        assert!(!acknowledged.is_empty());
        check(&store, &acknowledged, &format!("seed {seed}, round {round}")).await;
    }
}
