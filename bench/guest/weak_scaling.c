/*
 * A weak-scaling application: the heat equation on NX x ROWS points for each rank, however many there
 * are. Each step exchanges the rows at the borders; every SUMMARY steps each rank writes a fourth of its
 * rows to its disk, in the place of those before. Three times, evenly spaced over the STEPS, it does
 * what WAY says:
 *
 *     nothing      goes on
 *     state        writes all of its rows to its disk, in the place of the state before, and syncs it
 *     checkpoint   the same, and then all ranks take a global checkpoint by blobcr_mpi_checkpoint
 *
 *     weak_scaling NX ROWS STEPS SUMMARY WAY DISK
 *
 * DISK is a disk of the rank's own. At the end each rank says on stdout how long it was held up by each
 * call, and how long it ran from its first step to its last: `timed: RANK call MICROSECONDS`, `ran`.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <mpi.h>

#include <blobcr_mpi.h>

enum { CHECKPOINTS = 3, SUMMARY_ROWS = 4, WRITE_BYTES = 1 << 20 };

static long nx, rows;
static int rank, size, disk;
static double *now, *next;
static double calls[CHECKPOINTS];

static double *row(double *field, long i) { return field + (i + 1) * nx; }

static void fail(const char *what)
{
    fprintf(stderr, "weak: rank %d: %s: %s\n", rank, what, strerror(errno));
    MPI_Abort(MPI_COMM_WORLD, 1);
}

static void put(const double *from, size_t bytes, off_t at)
{
    const char *next_byte = (const char *)from;
    while (bytes > 0) {
        ssize_t n = pwrite(disk, next_byte, bytes < WRITE_BYTES ? bytes : WRITE_BYTES, at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            fail("write");
        next_byte += n;
        bytes -= (size_t)n;
        at += n;
    }
}

static off_t row_bytes(void) { return nx * (off_t)sizeof *now; }

static void write_state(void)
{
    put(row(now, 0), (size_t)(rows * row_bytes()), 0);
    if (fdatasync(disk) < 0)
        fail("sync");
}

/* Behind the state. */
static void write_summary(void)
{
    for (long i = 0; i < rows; i += SUMMARY_ROWS)
        put(row(now, i), (size_t)row_bytes(), (rows + i / SUMMARY_ROWS) * row_bytes());
}

/* Values that do not compress, others on each rank. */
static void begin(void)
{
    uint64_t random = 0x9e3779b97f4a7c15 * (uint64_t)(rank + 1);
    for (long at = 0; at < rows * nx; at++) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        row(now, 0)[at] = (double)(random >> 11) * 0x1p-53;
    }
}

static void step(void)
{
    int above = rank > 0 ? rank - 1 : MPI_PROC_NULL;
    int below = rank < size - 1 ? rank + 1 : MPI_PROC_NULL;
    double *swap;
    MPI_Sendrecv(row(now, 0), (int)nx, MPI_DOUBLE, above, 0, row(now, rows), (int)nx, MPI_DOUBLE,
                 below, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    MPI_Sendrecv(row(now, rows - 1), (int)nx, MPI_DOUBLE, below, 1, row(now, -1), (int)nx,
                 MPI_DOUBLE, above, 1, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    for (long i = 0; i < rows; i++) {
        const double *old = row(now, i);
        double *new = row(next, i);
        new[0] = old[0];
        for (long j = 1; j < nx - 1; j++)
            new[j] = old[j] + 0.1 * (old[j - nx] + old[j + nx] + old[j - 1] + old[j + 1] - 4 * old[j]);
        new[nx - 1] = old[nx - 1];
    }
    swap = now;
    now = next;
    next = swap;
}

/* The clock starts when all have written, so that nobody's call is another's writing. */
static double checkpoint(void)
{
    uint64_t set;
    double began;
    MPI_Barrier(MPI_COMM_WORLD);
    began = MPI_Wtime();
    if (blobcr_mpi_checkpoint(MPI_COMM_WORLD, 0, &set) < 0) {
        fprintf(stderr, "weak: rank %d: no checkpoint: %s\n", rank, blobcr_mpi_last_error());
        MPI_Abort(MPI_COMM_WORLD, 1);
    }
    return MPI_Wtime() - began;
}

/* As guest/examples/heat.c does, and for the same reason. */
static void meet(void)
{
    int *all = calloc(2 * (size_t)size, sizeof *all);
    if (all == NULL)
        fail("memory");
    MPI_Alltoall(all, 1, MPI_INT, all + size, 1, MPI_INT, MPI_COMM_WORLD);
    free(all);
}

static double run(long steps, long summary, int writes, int asks)
{
    long taken = 0;
    double began;
    MPI_Barrier(MPI_COMM_WORLD);
    began = MPI_Wtime();
    for (long done = 1; done <= steps; done++) {
        step();
        if (done % summary == 0)
            write_summary();
        if (taken == CHECKPOINTS || done < steps * (taken + 1) / (CHECKPOINTS + 1))
            continue;
        if (writes)
            write_state();
        if (asks)
            calls[taken] = checkpoint();
        taken++;
    }
    MPI_Barrier(MPI_COMM_WORLD);
    return MPI_Wtime() - began;
}

int main(int argc, char **argv)
{
    int asks, writes;
    double ran;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    errno = EINVAL;
    if (argc != 7)
        fail("usage: weak_scaling NX ROWS STEPS SUMMARY WAY DISK");
    nx = atol(argv[1]);
    rows = atol(argv[2]);
    asks = strcmp(argv[5], "checkpoint") == 0;
    writes = asks || strcmp(argv[5], "state") == 0;
    if (nx < 2 || rows < 1 || atol(argv[3]) <= CHECKPOINTS || atol(argv[4]) < 1)
        fail("the numbers");
    disk = open(argv[6], O_RDWR | O_CLOEXEC);
    if (disk < 0)
        fail(argv[6]);
    now = calloc((size_t)((rows + 2) * nx), sizeof *now);
    next = calloc((size_t)((rows + 2) * nx), sizeof *next);
    if (now == NULL || next == NULL)
        fail("memory");
    begin();
    meet();
    ran = run(atol(argv[3]), atol(argv[4]), writes, asks);
    for (int call = 0; asks && call < CHECKPOINTS; call++)
        printf("timed: %d call %.0f\n", rank, calls[call] * 1e6);
    printf("timed: %d ran %.0f\n", rank, ran * 1e6);
    close(disk);
    MPI_Finalize();
    return 0;
}
