/*
 * The 2-D heat equation on NX x NY points: rows are divided among the ranks, each step exchanges
 * the rows at the borders.
 *
 *     heat NX NY ITERATIONS EVERY DIR
 *
 * Every EVERY iterations each rank writes its rows to DIR/RANK.state and all take a global
 * checkpoint with blobcr_mpi_checkpoint; DIR is on a disk of each rank's machine. The first rank
 * appends a line per iteration to DIR/log. A run that finds states in DIR goes on from them. The end
 * prints a hash of the whole field, which is the same to the last bit however often it was restarted.
 *
 *     mpicc heat.c $(pkg-config --cflags --libs blobcr-mpi) -o heat
 *
 * With -DPLAIN it calls nothing of blobcr: then libblobcr_mpi.so is preloaded, and calls
 * blobcr_mpi_save, which this program exports (link it with -rdynamic).
 */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <mpi.h>
#ifndef PLAIN
#include <blobcr_mpi.h>
#endif

static const uint64_t MAGIC = 0x31544145484d5052; /* of the state's format */

static long nx, ny, rows, first;
static int rank, size;
static double *now, *next;
static uint64_t iteration;
static const char *dir;

struct head {
    uint64_t magic, nx, ny, size, iteration;
};

static double *row(double *field, long i) { return field + (i + 1) * nx; }

static void fail(const char *what)
{
    fprintf(stderr, "heat: rank %d: %s: %s\n", rank, what, strerror(errno));
    MPI_Abort(MPI_COMM_WORLD, 1);
}

static int write_all(int fd, const void *from, size_t bytes)
{
    const char *at = from;
    while (bytes > 0) {
        ssize_t n = write(fd, at, bytes);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        at += n;
        bytes -= (size_t)n;
    }
    return 0;
}

/* Writes this rank's rows beside the old state and puts them in its place in one step. */
int blobcr_mpi_save(int of_rank, int of_size, const char *to);
int blobcr_mpi_save(int of_rank, int of_size, const char *to)
{
    char path[4096], temporary[4104];
    struct head head = {MAGIC, (uint64_t)nx, (uint64_t)ny, (uint64_t)of_size, iteration};
    int fd, dir_fd, rc;
    snprintf(path, sizeof path, "%s/%d.state", to, of_rank);
    snprintf(temporary, sizeof temporary, "%s.new", path);
    fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0)
        return -errno;
    rc = write_all(fd, &head, sizeof head);
    if (rc == 0)
        rc = write_all(fd, row(now, 0), (size_t)(rows * nx) * sizeof *now);
    if (rc == 0 && fsync(fd) < 0)
        rc = -errno;
    close(fd);
    if (rc == 0 && rename(temporary, path) < 0)
        rc = -errno;
    dir_fd = open(to, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (rc == 0 && (dir_fd < 0 || fsync(dir_fd) < 0))
        rc = -errno;
    if (dir_fd >= 0)
        close(dir_fd);
    return rc;
}

/* The iteration of this rank's state; 0 without one. */
static uint64_t load(void)
{
    char path[4096];
    struct head head;
    size_t count = (size_t)(rows * nx);
    FILE *file;
    snprintf(path, sizeof path, "%s/%d.state", dir, rank);
    file = fopen(path, "rb");
    if (file == NULL && errno == ENOENT)
        return 0;
    if (file == NULL || fread(&head, sizeof head, 1, file) != 1 ||
        fread(row(now, 0), sizeof *now, count, file) != count)
        fail(path);
    fclose(file);
    if (head.magic != MAGIC || head.nx != (uint64_t)nx || head.ny != (uint64_t)ny ||
        head.size != (uint64_t)size) {
        errno = EINVAL;
        fail("the state in DIR is of another problem");
    }
    return head.iteration;
}

static void begin(void)
{
    uint64_t mine, least, most;
    for (long i = 0; i < rows; i++)
        for (long j = 0; j < nx; j++)
            row(now, i)[j] = (double)(((first + i) * 31 + j * 17) % 101);
    /* From here on it may be saved: every collective call can take a checkpoint. */
    iteration = mine = load();
    MPI_Allreduce(&mine, &least, 1, MPI_UINT64_T, MPI_MIN, MPI_COMM_WORLD);
    MPI_Allreduce(&mine, &most, 1, MPI_UINT64_T, MPI_MAX, MPI_COMM_WORLD);
    if (least != most) {
        errno = EINVAL;
        fail("the states in DIR are not of one checkpoint; restart all machines from the same set");
    }
    if (rank == 0 && iteration > 0)
        printf("resumed at %" PRIu64 "\n", iteration);
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
        int edge = (first + i == 0) || (first + i == ny - 1);
        for (long j = 0; j < nx; j++) {
            double *old = row(now, i) + j;
            if (edge || j == 0 || j == nx - 1)
                row(next, i)[j] = *old;
            else
                row(next, i)[j] = *old + 0.1 * (old[-nx] + old[nx] + old[-1] + old[1] - 4 * *old);
        }
    }
    swap = now;
    now = next;
    next = swap;
    iteration++;
}

/* FNV-1a over the rows of all ranks in their order, so that it does not depend on their number. */
static uint64_t hash(void)
{
    uint64_t h = 0xcbf29ce484222325;
    if (rank > 0)
        MPI_Recv(&h, 1, MPI_UINT64_T, rank - 1, 2, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    for (size_t i = 0; i < (size_t)(rows * nx) * sizeof *now; i++)
        h = (h ^ ((unsigned char *)row(now, 0))[i]) * 0x100000001b3;
    if (rank < size - 1)
        MPI_Send(&h, 1, MPI_UINT64_T, rank + 1, 2, MPI_COMM_WORLD);
    MPI_Bcast(&h, 1, MPI_UINT64_T, size - 1, MPI_COMM_WORLD);
    return h;
}

static void log_line(FILE *log, double heat)
{
    if (fprintf(log, "%" PRIu64 " %.17g\n", iteration, heat) < 0 || fflush(log) != 0)
        fail("log");
}

/* Whether all ranks could write is the library's to find out: every rank must call it. */
static void checkpoint(void)
{
#ifndef PLAIN
    uint64_t set;
    int rc = blobcr_mpi_checkpoint(MPI_COMM_WORLD, blobcr_mpi_save(rank, size, dir), &set);
    /* The job is well without: it goes on, and tries again the next time. */
    if (rc < 0)
        fprintf(stderr, "heat: rank %d: no checkpoint: %d %s\n", rank, rc, blobcr_mpi_last_error());
    else
        fprintf(stderr, "heat: rank %d: set %" PRIu64 " at %" PRIu64 "\n", rank, set, iteration);
#endif
}

/*
 * In MPICH before 4.2 over UCX, a rank that ends while another is still in its last call, or still
 * greets it, can leave the other waiting in MPI_Finalize for ever (pmodels/mpich#6596). So all ranks
 * meet when they begin, and come out of their last call before one ends.
 */
static void meet(void)
{
    int *all = calloc(2 * (size_t)size, sizeof *all);
    if (all == NULL)
        fail("memory");
    MPI_Alltoall(all, 1, MPI_INT, all + size, 1, MPI_INT, MPI_COMM_WORLD);
    free(all);
}

static void end_together(void)
{
    MPI_Barrier(MPI_COMM_WORLD);
    sleep(1);
}

int main(int argc, char **argv)
{
    uint64_t iterations, every;
    FILE *log = NULL;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (argc != 6) {
        errno = EINVAL;
        fail("usage: heat NX NY ITERATIONS EVERY DIR");
    }
    nx = atol(argv[1]);
    ny = atol(argv[2]);
    iterations = strtoull(argv[3], NULL, 10);
    every = strtoull(argv[4], NULL, 10);
    dir = argv[5];
    first = ny * rank / size;
    rows = ny * (rank + 1) / size - first;
    if (nx < 1 || rows < 1) {
        errno = EINVAL;
        fail("every rank needs a row");
    }
    now = calloc((size_t)((rows + 2) * nx), sizeof *now);
    next = calloc((size_t)((rows + 2) * nx), sizeof *next);
    if (now == NULL || next == NULL)
        fail("memory");
    meet();
    begin();
    if (rank == 0) {
        char path[4096];
        snprintf(path, sizeof path, "%s/log", dir);
        log = fopen(path, "a");
        if (log == NULL)
            fail(path);
    }
    while (iteration < iterations) {
        double mine = 0, all = 0;
        step();
        for (long i = 0; i < rows; i++)
            mine += row(now, i)[nx / 2];
        if (rank == 0)
            log_line(log, mine);
        if (every > 0 && iteration % every == 0)
            checkpoint();
        MPI_Allreduce(&mine, &all, 1, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
    }
    {
        uint64_t h = hash();
        if (rank == 0)
            printf("hash %016" PRIx64 "\n", h);
    }
    if (log != NULL && fclose(log) != 0)
        fail("log");
    free(now);
    free(next);
    end_together();
    MPI_Finalize();
    return 0;
}
