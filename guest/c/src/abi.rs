//! The structures of `blobcr-guest.h`; a test compares every offset with what a C compiler makes.

use std::ffi::{CStr, c_char};
use std::path::PathBuf;
use std::time::Duration;

use blobcr_guest::{GuestError, Place};

pub(crate) const VERSION: u32 = 1;
pub(crate) const NAME_SIZE: usize = 136;
pub(crate) const REASON_SIZE: usize = 240;
pub(crate) const DISKS_MAX: usize = 32;
pub(crate) const NO_FLUSH: u32 = 1;
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(60);

pub(crate) type Name = [u8; NAME_SIZE];

#[repr(C)]
pub(crate) struct Options {
    pub(crate) version: u32,
    pub(crate) size: u32,
    pub(crate) flags: u32,
    pub(crate) timeout_ms: u32,
    pub(crate) port: *const c_char,
    pub(crate) connect: *const c_char,
    pub(crate) vm: *const c_char,
    pub(crate) token_file: *const c_char,
    pub(crate) socket: *const c_char,
    pub(crate) key: *const c_char,
    pub(crate) group: *const c_char,
    pub(crate) sequence: u64,
    pub(crate) expected_vms: u32,
    pub(crate) reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Snapshot {
    pub(crate) disk: Name,
    pub(crate) image: Name,
    pub(crate) image_id: u64,
    pub(crate) number: u64,
    pub(crate) dirty_bytes: u64,
    pub(crate) downtime_ns: u64,
    pub(crate) state: u32,
    pub(crate) reserved: u32,
}

#[repr(C)]
pub(crate) struct Taken {
    pub(crate) version: u32,
    pub(crate) size: u32,
    pub(crate) count: u32,
    pub(crate) reserved: u32,
    pub(crate) flush_ns: u64,
    pub(crate) call_ns: u64,
    pub(crate) vm: Name,
    pub(crate) snapshots: [Snapshot; DISKS_MAX],
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Disk {
    pub(crate) disk: Name,
    pub(crate) checkpoint_image: Name,
    pub(crate) size_bytes: u64,
    pub(crate) dirty_bytes: u64,
    pub(crate) last_stable: u64,
    pub(crate) pending: u64,
    pub(crate) stalled: [u8; REASON_SIZE],
}

#[repr(C)]
pub(crate) struct Vm {
    pub(crate) version: u32,
    pub(crate) size: u32,
    pub(crate) count: u32,
    pub(crate) group_count: u32,
    pub(crate) vm: Name,
    pub(crate) group: Name,
    pub(crate) disks: [Disk; DISKS_MAX],
}

#[repr(C)]
pub(crate) struct Set {
    pub(crate) version: u32,
    pub(crate) size: u32,
    pub(crate) sequence: u64,
    pub(crate) expected_vms: u32,
    pub(crate) joined_vms: u32,
    pub(crate) state: u32,
    pub(crate) reserved: u32,
    pub(crate) group: Name,
}

/// A structure that begins with its version and its size.
pub(crate) trait Versioned {
    const NAME: &'static str;
    fn head(&self) -> (u32, u32);
}

macro_rules! versioned {
    ($($type:ty = $name:literal),*) => {$(
        impl Versioned for $type {
            const NAME: &'static str = $name;
            fn head(&self) -> (u32, u32) {
                (self.version, self.size)
            }
        }
    )*};
}
versioned!(
    Options = "struct blobcr_options",
    Taken = "struct blobcr_result",
    Vm = "struct blobcr_vm",
    Set = "struct blobcr_set"
);

/// Whether it is as this library knows it.
pub(crate) fn check<T: Versioned>(structure: &T) -> Result<(), GuestError> {
    let (version, size) = structure.head();
    if version == VERSION && size as usize == size_of::<T>() {
        return Ok(());
    }
    Err(GuestError::Usage(format!(
        "{} is of version {version} and {size} bytes, and this library has version {VERSION} of {} \
         bytes: clear it with BLOBCR_INIT, and compile with the header of this library",
        T::NAME,
        size_of::<T>()
    )))
}

/// The options as Rust has them.
pub(crate) struct Asked {
    pub(crate) place: Place,
    pub(crate) timeout: Duration,
    pub(crate) no_flush: bool,
    pub(crate) key: Option<String>,
    pub(crate) group: String,
    pub(crate) sequence: u64,
    pub(crate) expected_vms: u32,
}

impl Asked {
    /// # Safety
    /// Every pointer in the options is null or to a text that ends with NUL.
    pub(crate) unsafe fn from(options: Option<&Options>) -> Result<Self, GuestError> {
        let Some(o) = options else {
            return Ok(Self {
                place: Place::default(),
                timeout: TIMEOUT_DEFAULT,
                no_flush: false,
                key: None,
                group: String::new(),
                sequence: 0,
                expected_vms: 0,
            });
        };
        check(o)?;
        if o.flags & !NO_FLUSH != 0 || o.reserved != 0 {
            return Err(GuestError::Usage(format!(
                "flags {:#x} or a reserved field are set that this library does not know",
                o.flags
            )));
        }
        // SAFETY: as the caller promises.
        let (port, connect, vm, token_file, socket, key, group) = unsafe {
            (
                text(o.port)?,
                text(o.connect)?,
                text(o.vm)?,
                text(o.token_file)?,
                text(o.socket)?,
                text(o.key)?,
                text(o.group)?,
            )
        };
        let timeout = match o.timeout_ms {
            0 => TIMEOUT_DEFAULT,
            ms => Duration::from_millis(ms.into()),
        };
        let (socket, token_file) = (socket.map(PathBuf::from), token_file.map(PathBuf::from));
        Ok(Self {
            place: Place { port, socket, connect, vm, token_file },
            timeout,
            no_flush: o.flags & NO_FLUSH != 0,
            key,
            group: group.unwrap_or_default(),
            sequence: o.sequence,
            expected_vms: o.expected_vms,
        })
    }
}

/// # Safety
/// It is null or a text that ends with NUL.
unsafe fn text(from: *const c_char) -> Result<Option<String>, GuestError> {
    if from.is_null() {
        return Ok(None);
    }
    // SAFETY: as the caller promises.
    let text = unsafe { CStr::from_ptr(from) };
    match text.to_str() {
        Ok(text) => Ok(Some(text.to_owned())),
        Err(_) => Err(GuestError::Usage(format!("{text:?} is no UTF-8"))),
    }
}

/// Copies as much of the text as there is room for, whole characters, and a NUL.
pub(crate) fn fill<const N: usize>(into: &mut [u8; N], text: &str) {
    into.fill(0);
    let mut end = text.len().min(N - 1);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    into[..end].copy_from_slice(&text.as_bytes()[..end]);
}

/// The text of a field, without what may lie behind its NUL.
pub(crate) fn read<const N: usize>(field: &[u8; N]) -> Result<String, GuestError> {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(N);
    match std::str::from_utf8(&field[..end]) {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => Err(GuestError::Usage("a name in the result is no UTF-8".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_between_characters() {
        let mut field = [1; 6];
        fill(&mut field, "abcdé");
        assert_eq!(&field, b"abcd\0\0");
        fill(&mut field, "abcdef");
        assert_eq!(&field, b"abcde\0");
        assert_eq!(read(&field).unwrap(), "abcde");
        assert!(read(b"\xff\0").is_err());
    }

    #[test]
    fn options_of_another_layout_are_refused() {
        // SAFETY: all zero is a valid value: numbers and null pointers.
        let mut options: Options = unsafe { std::mem::zeroed() };
        // SAFETY: its pointers are null.
        let asked = |options: &Options| unsafe { Asked::from(Some(options)) }.map(|_| ());
        assert!(asked(&options).unwrap_err().to_string().contains("BLOBCR_INIT"));
        (options.version, options.size) = (VERSION, size_of::<Options>() as u32);
        asked(&options).unwrap();
        options.flags = 2;
        asked(&options).unwrap_err();
        (options.flags, options.reserved) = (0, 1);
        asked(&options).unwrap_err();
    }
}
