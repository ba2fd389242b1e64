! Twenty reductions of a program in Fortran: steps DIR
program steps
  implicit none
  include 'mpif.h'
  integer :: error, step, mine, all
  call MPI_Init(error)
  do step = 1, 20
    mine = step
    call MPI_Allreduce(mine, all, 1, MPI_INTEGER, MPI_SUM, MPI_COMM_WORLD, error)
    if (error /= MPI_SUCCESS .or. all /= 4 * step) stop 3
    call MPI_Barrier(MPI_COMM_SELF, error)
  end do
  call MPI_Finalize(error)
end program
