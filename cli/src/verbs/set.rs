//! `blobcr set`: checkpoint sets of a group of VMs.

use std::collections::BTreeSet;

use blobcr_proto::v1;
use blobcr_repository::Repository;
use serde::Serialize;

use crate::args::SetCommand;
use crate::output::{Column, Output, or_dash, table};
use crate::session::Session;
use crate::view::rfc3339;

/// Groups in one answer.
const PAGE: u32 = 500;

/// One member of a set.
#[derive(Debug, Serialize)]
pub(super) struct MemberView {
    vm: String,
    disk: String,
    image: String,
    snapshot: u64,
}

/// A set.
#[derive(Debug, Serialize)]
pub(super) struct SetView {
    group: String,
    set: u64,
    state: &'static str,
    expected_vms: u32,
    joined_vms: usize,
    members: Vec<MemberView>,
    pins: Vec<String>,
    created_at: Option<String>,
}

impl From<v1::CheckpointSet> for SetView {
    fn from(set: v1::CheckpointSet) -> Self {
        let state = state_word(set.state());
        let joined: BTreeSet<&str> = set.members.iter().map(|m| m.vm.as_str()).collect();
        let joined_vms = joined.len();
        let member = |m: v1::SetMember| MemberView {
            vm: m.vm,
            disk: m.disk,
            image: m.image,
            snapshot: m.number,
        };
        Self {
            group: set.group,
            set: set.sequence,
            state,
            expected_vms: set.expected_vms,
            joined_vms,
            members: set.members.into_iter().map(member).collect(),
            pins: set.pins,
            created_at: rfc3339(set.created_unix_ms),
        }
    }
}

const fn state_word(state: v1::SetState) -> &'static str {
    match state {
        v1::SetState::Incomplete => "incomplete",
        v1::SetState::Pending => "pending",
        v1::SetState::Stable => "stable",
        v1::SetState::Failed => "failed",
        v1::SetState::Obsolete => "obsolete",
        v1::SetState::Unspecified => "unknown",
    }
}

/// Runs one verb.
///
/// # Errors
/// What the verb says.
pub async fn run(command: SetCommand, session: &Session, output: Output) -> anyhow::Result<()> {
    let repository = session.repository().await?;
    let catalog = repository.catalog();
    match command {
        SetCommand::List { group, limit } => {
            let request = v1::ListSetsRequest { group: group.into(), limit };
            let sets = catalog.list_sets(request).await?.sets;
            let views: Vec<SetView> = sets.into_iter().map(SetView::from).collect();
            output.data(&views, |views| sets_table(views))
        }
        SetCommand::Latest { group } => {
            let request = v1::LatestSetRequest { group: group.into() };
            let set = SetView::from(catalog.latest_set(request).await?);
            output.data(&set, members_table)
        }
        SetCommand::Groups => groups(&repository, output).await,
        SetCommand::Pin { group, sequence, holder } => {
            let request = v1::PinSetRequest { group: group.into(), sequence, holder };
            let set = SetView::from(catalog.pin_set(request).await?);
            output.data(&set, |set| format!("set {} of {} is pinned\n", set.set, set.group))
        }
        SetCommand::Unpin { group, sequence, holder } => {
            let request = v1::PinSetRequest { group: group.into(), sequence, holder };
            let set = SetView::from(catalog.unpin_set(request).await?);
            output.data(&set, |_| String::new())
        }
        SetCommand::Keep { group, sets } => {
            let request = v1::KeepSetsRequest { group: group.into(), keep_sets: sets };
            let group = GroupView::from(catalog.keep_sets(request).await?);
            output.data(&group, |_| String::new())
        }
        SetCommand::Prune { group, keep_last, dry_run } => {
            prune(&repository, group.into(), keep_last, dry_run, output).await
        }
        SetCommand::Restart(args) => super::restart::run(args, session, &repository, output).await,
    }
}

fn sets_table(views: &[SetView]) -> String {
    let columns = [
        Column::Number("SET"),
        Column::Text("STATE"),
        Column::Text("VMS"),
        Column::Text("CREATED"),
        Column::Text("PINS"),
    ];
    let row = |set: &SetView| {
        vec![
            set.set.to_string(),
            set.state.to_owned(),
            format!("{}/{}", set.joined_vms, set.expected_vms),
            or_dash(set.created_at.clone()),
            set.pins.join(", "),
        ]
    };
    table(&columns, views.iter().map(row))
}

fn members_table(set: &SetView) -> String {
    let columns = [Column::Text("VM"), Column::Text("DISK"), Column::Text("SNAPSHOT")];
    let row = |member: &MemberView| {
        let snapshot = format!("{}@{}", member.image, member.snapshot);
        vec![member.vm.clone(), member.disk.clone(), snapshot]
    };
    format!("set {} of {}\n{}", set.set, set.group, table(&columns, set.members.iter().map(row)))
}

/// A group.
#[derive(Debug, Serialize)]
struct GroupView {
    group: String,
    last_set: Option<u64>,
    /// Null: all.
    keep_sets: Option<u32>,
}

impl From<v1::Group> for GroupView {
    fn from(group: v1::Group) -> Self {
        Self {
            group: group.name,
            last_set: Some(group.last_sequence).filter(|&last| last > 0),
            keep_sets: Some(group.keep_sets).filter(|&keep| keep > 0),
        }
    }
}

async fn groups(repository: &Repository, output: Output) -> anyhow::Result<()> {
    let mut views: Vec<GroupView> = Vec::new();
    loop {
        let after = views.last().map(|group| group.group.clone()).unwrap_or_default();
        let request = v1::ListGroupsRequest { after, limit: PAGE };
        let page = repository.catalog().list_groups(request).await?;
        let more = page.more && !page.groups.is_empty();
        views.extend(page.groups.into_iter().map(GroupView::from));
        if !more {
            break;
        }
    }
    output.data(&views, |views| {
        let columns = [Column::Text("GROUP"), Column::Number("LAST SET"), Column::Number("KEEPS")];
        let row = |group: &GroupView| {
            let keeps = group.keep_sets.map_or_else(|| "all".to_owned(), |keep| keep.to_string());
            vec![group.group.clone(), or_dash(group.last_set), keeps]
        };
        table(&columns, views.iter().map(row))
    })
}

/// What was given up.
#[derive(Debug, Serialize)]
struct PrunedView {
    sets: Vec<SetView>,
    snapshots_removed: u64,
}

async fn prune(
    repository: &Repository,
    group: String,
    keep_last: Option<u32>,
    dry_run: bool,
    output: Output,
) -> anyhow::Result<()> {
    let mut all = PrunedView { sets: Vec::new(), snapshots_removed: 0 };
    loop {
        let keep_sets = keep_last.unwrap_or_default();
        let request = v1::RetireSetsRequest { group: group.clone(), keep_sets, dry_run };
        let done = repository.catalog().retire_sets(request).await?;
        let last = done.sets.is_empty() || dry_run;
        all.sets.extend(done.sets.into_iter().map(SetView::from));
        all.snapshots_removed += done.snapshots_removed;
        if last {
            break;
        }
    }
    output.data(&all, |all| {
        let word = if dry_run { "would be given up" } else { "given up" };
        format!(
            "{}{} sets {word}, {} snapshots removed\n",
            sets_table(&all.sets),
            all.sets.len(),
            all.snapshots_removed
        )
    })
}
