"""Holds one RBD image open, as a hypervisor does, and calls librbd: a command a line, answered by
the seconds that the call took and a count."""

import os
import sys
import time

import rados
import rbd

cluster = rados.Rados(conffile=sys.argv[1])
cluster.connect()
pool = cluster.open_ioctx("rbd")
name = sys.argv[2]
image = rbd.Image(pool, name)


def write(length, stride, count):
    """Writes new bytes at `count` places, the starts of which are `stride` apart."""
    for place in range(int(count)):
        image.write(os.urandom(int(length)), place * int(stride))
    image.flush()
    return int(count)


def snapshot(to):
    image.create_snap(to)
    return 1


def diff(old, new):
    """As `rbd diff` lists them."""
    found = []
    with rbd.Image(pool, name, snapshot=new, read_only=True) as at:
        at.diff_iterate(0, at.size(), old, lambda *extent: found.append(extent))
    return len(found)


verbs = {verb.__name__: verb for verb in (write, snapshot, diff)}
print("0 0", flush=True)
for line in sys.stdin:
    verb, *words = line.split()
    began = time.perf_counter()
    count = verbs[verb](*words)
    print(time.perf_counter() - began, count, flush=True)
