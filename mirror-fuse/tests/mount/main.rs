//! A mirror that is really mounted, used through system calls. Needs /dev/fuse, and root or
//! fusermount3.

#[cfg(test)]
mod images;
#[cfg(test)]
mod support;
