//! `blobcr vm`: the VMs of a host and their channels.

use std::time::Duration;

use blobcr_proto::v1;

use crate::args::VmCommand;
use crate::channel::within;
use crate::output::{Column, Output, table};
use crate::session::Session;
use crate::view::VmView;

/// The proxy answers from memory, or after asking its mirror.
const DEADLINE: Duration = Duration::from_secs(60);

/// The name by which the guest's agent finds the channel among its ports.
const PORT_NAME: &str = "org.blobcr.checkpoint.0";

/// Runs one verb.
///
/// # Errors
/// What the verb says.
pub async fn run(command: VmCommand, session: &Session, output: Output) -> anyhow::Result<()> {
    let mut proxy = session.proxy()?;
    match command {
        VmCommand::Add { vm, disks } => {
            let disks = disks.into_iter().map(String::from).collect();
            let request = v1::AddVmRequest { name: vm.into(), disks };
            let answer = proxy.client.add_vm(within(DEADLINE, request)).await;
            let view = view(proxy.answer(answer)?);
            output.data(&view, |view| {
                format!("{}\n\nGive QEMU:\n{}\n", view.socket, pairs(&view.qemu_args))
            })
        }
        VmCommand::List => {
            let answer = proxy.client.list_vms(within(DEADLINE, v1::ListVmsRequest {})).await;
            let views: Vec<_> = proxy.answer(answer)?.vms.into_iter().map(view).collect();
            output.data(&views, |views| {
                let columns = [Column::Text("VM"), Column::Text("DISKS"), Column::Text("SOCKET")];
                table(
                    &columns,
                    views.iter().map(|view| {
                        vec![view.vm.clone(), view.disks.join(" "), view.socket.clone()]
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
    }
}

/// What was removed.
#[derive(Debug, serde::Serialize)]
struct RemovedView {
    vm: String,
    state: &'static str,
}

fn view(vm: v1::Vm) -> VmView {
    let qemu_args = qemu_args(&vm.socket);
    VmView { vm: vm.name, disks: vm.disks, socket: vm.socket, qemu_args }
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
    }
}
