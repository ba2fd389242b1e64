//! Real guests that reach their host by a network only: by an address that QEMU forwards, and over a
//! tap with a token.

use anyhow::{Context, Result, ensure};
use blobcr_tests::daemon::wait_until;
use blobcr_tests::hosted::{BOOT, Hosted, PROXY, SOON};
use blobcr_tests::roles::{Outage, Which};

const FORWARDED: &str = "10.0.2.100:7000";

#[test]
fn a_guest_with_a_forwarded_address_is_served_and_its_retry_too() -> Result<()> {
    let mut hosted = Hosted::start(false)?;
    let vm = hosted.add("web", &[])?;
    let run = format!(
        "ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0; ip route add default via 10.0.2.2; \
         export BLOBCR_CONNECT={FORWARDED}; \
         await 0; blobcr-guest checkpoint --key again --timeout 300; echo first=$?; \
         blobcr-guest checkpoint --key again; echo again=$?; \
         blobcr-guest checkpoint --wait; echo next=$?; \
         for i in 1 2 3; do sleep 1000 | nc 10.0.2.100 7000 & done; await 1; \
         asked=; for i in 1 2 3 4 5 6; do \
           blobcr-guest status >/run/status$i & asked=\"$asked $!\"; done; \
         wait $asked; echo told=$(cat /run/status* | grep -c image=debian); \
         nc -w 5 10.0.2.2 22 </dev/null; echo host=$?; \
         await 2"
    );
    let mut guest = hosted.boot(&vm, vm.words("qemu_forward_args")?, &[], &run)?;
    guest.wait_for("guest: up", BOOT)?;

    // The first CHECKPOINT of a disk asks the metadata server: so it is on its way for a while.
    hosted.roles.take_away(Which::Metadata(0), Outage::Paused)?;
    vm.raise(0)?;
    let asked = ["checkpoint requested", "key=\"again\""];
    hosted.wait_logged(1, &asked)?;
    hosted.roles.take_away(PROXY, Outage::Killed)?;
    hosted.roles.bring_back(PROXY)?;
    hosted.wait_logged(2, &asked)?;
    hosted.roles.bring_back(Which::Metadata(0))?;
    for line in ["first=0", "again=0"] {
        let taken = guest.wait_for("@2 disk=web", SOON)?;
        ensure!(taken.starts_with("web-"), "{taken}");
        guest.wait_for(line, SOON)?;
    }
    guest.wait_for("@3 disk=web", SOON)?;
    guest.wait_for(" stable stored_bytes=", SOON)?;
    guest.wait_for("next=0", SOON)?;
    // The first one is what it was cloned from.
    assert_eq!(hosted.snapshots(&vm)?, [1, 2, 3], "however often it was asked for");

    // Each connection has a process of its own, and those that only wait are in nobody's way.
    wait_until("three connections wait", || Ok(vm.relays()? == 3))?;
    vm.raise(1)?;
    guest.wait_for("told=6", SOON)?;
    guest.wait_for("host=1", SOON)?;
    assert_eq!(vm.relays()?, 3);
    guest.kill()?;
    wait_until("they end with their VM", || Ok(vm.relays()? == 0))?;
    hosted.roles.stop()
}

#[test]
fn a_guest_behind_a_tap_is_served_with_its_own_token_only() -> Result<()> {
    let mut hosted = Hosted::start(true)?;
    let host = hosted.roles.host(PROXY)?;
    let (taps, vms) = (
        [host.tap(1)?, host.tap(2)?],
        [hosted.add("web", &["--tcp"])?, hosted.add("db", &["--tcp"])?],
    );
    let address = vms[0].text("address")?.to_owned();
    let (ip, port) = address.split_once(':').context("no port")?;
    let tokens = [vms[0].text("token")?, vms[1].text("token")?];
    let setup = |own: usize| {
        let file = |name: &str, vm: usize| format!("echo {} >/run/{name}; ", tokens[vm]);
        let files = file("own", own) + &file("other", 1 - own);
        format!("{}{files}export BLOBCR_CONNECT={address}; ", taps[own].guest_setup())
    };
    let web = format!(
        "{}await 0; \
         ask() {{ blobcr-guest --vm $1 --token-file /run/$2 $3; echo $1-$2=$?; }}; \
         ask web own 'checkpoint --wait --timeout 300'; \
         ask web other status; ask db own checkpoint; \
         blobcr-guest checkpoint; echo none=$?; \
         until raised 1; do for i in $(seq 12); do sleep 4 | nc {ip} {port} & done; sleep 1; done; \
         await 2; ask web own 'checkpoint --key last --timeout 300'",
        setup(0)
    );
    let db = format!(
        "{}await 0; export BLOBCR_VM=db BLOBCR_TOKEN_FILE=/run/own; \
         blobcr-guest checkpoint --wait --timeout 300; echo own=$?",
        setup(1)
    );
    let mut guests = Vec::new();
    for ((vm, tap), run) in vms.iter().zip(&taps).zip([web, db]) {
        guests.push(hosted.boot(vm, tap.qemu_args(), &[], &run)?);
    }
    for guest in &mut guests {
        guest.wait_for("guest: up", BOOT)?;
    }
    vms[0].raise(0)?;
    guests[0].wait_for("@2 disk=web", SOON)?;
    guests[0].wait_for("web-own=0", SOON)?;
    for refused in ["web-other=", "db-own=", "none="] {
        let line = guests[0].wait_for(refused, SOON)?;
        ensure!(!line.ends_with("=0"), "{line}");
    }
    let peer = taps[0].guest().to_string();
    let wrong = [&peer, "connection over TCP refused", "this is not its token"];
    assert_eq!(hosted.logged(&wrong)?, 2, "{}", hosted.roles.log_of(PROXY)?);
    let silent = [&peer, "connection over TCP refused", "says whose it is"];
    assert_eq!(hosted.logged(&silent)?, 1, "{}", hosted.roles.log_of(PROXY)?);
    ensure!(hosted.snapshots(&vms[1]).is_err(), "a refused request committed something");

    // While it holds as many connections as it is let, the other VM comes through.
    let many = [&peer, "too many connections that have not said whose they are"];
    hosted.wait_logged(1, &many)?;
    vms[1].raise(0)?;
    guests[1].wait_for("@2 disk=db", SOON)?;
    guests[1].wait_for("own=0", SOON)?;
    vms[0].raise(1)?;

    // A token outlives its proxy.
    hosted.roles.take_away(PROXY, Outage::Killed)?;
    vms[0].raise(2)?;
    hosted.roles.bring_back(PROXY)?;
    guests[0].wait_for("@3 disk=web", SOON)?;
    guests[0].wait_for("web-own=0", SOON)?;
    for (guest, (vm, taken)) in guests.iter_mut().zip(vms.iter().zip([&[1, 2, 3][..], &[1, 2]])) {
        guest.wait_until_down(SOON)?;
        assert_eq!(hosted.snapshots(vm)?, taken);
    }
    hosted.roles.stop()
}
