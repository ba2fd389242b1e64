//! Takes CHECKPOINT requests from the guests of its own host, and from nobody else.
//!
//! Every VM has a Unix socket of its own, `DIR/VM.sock`, to which its hypervisor connects a
//! virtio-serial port of the guest, or an address that it forwards. A VM that reaches its host by a
//! network only gets a token for one TCP port that all of them share; over vsock the kernel says
//! which VM it is. Which VM a request speaks for is known from the socket that it arrived on, the
//! token that its connection began with or the CID that it came from, and from nothing else that
//! the guest says. The same operations are served to the host's
//! own tools by the gRPC service `Checkpoint`.
//!
//! | module | holds |
//! |---|---|
//! | `proxy` | [`Proxy`]: the VMs of this host, their records and their sockets |
//! | `new_vm` | [`NewVm`], and what of it is refused |
//! | `options` | [`ProxyOptions`] |
//! | `served` | the VMs that are served, and their connections |
//! | `channel` | one connection of a VM: frames in, answers out, all of it bounded |
//! | `tcp` | the port for guests that come by a network, with a token |
//! | `vsock` | the port for guests whose CID the kernel reports |
//! | `requests` | what a checkpoint, a wait and a status do, whoever sent them |
//! | `sets` | what a VM may do with the checkpoint sets of its groups |
//! | `lines` | how much of the log a VM can fill |
//! | `answers` | first answers by idempotency key, so that a repeated request is no second checkpoint |
//! | `upstream` | the mirror and the metadata service behind the requests |
//! | `records` | `DIR/VM.json`, which outlives the process |
//! | `sockets` | binding `DIR/VM.sock` and telling a dead one from a live one |
//! | `service` | the gRPC service |

mod answers;
mod channel;
mod error;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod limits;
mod lines;
mod new_vm;
mod options;
mod proxy;
mod records;
mod requests;
mod served;
mod service;
mod sets;
mod sockets;
mod tcp;
#[cfg(feature = "testing")]
pub mod testing;
mod upstream;
mod vsock;

pub use error::ProxyError;
pub use limits::{DISKS_PER_VM_MAX, GROUPS_PER_VM_MAX, KEY_BYTES_MAX, Limits, VMS_MAX};
pub use new_vm::NewVm;
pub use options::ProxyOptions;
pub use proxy::Proxy;
pub use service::CheckpointService;
