"""The layers that isolate a process before it runs untrusted code. Needs the standard library only.

- Its own user, mount, process, network, IPC and host name namespaces.
- A root directory of the standard library alone, read-only, and a folder in memory at /tmp, of limited size.
- A user without rights outside (`nobody` where root starts it), no capabilities, no way to gain any, no core dumps.
- Limits on CPU time, memory, file size, open files and threads.
- A filter of system calls (`seccomp`): no new process, no exec, no socket.

Each function adds one layer, or raises `LayerUnavailable` with the name of the layer. `fork_server` applies them.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from collections.abc import Callable, Mapping
from typing import Any

ROOT = "/proc"  # where the new root is mounted: a folder that always exists and that nothing is taken from
INSIDE = 1  # user and group ID of the program in its namespace
NOBODY = 65534  # the same outside, where root starts the sandbox: limits and file permissions do not bind root

CLONE_NEW = 0x00020000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000  # ns, uts, ipc, user, pid, net
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, AT_RECURSIVE, AT_FDCWD = 1, 2, 4, 0x8000, -100
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 4, 22, 38, 2
CAPABILITY_VERSION_3 = 0x20080522
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
MOUNT_SETATTR = 442  # on every machine

libc = ctypes.CDLL(None, use_errno=True)


class LayerUnavailable(Exception):
    """A layer of the isolation that this system does not offer."""


def call(layer: str, function: Callable[..., int], *arguments: Any) -> None:  # noqa: ANN401 - what libc takes
    """Call a function of libc; raise `LayerUnavailable` where it fails."""
    if function(*arguments) < 0:
        raise LayerUnavailable(f"{layer}: {os.strerror(ctypes.get_errno())}")


def prctl(layer: str, option: int, argument: int, pointer: int = 0) -> None:
    """Set an attribute of this process."""
    call(layer, libc.prctl, ctypes.c_int(option), ctypes.c_ulong(argument), ctypes.c_void_p(pointer), 0, 0)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    prctl("death with the parent (prctl)", PR_SET_PDEATHSIG, signal.SIGKILL)


def can_map_nobody() -> bool:
    """Return whether this process is root and may map the user `nobody` into a namespace."""
    with open("/proc/self/uid_map") as lines:
        ranges = [[int(word) for word in line.split()] for line in lines]
    return os.geteuid() == 0 and any(start <= NOBODY < start + count for start, _, count in ranges)


def enter_namespaces() -> None:
    """Move this process to new namespaces; a child that stays outside writes its user and group maps."""
    uid = os.geteuid()
    gid = os.getegid()
    process = os.getpid()
    as_root = can_map_nobody()
    ready_reader, ready_writer = os.pipe()
    mapper = os.fork()
    if mapper == 0:
        os.close(ready_writer)
        os._exit(write_maps(process, uid, gid, as_root=as_root) if os.read(ready_reader, 1) else 0)
    os.close(ready_reader)
    call("new namespaces (unshare)", libc.unshare, CLONE_NEW)
    os.write(ready_writer, b"1")
    os.close(ready_writer)
    if error := os.waitstatus_to_exitcode(os.waitpid(mapper, 0)[1]):
        raise LayerUnavailable(f"a user namespace (uid_map): {os.strerror(error)}")


def write_maps(process: int, uid: int, gid: int, *, as_root: bool) -> int:
    """Write the user and group maps of a process's new namespace; return the error number, 0 for none."""
    maps = {"uid_map": f"{INSIDE} {uid} 1", "gid_map": f"{INSIDE} {gid} 1"}
    if as_root:  # ID 0 inside builds the root directory: only root may see what is bind-mounted
        maps = dict.fromkeys(maps, f"0 0 1\n{INSIDE} {NOBODY} 1")
    try:
        for name, text in {**({} if as_root else {"setgroups": "deny"}), **maps}.items():
            with open(f"/proc/{process}/{name}", "w") as file:
                file.write(text)
    except OSError as error:
        return error.errno or 1
    return 0


def mount(
    layer: str, source: str | None, target: str, *, kind: str | None = None, flags: int = 0, options: str | None = None
) -> None:
    """Mount a file system."""
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    data = None if options is None else options.encode()
    call(f"{layer} (mount)", libc.mount, *texts, ctypes.c_ulong(flags), data)


def set_attributes(path: str, *, add: int = 0, clear: int = 0, recursive: bool = False) -> None:
    """Change the attributes of a mount; those that the system's own mounts set cannot be cleared."""
    attributes = (ctypes.c_uint64 * 4)(add, clear, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    arguments = (ctypes.c_long(AT_FDCWD), os.fsencode(path), ctypes.c_long(flags), attributes, ctypes.c_long(32))
    call("read-only mounts (mount_setattr, Linux 5.12)", libc.syscall, ctypes.c_long(MOUNT_SETATTR), *arguments)


def build_root(request: Mapping[str, Any]) -> None:
    """Replace the root directory by one of the files in the request, with one writable folder."""
    call("a host name (sethostname)", libc.sethostname, b"sandbox", 7)
    mount("private mounts", None, "/", flags=MS_REC | MS_PRIVATE)
    mount("a root directory", "root", ROOT, kind="tmpfs", flags=MS_NOSUID | MS_NODEV, options="mode=755,size=1m")
    folder = f"{ROOT}/tmp"
    os.mkdir(folder)
    size = f"mode=700,uid={INSIDE},gid={INSIDE},size={request['folder_mb']}m,nr_inodes=4096"
    mount("a folder", "folder", folder, kind="tmpfs", flags=MS_NOSUID | MS_NODEV | MS_NOEXEC, options=size)
    for source, inside in request["read_only"]:
        target = ROOT + inside
        if os.path.isdir(source):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT))
        mount(f"{source} read-only", source, target, flags=MS_BIND | MS_REC)
    for inside in request["hidden"]:
        mount(f"an empty {inside}", "hidden", ROOT + inside, kind="tmpfs", options="mode=755,size=4k")
    set_attributes(ROOT, add=MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, recursive=True)
    if not request["forks"]:  # of many programs, one must not leave files to the next
        set_attributes(folder, clear=MOUNT_ATTR_RDONLY)
    os.chdir(ROOT)
    pivot = ctypes.c_long(PIVOT_ROOT[os.uname().machine])
    call("a new root (pivot_root)", libc.syscall, pivot, b".", b".")
    call("a new root (umount)", libc.umount2, b".", MNT_DETACH)
    os.chdir("/tmp")


def drop_privileges() -> None:
    """Become the program's user, without capabilities and without a way to gain any."""
    prctl("no new privileges (prctl)", PR_SET_NO_NEW_PRIVS, 1)
    if os.getuid() != INSIDE:
        os.setgroups([])
    os.setresgid(INSIDE, INSIDE, INSIDE)
    os.setresuid(INSIDE, INSIDE, INSIDE)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    call("no capabilities (capset)", libc.capset, header, (ctypes.c_uint32 * 6)())
    prctl("no core dumps (prctl)", PR_SET_DUMPABLE, 0)


def set_limit(kind: int, value: int) -> None:
    """Set a resource limit, soft and hard, that can only be lowered afterwards."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def set_limits(request: Mapping[str, Any]) -> None:
    """Limit the program's resources; raise where the limit on threads has no effect."""
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    resource.setrlimit(resource.RLIMIT_NPROC, (0, hard))
    try:
        if os.fork() == 0:
            os._exit(0)
        raise LayerUnavailable("a limit on threads: it does not bind this user, who is root outside; use another user")
    except BlockingIOError:  # the limit has an effect
        set_limit(resource.RLIMIT_NPROC, request["num_threads"] + 1)
    set_limit(resource.RLIMIT_AS, request["memory_mb"] << 20)
    set_limit(resource.RLIMIT_FSIZE, request["folder_mb"] << 20)
    set_limit(resource.RLIMIT_NOFILE, 64)
    set_limit(resource.RLIMIT_CORE, 0)
    set_limit(resource.RLIMIT_MEMLOCK, 0)
    set_limit(resource.RLIMIT_CPU, request["cpu_s"])


def filter_syscalls(code: bytes) -> None:
    """Allow only the system calls of the filter, permanently."""
    program = ctypes.create_string_buffer(code, len(code))
    header = (ctypes.c_uint64 * 2)(len(code) // 8, ctypes.addressof(program))  # struct sock_fprog, padded
    prctl("a filter of system calls (seccomp)", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(header))


def check_filter(apply_filter: Callable[[], None]) -> None:
    """Apply the filter of system calls in a child; raise `LayerUnavailable` where that fails."""
    child = os.fork()
    if child == 0:
        try:
            apply_filter()
        except LayerUnavailable:
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise LayerUnavailable("a filter of system calls (seccomp)")
