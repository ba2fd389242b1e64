//! What a VM may do with checkpoint sets: those of its own groups, and no others.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::Duration;

use blobcr_proto::name::GroupName;
use blobcr_proto::v1::{
    BeginSetRequest, BeginVmSetRequest, CheckpointSet, GetSetRequest, LatestSetRequest,
    SetMembership, VmSet, VmSetStatusRequest,
};
use tokio::time::Instant;
use tonic::Status;

use crate::limits::SETS_BEGUN_MAX;
use crate::requests::{Backend, Vm};

/// The time in which [`SETS_BEGUN_MAX`] sets may be begun.
const WINDOW: Duration = Duration::from_secs(60);

/// How many sets a VM has begun lately: each is a record that stays.
#[derive(Debug, Default)]
pub(crate) struct Begun(Mutex<Option<(Instant, u32)>>);

impl Begun {
    fn count(&self) -> Result<(), Status> {
        let mut begun = self.0.lock().expect("nothing panics while it holds this");
        let now = Instant::now();
        let (since, count) = begun.filter(|(since, _)| now - *since < WINDOW).unwrap_or((now, 0));
        if count >= SETS_BEGUN_MAX {
            return Err(Status::resource_exhausted(format!(
                "this VM has begun {SETS_BEGUN_MAX} sets within {} s; wait",
                WINDOW.as_secs()
            )));
        }
        *begun = Some((since, count + 1));
        Ok(())
    }
}

/// The group that is meant, which must be one of the VM's own: another job's sets are not its
/// business, and what it added there would spoil them.
fn own_group<'a>(vm: &'a Vm, named: &str) -> Result<&'a GroupName, Status> {
    let own = &vm.record.groups;
    if named.is_empty() {
        return match own.as_slice() {
            [group] => Ok(group),
            [] => Err(Status::failed_precondition(format!(
                "the VM {0} is in no group; add it with `blobcr vm add {0} --group GROUP`",
                vm.name()
            ))),
            _ => Err(Status::invalid_argument(format!(
                "the VM {} is in {} groups; name one of them",
                vm.name(),
                own.len()
            ))),
        };
    }
    own.iter().find(|group| group.as_str() == named).ok_or_else(|| {
        Status::permission_denied(format!(
            "the VM {} is not in the group {named:?}; `blobcr vm add --group` puts it there",
            vm.name()
        ))
    })
}

/// Checks which set a checkpoint is to be a member of, and writes its group out.
pub(crate) fn check_membership(vm: &Vm, set: &mut SetMembership) -> Result<(), Status> {
    if set.expected_vms == 0 {
        return Err(Status::invalid_argument("a checkpoint set has at least one VM"));
    }
    set.group = own_group(vm, &set.group)?.to_string();
    Ok(())
}

/// Begins a new set of the VM's group.
pub(crate) async fn begin(
    backend: &Backend,
    vm: &Vm,
    request: BeginVmSetRequest,
) -> Result<VmSet, Status> {
    let group = own_group(vm, &request.group)?.to_string();
    vm.begun.count()?;
    let request = BeginSetRequest { group, expected_vms: request.expected_vms };
    let set = backend.upstream.begin_set(request).await?;
    tracing::info!(vm = %vm.name(), group = set.group, sequence = set.sequence, "set begun");
    Ok(for_members(set))
}

/// A set of the VM's group; without a number, the newest that is complete and stable.
pub(crate) async fn status(
    backend: &Backend,
    vm: &Vm,
    request: VmSetStatusRequest,
) -> Result<VmSet, Status> {
    let group = own_group(vm, &request.group)?.to_string();
    let set = match request.sequence {
        0 => backend.upstream.latest_set(LatestSetRequest { group }).await?,
        sequence => backend.upstream.get_set(GetSetRequest { group, sequence }).await?,
    };
    Ok(for_members(set))
}

fn for_members(set: CheckpointSet) -> VmSet {
    let vms: BTreeSet<&str> = set.members.iter().map(|member| member.vm.as_str()).collect();
    VmSet {
        joined_vms: u32::try_from(vms.len()).unwrap_or(u32::MAX),
        state: set.state,
        sequence: set.sequence,
        expected_vms: set.expected_vms,
        group: set.group,
    }
}
