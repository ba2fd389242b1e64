//! A cluster of real processes: three members of an etcd, two metadata servers, six nodes and two mirrors.
//! Any one of them goes away and comes back while both mirrors commit.

use std::fs;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use blobcr_tests::disk_file::{noise, sparse};
use blobcr_tests::mounted::MountedDisk;
use blobcr_tests::roles::{Outage, Plan, Roles, Which};
use blobcr_tests::writer::Writer;
use serde_json::Value;

const MIB: usize = 1 << 20;
const SIZE: usize = 8 * MIB;
const POOL: &str = "replica:3";
const NODES: usize = 6;
/// COMMITs between two events, of each mirror.
const BETWEEN: usize = 6;

/// A cluster with one image, and what that holds.
fn cluster(isolated: bool) -> Result<(Roles, Vec<u8>)> {
    let plan = Plan { isolated, ..Plan::cluster(POOL, NODES) };
    let roles = Roles::start(&plan, |_| Ok(()))?;
    let base = noise(5, SIZE);
    let raw = sparse(&roles.dir().join("base.raw"), SIZE as u64, &[(0, &base)])?;
    roles.json(&["image", "import", raw.to_str().context("ASCII")?, "base"])?;
    Ok((roles, base))
}

/// Lets both mirrors commit while each of these is taken away, one after the other, and comes back.
fn away_under_commits(isolated: bool, outages: &[(Which, Outage)]) -> Result<()> {
    let (mut roles, base) = cluster(isolated)?;
    let mut writers = Vec::new();
    for mirror in 0..2 {
        let path = roles.attach(mirror, "base", &format!("d{mirror}"))?;
        writers.push(Writer::start(&path, base.clone(), mirror as u64 + 1));
    }
    let mut go_on = |what: &str| -> Result<()> {
        writers.iter_mut().try_for_each(|writer| writer.wait_more(BETWEEN)).context(what.to_owned())
    };
    let met = go_on("before").and_then(|()| {
        for (which, outage) in outages {
            roles.take_away(*which, *outage)?;
            go_on(&format!("without {which:?}, {outage:?}"))?;
            roles.bring_back(*which)?;
            go_on(&format!("with {which:?} back"))?;
        }
        Ok(())
    });
    met.with_context(|| roles.log())?;
    let finished: Result<Vec<_>> = writers.into_iter().map(Writer::finish).collect();
    for (mirror, written) in finished.with_context(|| roles.log())?.iter().enumerate() {
        let made = written.commits().len();
        ensure!(made > BETWEEN * (1 + 2 * outages.len()), "{made} COMMITs");
        // Through the other mirror, which has nothing of it.
        written.check(&roles, 1 - mirror).with_context(|| roles.log())?;
    }
    roles.stop()
}

#[test]
fn servers_die_and_come_back_under_commits() -> Result<()> {
    away_under_commits(
        false,
        &[(Which::Metadata(0), Outage::Killed), (Which::Etcd(1), Outage::Killed)],
    )
}

#[test]
fn nodes_die_and_stop_to_answer_under_commits() -> Result<()> {
    away_under_commits(false, &[(Which::Node(2), Outage::Killed), (Which::Node(4), Outage::Paused)])
}

#[test]
fn servers_and_nodes_in_namespaces_die_and_come_back_under_commits() -> Result<()> {
    away_under_commits(
        true,
        &[
            (Which::Metadata(0), Outage::Killed),
            (Which::Etcd(1), Outage::Killed),
            (Which::Node(3), Outage::Paused),
        ],
    )
}

#[test]
fn a_node_that_is_cut_off_is_joined_again_under_commits() -> Result<()> {
    away_under_commits(true, &[(Which::Node(1), Outage::CutOff)])
}

#[test]
fn servers_that_are_cut_off_are_joined_again_under_commits() -> Result<()> {
    away_under_commits(
        true,
        &[(Which::Metadata(1), Outage::CutOff), (Which::Etcd(0), Outage::CutOff)],
    )
}

/// A host that loses its network: its guest reads and writes what is there, and COMMITs are accepted.
/// They become stable when the network is back. The other host notices nothing.
#[test]
fn a_host_without_network_goes_on_and_catches_up() -> Result<()> {
    let (mut roles, base) = cluster(true)?;
    let alone = Which::Mirror(0);
    let mut other = Writer::start(&roles.attach(1, "base", "d1")?, base.clone(), 9);
    let path = roles.attach(0, "base", "d0")?;
    let disk = MountedDisk::open(&path, true)?;
    let mut model = base;
    // What is read is kept, and the first COMMIT makes the disk's image.
    ensure!(fs::read(&path)? == model, "the disk is not its image");
    let first = disk.commit_stable()?;

    roles.take_away(alone, Outage::CutOff)?;
    let mut made = Vec::new();
    for round in 0..2 {
        let (offset, bytes) = ((2 + 3 * round) * MIB + 8192, noise(100 + round as u64, MIB));
        let file = MountedDisk::open(&path, false)?;
        file.file().write_all_at(&bytes, offset as u64).context("write")?;
        file.file().sync_all().context("flush")?;
        model[offset..offset + MIB].copy_from_slice(&bytes);
        made.push((disk.commit().context("COMMIT")?, model.clone()));
        ensure!(fs::read(&path)? == model, "the disk is not what was written");
    }
    other.wait_more(BETWEEN)?;
    let info = roles.json(&["disk", "info", "d0"])?;
    ensure!(info["pending"].as_array().is_some_and(|all| all.len() == 2), "{info}");
    // The repository has not heard of them.
    let listed = roles.json_from(Which::Metadata(0), &["snapshot", "list", &first.image])?;
    let stable = |one: &&Value| one["state"] == "stable";
    let stable = listed.as_array().context("no list")?.iter().filter(stable).count();
    ensure!(stable as u64 == first.number, "{listed}");

    roles.bring_back(alone)?;
    for (made, model) in &made {
        roles.wait_stable(&made.name())?;
        let verified = roles.json_from(Which::Mirror(1), &["snapshot", "verify", &made.name()])?;
        ensure!(verified["intact"] == true, "{verified}");
        let file = format!("images/{}/{}.raw", made.image, made.number);
        ensure!(fs::read(roles.mount(1).join(file))? == *model, "{} differs", made.name());
    }
    drop(disk);
    other.finish()?.check(&roles, 0)?;
    roles.stop()
}
