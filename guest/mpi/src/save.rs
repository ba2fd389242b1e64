//! Who saves the state of a process that knows nothing of checkpoints.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;

use crate::failure::Failure;
use crate::mpi::{Comm, symbol};
use crate::settings::{PRELOAD, Save, Settings};

type Function = unsafe extern "C" fn(c_int, c_int, *const c_char) -> c_int;
const NAME: &CStr = c"blobcr_mpi_save";

/// Found and ready.
pub(crate) enum Saver {
    /// A function of the process.
    Function(Function),
    /// A command of the shell.
    Command(&'static str),
}

/// Whether the program itself has a function for it.
pub(crate) fn exported() -> bool {
    symbol(NAME).is_some()
}

impl Saver {
    /// The one that the settings name, or else the program's own.
    pub(crate) fn find(settings: &'static Settings) -> Result<Self, Failure> {
        let found = match &settings.save {
            Some(Save::Command(command)) => return Ok(Self::Command(command)),
            Some(Save::Library(path)) => load(path)?,
            None => symbol(NAME)
                .ok_or_else(|| Failure::usage("the program exports no blobcr_mpi_save"))?,
        };
        // SAFETY: a function of this name has the type that blobcr_mpi.h declares.
        Ok(Self::Function(unsafe { std::mem::transmute::<*mut c_void, Function>(found) }))
    }

    /// Saves this process's state in the directory.
    pub(crate) fn save(&self, comm: &Comm, dir: &Path) -> Result<(), Failure> {
        match self {
            Self::Function(function) => {
                let path = c_string(dir)?;
                // SAFETY: the path outlives the call.
                match unsafe { function(comm.rank, comm.size, path.as_ptr()) } {
                    0 => Ok(()),
                    rc => Err(Failure::new(rc, format!("blobcr_mpi_save returned {rc}"))),
                }
            }
            Self::Command(command) => {
                let status = Command::new("/bin/sh")
                    .args(["-c", command])
                    .env("BLOBCR_RANK", comm.rank.to_string())
                    .env("BLOBCR_SIZE", comm.size.to_string())
                    .env("BLOBCR_PID", std::process::id().to_string())
                    .env("BLOBCR_MPI_DIR", dir)
                    .env_remove(PRELOAD)
                    .status()
                    .map_err(|e| Failure::io("cannot run BLOBCR_MPI_SAVE", &e))?;
                match status.success() {
                    true => Ok(()),
                    false => Err(Failure::new(libc::EIO, format!("BLOBCR_MPI_SAVE: {status}"))),
                }
            }
        }
    }
}

fn load(path: &Path) -> Result<*mut c_void, Failure> {
    let name = c_string(path)?;
    // SAFETY: the name ends with NUL; what the library does when loaded is its user's to choose.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if library.is_null() {
        // SAFETY: after a failure, it is a text.
        let why = unsafe { CStr::from_ptr(libc::dlerror()) };
        return Err(Failure::usage(format!("BLOBCR_MPI_HOOK: {}", why.to_string_lossy())));
    }
    // SAFETY: the library is open and stays so.
    let found = unsafe { libc::dlsym(library, NAME.as_ptr()) };
    if found.is_null() {
        return Err(Failure::usage(format!(
            "BLOBCR_MPI_HOOK: {} exports no blobcr_mpi_save",
            path.display()
        )));
    }
    Ok(found)
}

fn c_string(path: &Path) -> Result<CString, Failure> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Failure::usage(format!("{} has a NUL in it", path.display())))
}
