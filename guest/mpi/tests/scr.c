/*
 * Steps as a code that uses SCR takes them: scr STEPS DIR. Each rank's state is the number of the
 * step in a file of its own.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <mpi.h>
#include <blobcr_mpi.h>

static int rank;

static void check(int rc)
{
    if (rc < 0) {
        fprintf(stderr, "rank %d: %d %s\n", rank, rc, blobcr_mpi_last_error());
        MPI_Abort(MPI_COMM_WORLD, 1);
    }
}

static FILE *open_routed(const char *mode)
{
    char name[32], path[4096];
    snprintf(name, sizeof name, "some/where/rank-%d", rank);
    check(blobcr_mpi_route_file(name, path, sizeof path));
    return fopen(path, mode);
}

static int restart(void)
{
    char name[BLOBCR_MPI_NAME_SIZE], begun[BLOBCR_MPI_NAME_SIZE];
    int have, step = 0;
    for (;;) {
        FILE *file;
        int valid = 0;
        check(blobcr_mpi_have_restart(&have, name));
        if (!have)
            break;
        check(blobcr_mpi_start_restart(begun));
        if (strcmp(name, begun) != 0)
            MPI_Abort(MPI_COMM_WORLD, 2);
        file = open_routed("r");
        if (file != NULL) {
            valid = fscanf(file, "%d", &step) == 1;
            fclose(file);
        }
        if (blobcr_mpi_complete_restart(valid) == 0)
            break;
        if (rank == 0)
            printf("unreadable %s\n", name);
    }
    if (rank == 0 && have)
        printf("restarted %s\n", name);
    if (rank == 0 && !have)
        printf("fresh\n");
    return have ? step : 0;
}

int main(int argc, char **argv)
{
    int step, steps, flag, ends = 0;
    uint64_t set = 0;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    steps = argc > 1 ? atoi(argv[1]) : 0;
    for (step = restart() + 1; step <= steps && !ends; step++) {
        char name[BLOBCR_MPI_NAME_SIZE];
        FILE *file;
        check(blobcr_mpi_need_checkpoint(&flag));
        if (!flag)
            continue;
        snprintf(name, sizeof name, "step-%d", step);
        check(blobcr_mpi_start_output(name));
        file = open_routed("w");
        check(blobcr_mpi_complete_output(
            file != NULL && fprintf(file, "%d\n", step) > 0 && fclose(file) == 0, &set));
        if (rank == 0)
            printf("%s set %d\n", name, (int)set);
        check(blobcr_mpi_should_exit(&ends));
    }
    if (rank == 0) {
        if (ends)
            printf("ends\n");
        printf("stable %d\n", blobcr_mpi_wait(set, 10000));
    }
    MPI_Finalize();
    return 0;
}
