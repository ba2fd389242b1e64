"""A program in a virtual machine asks the host for a CHECKPOINT of the machine's disks.

    import blobcr
    taken = blobcr.checkpoint()
    blobcr.wait(taken)
    print(taken.snapshots[0].image, taken.snapshots[0].number)

The functions are those of libblobcr (blobcr_checkpoint(3)), which must be installed, and take its
options by name: port, connect, vm, token_file, socket, key, group, sequence, expected_vms, timeout
in seconds, and flush=False. What fails raises Error, an OSError with the errno of the library.
"""

import ctypes
import enum

__all__ = [
    "Error", "SetState", "State", "begin_set", "checkpoint", "set_status", "status", "wait",
]

_VERSION, _NAME, _REASON, _DISKS, _NO_FLUSH = 1, 136, 240, 32, 1
_HEAD = ("version", "size", "reserved")
_u32, _u64, _text = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_char_p


class Error(OSError):
    """The request failed; a checkpoint may have been taken when errno is ETIMEDOUT."""


class State(enum.IntEnum):
    """Of a snapshot."""

    NONE, PENDING, STABLE, FAILED, OBSOLETE = range(5)


class SetState(enum.IntEnum):
    """Of a checkpoint set."""

    INCOMPLETE, PENDING, STABLE, FAILED, OBSOLETE = range(1, 6)


class _Structure(ctypes.Structure):
    """Names are text, and what has room for more shows what there is."""

    def __init__(self):
        super().__init__()
        if hasattr(self, "version"):
            self.version, self.size = _VERSION, ctypes.sizeof(self)

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        return value.decode() if isinstance(value, bytes) else value

    def __repr__(self):
        names = [name.lstrip("_") for name, *_ in self._fields_]
        shown = [f"{n}={getattr(self, n)!r}" for n in names if n not in _HEAD]
        return f"{type(self).__name__}({', '.join(shown)})"


class _Options(_Structure):
    _fields_ = [
        ("version", _u32), ("size", _u32), ("flags", _u32), ("timeout_ms", _u32),
        ("port", _text), ("connect", _text), ("vm", _text), ("token_file", _text),
        ("socket", _text), ("key", _text), ("group", _text),
        ("sequence", _u64), ("expected_vms", _u32), ("reserved", _u32),
    ]


class Snapshot(_Structure):
    """One disk's part in a checkpoint: `image`@`number`."""

    _fields_ = [
        ("disk", ctypes.c_char * _NAME), ("image", ctypes.c_char * _NAME), ("image_id", _u64),
        ("number", _u64), ("dirty_bytes", _u64), ("downtime_ns", _u64), ("_state", _u32),
        ("reserved", _u32),
    ]

    @property
    def state(self):
        return State(self._state)


class Checkpoint(_Structure):
    """What was taken."""

    _fields_ = [
        ("version", _u32), ("size", _u32), ("count", _u32), ("reserved", _u32),
        ("flush_ns", _u64), ("call_ns", _u64), ("vm", ctypes.c_char * _NAME),
        ("_snapshots", Snapshot * _DISKS),
    ]

    @property
    def snapshots(self):
        return self._snapshots[:min(self.count, _DISKS)]


class Disk(_Structure):
    """A disk of this machine."""

    _fields_ = [
        ("disk", ctypes.c_char * _NAME), ("checkpoint_image", ctypes.c_char * _NAME),
        ("size_bytes", _u64), ("dirty_bytes", _u64), ("last_stable", _u64), ("pending", _u64),
        ("stalled", ctypes.c_char * _REASON),
    ]


class Vm(_Structure):
    """This machine, as its host knows it."""

    _fields_ = [
        ("version", _u32), ("size", _u32), ("count", _u32), ("group_count", _u32),
        ("vm", ctypes.c_char * _NAME), ("group", ctypes.c_char * _NAME), ("_disks", Disk * _DISKS),
    ]

    @property
    def disks(self):
        return self._disks[:min(self.count, _DISKS)]


class CheckpointSet(_Structure):
    """One snapshot per disk of a group of machines."""

    _fields_ = [
        ("version", _u32), ("size", _u32), ("sequence", _u64), ("expected_vms", _u32),
        ("joined_vms", _u32), ("_state", _u32), ("reserved", _u32),
        ("group", ctypes.c_char * _NAME),
    ]

    @property
    def state(self):
        return SetState(self._state)


_library = ctypes.CDLL("libblobcr.so.1")
_library.blobcr_last_error.restype = _text


def _call(function, result, flush=True, timeout=None, **options):
    given = _Options()
    given.flags = 0 if flush else _NO_FLUSH
    if timeout is not None:
        given.timeout_ms = max(1, int(timeout * 1000))
    texts = {name for name, kind, *_ in _Options._fields_ if kind is _text}
    for name, value in options.items():
        if name not in texts | {"sequence", "expected_vms"}:
            raise TypeError(f"{name} is no option")
        if value is not None:
            setattr(given, name, value.encode() if name in texts else value)
    rc = function(ctypes.byref(given), ctypes.byref(result))
    if rc < 0:
        raise Error(-rc, _library.blobcr_last_error().decode())
    return result


def checkpoint(**options):
    """Flushes this machine's disks and asks for a CHECKPOINT of them; returns a Checkpoint.

    With sequence= it is a member of that set. The snapshots are pending still.
    """
    return _call(_library.blobcr_checkpoint, Checkpoint(), **options)


def wait(taken=None, **options):
    """Waits until the snapshots are stable; without an argument, those of the newest checkpoint."""
    return _call(_library.blobcr_wait, taken or Checkpoint(), **options)


def status(**options):
    """Tells what this machine is to its host; returns a Vm."""
    return _call(_library.blobcr_status, Vm(), **options)


def begin_set(expected_vms, **options):
    """Begins a set; each machine, this one too, then joins it. Returns a CheckpointSet."""
    return _call(_library.blobcr_begin_set, CheckpointSet(), expected_vms=expected_vms, **options)


def set_status(**options):
    """Tells what has become of a set, or which is the newest stable one; returns a CheckpointSet."""
    return _call(_library.blobcr_set_status, CheckpointSet(), **options)
