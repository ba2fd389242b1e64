/*
 * libblobcr_mpi: global checkpoints of an MPI job that runs in several virtual machines.
 *
 * A global checkpoint is one snapshot of every machine's disks, all of them or none: a set that
 * lacks one is never used for a restart. Every rank writes its state to a file on its machine's
 * disk, and then all of them call
 *
 *     uint64_t set;
 *     int rc = blobcr_mpi_checkpoint(MPI_COMM_WORLD, written, &set);
 *
 * One binary serves MPICH and Open MPI. Include mpi.h first. All functions but blobcr_mpi_wait,
 * blobcr_mpi_route_file and blobcr_mpi_last_error are collective: every rank calls them, in the
 * same order, and every rank gets the same result. They return
 *
 *      0     done: go on
 *      1     restarted from this point (given only by blobcr_mpi_checkpoint, with BLOBCR_MPI_SAVE=criu)
 *      < 0   a negative errno; blobcr_mpi_last_error() says more, and which rank failed
 *
 * The environment tells where the host is and how often to checkpoint; docs/mpi.md lists it.
 */
#ifndef BLOBCR_MPI_H
#define BLOBCR_MPI_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of a checkpoint's name and its final NUL. */
#define BLOBCR_MPI_NAME_SIZE 64

/*
 * Takes a global checkpoint of the machines of `comm`. `written` is 0 when this rank has written
 * its state, or a negative errno: then no host is asked and every rank gets an error. Each machine
 * is flushed once and its host is asked once, whatever number of ranks it has. On success *set is
 * the set's number, otherwise 0, and the set, if one was begun, stays incomplete for ever.
 */
int blobcr_mpi_checkpoint(MPI_Comm comm, int written, uint64_t *set);

/*
 * Waits until the set is stable: until then a failure falls back to the set before. Not collective:
 * any rank may ask. -EAGAIN: not yet; -EIO: it will never be.
 */
int blobcr_mpi_wait(uint64_t set, uint32_t timeout_ms);

/* What the last call that failed failed of, for people. Never NULL; valid until the next call. */
const char *blobcr_mpi_last_error(void);

/*
 * In the shape of SCR, on MPI_COMM_WORLD. An output is a directory of its own on each machine's
 * disk, below BLOBCR_MPI_DIR; it gets its name in one step, when all of its files are complete.
 */

/* Whether it is time: after BLOBCR_MPI_INTERVAL_S, on a signal, or each time without either. */
int blobcr_mpi_need_checkpoint(int *flag);

/* Whether to end: when BLOBCR_MPI_EXIT_FILE is there, or after BLOBCR_MPI_EXIT_SIGNAL. */
int blobcr_mpi_should_exit(int *flag);

/* Begins an output. The name is for people, and has no slash. */
int blobcr_mpi_start_output(const char *name);

/* Where this rank's file of that name belongs, in the output or the restart that has begun. */
int blobcr_mpi_route_file(const char *file, char *path, size_t size);

/*
 * Ends an output; `valid` is 0 when this rank could not write. When all could, takes a global
 * checkpoint; set may be NULL.
 */
int blobcr_mpi_complete_output(int valid, uint64_t *set);

/* Whether there is an output that every machine has whole, and its name. */
int blobcr_mpi_have_restart(int *flag, char name[BLOBCR_MPI_NAME_SIZE]);

/* Begins to read the newest one. */
int blobcr_mpi_start_restart(char name[BLOBCR_MPI_NAME_SIZE]);

/*
 * Ends it; `valid` is 0 when this rank could not read. Then the call returns -EIO on every rank, and
 * blobcr_mpi_have_restart tells of the one before.
 */
int blobcr_mpi_complete_restart(int valid);

/*
 * What a library named by BLOBCR_MPI_HOOK, or the program itself, exports to save the state of one
 * process when a checkpoint is taken without the program's doing. 0, or a negative errno.
 */
int blobcr_mpi_save(int rank, int size, const char *dir);

#ifdef __cplusplus
}
#endif

#endif /* BLOBCR_MPI_H */
