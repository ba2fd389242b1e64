/* Takes a checkpoint of the disk that is named, and prints IMAGE@N once it is stable. */
#include <blobcr.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

static int failed(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    return 1;
}

int main(int argc, char **argv)
{
    struct blobcr_clone clone;
    struct blobcr_commit commit;
    struct blobcr_status status;
    int fd;

    if (argc != 2 || (fd = open(argv[1], O_RDWR)) < 0)
        return failed("open");
    if (write(fd, "from C", 6) != 6)
        return failed("write");
    BLOBCR_INIT(&clone);
    if (ioctl(fd, BLOBCR_IOC_CLONE, &clone) != 0)
        return failed("CLONE");
    BLOBCR_INIT(&commit);
    commit.flags = BLOBCR_COMMIT_WAIT;
    commit.timeout_ms = 60000;
    if (ioctl(fd, BLOBCR_IOC_COMMIT, &commit) != 0)
        return failed("COMMIT");
    BLOBCR_INIT(&status);
    status.number = commit.number;
    if (ioctl(fd, BLOBCR_IOC_STATUS, &status) != 0)
        return failed("STATUS");
    if (commit.state != BLOBCR_STATE_STABLE || status.state != BLOBCR_STATE_STABLE ||
        status.image_id != clone.image_id || strcmp(status.image, clone.image) != 0) {
        fprintf(stderr, "state %u, then %u\n", commit.state, status.state);
        return 1;
    }
    printf("%s@%llu\n", commit.image, (unsigned long long)commit.number);
    return close(fd);
}
