/*
 * libblobcr: a program in a virtual machine asks the host for a CHECKPOINT of the machine's disks.
 *
 *     struct blobcr_options options;
 *     struct blobcr_result taken;
 *     BLOBCR_INIT(&options);
 *     BLOBCR_INIT(&taken);
 *     if (blobcr_checkpoint(&options, &taken) < 0)
 *         fprintf(stderr, "%s\n", blobcr_last_error());
 *
 * Every function returns 0, or a negative errno; blobcr_last_error() then says more. The library
 * reads no environment, prints nothing, starts no threads, and may be used by several threads at a
 * time. Structures begin with the version of their layout and their own size: BLOBCR_INIT clears
 * them and fills these in, and what is then left at zero is the default. Texts are UTF-8.
 *
 *     -EINVAL        the caller's mistake: a structure, an option, a set that is not the VM's
 *     -ENODEV        this machine has no port to its host
 *     -ETIMEDOUT     the host did not answer in time; it may have taken the checkpoint: ask again
 *                    with the same key
 *     -EAGAIN        blobcr_wait: not stable yet, and it may still become so
 *     -EACCES        not this VM's token
 *     -ENOENT        no such disk, group or set
 *     -EBUSY         not now: the disk is rolled back, the set is complete, …
 *     -EHOSTUNREACH  the host cannot reach what it needs
 *     -EIO           a snapshot failed, is gone or is damaged: take another one
 *     others         as the system call that failed gave them
 */
#ifndef BLOBCR_GUEST_H
#define BLOBCR_GUEST_H

#include "blobcr.h"

#ifdef __cplusplus
extern "C" {
#endif

/* blobcr_checkpoint: do not flush this machine's file systems and disks first. */
#define BLOBCR_NO_FLUSH 1u

/* How many disks the structures have room for; `count` tells how many there are. */
#define BLOBCR_DISKS_MAX 32

/* The state of a set. */
#define BLOBCR_SET_INCOMPLETE 1 /* VMs are missing */
#define BLOBCR_SET_PENDING 2    /* all are there, and not all snapshots are stable */
#define BLOBCR_SET_STABLE 3     /* a restart may use it */
#define BLOBCR_SET_FAILED 4     /* a snapshot failed or is gone */
#define BLOBCR_SET_OBSOLETE 5   /* given up by its owner, to be collected */

/* How the host is asked, and what. NULL for a pointer to it is the same as all defaults. */
struct blobcr_options {
    uint32_t version;       /* BLOBCR_ABI_VERSION */
    uint32_t size;          /* sizeof(struct blobcr_options) */
    uint32_t flags;         /* 0 or BLOBCR_NO_FLUSH */
    uint32_t timeout_ms;    /* give up then; 0: 60000 */
    const char *port;       /* the virtio-serial port; NULL: org.blobcr.checkpoint.0 */
    const char *connect;    /* ADDRESS:PORT in numbers over TCP, or vsock:PORT, instead of the port */
    const char *vm;         /* with a token: whose it is */
    const char *token_file; /* with connect, where the hypervisor forwards nothing */
    const char *socket;     /* a Unix socket instead of the port, outside of a VM */
    const char *key;        /* the same key gives the first answer and no second checkpoint */
    const char *group;      /* of a set; NULL: the VM's only one */
    uint64_t sequence;      /* of a set; 0: blobcr_checkpoint joins none, blobcr_set_status takes
                               the newest that is stable */
    uint32_t expected_vms;  /* how many VMs the set has */
    uint32_t reserved;      /* 0 */
};

/* One disk's part in a checkpoint. */
struct blobcr_snapshot {
    char disk[BLOBCR_NAME_SIZE];
    char image[BLOBCR_NAME_SIZE]; /* the snapshot is `image`@`number` */
    uint64_t image_id;            /* never reused, even when the image is removed */
    uint64_t number;
    uint64_t dirty_bytes; /* changed since the checkpoint before */
    uint64_t downtime_ns; /* how long the disk was held */
    uint32_t state;       /* BLOBCR_STATE_..., of blobcr.h */
    uint32_t reserved;
};

/* A checkpoint. */
struct blobcr_result {
    uint32_t version;  /* BLOBCR_ABI_VERSION */
    uint32_t size;     /* sizeof(struct blobcr_result) */
    uint32_t count;    /* snapshots, also where there is room for fewer */
    uint32_t reserved; /* 0 */
    uint64_t flush_ns; /* spent on flushing this machine's file systems and disks */
    uint64_t call_ns;  /* between asking the host and its answer */
    char vm[BLOBCR_NAME_SIZE];
    struct blobcr_snapshot snapshots[BLOBCR_DISKS_MAX];
};

/* A disk of this VM. */
struct blobcr_disk {
    char disk[BLOBCR_NAME_SIZE];
    char checkpoint_image[BLOBCR_NAME_SIZE]; /* empty before the first CHECKPOINT */
    uint64_t size_bytes;
    uint64_t dirty_bytes; /* changed since the last CHECKPOINT */
    uint64_t last_stable; /* the newest stable snapshot; 0: none */
    uint64_t pending;     /* snapshots being persisted */
    char stalled[BLOBCR_REASON_SIZE]; /* why nothing moves just now; empty when it does */
};

/* This VM. */
struct blobcr_vm {
    uint32_t version;     /* BLOBCR_ABI_VERSION */
    uint32_t size;        /* sizeof(struct blobcr_vm) */
    uint32_t count;       /* disks, also where there is room for fewer */
    uint32_t group_count; /* groups of whose sets it may be a member */
    char vm[BLOBCR_NAME_SIZE];
    char group[BLOBCR_NAME_SIZE]; /* the first of them */
    struct blobcr_disk disks[BLOBCR_DISKS_MAX];
};

/* A checkpoint set. */
struct blobcr_set {
    uint32_t version; /* BLOBCR_ABI_VERSION */
    uint32_t size;    /* sizeof(struct blobcr_set) */
    uint64_t sequence;
    uint32_t expected_vms;
    uint32_t joined_vms;
    uint32_t state; /* BLOBCR_SET_... */
    uint32_t reserved;
    char group[BLOBCR_NAME_SIZE];
};

/*
 * Flushes this machine's file systems and disks and asks for a CHECKPOINT of its disks; with
 * `sequence` as a member of that set. Returns as soon as the machine may go on: the snapshots are
 * pending then. What a program has to find after a restart must have been written before.
 */
int blobcr_checkpoint(const struct blobcr_options *options, struct blobcr_result *taken);

/*
 * Waits until the snapshots in `taken` are stable, and sets their states; those of the newest
 * checkpoint when its count is 0.
 */
int blobcr_wait(const struct blobcr_options *options, struct blobcr_result *taken);

/* Tells what this VM is to its host. */
int blobcr_status(const struct blobcr_options *options, struct blobcr_vm *vm);

/* Begins a set of `group` with `expected_vms`; each VM, this one too, then joins it. */
int blobcr_begin_set(const struct blobcr_options *options, struct blobcr_set *set);

/* Tells what has become of the set `sequence` of `group`. */
int blobcr_set_status(const struct blobcr_options *options, struct blobcr_set *set);

/*
 * What the last call of this thread that failed failed of, for people. Never NULL; valid until this
 * thread calls this library again.
 */
const char *blobcr_last_error(void);

#ifdef __cplusplus
}
#endif

#endif /* BLOBCR_GUEST_H */
