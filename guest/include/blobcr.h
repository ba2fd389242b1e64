/*
 * CLONE and COMMIT of a blobcr disk: ioctls on MOUNT/disks/DISK.raw.
 *
 * This file is the one definition of the ioctls. It needs nothing but a C99 or C++11 compiler and
 * Linux. Every structure has a fixed size on every machine; it begins with the version of its
 * layout and its own size, which the caller sets (BLOBCR_INIT does):
 *
 *     struct blobcr_commit commit;
 *     BLOBCR_INIT(&commit);
 *     commit.flags = BLOBCR_COMMIT_WAIT;
 *     if (ioctl(fd, BLOBCR_IOC_COMMIT, &commit) == 0)
 *         printf("%s@%llu\n", commit.image, (unsigned long long)commit.number);
 *
 * The file may have been opened for reading only. Errors, in errno:
 *     ENOTTY        not a blobcr disk (a snapshot's file takes no ioctls)
 *     EINVAL        a version, size or flag that this mirror does not know
 *     EHOSTUNREACH  the repository cannot be reached, and the first CLONE needs it
 *     ENOENT        there is no such snapshot (BLOBCR_IOC_STATUS)
 *     EIO           the disk or the repository failed; the mirror's log says how
 */
#ifndef BLOBCR_H
#define BLOBCR_H

#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The layout of all structures below. */
#define BLOBCR_ABI_VERSION 1

/* Bytes of an image's name and its final NUL; a name has at most 128. */
#define BLOBCR_NAME_SIZE 136

/* Bytes of a text for people and its final NUL; longer ones are cut. */
#define BLOBCR_REASON_SIZE 240

/* The state of a snapshot. */
#define BLOBCR_STATE_NONE 0     /* there is none yet */
#define BLOBCR_STATE_PENDING 1  /* accepted, being persisted */
#define BLOBCR_STATE_STABLE 2   /* durable: a restart may use it */
#define BLOBCR_STATE_FAILED 3   /* it will never be stable */
#define BLOBCR_STATE_OBSOLETE 4 /* given up by its owner, to be collected */

/* BLOBCR_IOC_COMMIT: return when the snapshot is stable (or has failed), not at once. */
#define BLOBCR_COMMIT_WAIT 1u

/* BLOBCR_IOC_CLONE: makes the disk's checkpoint image, when it has none yet, and tells which. */
struct blobcr_clone {
    uint32_t version;             /* in: BLOBCR_ABI_VERSION */
    uint32_t size;                /* in: sizeof(struct blobcr_clone) */
    uint32_t flags;               /* in: 0 */
    uint32_t reserved;            /* in: 0 */
    uint64_t image_id;            /* out: never reused, even when the image is removed */
    char image[BLOBCR_NAME_SIZE]; /* out: name of the checkpoint image, NUL-terminated */
};

/*
 * BLOBCR_IOC_COMMIT: what the disk holds now becomes the next snapshot of its checkpoint image,
 * which is made first when there is none. Persisting goes on in the background.
 */
struct blobcr_commit {
    uint32_t version;             /* in: BLOBCR_ABI_VERSION */
    uint32_t size;                /* in: sizeof(struct blobcr_commit) */
    uint32_t flags;               /* in: 0 or BLOBCR_COMMIT_WAIT */
    uint32_t state;               /* out: BLOBCR_STATE_... when the call returned */
    uint64_t timeout_ms;          /* in: how long to wait at most; 0: an hour. Then state is PENDING */
    uint64_t number;              /* out: the snapshot is `image`@`number` */
    uint64_t image_id;            /* out */
    uint64_t dirty_bytes;         /* out: changed since the COMMIT before */
    uint64_t downtime_ns;         /* out: how long the COMMIT held the disk */
    char image[BLOBCR_NAME_SIZE]; /* out: NUL-terminated */
};

/* BLOBCR_IOC_STATUS: the state of a snapshot of the disk's checkpoint image, and of the disk. */
struct blobcr_status {
    uint32_t version;                /* in: BLOBCR_ABI_VERSION */
    uint32_t size;                   /* in: sizeof(struct blobcr_status) */
    uint32_t flags;                  /* in: 0 */
    uint32_t state;                  /* out: of snapshot `number` */
    uint64_t number;                 /* in: a snapshot; 0: the newest stable one, told on return */
    uint64_t image_id;               /* out: 0 before the first CLONE */
    uint64_t last_stable;            /* out: the newest stable snapshot; 0: none */
    uint64_t pending;                /* out: snapshots being persisted */
    uint64_t disk_bytes;             /* out: size of the disk */
    uint64_t dirty_bytes;            /* out: changed since the last COMMIT */
    uint64_t local_bytes;            /* out: written here and kept here */
    char image[BLOBCR_NAME_SIZE];    /* out: empty before the first CLONE */
    char reason[BLOBCR_REASON_SIZE]; /* out: why nothing moves just now; empty when it does */
};

#define BLOBCR_IOC_MAGIC 0xBC
#define BLOBCR_IOC_CLONE _IOWR(BLOBCR_IOC_MAGIC, 1, struct blobcr_clone)
#define BLOBCR_IOC_COMMIT _IOWR(BLOBCR_IOC_MAGIC, 2, struct blobcr_commit)
#define BLOBCR_IOC_STATUS _IOWR(BLOBCR_IOC_MAGIC, 3, struct blobcr_status)

/* Clears a structure and fills in its version and size. */
#define BLOBCR_INIT(structure)                              \
    do {                                                    \
        memset((structure), 0, sizeof *(structure));        \
        (structure)->version = BLOBCR_ABI_VERSION;          \
        (structure)->size = (uint32_t)sizeof *(structure);  \
    } while (0)

#ifdef __cplusplus
}
#endif

#endif /* BLOBCR_H */
