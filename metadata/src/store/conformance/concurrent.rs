//! Cases with many tasks at once.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use tokio::task::JoinSet;

use super::{Case, Ticks};
use crate::store::{Expect, StoreError, Swap, Version};
use crate::version_manager::mix64;

const TASKS: u64 = 8;

/// The classic: everybody adds one to the same number.
pub(super) async fn increments_are_not_lost(case: Case) {
    const EACH: u64 = 25;
    case.set("n", "0").await;
    let mut tasks = JoinSet::new();
    for _ in 0..TASKS {
        let case = case.clone();
        tasks.spawn(async move {
            let mut versions = Vec::new();
            while versions.len() < EACH as usize {
                let entry = case.get("n").await.expect("it is there");
                let text = std::str::from_utf8(&entry.value).expect("digits");
                let next = text.parse::<u64>().expect("digits") + 1;
                match case.put("n", Expect::Version(entry.version), &next.to_string()).await {
                    Ok(version) => versions.push(version),
                    Err(StoreError::Conflict { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            versions
        });
    }
    let mut versions: Vec<Version> = tasks.join_all().await.concat();
    versions.sort_unstable();
    versions.dedup();
    assert_eq!(versions.len() as u64, TASKS * EACH, "versions are unique");
    let entry = case.get("n").await.expect("it is there");
    assert_eq!(&entry.value[..], (TASKS * EACH).to_string().as_bytes());
    assert_eq!(versions.last(), Some(&entry.version));
}

#[derive(Clone, Copy, Debug)]
enum Done {
    /// Saw this version.
    Read(Version),
    /// Replaced the first version by the second.
    Swapped(Version, Version),
    /// Could not replace this version.
    Refused(Version),
}

#[derive(Clone, Copy, Debug)]
struct Event {
    begun: u64,
    ended: u64,
    done: Done,
}

/// Records what many tasks do to one register, and checks that some order explains it all.
///
/// Versions name the writes and say in which order they took effect, so it is enough to check every
/// event against them and against real time.
pub(super) async fn a_history_is_linearizable(case: Case, seed: u64) {
    const EACH: u64 = 60;
    let ticks = Arc::new(Ticks::default());
    let first = case.set("r", "first").await;
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let (case, ticks) = (case.clone(), Arc::clone(&ticks));
        tasks.spawn(async move {
            let mut events = Vec::new();
            let mut known = first;
            for n in 0..EACH {
                let begun = ticks.now();
                // Half of the tasks mostly read, and some swaps expect what is long gone.
                let done = if mix64(seed ^ mix64(task << 32 | n)) % 4 < 1 + task % 3 {
                    known = case.version("r").await;
                    Done::Read(known)
                } else {
                    match case.put("r", Expect::Version(known), &format!("{task}.{n}")).await {
                        Ok(version) => {
                            let old = std::mem::replace(&mut known, version);
                            Done::Swapped(old, version)
                        }
                        Err(StoreError::Conflict { .. }) => Done::Refused(known),
                        Err(error) => panic!("{error}"),
                    }
                };
                events.push(Event { begun, ended: ticks.now(), done });
            }
            events
        });
    }
    let mut events = tasks.join_all().await.concat();
    events.sort_unstable_by_key(|event| event.begun);
    check_history(first, &events, seed);
}

fn check_history(first: Version, events: &[Event], seed: u64) {
    // When each write may have taken effect, in order of version.
    let mut writes: BTreeMap<Version, (u64, u64)> = BTreeMap::from([(first, (0, 0))]);
    let mut replaced: BTreeMap<Version, Version> = BTreeMap::new();
    for event in events {
        if let Done::Swapped(old, new) = event.done {
            assert!(new > old, "seed {seed}: {event:?}");
            writes.insert(new, (event.begun, event.ended));
            let other = replaced.insert(old, new);
            assert_eq!(other, None, "seed {seed}: {old:?} was replaced twice: {event:?}");
        }
    }
    let versions: Vec<Version> = writes.keys().copied().collect();
    for pair in versions.windows(2) {
        // Every version but the newest was replaced by the next one: nothing came between.
        assert_eq!(replaced.get(&pair[0]), Some(&pair[1]), "seed {seed}");
        assert!(writes[&pair[0]].0 <= writes[&pair[1]].1, "seed {seed}: written back in time");
    }
    let mut newest_seen: Vec<(u64, Version)> = vec![(0, first)];
    for event in events {
        let (seen, at_least) = match event.done {
            Done::Read(version) => (version, true),
            Done::Swapped(_, new) => (new, true),
            Done::Refused(expected) => (expected, false),
        };
        let context = || format!("seed {seed}: {event:?}");
        let (written, _) =
            *writes.get(&seen).unwrap_or_else(|| panic!("never written: {}", context()));
        assert!(written <= event.ended, "from the future: {}", context());
        if at_least {
            let stale =
                newest_seen.iter().find(|(ended, other)| *ended < event.begun && *other > seen);
            assert_eq!(stale, None, "stale: {}", context());
            newest_seen.push((event.ended, seen));
        } else {
            let next = replaced.get(&seen).unwrap_or_else(|| panic!("no reason: {}", context()));
            assert!(writes[next].0 < event.ended, "refused too early: {}", context());
        }
    }
}

/// A token moves between keys: every page holds it once.
pub(super) async fn a_page_is_one_instant(case: Case) {
    const MOVES: usize = 200;
    const PLACES: usize = 12;
    let place = |n: usize| format!("p/{:02}", n * 5 % PLACES);
    case.set(&place(0), "token").await;
    // Keys around the places, so that a page is longer than one look.
    for n in 0..40 {
        case.set(&format!("p/{:02}x{n}", n % PLACES), "other").await;
    }
    let mover = {
        let case = case.clone();
        tokio::spawn(async move {
            for n in 0..MOVES {
                let swap = Swap::new().delete(case.key(&place(n)), Expect::Any).put(
                    case.key(&place(n + 1)),
                    Expect::Absent,
                    "token",
                );
                case.store.swap(swap).await.expect("only one moves it");
            }
        })
    };
    let mut pages = 0;
    while !mover.is_finished() || pages == 0 {
        let page = case.list("p/", None, 100).await;
        let tokens = page.entries.iter().filter(|entry| entry.value == "token").count();
        assert_eq!((tokens, page.entries.len()), (1, 41), "page {pages}: {page:?}");
        assert!(page.entries.is_sorted_by_key(|entry| &entry.key));
        pages += 1;
    }
    mover.await.expect("the mover did not fail");
}

/// Whoever asked may go away at any moment: pairs of keys stay equal.
pub(super) async fn a_cancelled_swap_happens_whole_or_not_at_all(case: Case) {
    for round in 0..60u64 {
        let swap = ["x", "y"].into_iter().fold(Swap::new(), |swap, name| {
            swap.put(case.key(name), Expect::Any, round.to_string())
        });
        let store = Arc::clone(&case.store);
        let task = tokio::spawn(async move { store.swap(swap).await });
        for _ in 0..round % 4 {
            tokio::task::yield_now().await;
        }
        task.abort();
        drop(task.await);
        let pair = case.list("", None, 10).await.entries;
        let values: Vec<&Bytes> = pair.iter().map(|entry| &entry.value).collect();
        assert!(values.is_empty() || values.len() == 2 && values[0] == values[1], "{pair:?}");
    }
    let last = case.set("x", "last").await;
    assert!(last > Version(0));
}

/// Everything that swaps acknowledged is shown, each version once and in order, when it can be read.
pub(super) async fn watchers_see_what_swaps_did(case: Case) {
    const EACH: u64 = 30;
    let mut watch = case.watch("c/").await;
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let case = case.clone();
        tasks.spawn(async move {
            let mut done = Vec::new();
            for n in 0..EACH {
                done.push(case.set(&format!("c/{}", (task + n) % 5), "v").await);
            }
            done
        });
    }
    let mut seen = Vec::new();
    while (seen.len() as u64) < TASKS * EACH {
        let change = watch.next().await.expect("the watcher keeps up");
        let entry = case.store.get(&change.key).await.expect("get works").expect("never deleted");
        assert!(entry.version >= change.version, "shown before it can be read: {change:?}");
        seen.push(change.version);
    }
    let mut done = tasks.join_all().await.concat();
    done.sort_unstable();
    assert_eq!(seen, done);
}
