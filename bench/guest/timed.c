/*
 * Is loaded before a program that calls blobcr_mpi_checkpoint, and says on stderr how long each call took
 * on each rank (`timed: RANK call MICROSECONDS`) and the program from MPI_Init to MPI_Finalize
 * (`timed: RANK ran MICROSECONDS`).
 *
 * TIMED says what the call does: `checkpoint`: what it is made for; `copy`: each rank sends its state's
 * file to a remote directory; `stop`: the host stops the machines, copies what changed on their disks, and
 * lets them go on. For the last two, TIMED_HOST is ADDRESS:PORT of the remote end, and TIMED_DIR where the
 * state is.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

#include <mpi.h>

static double began;
/* The machine's clock stands still while it is stopped. */
static double stopped_us;

static int rank_of(void)
{
    int rank;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    return rank;
}

/* Asks the remote end, behind a line with `bytes` of a file, and waits until it is done. */
static int ask(const char *line, int file, off_t bytes, double *stopped)
{
    struct sockaddr_in to = {.sin_family = AF_INET};
    char host[64], answer[64];
    size_t have = 0;
    ssize_t n = 0;
    char *port;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    snprintf(host, sizeof host, "%s", getenv("TIMED_HOST"));
    port = strchr(host, ':');
    if (fd < 0 || port == NULL)
        return -EINVAL;
    *port = 0;
    to.sin_port = htons((uint16_t)atoi(port + 1));
    inet_pton(AF_INET, host, &to.sin_addr);
    if (connect(fd, (struct sockaddr *)&to, sizeof to) < 0 || write(fd, line, strlen(line)) < 0)
        goto failed;
    while (bytes > 0) {
        n = sendfile(fd, file, NULL, (size_t)bytes);
        if (n <= 0)
            goto failed;
        bytes -= n;
    }
    while (have < sizeof answer - 1 && (n = read(fd, answer + have, sizeof answer - 1 - have)) > 0)
        have += (size_t)n;
    answer[have] = 0;
    if (sscanf(answer, "ok %lf", stopped) != 1)
        goto failed;
    close(fd);
    return 0;
failed:
    fprintf(stderr, "timed: the remote end: %s\n", strerror(errno));
    close(fd);
    return -EIO;
}

static int copy(void)
{
    char path[4096], line[128];
    double none;
    struct stat stat;
    int rc, fd;
    snprintf(path, sizeof path, "%s/%d.state", getenv("TIMED_DIR"), rank_of());
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &stat) < 0)
        return -errno;
    snprintf(line, sizeof line, "copy %d %lld\n", rank_of(), (long long)stat.st_size);
    rc = ask(line, fd, stat.st_size, &none);
    close(fd);
    return rc;
}

/* One rank of each machine asks. */
static int stop(double *stopped)
{
    static MPI_Comm machine = MPI_COMM_NULL;
    int of_machine, rc = 0;
    if (machine == MPI_COMM_NULL)
        MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &machine);
    MPI_Comm_rank(machine, &of_machine);
    if (of_machine == 0) {
        char line[128], host[64];
        /* node0, node1 … */
        gethostname(host, sizeof host);
        snprintf(line, sizeof line, "stop %s\n", host + strcspn(host, "0123456789"));
        sync();
        rc = ask(line, -1, 0, stopped);
    }
    return rc;
}

int blobcr_mpi_checkpoint(MPI_Comm comm, int written, uint64_t *set)
{
    const char *what = getenv("TIMED");
    double start = MPI_Wtime(), stopped = 0, us;
    int rc;
    if (strcmp(what, "checkpoint") == 0) {
        int (*real)(MPI_Comm, int, uint64_t *) =
            (int (*)(MPI_Comm, int, uint64_t *))dlsym(RTLD_NEXT, "blobcr_mpi_checkpoint");
        rc = real(comm, written, set);
    } else {
        int mine;
        /* The same agreement before and after as the call that it stands for. */
        MPI_Allreduce(&written, &rc, 1, MPI_INT, MPI_MIN, comm);
        mine = rc < 0 ? rc : strcmp(what, "copy") == 0 ? copy() : stop(&stopped);
        MPI_Allreduce(&mine, &rc, 1, MPI_INT, MPI_MIN, comm);
        MPI_Allreduce(MPI_IN_PLACE, &stopped, 1, MPI_DOUBLE, MPI_MAX, comm);
        *set = 0;
    }
    us = (MPI_Wtime() - start) * 1e6 + stopped;
    stopped_us += stopped;
    if (rc == 0)
        fprintf(stderr, "timed: %d call %.0f\n", rank_of(), us);
    return rc;
}

int MPI_Init(int *argc, char ***argv)
{
    int (*real)(int *, char ***) = (int (*)(int *, char ***))dlsym(RTLD_NEXT, "MPI_Init");
    int rc = real(argc, argv);
    began = MPI_Wtime();
    return rc;
}

int MPI_Finalize(void)
{
    int (*real)(void) = (int (*)(void))dlsym(RTLD_NEXT, "MPI_Finalize");
    fprintf(stderr, "timed: %d ran %.0f\n", rank_of(), (MPI_Wtime() - began) * 1e6 + stopped_us);
    return real();
}
