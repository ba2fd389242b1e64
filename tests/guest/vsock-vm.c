/* As much of a virtual machine as its host's kernel sees over vsock: the driver of a virtio-vsock
 * device, without a processor behind it. The kernel (vhost_vsock) knows it by a CID.
 *
 *   vsock-vm CID PORT LISTEN [CLAIMED]
 *
 * Takes connections to the vsock port LISTEN of this machine, one after the other, and passes each
 * on to the vsock port PORT of the host as the virtual machine with that CID. With LISTEN 0 it sends
 * its standard input and ends. With CLAIMED it says in every packet that it has that CID. */
#include <errno.h>
#include <linux/vhost.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include <linux/virtio_vsock.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>
#include <fcntl.h>

enum { RX, TX, QUEUES };
enum { SIZE = 16, BUFFER = 8192, ARENA = 1 << 20 };
enum { CREDIT = SIZE * BUFFER };

/* One queue: the rings that the kernel reads, and a buffer for each descriptor. */
struct queue {
    struct vring ring;
    char *buffers;
    int kick, call;
    uint16_t used;
};

static int vhost;
static char *arena;
static struct queue queues[QUEUES];
static uint64_t claimed;
static uint32_t port_there, port_here = 1024, received;

static void check(int failed, const char *what) {
    if (failed) {
        perror(what);
        exit(1);
    }
}

static void control(unsigned long request, void *argument, const char *what) {
    check(ioctl(vhost, request, argument) < 0, what);
}

/* Makes a descriptor's buffer the kernel's. */
static void offer(struct queue *q, uint16_t descriptor, uint32_t bytes, uint16_t flags) {
    q->ring.desc[descriptor] = (struct vring_desc){
        .addr = (uintptr_t)(q->buffers + descriptor * BUFFER), .len = bytes, .flags = flags};
    uint16_t next = q->ring.avail->idx;
    q->ring.avail->ring[next % SIZE] = descriptor;
    __atomic_store_n(&q->ring.avail->idx, next + 1, __ATOMIC_RELEASE);
    uint64_t one = 1;
    check(write(q->kick, &one, sizeof one) < 0, "kick");
}

/* A descriptor that the kernel is done with, or none. */
static struct vring_used_elem *done(struct queue *q) {
    if (__atomic_load_n(&q->ring.used->idx, __ATOMIC_ACQUIRE) == q->used)
        return NULL;
    return &q->ring.used->ring[q->used++ % SIZE];
}

static void start_queue(int number) {
    struct queue *q = &queues[number];
    char *rings = arena + number * (ARENA / QUEUES);
    vring_init(&q->ring, SIZE, rings, 4096);
    q->buffers = rings + 16384;
    q->kick = eventfd(0, EFD_CLOEXEC);
    q->call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    check(q->kick < 0 || q->call < 0, "eventfd");
    struct vhost_vring_state state = {.index = number, .num = SIZE};
    control(VHOST_SET_VRING_NUM, &state, "VHOST_SET_VRING_NUM");
    state.num = 0;
    control(VHOST_SET_VRING_BASE, &state, "VHOST_SET_VRING_BASE");
    struct vhost_vring_addr addresses = {.index = number,
        .desc_user_addr = (uintptr_t)q->ring.desc,
        .avail_user_addr = (uintptr_t)q->ring.avail,
        .used_user_addr = (uintptr_t)q->ring.used};
    control(VHOST_SET_VRING_ADDR, &addresses, "VHOST_SET_VRING_ADDR");
    struct vhost_vring_file file = {.index = number, .fd = q->kick};
    control(VHOST_SET_VRING_KICK, &file, "VHOST_SET_VRING_KICK");
    file.fd = q->call;
    control(VHOST_SET_VRING_CALL, &file, "VHOST_SET_VRING_CALL");
}

static void start(uint64_t cid) {
    vhost = open("/dev/vhost-vsock", O_RDWR | O_CLOEXEC);
    check(vhost < 0, "/dev/vhost-vsock");
    control(VHOST_SET_OWNER, NULL, "VHOST_SET_OWNER");
    uint64_t features = 1ull << VIRTIO_F_VERSION_1;
    control(VHOST_SET_FEATURES, &features, "VHOST_SET_FEATURES");
    control(VHOST_VSOCK_SET_GUEST_CID, &cid, "VHOST_VSOCK_SET_GUEST_CID");
    arena = mmap(NULL, ARENA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(arena == MAP_FAILED, "mmap");
    /* Its memory is where it is in this process. */
    struct vhost_memory *memory = calloc(1, sizeof *memory + sizeof *memory->regions);
    memory->nregions = 1;
    memory->regions[0] = (struct vhost_memory_region){.guest_phys_addr = (uintptr_t)arena,
        .memory_size = ARENA, .userspace_addr = (uintptr_t)arena};
    control(VHOST_SET_MEM_TABLE, memory, "VHOST_SET_MEM_TABLE");
    free(memory);
    start_queue(RX);
    start_queue(TX);
    int running = 1;
    control(VHOST_VSOCK_SET_RUNNING, &running, "VHOST_VSOCK_SET_RUNNING");
    for (int i = 0; i < SIZE; i++)
        offer(&queues[RX], i, BUFFER, VRING_DESC_F_WRITE);
}

/* Sends one packet, and waits until the kernel has taken it. */
static void packet(uint16_t operation, const char *payload, uint32_t bytes) {
    struct queue *q = &queues[TX];
    struct virtio_vsock_hdr header = {.src_cid = claimed, .dst_cid = VMADDR_CID_HOST,
        .src_port = port_here, .dst_port = port_there, .len = bytes, .type = VIRTIO_VSOCK_TYPE_STREAM,
        .op = operation, .buf_alloc = CREDIT, .fwd_cnt = received};
    if (operation == VIRTIO_VSOCK_OP_SHUTDOWN)
        header.flags = VIRTIO_VSOCK_SHUTDOWN_RCV | VIRTIO_VSOCK_SHUTDOWN_SEND;
    memcpy(q->buffers, &header, sizeof header);
    memcpy(q->buffers + sizeof header, payload, bytes);
    offer(q, 0, sizeof header + bytes, 0);
    while (!done(q))
        usleep(100);
}

/* Takes what the host has sent. Whether the connection is still there. */
static int take(int local) {
    struct queue *q = &queues[RX];
    struct vring_used_elem *element;
    int there = 1;
    uint64_t calls;
    (void)!read(q->call, &calls, sizeof calls);
    while ((element = done(q))) {
        uint16_t descriptor = element->id;
        char *buffer = q->buffers + descriptor * BUFFER;
        struct virtio_vsock_hdr header;
        memcpy(&header, buffer, sizeof header);
        /* What is late of an earlier connection is of no interest. */
        if (header.dst_port == port_here) {
            if (header.op == VIRTIO_VSOCK_OP_RW) {
                const char *payload = buffer + sizeof header;
                if (send(local, payload, header.len, MSG_NOSIGNAL) != (ssize_t)header.len)
                    there = 0;
                received += header.len;
                packet(VIRTIO_VSOCK_OP_CREDIT_UPDATE, NULL, 0);
            } else if (header.op == VIRTIO_VSOCK_OP_CREDIT_REQUEST) {
                packet(VIRTIO_VSOCK_OP_CREDIT_UPDATE, NULL, 0);
            } else if (header.op == VIRTIO_VSOCK_OP_RST || header.op == VIRTIO_VSOCK_OP_SHUTDOWN) {
                there = 0;
            }
        }
        offer(q, descriptor, BUFFER, VRING_DESC_F_WRITE);
    }
    return there;
}

static void relay(int local) {
    port_here++;
    received = 0;
    packet(VIRTIO_VSOCK_OP_REQUEST, NULL, 0);
    struct pollfd ready[] = {{.fd = local, .events = POLLIN}, {.fd = queues[RX].call, .events = POLLIN}};
    char bytes[4096];
    for (;;) {
        poll(ready, 2, -1);
        if (ready[1].revents && !take(local))
            break;
        if (!ready[0].revents)
            continue;
        ssize_t got = read(local, bytes, sizeof bytes);
        if (got <= 0)
            break;
        packet(VIRTIO_VSOCK_OP_RW, bytes, got);
    }
    packet(VIRTIO_VSOCK_OP_SHUTDOWN, NULL, 0);
    packet(VIRTIO_VSOCK_OP_RST, NULL, 0);
    close(local);
}

int main(int count, char **words) {
    if (count < 4) {
        fprintf(stderr, "usage: vsock-vm CID PORT LISTEN [CLAIMED]\n");
        return 2;
    }
    uint64_t cid = strtoull(words[1], NULL, 10);
    port_there = strtoul(words[2], NULL, 10);
    claimed = count > 4 ? strtoull(words[4], NULL, 10) : cid;
    start(cid);
    if (strtoul(words[3], NULL, 10) == 0) {
        relay(STDIN_FILENO);
        return 0;
    }
    int listener = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_LOCAL,
        .svm_port = strtoul(words[3], NULL, 10)};
    check(listener < 0 || bind(listener, (void *)&address, sizeof address) || listen(listener, 8), "listen");
    for (;;) {
        int local = accept(listener, NULL, NULL);
        check(local < 0, "accept");
        relay(local);
    }
}
