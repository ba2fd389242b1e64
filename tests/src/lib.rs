//! End-to-end tests: real processes, real mounts, real guests.
//!
//! | module | holds |
//! |---|---|
//! | [`cluster`] | a `blobcr up` in a directory of its own |
//! | [`daemon`] | a single role as a process |
//! | [`disk_file`] | files that stand for disks |
//! | [`etcd`] | an etcd of one or several members |
//! | [`ext4`] | disks with an ext4, looked at from the host |
//! | [`hosted`] | VMs on a host whose proxy is a process of its own |
//! | [`integrity`] | what holds for every byte: random operations, and testers by others |
//! | [`guest_image`] | the smallest real guest, built from Debian's packages |
//! | [`job`] | an MPI job on two VMs, which loses one of them |
//! | [`job_soak`] | the same with losses that a seed chooses |
//! | [`mounted`] | an attached disk: its file and its ioctls |
//! | [`network`] | where processes live: loopback, or a network namespace each |
//! | [`node_soak`] | nodes that die under load, for as long as one likes |
//! | [`qmp`] | QEMU's machine protocol |
//! | [`roles`] | the roles as processes, each of which can go away and come back |
//! | [`scenario`] | the main job, end to end: what the demo shows and the tests assert |
//! | [`seed`] | the seed with which a soak begins |
//! | [`vm`] | a virtual machine under QEMU |
//! | [`writer`] | what writes and commits in the place of a guest, and knows what must be there |

pub mod cluster;
pub mod daemon;
pub mod disk_file;
pub mod etcd;
pub mod ext4;
pub mod guest_image;
pub mod hosted;
pub mod integrity;
pub mod job;
pub mod job_soak;
pub mod mounted;
pub mod network;
pub mod node_soak;
pub mod qmp;
pub mod roles;
pub mod scenario;
pub mod seed;
pub mod vm;
pub mod writer;
