//! Changes as etcd shows them.

use std::sync::Arc;

use etcd_client::{Client, EventType, GetOptions, WatchOptions, WatchResponse};
use tokio::sync::mpsc;

use super::members::{Members, Repeat};
use super::{Area, get_range, revision, version};
use crate::store::{Change, StoreError, Watch};
use bytes::Bytes;

/// Begins to watch. The watch ends, and says so, with the connection to the member that serves it.
pub(super) async fn start(
    members: &Arc<Members>,
    area: &Area,
    prefix: &[u8],
) -> Result<Watch, StoreError> {
    // The member that serves the watch may be behind: what is newer than this is shown all the same.
    let now = get_range(members, &area.marker(), GetOptions::new().with_keys_only()).await?;
    let from = revision(now.header())? + 1;
    let prefix = area.outer(prefix);
    let ask = |mut client: Client| {
        let options = WatchOptions::new().with_prefix().with_start_revision(from);
        let prefix = prefix.clone();
        async move { client.watch(prefix, Some(options)).await }
    };
    let stream = members.ask(Repeat::Safe, ask).await?.value;
    let (changes, watch) = Watch::new();
    tokio::spawn(deliver(stream, area.clone(), changes));
    Ok(watch)
}

/// Passes changes on until the watcher has gone, cannot keep up, or etcd has no more.
async fn deliver(mut stream: etcd_client::WatchStream, area: Area, changes: mpsc::Sender<Change>) {
    loop {
        let answer = tokio::select! {
            answer = stream.message() => answer,
            () = changes.closed() => return,
        };
        let shown = match answer {
            Ok(Some(answer)) if !answer.canceled() => self::changes(&area, &answer),
            Ok(_) => return,
            Err(error) => {
                tracing::debug!(%error, "a watch of etcd has ended");
                return;
            }
        };
        let Ok(shown) = shown else { return };
        if shown.into_iter().any(|change| changes.try_send(change).is_err()) {
            return;
        }
    }
}

/// The changes of one answer, which holds every change of a revision or none.
fn changes(area: &Area, answer: &WatchResponse) -> Result<Vec<Change>, StoreError> {
    let mut changes = Vec::with_capacity(answer.events().len());
    for event in answer.events() {
        let Some(changed) = event.kv() else { continue };
        let value = match event.event_type() {
            EventType::Put => Some(Bytes::copy_from_slice(changed.value())),
            EventType::Delete => None,
        };
        let key = area.inner(changed.key())?;
        changes.push(Change { key, version: version(changed.mod_revision()), value });
    }
    // etcd shows the keys of a revision in the order in which the transaction named them.
    changes.sort_by(|a, b| (a.version, &a.key).cmp(&(b.version, &b.key)));
    Ok(changes)
}
