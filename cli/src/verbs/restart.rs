//! `blobcr set restart`: fresh disks with what a set holds, and for each VM its channel.
//!
//! Nothing is copied: a disk is attached in a few milliseconds and fetched as it is read. A set of
//! which something cannot be read is passed over, and an older one is taken.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use blobcr_proto::{DiskName, ImageName, ImageSpec, v1};
use blobcr_repository::Repository;
use serde::Serialize;

use super::snapshot_ref;
use crate::args::RestartArgs;
use crate::channel::within;
use crate::exit::{self, Exit, Refusal};
use crate::output::{Output, say};
use crate::session::Session;

/// The mirror and the proxy answer from memory, or after a few calls of the metadata service.
const DEADLINE: Duration = Duration::from_secs(60);
/// Sets that are looked at before giving up.
const SETS_TRIED: u32 = 100;
/// Names tried for a disk that is there already from an earlier restart.
const NAMES_TRIED: u32 = 1000;

/// A disk of a VM that is to start.
#[derive(Debug, Serialize)]
struct DiskView {
    disk: String,
    /// The name that it had when the set was taken.
    was: String,
    image: String,
    snapshot: u64,
    path: String,
}

/// A VM that is to start.
#[derive(Debug, Serialize)]
struct VmView {
    vm: String,
    disks: Vec<DiskView>,
    /// Its channel; null where the host has no proxy.
    socket: Option<String>,
}

/// What was made ready.
#[derive(Debug, Serialize)]
struct RestartView {
    group: String,
    set: u64,
    vms: Vec<VmView>,
}

/// Runs the verb.
///
/// # Errors
/// When there is no set that can be used, or a disk or channel cannot be had: then the disks that
/// were attached are detached again.
pub(super) async fn run(
    args: RestartArgs,
    session: &Session,
    repository: &Repository,
    output: Output,
) -> anyhow::Result<()> {
    let group = args.group.to_string();
    for set in candidates(repository, &args).await? {
        let vms = members(&set, &args)?;
        let sequence = set.sequence;
        let made = async {
            if args.verify {
                verify(repository, &vms).await?;
            }
            attach_all(session, sequence, &vms).await
        };
        match Box::pin(made).await {
            Ok(mut ready) => {
                channels(session, &group, &mut ready).await?;
                let view = RestartView { group, set: sequence, vms: ready };
                output.data(&view, human)?;
                return start_all(args.run.as_deref(), &view).await;
            }
            Err(error) if args.sequence.is_none() && exit::code(&error) == Exit::Integrity => {
                say(&format!("set {sequence} of {group} cannot be used, going back: {error:#}"));
            }
            Err(error) => return Err(error),
        }
    }
    let message = format!("every complete and stable set of {group} is damaged");
    Err(Refusal::new(Exit::Integrity, message).into())
}

/// The sets that a restart may use, newest first.
async fn candidates(
    repository: &Repository,
    args: &RestartArgs,
) -> anyhow::Result<Vec<v1::CheckpointSet>> {
    let group = args.group.to_string();
    if let Some(sequence) = args.sequence {
        let request = v1::GetSetRequest { group: group.clone(), sequence };
        let set = repository.catalog().get_set(request).await?;
        if set.state() != v1::SetState::Stable {
            let message = format!(
                "set {sequence} of {group} is not complete and stable; `blobcr set latest {group}` \
                 shows the newest that is"
            );
            return Err(Refusal::new(Exit::Conflict, message).into());
        }
        return Ok(vec![set]);
    }
    // Says what to do where there is none.
    let latest =
        repository.catalog().latest_set(v1::LatestSetRequest { group: group.clone() }).await?;
    let request = v1::ListSetsRequest { group, limit: SETS_TRIED };
    let sets = repository.catalog().list_sets(request).await?.sets;
    let older = sets
        .into_iter()
        .filter(|set| set.state() == v1::SetState::Stable && set.sequence < latest.sequence);
    let older: Vec<v1::CheckpointSet> = older.collect();
    Ok(std::iter::once(latest).chain(older).collect())
}

/// The disks of the VMs that are asked for.
fn members<'a>(
    set: &'a v1::CheckpointSet,
    args: &RestartArgs,
) -> anyhow::Result<BTreeMap<&'a str, Vec<&'a v1::SetMember>>> {
    let mut vms: BTreeMap<&str, Vec<&v1::SetMember>> = BTreeMap::new();
    for member in &set.members {
        vms.entry(&member.vm).or_default().push(member);
    }
    if args.vms.is_empty() {
        return Ok(vms);
    }
    let mut wanted = BTreeMap::new();
    for vm in &args.vms {
        let (vm, disks) = vms.remove_entry(vm.as_str()).ok_or_else(|| {
            let message = format!("set {} of {} has no VM {vm}", set.sequence, set.group);
            Refusal::new(Exit::NotFound, message)
        })?;
        wanted.insert(vm, disks);
    }
    Ok(wanted)
}

async fn verify(
    repository: &Repository,
    vms: &BTreeMap<&str, Vec<&v1::SetMember>>,
) -> anyhow::Result<()> {
    for member in vms.values().flatten() {
        let found = super::snapshot::verified(repository, &source(member)?).await?;
        if !found.is_whole() {
            let message = format!("{}@{} is damaged", member.image, member.number);
            return Err(Refusal::new(Exit::Integrity, message).into());
        }
    }
    Ok(())
}

fn source(member: &v1::SetMember) -> anyhow::Result<ImageSpec> {
    let image = ImageName::new(member.image.as_str())?;
    Ok(ImageSpec { image, number: Some(member.number) })
}

/// Attaches every disk, or none.
async fn attach_all(
    session: &Session,
    sequence: u64,
    vms: &BTreeMap<&str, Vec<&v1::SetMember>>,
) -> anyhow::Result<Vec<VmView>> {
    let there = super::disk::all(session).await?;
    let mut taken: BTreeSet<String> = there.into_iter().map(|disk| disk.name).collect();
    let mut ready = Vec::new();
    for (vm, members) in vms {
        let mut disks = Vec::new();
        for member in members {
            match attach(session, sequence, member, &mut taken).await {
                Ok(disk) => disks.push(disk),
                Err(error) => {
                    ready.push(VmView { vm: (*vm).to_owned(), disks, socket: None });
                    detach_all(session, &ready).await;
                    return Err(error);
                }
            }
        }
        ready.push(VmView { vm: (*vm).to_owned(), disks, socket: None });
    }
    Ok(ready)
}

async fn attach(
    session: &Session,
    sequence: u64,
    member: &v1::SetMember,
    taken: &mut BTreeSet<String>,
) -> anyhow::Result<DiskView> {
    let disk = free_name(&member.disk, sequence, taken)?;
    let mut mirror = session.mirror()?;
    let request = v1::AttachDiskRequest {
        source: Some(snapshot_ref(&source(member)?)),
        disk: disk.to_string(),
        size_bytes: 0,
    };
    let answer = mirror.client.attach_disk(within(DEADLINE, request)).await;
    let attached = mirror.answer(answer)?;
    taken.insert(disk.to_string());
    Ok(DiskView {
        disk: attached.name,
        was: member.disk.clone(),
        image: attached.image,
        snapshot: attached.snapshot,
        path: attached.path,
    })
}

/// `DISK-sSET`, also for a disk that came from a restart itself.
fn free_name(was: &str, sequence: u64, taken: &BTreeSet<String>) -> anyhow::Result<DiskName> {
    let stem = match was.rsplit_once("-s") {
        Some((stem, set)) if !stem.is_empty() && is_restart(set) => stem,
        _ => was,
    };
    let first = format!("{stem}-s{sequence}");
    let others = (2..NAMES_TRIED).map(|n| format!("{stem}-s{sequence}.{n}"));
    let free = std::iter::once(first).chain(others).find(|name| !taken.contains(name));
    let free = free.context("too many disks are there from restarts; detach some")?;
    Ok(DiskName::new(free)?)
}

/// Whether it ends a name as [`free_name`] makes them: `SET` or `SET.N`.
fn is_restart(text: &str) -> bool {
    let mut numbers = text.splitn(2, '.');
    numbers.all(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

/// As far as it goes: whoever calls this has an error to tell already.
async fn detach_all(session: &Session, vms: &[VmView]) {
    let Ok(mut mirror) = session.mirror() else { return };
    for disk in vms.iter().flat_map(|vm| &vm.disks) {
        let request = v1::DetachDiskRequest { disk: disk.disk.clone(), discard_changes: true };
        if let Err(status) = mirror.client.detach_disk(within(DEADLINE, request)).await {
            say(&format!("the disk {} stays attached: {}", disk.disk, status.message()));
        }
    }
}

/// Gives every VM its channel to the fresh disks, in the order in which it had its own.
async fn channels(session: &Session, group: &str, vms: &mut [VmView]) -> anyhow::Result<()> {
    if session.description.proxy.is_empty() {
        say("this host has no proxy: give each VM its channel with `blobcr vm add`");
        return Ok(());
    }
    let mut proxy = session.proxy()?;
    let answer = proxy.client.list_vms(within(DEADLINE, v1::ListVmsRequest {})).await;
    let known = proxy.answer(answer)?.vms;
    for vm in vms {
        if let Some(before) = known.iter().find(|known| known.name == vm.vm) {
            let place = |disk: &DiskView| before.disks.iter().position(|was| *was == disk.was);
            // Stable: what it did not have comes last, by name.
            vm.disks.sort_by_key(|disk| place(disk).unwrap_or(usize::MAX));
        }
        let request = v1::AddVmRequest {
            name: vm.vm.clone(),
            disks: vm.disks.iter().map(|disk| disk.disk.clone()).collect(),
            groups: vec![group.to_owned()],
            tcp: false,
            replace: true,
            vsock_cid: 0,
        };
        let answer = proxy.client.add_vm(within(DEADLINE, request)).await;
        vm.socket = Some(proxy.answer(answer)?.socket);
    }
    Ok(())
}

fn human(view: &RestartView) -> String {
    let mut text = format!("set {} of {}\n", view.set, view.group);
    for vm in &view.vms {
        text.push_str(&format!("{}\n", vm.vm));
        for disk in &vm.disks {
            text.push_str(&format!("  {} ({}@{})\n", disk.path, disk.image, disk.snapshot));
        }
        if let Some(socket) = &vm.socket {
            text.push_str(&format!("  channel {socket}\n"));
        }
    }
    text
}

/// Runs the program for every VM at the same time, and waits for all of them.
async fn start_all(program: Option<&Path>, view: &RestartView) -> anyhow::Result<()> {
    let Some(program) = program else { return Ok(()) };
    let mut started = Vec::new();
    for vm in &view.vms {
        let paths: Vec<&str> = vm.disks.iter().map(|disk| disk.path.as_str()).collect();
        let child = tokio::process::Command::new(program)
            .env("BLOBCR_VM", &vm.vm)
            .env("BLOBCR_DISKS", paths.join("\n"))
            .env("BLOBCR_SOCKET", vm.socket.as_deref().unwrap_or_default())
            .env("BLOBCR_GROUP", &view.group)
            .env("BLOBCR_SET", view.set.to_string())
            .stdin(Stdio::null())
            // What is printed there is the result.
            .stdout(std::io::stderr())
            .spawn()
            .with_context(|| format!("cannot run {} for {}", program.display(), vm.vm))?;
        started.push((vm.vm.as_str(), child));
    }
    let mut failed = Vec::new();
    for (vm, mut child) in started {
        let status = child.wait().await.with_context(|| format!("cannot wait for {vm}"))?;
        if !status.success() {
            failed.push(format!("{vm} ({status})"));
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    let message = format!("{} did not start: {}", program.display(), failed.join(", "));
    Err(Refusal::new(Exit::Other, message).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_of_a_restart_is_named_after_the_disk_that_it_began_as() {
        let mut taken = BTreeSet::new();
        let mut name = |was: &str, set| {
            let name = free_name(was, set, &taken).unwrap().to_string();
            taken.insert(name.clone());
            name
        };
        assert_eq!(name("d", 5), "d-s5");
        assert_eq!(name("d-s5", 9), "d-s9");
        assert_eq!(name("d-s5.2", 9), "d-s9.2");
        assert_eq!(name("d-s5", 9), "d-s9.3");
        for (was, named) in [("data-srv", "data-srv-s1"), ("a-s1.x", "a-s1.x-s1")] {
            assert_eq!(name(was, 1), named);
        }
    }
}
