//! The MPI library of the process, found at run time: this library is linked with none.
//!
//! A handle (a communicator, a type, an operation) is an `int` in MPICH and its kin and a pointer in
//! Open MPI. Both travel in one register, so a `usize` that is only handed on does for either; where
//! two are compared, an `int` is only its lower half.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;
use std::time::Duration;

use crate::failure::Failure;

/// The longest text of MPI_Get_library_version of both, with room.
const VERSION_BYTES: usize = 16 << 10;

/// What MPI_Finalize may take where the job could not begin.
const FINALIZE: Duration = Duration::from_secs(10);

pub(crate) type Handle = usize;

type Allreduce =
    unsafe extern "C" fn(*const c_void, *mut c_void, c_int, Handle, Handle, Handle) -> c_int;
type Allgather =
    unsafe extern "C" fn(*const c_void, c_int, Handle, *mut c_void, c_int, Handle, Handle) -> c_int;
type Bcast = unsafe extern "C" fn(*mut c_void, c_int, Handle, c_int, Handle) -> c_int;
type OfComm = unsafe extern "C" fn(Handle, *mut c_int) -> c_int;
type Dup = unsafe extern "C" fn(Handle, *mut Handle) -> c_int;
type Finalize = unsafe extern "C" fn() -> c_int;
type Initialized = unsafe extern "C" fn(*mut c_int) -> c_int;
type Version = unsafe extern "C" fn(*mut c_char, *mut c_int) -> c_int;

/// What is used of MPI.
pub(crate) struct Mpi {
    world: Handle,
    byte: Handle,
    int: Handle,
    min: Handle,
    max: Handle,
    ints: bool,
    allreduce: Allreduce,
    allgather: Allgather,
    bcast: Bcast,
    rank: OfComm,
    size: OfComm,
    dup: Dup,
    finalize: Finalize,
    initialized: Initialized,
}

/// The address of a function or variable of the program or one of its libraries.
pub(crate) fn symbol(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: the name ends with NUL.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}

macro_rules! function {
    ($name:literal as $type:ty) => {{
        let found = symbol($name).ok_or_else(|| missing($name))?;
        // SAFETY: MPI functions of that name have that type in both libraries.
        unsafe { std::mem::transmute::<*mut c_void, $type>(found) }
    }};
}

fn missing(name: &CStr) -> String {
    format!(
        "this process has no {}: it is no MPI program, or has loaded its MPI library for itself \
         alone (RTLD_LOCAL)",
        name.to_string_lossy()
    )
}

impl Mpi {
    /// The process's MPI.
    pub(crate) fn get() -> Result<&'static Self, Failure> {
        static FOUND: OnceLock<Result<Mpi, String>> = OnceLock::new();
        match FOUND.get_or_init(Self::find) {
            Ok(mpi) => Ok(mpi),
            Err(text) => Err(Failure::new(libc::ENOSYS, text.clone())),
        }
    }

    fn find() -> Result<Self, String> {
        let ints = symbol(c"ompi_mpi_comm_world").is_none();
        if ints {
            let version = library_version()?;
            let kin = ["MPICH", "MVAPICH", "Intel(R) MPI", "CRAY MPI"];
            if !kin.iter().any(|name| version.contains(name)) {
                return Err(format!("this MPI is neither MPICH nor Open MPI: {version}"));
            }
        }
        let pick = |pointer: &CStr, int: Handle| match ints {
            true => Ok(int),
            false => symbol(pointer).map(|at| at as Handle).ok_or_else(|| missing(pointer)),
        };
        Ok(Self {
            world: pick(c"ompi_mpi_comm_world", 0x4400_0000)?,
            byte: pick(c"ompi_mpi_byte", 0x4c00_010d)?,
            int: pick(c"ompi_mpi_int", 0x4c00_0405)?,
            max: pick(c"ompi_mpi_op_max", 0x5800_0001)?,
            min: pick(c"ompi_mpi_op_min", 0x5800_0002)?,
            ints,
            allreduce: function!(c"PMPI_Allreduce" as Allreduce),
            allgather: function!(c"PMPI_Allgather" as Allgather),
            bcast: function!(c"PMPI_Bcast" as Bcast),
            rank: function!(c"PMPI_Comm_rank" as OfComm),
            size: function!(c"PMPI_Comm_size" as OfComm),
            dup: function!(c"PMPI_Comm_dup" as Dup),
            finalize: function!(c"PMPI_Finalize" as Finalize),
            initialized: function!(c"PMPI_Initialized" as Initialized),
        })
    }

    /// Whether it is MPICH, and UCX carries its messages.
    pub(crate) fn is_mpich_over_ucx(&self) -> bool {
        self.ints && symbol(c"ucp_init_version").is_some()
    }

    /// Whether the handle is MPI_COMM_WORLD.
    pub(crate) fn is_world(&self, comm: Handle) -> bool {
        match self.ints {
            // A C program leaves anything in the upper half of the register.
            true => comm as u32 == self.world as u32,
            false => comm == self.world,
        }
    }

    /// Whether the number is Fortran's of MPI_COMM_WORLD.
    pub(crate) fn is_fortran_world(&self, comm: c_int) -> bool {
        match self.ints {
            true => comm as u32 == self.world as u32,
            false => comm == 0,
        }
    }

    /// All processes of the job, by the program's own communicator.
    pub(crate) fn world(&'static self) -> Result<Comm, Failure> {
        Comm::of(self, self.world)
    }

    /// Ends the job, by all of its ranks. Not by MPI_Abort: then launchers throw away what ranks
    /// have just said.
    pub(crate) fn end(&self, code: c_int) -> ! {
        // MPICH before 4.2 over UCX can wait in MPI_Finalize for ever when ranks do not come there together
        // (pmodels/mpich#6596). What was said is out by then.
        std::thread::spawn(move || {
            std::thread::sleep(FINALIZE);
            // SAFETY: it only ends the process.
            unsafe { libc::_exit(code) }
        });
        // SAFETY: MPI runs, and nothing calls it after this.
        unsafe { (self.finalize)() };
        std::process::exit(code)
    }
}

fn library_version() -> Result<String, String> {
    let get = function!(c"PMPI_Get_library_version" as Version);
    let mut text = vec![0_u8; VERSION_BYTES];
    let mut len = 0;
    // SAFETY: the buffer is longer than the longest text of either library.
    unsafe { get(text.as_mut_ptr().cast(), &raw mut len) };
    let text = CStr::from_bytes_until_nul(&text).map_err(|e| e.to_string())?;
    Ok(text.to_string_lossy().lines().next().unwrap_or_default().to_owned())
}

/// A communicator, and this process in it.
#[derive(Clone, Copy)]
pub(crate) struct Comm {
    mpi: &'static Mpi,
    handle: Handle,
    pub(crate) rank: c_int,
    pub(crate) size: c_int,
}

impl Comm {
    /// The communicator of a handle that the program gave.
    pub(crate) fn of(mpi: &'static Mpi, handle: Handle) -> Result<Self, Failure> {
        let (mut up, mut rank, mut size) = (0, 0, 0);
        // SAFETY: may be called at any time.
        unsafe { (mpi.initialized)(&raw mut up) };
        if up == 0 {
            return Err(Failure::new(libc::EINVAL, "call MPI_Init first".to_owned()));
        }
        // SAFETY: the handle is the program's, which vouches for it; the results outlive the calls.
        check("MPI_Comm_rank", unsafe { (mpi.rank)(handle, &raw mut rank) })?;
        // SAFETY: as above.
        check("MPI_Comm_size", unsafe { (mpi.size)(handle, &raw mut size) })?;
        Ok(Self { mpi, handle, rank, size })
    }

    /// Another one of the same processes, whose messages never meet the program's.
    pub(crate) fn duplicate(&self) -> Result<Self, Failure> {
        // An int handle fills the lower half.
        let mut handle: Handle = 0;
        // SAFETY: the result has room for either kind of handle.
        check("MPI_Comm_dup", unsafe { (self.mpi.dup)(self.handle, &raw mut handle) })?;
        Ok(Self { handle, ..*self })
    }

    /// Everybody's bytes become those of `root`.
    pub(crate) fn bcast(&self, bytes: &mut [u8], root: c_int) -> Result<(), Failure> {
        let (at, count) = (bytes.as_mut_ptr().cast(), bytes.len() as c_int);
        // SAFETY: the bytes outlive the call.
        let rc = unsafe { (self.mpi.bcast)(at, count, self.mpi.byte, root, self.handle) };
        check("MPI_Bcast", rc)
    }

    /// One number of each process, by rank.
    pub(crate) fn allgather(&self, mine: u64) -> Result<Vec<u64>, Failure> {
        let mine = mine.to_ne_bytes();
        let mut all = vec![0_u64; self.size as usize];
        let (count, byte) = (mine.len() as c_int, self.mpi.byte);
        let (from, to) = (mine.as_ptr().cast(), all.as_mut_ptr().cast());
        // SAFETY: both buffers outlive the call, and there is room for one number of each process.
        let rc = unsafe { (self.mpi.allgather)(from, count, byte, to, count, byte, self.handle) };
        check("MPI_Allgather", rc)?;
        Ok(all)
    }

    /// The least of everybody's numbers.
    pub(crate) fn min(&self, mine: c_int) -> Result<c_int, Failure> {
        Ok(self.reduce([mine], self.mpi.min)?[0])
    }

    /// The greatest of everybody's numbers, of each.
    pub(crate) fn max<const N: usize>(&self, mine: [c_int; N]) -> Result<[c_int; N], Failure> {
        self.reduce(mine, self.mpi.max)
    }

    fn reduce<const N: usize>(&self, mine: [c_int; N], op: Handle) -> Result<[c_int; N], Failure> {
        let mut all = [0; N];
        let (from, to) = (mine.as_ptr().cast(), all.as_mut_ptr().cast());
        // SAFETY: both buffers hold N ints and outlive the call.
        let rc =
            unsafe { (self.mpi.allreduce)(from, to, N as c_int, self.mpi.int, op, self.handle) };
        check("MPI_Allreduce", rc)?;
        Ok(all)
    }
}

fn check(what: &str, rc: c_int) -> Result<(), Failure> {
    match rc {
        0 => Ok(()),
        rc => Err(Failure::new(libc::ECOMM, format!("{what} failed with the MPI error {rc}"))),
    }
}
