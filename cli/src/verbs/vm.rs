//! `blobcr vm`: the VMs of a host and their channels.

use std::time::Duration;

use blobcr_proto::v1;

use crate::args::VmCommand;
use crate::channel::within;
use crate::output::{Column, Output, or_dash, table};
use crate::session::Session;
use crate::view::{VmView, some_unless_empty};

/// The proxy answers from memory, or after asking its mirror.
const DEADLINE: Duration = Duration::from_secs(60);

/// Where a guest finds its channel in QEMU's user network.
const FORWARDED: &str = "10.0.2.100:7000";

/// The name by which the guest's agent finds the channel among its ports.
const PORT_NAME: &str = "org.blobcr.checkpoint.0";

/// Runs one verb.
///
/// # Errors
/// What the verb says.
pub async fn run(command: VmCommand, session: &Session, output: Output) -> anyhow::Result<()> {
    let mut proxy = session.proxy()?;
    match command {
        VmCommand::Add { vm, disks, groups, tcp, vsock_cid } => {
            let disks = disks.into_iter().map(String::from).collect();
            let groups = groups.into_iter().map(String::from).collect();
            let (name, vsock_cid) = (vm.into(), vsock_cid.unwrap_or(0));
            let request = v1::AddVmRequest { name, disks, groups, tcp, replace: false, vsock_cid };
            let answer = proxy.client.add_vm(within(DEADLINE, request)).await;
            output.data(&view(proxy.answer(answer)?), added)
        }
        VmCommand::List => {
            let answer = proxy.client.list_vms(within(DEADLINE, v1::ListVmsRequest {})).await;
            let views: Vec<_> = proxy.answer(answer)?.vms.into_iter().map(view).collect();
            output.data(&views, |views| {
                let columns = [
                    Column::Text("VM"),
                    Column::Text("DISKS"),
                    Column::Text("GROUPS"),
                    Column::Text("TCP"),
                    Column::Text("CID"),
                    Column::Text("SOCKET"),
                ];
                table(
                    &columns,
                    views.iter().map(|view| {
                        vec![
                            view.vm.clone(),
                            view.disks.join(" "),
                            view.groups.join(" "),
                            or_dash(view.address.clone()),
                            or_dash(view.vsock_cid),
                            view.socket.clone(),
                        ]
                    }),
                )
            })
        }
        VmCommand::Remove { vm } => {
            let request = v1::VmRef { name: vm.to_string() };
            let answer = proxy.client.remove_vm(within(DEADLINE, request)).await;
            proxy.answer(answer)?;
            let view = RemovedView { vm: vm.into(), state: "removed" };
            output.data(&view, |_| String::new())
        }
        // It needs no endpoint, so it never comes here.
        VmCommand::Relay { socket } => super::relay::run(&socket),
    }
}

fn added(view: &VmView) -> String {
    let token = match (&view.token, &view.address) {
        (Some(token), Some(address)) => {
            format!("\nOver TCP, at {address}, with the token (told this once):\n  {token}\n")
        }
        _ => String::new(),
    };
    let vsock = match (view.vsock_cid, view.vsock_port) {
        (Some(cid), Some(port)) => format!(
            "\nOver vsock, where the guest asks vsock:{port}, give QEMU:\n  \
             -device vhost-vsock-pci,guest-cid={cid}\n"
        ),
        _ => String::new(),
    };
    format!(
        "{}\n\nGive QEMU:\n{}\nor, for a guest that is to use TCP at {FORWARDED}:\n{}\n\
         {token}{vsock}",
        view.socket,
        pairs(&view.qemu_args),
        pairs(&view.qemu_forward_args)
    )
}

/// What was removed.
#[derive(Debug, serde::Serialize)]
struct RemovedView {
    vm: String,
    state: &'static str,
}

fn view(vm: v1::Vm) -> VmView {
    VmView {
        qemu_args: qemu_args(&vm.socket),
        qemu_forward_args: qemu_forward_args(&vm.socket),
        vm: vm.name,
        disks: vm.disks,
        socket: vm.socket,
        groups: vm.groups,
        address: some_unless_empty(vm.address),
        token: some_unless_empty(vm.token),
        vsock_cid: Some(vm.vsock_cid).filter(|cid| *cid != 0),
        vsock_port: Some(vm.vsock_port).filter(|port| *port != 0),
    }
}

/// A network that leads to the VM's own channel and nowhere else: which socket it is stands on the
/// host's command line, so the guest cannot forge it.
fn qemu_forward_args(socket: &str) -> Vec<String> {
    // QEMU splits the command as a shell would.
    let quoted = format!("'{}'", socket.replace('\'', r"'\''")).replace(',', ",,");
    vec![
        "-netdev".to_owned(),
        format!("user,id=blobcr,restrict=on,guestfwd=tcp:{FORWARDED}-cmd:blobcr vm relay {quoted}"),
        "-device".to_owned(),
        "virtio-net-pci,netdev=blobcr".to_owned(),
    ]
}

/// The guest's end of the channel. QEMU connects, and connects again after a restart of ours.
fn qemu_args(socket: &str) -> Vec<String> {
    // A comma ends a value in QEMU's options unless it is doubled.
    let socket = socket.replace(',', ",,");
    vec![
        "-chardev".to_owned(),
        format!("socket,id=blobcr,path={socket},reconnect-ms=1000"),
        "-device".to_owned(),
        "virtio-serial-pci".to_owned(),
        "-device".to_owned(),
        format!("virtserialport,chardev=blobcr,name={PORT_NAME}"),
    ]
}

fn pairs(args: &[String]) -> String {
    let lines: Vec<_> = args.chunks(2).map(|pair| format!("  {}", pair.join(" "))).collect();
    lines.join(" \\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comma_in_a_path_does_not_become_an_option() {
        assert!(qemu_args("/a,b.sock")[1].contains("path=/a,,b.sock,"));
        let forward = qemu_forward_args("/a,b c'd.sock");
        assert!(forward[1].ends_with(r"blobcr vm relay '/a,,b c'\''d.sock'"), "{forward:?}");
    }
}
