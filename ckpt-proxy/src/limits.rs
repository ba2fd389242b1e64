//! Everything that is bounded, and why it is bounded there.

use std::time::Duration;

/// VMs of one host. Each costs a listening socket and a task; a host runs hundreds at most.
pub const VMS_MAX: usize = 4096;

/// Disks of one VM. The reply of a checkpoint and of a wait must fit one frame of a channel
/// (64 KiB), and a disk takes up to about 700 bytes there.
pub const DISKS_PER_VM_MAX: usize = 64;

/// Bytes of a guest's idempotency key: room for a UUID or 256 bits in hexadecimal.
pub const KEY_BYTES_MAX: usize = 64;

/// First answers remembered for each VM. A guest repeats a request within seconds; the mirror
/// remembers the key beyond that.
pub(crate) const ANSWERS_MAX: usize = 128;

/// Checkpoints of one VM that run at a time. The mirror lets two snapshots of a disk be in flight;
/// more only queue behind them.
pub(crate) const CHECKPOINTS_MAX: usize = 4;

/// Waits of one VM at a time: one for each snapshot in flight, and room for impatient programs.
pub(crate) const WAITS_MAX: usize = 16;

/// Requests of one connection that wait for their answer.
pub(crate) const REQUESTS_MAX: usize = 8;

/// Groups of one VM: a VM takes part in one job, or a few that share it.
pub const GROUPS_PER_VM_MAX: usize = 16;

/// Sets that one VM begins within a minute. The quickest jobs checkpoint once a second.
pub(crate) const SETS_BEGUN_MAX: u32 = 600;

/// Connections over TCP that have not said yet whose they are.
pub(crate) const GREETINGS_MAX: usize = 64;

/// Of those, from one address: a guest that holds all that it can leaves room for the others.
pub(crate) const GREETINGS_PER_ADDRESS_MAX: usize = 8;

/// Connections over vsock that the kernel keeps until they are taken up: as many as over TCP.
pub(crate) const BACKLOG: i32 = 128;

/// Lines of the log within ten seconds that one VM can cause by what costs it nothing. The quickest
/// jobs cause one a second; a guest that does nothing else makes some 100 MB a day of it.
pub(crate) const LINES_MAX: u32 = 100;

/// Bytes read from a connection at a time: one frame of the largest size.
pub(crate) const READ_BYTES: usize = 64 << 10;

/// Places in a row that looked like a frame and were none before a connection is closed. Each can
/// cost a checksum of 64 KiB, so a guest that sends nothing else must be slowed down.
pub(crate) const NOISE_MAX: usize = 1000;

/// The longest text of another party that is passed on to a guest.
pub(crate) const TEXT_BYTES_MAX: usize = 512;

/// Times and numbers that a test or an unusual host may want otherwise.
#[derive(Clone, Debug)]
pub struct Limits {
    /// How long a request tries again while the mirror or the metadata service cannot be reached,
    /// before it is answered with UNAVAILABLE. Long enough for a restart.
    pub unreachable: Duration,
    /// The deadline of one call to the mirror or the metadata service. A checkpoint may have to
    /// wait for one of two snapshots in flight.
    pub call: Duration,
    /// How long one frame may take from its first byte to its last. A guest program that died in
    /// the middle of one must not swallow the request of the next.
    pub frame: Duration,
    /// How long a peer may take no byte of its answers before its connection is closed.
    pub write: Duration,
    /// The longest that one WaitStable waits; whoever wants longer asks again. It bounds what a
    /// program that died while it waited leaves behind.
    pub wait_max: Duration,
    /// How long a WaitStable waits that names no time.
    pub wait_default: Duration,
    /// Connections of one VM at a time: the hypervisor's, and tools of the host.
    pub connections: usize,
    /// How long a VM's socket rests after a connection was closed for misbehaviour.
    pub rest: Duration,
    /// How long a snapshot is followed for the log before that is given up.
    pub follow: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            unreachable: Duration::from_secs(5),
            call: Duration::from_secs(60),
            frame: Duration::from_secs(2),
            write: Duration::from_secs(30),
            wait_max: Duration::from_secs(60),
            wait_default: Duration::from_secs(60),
            connections: 16,
            rest: Duration::from_secs(1),
            follow: Duration::from_secs(3600),
        }
    }
}
