//! The same functions under Fortran's names, as `mpif.h` and `use mpi` call them.
//!
//! Everything is passed by its address, and a communicator is a number of Fortran's own. One MPI
//! library's Fortran calls its C functions under the names that are wrapped too, the other's does
//! not: so what Fortran's own functions call is not counted again.

use std::ffi::{CStr, c_int, c_void};
use std::sync::OnceLock;

use crate::trigger;
use crate::wrap::own;

type At = *mut c_void;

macro_rules! fortran {
    ($name:ident = $own:literal, $before:expr, $after:expr, ($($arg:ident: $type:ty),*)) => {
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name($($arg: $type),*) {
            static OWN: OnceLock<usize> = OnceLock::new();
            const NAME: &CStr = $own;
            let own = own(&OWN, NAME);
            $before;
            // SAFETY: it is the function of that name, which takes the same.
            trigger::inside(|| unsafe {
                std::mem::transmute::<usize, unsafe extern "C" fn($($type),*)>(own)($($arg),*);
            });
            $after;
        }
    };
}

macro_rules! collective {
    ($name:ident = $own:literal, $function:literal, ($($arg:ident),*)) => {
        fortran!($name = $own,
            // SAFETY: Fortran passes the address of a communicator.
            trigger::before_fortran($function, unsafe { *comm }), nothing(),
            ($($arg: At,)* comm: *mut c_int, error: *mut c_int));
    };
}

fn nothing() {}

fortran!(mpi_init_ = c"pmpi_init_", nothing(), trigger::begin(), (error: *mut c_int));
fortran!(mpi_init_thread_ = c"pmpi_init_thread_", nothing(), trigger::begin(),
    (required: *mut c_int, provided: *mut c_int, error: *mut c_int));
fortran!(mpi_finalize_ = c"pmpi_finalize_", trigger::end(), nothing(), (error: *mut c_int));

// The numbers are those of crate::settings::FUNCTIONS.
collective!(mpi_barrier_ = c"pmpi_barrier_", 0, ());
collective!(mpi_bcast_ = c"pmpi_bcast_", 1, (buffer, count, of, root));
collective!(mpi_reduce_ = c"pmpi_reduce_", 2, (send, recv, count, of, op, root));
collective!(mpi_allreduce_ = c"pmpi_allreduce_", 3, (send, recv, count, of, op));
collective!(mpi_allgather_ = c"pmpi_allgather_", 4, (send, sends, of, recv, recvs, into));
collective!(mpi_gather_ = c"pmpi_gather_", 5, (send, sends, of, recv, recvs, into, root));
collective!(mpi_scatter_ = c"pmpi_scatter_", 6, (send, sends, of, recv, recvs, into, root));
collective!(mpi_alltoall_ = c"pmpi_alltoall_", 7, (send, sends, of, recv, recvs, into));
