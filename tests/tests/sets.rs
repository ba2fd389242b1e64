//! Checkpoint sets from a VM's channel to a restart, through real processes and a real mount.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use blobcr_guest::{Ask, Client, Credentials, Deadline, GuestError, Target};
use blobcr_proto::v1::{SetMembership, SetState};
use blobcr_tests::cluster::Cluster;
use blobcr_tests::daemon::wait_until;
use blobcr_tests::disk_file::{noise, sparse};
use rustix::process::Signal;
use serde_json::Value;

const SIZE: u64 = 8 << 20;

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

/// A VM with one disk, as its hypervisor has it open.
struct Vm {
    name: &'static str,
    disk: PathBuf,
    channel: Client,
}

impl Vm {
    /// Brings these bytes, and nothing else, onto the disk.
    fn write(&self, seed: u64) -> Result<()> {
        let file = File::options().write(true).open(&self.disk)?;
        file.write_all_at(&content(self.name, seed), 1 << 20)?;
        Ok(file.sync_all()?)
    }

    fn join(&self, sequence: u64, expected_vms: u32) -> Result<()> {
        let set = SetMembership { group: String::new(), sequence, expected_vms };
        let taken = self.channel.checkpoint(&Ask { set: Some(set), ..Ask::new() }, soon())?;
        self.channel.wait_stable(&taken.snapshots, soon())?;
        Ok(())
    }
}

/// Does not shrink, so it lies in a node's files as it is.
fn content(vm: &str, seed: u64) -> Vec<u8> {
    noise(seed * 7 + vm.len() as u64, 300_000)
}

fn holds(disk: &Path, vm: &str, seed: u64) -> Result<bool> {
    let mut found = vec![0; 300_000];
    File::open(disk)?.read_exact_at(&mut found, 1 << 20)?;
    Ok(found == content(vm, seed))
}

/// Two VMs of the group `job`: one by its socket, one over TCP.
fn job(cluster: &Cluster) -> Result<[Vm; 2]> {
    let raw = sparse(&cluster.scratch().join("base.raw"), SIZE, &[(0, &noise(1, 4096))])?;
    cluster.import(&raw, "base")?;
    let one = cluster.attach("base", "d1")?;
    let three = cluster.attach("base", "d3")?;
    let added = cluster.json(&["vm", "add", "one", "--disk", "d1", "--group", "job"])?;
    let socket = Target::Socket(added["socket"].as_str().context("a socket")?.into());
    let added = cluster.json(&["vm", "add", "three", "--disk", "d3", "--group", "job", "--tcp"])?;
    let address: SocketAddr = added["address"].as_str().context("an address")?.parse()?;
    let token = added["token"].as_str().context("a token")?.to_owned();
    let credentials = Credentials { vm: "three".to_owned(), token };
    Ok([
        Vm { name: "one", disk: one, channel: Client::new(socket) },
        Vm {
            name: "three",
            disk: three,
            channel: Client::new(Target::tcp(address, Some(credentials))),
        },
    ])
}

/// All VMs write, and join one new set.
fn take(vms: &[Vm; 2], seed: u64) -> Result<u64> {
    let set = vms[0].channel.begin_set("", 2, soon())?;
    for vm in vms {
        vm.write(seed)?;
        vm.join(set.sequence, 2)?;
    }
    let seen = vms[1].channel.set_status("job", set.sequence, soon())?;
    ensure!((seen.joined_vms, seen.state()) == (2, SetState::Stable), "{seen:?}");
    Ok(set.sequence)
}

fn paths(restarted: &Value) -> Result<Vec<(String, PathBuf)>> {
    let vms = restarted["vms"].as_array().context("VMs")?;
    let path = |vm: &Value| {
        let name = vm["vm"].as_str().context("a name")?.to_owned();
        Ok((name, vm["disks"][0]["path"].as_str().context("a path")?.into()))
    };
    vms.iter().map(path).collect()
}

#[test]
fn a_job_goes_on_from_its_newest_set_that_counts() -> Result<()> {
    let cluster = Cluster::start(&["--guests", "127.0.0.1:0"])?;
    let vms = job(&cluster)?;
    let none = cluster.run(&["set", "restart", "job"])?;
    ensure!(none.code == 3 && none.stderr.contains("set list"), "{none:?}");
    assert_eq!(take(&vms, 1)?, 1);
    assert_eq!(take(&vms, 2)?, 2);
    // One of the two is lost before it joins.
    vms[0].channel.begin_set("job", 2, soon())?;
    vms[0].write(3)?;
    vms[0].join(3, 2)?;
    assert_eq!(cluster.json(&["set", "latest", "job"])?["set"], 2);
    let listed = cluster.json(&["set", "list", "job"])?;
    let states: Vec<_> = listed.as_array().context("sets")?.iter().map(|s| &s["state"]).collect();
    assert_eq!(states, ["incomplete", "stable", "stable"]);

    let restarted = cluster.json(&["set", "restart", "job"])?;
    assert_eq!(restarted["set"], 2);
    let disks = paths(&restarted)?;
    for ((vm, path), disk) in disks.iter().zip(["d1-s2.raw", "d3-s2.raw"]) {
        ensure!(path.ends_with(disk), "{path:?}");
        ensure!(holds(path, vm, 2)?, "{vm} is not what it was");
    }
    // The same channels and the same token lead to the fresh disks now.
    let again: Vec<Vm> =
        { vms }.into_iter().zip(disks).map(|(vm, (_, disk))| Vm { disk, ..vm }).collect();
    let again: [Vm; 2] = again.try_into().ok().context("two VMs")?;
    assert_eq!(take(&again, 4)?, 4);
    let older = cluster.json(&["set", "restart", "job", "--set", "1", "--vm", "three"])?;
    let disks = paths(&older)?;
    ensure!(disks.len() == 1 && holds(&disks[0].1, "three", 1)?, "{older}");
    let wrong = cluster.run(&["set", "restart", "job", "--set", "3"])?;
    ensure!(wrong.code == 4 && wrong.stderr.contains("not complete and stable"), "{wrong:?}");
    let wrong = cluster.run(&["set", "restart", "job", "--vm", "two"])?;
    ensure!(wrong.code == 3 && wrong.stderr.contains("no VM two"), "{wrong:?}");
    Ok(())
}

#[test]
fn a_restart_goes_back_past_a_set_that_is_damaged_and_runs_what_starts_the_vms() -> Result<()> {
    let mut cluster = Cluster::start(&["--guests", "127.0.0.1:0"])?;
    let vms = job(&cluster)?;
    take(&vms, 1)?;
    take(&vms, 2)?;
    drop(vms);
    cluster.stop(Signal::TERM)?;
    damage(&cluster.dir(), &content("one", 2))?;
    cluster.restart()?;

    let program = cluster.scratch().join("start-vm");
    let told = cluster.scratch().join("told");
    let script = format!(
        "#!/bin/sh\necho on-stdout\necho \"$BLOBCR_VM $BLOBCR_GROUP $BLOBCR_SET $BLOBCR_DISKS \
         $BLOBCR_SOCKET\" >> {}\n",
        told.display()
    );
    fs::write(&program, script)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let program = program.to_str().context("a path")?;
    let ran = cluster.run(&["--json", "set", "restart", "job", "--verify", "--run", program])?;
    ensure!(ran.code == 0, "{ran:?}");
    ensure!(ran.stderr.contains("set 2 of job cannot be used, going back"), "{}", ran.stderr);
    let restarted: Value = serde_json::from_str(&ran.stdout)?;
    assert_eq!(restarted["set"], 1);
    for (vm, path) in paths(&restarted)? {
        ensure!(holds(&path, &vm, 1)?, "{vm} is not what it was");
        let line =
            format!("{vm} job 1 {} {}/vms/{vm}.sock", path.display(), cluster.dir().display());
        ensure!(fs::read_to_string(&told)?.lines().any(|told| told == line), "{line}");
    }
    // No disk of the damaged set stays behind.
    let disks = cluster.json(&["disk", "list"])?;
    let names: Vec<_> = disks.as_array().context("disks")?.iter().map(|d| &d["disk"]).collect();
    assert_eq!(names, ["d1", "d1-s1", "d3", "d3-s1"]);
    // Asked for by name, it is refused for what it is.
    let wrong = cluster.run(&["set", "restart", "job", "--set", "2", "--verify"])?;
    ensure!(wrong.code == 6 && wrong.stderr.contains("is damaged"), "{wrong:?}");
    Ok(())
}

/// Flips a bit wherever a node has these bytes.
fn damage(dir: &Path, bytes: &[u8]) -> Result<()> {
    let mut found = 0;
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if path.is_dir() && !path.is_symlink() {
                dirs.push(path);
            } else if path.extension().is_some_and(|e| e == "seg") {
                let mut file = fs::read(&path)?;
                let needle = &bytes[4096..4160];
                while let Some(at) = file.windows(64).position(|window| window == needle) {
                    file[at] ^= 1;
                    found += 1;
                    fs::write(&path, &file)?;
                }
            }
        }
    }
    ensure!(found > 0, "no node has them");
    Ok(())
}

#[test]
fn old_sets_are_given_up_by_policy_and_their_bytes_collected() -> Result<()> {
    let cluster = Cluster::start(&["--guests", "127.0.0.1:0"])?;
    let vms = job(&cluster)?;
    for seed in 1..=5 {
        take(&vms, seed)?;
    }
    let image = cluster.json(&["disk", "info", "d1"])?["checkpoint_image"].clone();
    let image = image.as_str().context("a checkpoint image")?.to_owned();
    // The first snapshot is the disk as it was cloned, so set N has snapshot N + 1.
    let third = format!("{image}@3");
    let refused = cluster.run(&["image", "remove", &third])?;
    ensure!(refused.code == 4 && refused.stderr.contains("set 2 of group"), "{refused:?}");
    let pruned = cluster.json(&["snapshot", "prune", &image, "--keep-last", "1"])?;
    let of_sets = |s: &&Value| s["snapshot"] != 1;
    let mut members = pruned.as_array().context("snapshots")?.iter().filter(of_sets);
    ensure!(members.all(|s| s["action"] == "kept"), "a snapshot of a set was removed: {pruned}");

    cluster.json(&["set", "pin", "job", "2", "--holder", "alice"])?;
    let dry = cluster.json(&["set", "prune", "job", "--keep-last", "2", "--dry-run"])?;
    let sets = |view: &Value| -> Vec<u64> {
        let sets = view["sets"].as_array().into_iter().flatten();
        sets.filter_map(|set| set["set"].as_u64()).collect()
    };
    assert_eq!(sets(&dry), [3, 1]);
    cluster.json(&["set", "keep", "job", "2"])?;
    // The steward does that by itself.
    let listed = || -> Result<Vec<u64>> {
        let view = cluster.json(&["set", "list", "job"])?;
        Ok(sets(&serde_json::json!({ "sets": view })))
    };
    wait_until("old sets are given up", || Ok(listed()? == [5, 4, 2]))?;
    let snapshots = cluster.json(&["snapshot", "list", &image])?;
    let stable: Vec<u64> = snapshots
        .as_array()
        .context("snapshots")?
        .iter()
        .filter(|s| s["state"] == "stable" && of_sets(s))
        .filter_map(|s| s["snapshot"].as_u64())
        .collect();
    assert_eq!(stable, [3, 5, 6]);
    let groups = cluster.json(&["set", "groups"])?;
    assert_eq!(groups[0]["keep_sets"], 2);
    cluster.json(&["set", "unpin", "job", "2", "--holder", "alice"])?;
    let pruned = cluster.json(&["set", "prune", "job"])?;
    assert_eq!((sets(&pruned), &pruned["snapshots_removed"]), (vec![2], &2.into()));
    for set in [4, 5] {
        let set = set.to_string();
        cluster.json(&["set", "restart", "job", "--set", &set, "--verify"])?;
    }
    Ok(())
}

#[test]
fn a_guest_reaches_the_sets_of_its_own_group_only_and_only_with_its_token() -> Result<()> {
    let cluster = Cluster::start(&["--guests", "127.0.0.1:0"])?;
    let vms = job(&cluster)?;
    cluster.attach("base", "d2")?;
    let added = cluster.json(&["vm", "add", "two", "--disk", "d2", "--group", "other", "--tcp"])?;
    let address: SocketAddr = added["address"].as_str().context("an address")?.parse()?;
    let token = added["token"].as_str().context("a token")?.to_owned();
    let as_vm = |vm: &str| {
        let credentials = Credentials { vm: vm.to_owned(), token: token.clone() };
        Client::new(Target::tcp(address, Some(credentials)))
    };
    let refused = |result: Result<_, GuestError>, code: i32| match result {
        Err(GuestError::Refused { code: found, .. }) if found == code => Ok(()),
        other => Err(anyhow::anyhow!("not refused with {code}: {other:?}")),
    };
    const PERMISSION_DENIED: i32 = 7;
    const UNAUTHENTICATED: i32 = 16;
    let begun = vms[0].channel.begin_set("", 2, soon())?;
    refused(as_vm("two").begin_set("job", 2, soon()), PERMISSION_DENIED)?;
    refused(as_vm("two").set_status("job", begun.sequence, soon()), PERMISSION_DENIED)?;
    refused(as_vm("three").begin_set("job", 2, soon()), UNAUTHENTICATED)?;
    let join = SetMembership { group: "job".to_owned(), sequence: 1, expected_vms: 2 };
    let joined = as_vm("two").checkpoint(&Ask { set: Some(join), ..Ask::new() }, soon());
    refused(joined.map(|_| Default::default()), PERMISSION_DENIED)?;
    let disk = cluster.json(&["disk", "info", "d2"])?;
    ensure!(disk["checkpoint_image"].is_null(), "a refused request committed something");
    // Everybody else is served as before.
    assert_eq!(take(&vms, 1)?, 2);
    assert_eq!(as_vm("two").begin_set("", 1, soon())?.group, "other");
    Ok(())
}

/// The relay that QEMU runs for a forwarded address, spoken to as QEMU does.
#[test]
fn a_forwarded_address_leads_to_the_vms_own_channel() -> Result<()> {
    let cluster = Cluster::start(&[])?;
    let raw = sparse(&cluster.scratch().join("base.raw"), SIZE, &[(0, &noise(1, 4096))])?;
    cluster.import(&raw, "base")?;
    cluster.attach("base", "d1")?;
    let added = cluster.json(&["vm", "add", "one", "--disk", "d1"])?;
    let socket = added["socket"].as_str().context("a socket")?;
    let forward = added["qemu_forward_args"][1].as_str().context("arguments")?;
    ensure!(forward.ends_with(&format!("blobcr vm relay '{socket}'")), "{forward}");
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let mut relay = cluster.command(&["vm", "relay", socket])?;
    let forwarding = std::thread::spawn(move || -> Result<std::process::ExitStatus> {
        let (stream, _) = listener.accept()?;
        let stdin: std::os::fd::OwnedFd = stream.try_clone()?.into();
        let stdout: std::os::fd::OwnedFd = stream.into();
        Ok(relay.stdin(stdin).stdout(stdout).status()?)
    });
    let status = Client::new(Target::tcp(address, None)).status(soon())?;
    assert_eq!((status.vm.as_str(), status.disks.len()), ("one", 1));
    // It ends with the connection.
    let ended = forwarding.join().map_err(|_| anyhow::anyhow!("the relay's thread"))??;
    ensure!(ended.success(), "{ended}");
    let nobody = cluster.run(&["vm", "relay", "/nowhere/one.sock"])?;
    ensure!(nobody.code == 3 && nobody.stderr.contains("proxy runs"), "{nobody:?}");
    Ok(())
}
