//! A mirror that is really mounted, used through system calls. Needs /dev/fuse, and root or
//! fusermount3.

#[cfg(test)]
mod disks;
#[cfg(test)]
mod forks;
#[cfg(test)]
mod full;
#[cfg(test)]
mod hosts;
#[cfg(test)]
mod images;
#[cfg(test)]
mod ioctls;
#[cfg(test)]
mod prefetch;
#[cfg(test)]
mod qemu;
#[cfg(test)]
mod stress;
#[cfg(test)]
mod support;
