//! [`NewVm`]: what a VM is added with, and what of it is refused whatever VMs there are.

use std::fmt::Display;

use blobcr_proto::DiskName;
use blobcr_proto::name::GroupName;

use crate::error::ProxyError;
use crate::limits::{DISKS_PER_VM_MAX, GROUPS_PER_VM_MAX};
use crate::vsock::Cid;

/// A VM to add.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewVm {
    /// Its name.
    pub name: String,
    /// Its disks, which are checkpointed behind one barrier.
    pub disks: Vec<String>,
    /// The groups of whose sets it may be a member.
    pub groups: Vec<String>,
    /// Whether it gets a token for a channel over TCP.
    pub tcp: bool,
    /// The CID that its hypervisor gives it, for a channel over vsock; 0: none.
    pub vsock_cid: u32,
    /// A VM that is there gets these disks in place of its own, and these groups besides its own.
    /// It keeps its token, and its CID unless another one is given; its connections end.
    pub replace: bool,
}

/// The groups that are named, and those that the VM is in already.
pub(crate) fn check_groups(
    named: &[String],
    known: &[GroupName],
) -> Result<Vec<GroupName>, ProxyError> {
    let names = named.iter().map(|g| GroupName::new(g.as_str())).collect::<Result<Vec<_>, _>>()?;
    check_distinct("group", &names)?;
    let more = known.iter().filter(|group| !names.contains(group)).cloned();
    let all: Vec<GroupName> = names.iter().cloned().chain(more).collect();
    if all.len() > GROUPS_PER_VM_MAX {
        let problem = format!("a VM is in at most {GROUPS_PER_VM_MAX} groups, not {}", all.len());
        return Err(ProxyError::Invalid(problem));
    }
    Ok(all)
}

fn check_distinct<N: PartialEq + Display>(what: &str, names: &[N]) -> Result<(), ProxyError> {
    match names.iter().enumerate().find(|(i, name)| names[..*i].contains(name)) {
        Some((_, twice)) => Err(ProxyError::Invalid(format!("the {what} {twice} is named twice"))),
        None => Ok(()),
    }
}

pub(crate) fn check_disks(disks: &[String]) -> Result<Vec<DiskName>, ProxyError> {
    let names = disks.iter().map(|d| DiskName::new(d.as_str())).collect::<Result<Vec<_>, _>>()?;
    if names.is_empty() {
        return Err(ProxyError::Invalid("a VM has at least one disk".to_owned()));
    }
    if names.len() > DISKS_PER_VM_MAX {
        return Err(ProxyError::Invalid(format!(
            "a VM has at most {DISKS_PER_VM_MAX} disks; this one would have {}",
            names.len()
        )));
    }
    check_distinct("disk", &names)?;
    Ok(names)
}

/// The CID, if there is one, which a VM can have.
pub(crate) fn check_cid(cid: u32) -> Result<Option<Cid>, ProxyError> {
    match Cid::new(cid) {
        None if cid != 0 => Err(ProxyError::Invalid(format!(
            "no VM has the CID {cid}, which is reserved; give this one another, 3 or more"
        ))),
        cid => Ok(cid),
    }
}
