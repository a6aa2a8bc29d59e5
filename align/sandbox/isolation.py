"""A process that locks a child up and has it run a module's `main`. It needs the standard library alone.

Every layer is there before the module's `main` runs, or the child ends and `missing` says what was not:
- user, mount, process, network, IPC and host name namespaces of its own;
- a root made of the standard library, read only, and a folder in memory at /tmp, of bounded size;
- a user who is no one outside (`nobody` where root starts it), no capability, no way to gain one, no dumps;
- limits on CPU time, memory, file size, open files and threads;
- a list of the system calls that are allowed (`syscall_filter`): no new process, no exec, no socket.
A module that forks runs no program itself and can write nowhere; each of its children takes the last layer on itself.
The child dies with its jail, and the jail with the process that serves jails.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import types
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

ROOT = "/proc"  # where the new root is put up: a folder that is always there and that nothing is taken from
INSIDE = 1  # the program's user and group in its own namespace
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


class Missing(Exception):
    """A layer that cannot be had here."""


def call(what: str, function: Callable[..., int], *arguments: Any) -> None:  # noqa: ANN401 - what libc takes
    """Call into libc; an error becomes `Missing`, with the name of the layer."""
    if function(*arguments) < 0:
        raise Missing(f"{what}: {os.strerror(ctypes.get_errno())}")


def prctl(what: str, option: int, argument: int, more: int = 0) -> None:
    """Set an attribute of this process."""
    call(what, libc.prctl, ctypes.c_int(option), ctypes.c_ulong(argument), ctypes.c_void_p(more), 0, 0)


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that made it ends."""
    prctl("death with the parent (prctl)", PR_SET_PDEATHSIG, signal.SIGKILL)


def has_nobody() -> bool:
    """Whether this is root, with the user `nobody` to hand over to."""
    with open("/proc/self/uid_map") as lines:
        ranges = [[int(word) for word in line.split()] for line in lines]
    return os.geteuid() == 0 and any(start <= NOBODY < start + count for start, _, count in ranges)


def enter_namespaces() -> None:
    """Leave the system's namespaces; a helper that stays outside says who we are inside."""
    uid, gid, process, as_root = os.geteuid(), os.getegid(), os.getpid(), has_nobody()
    ready, tell = os.pipe()
    helper = os.fork()
    if helper == 0:
        os.close(tell)
        os._exit(write_maps(process, uid, gid, as_root=as_root) if os.read(ready, 1) else 0)
    os.close(ready)
    call("namespaces of its own (unshare)", libc.unshare, CLONE_NEW)
    os.write(tell, b"1")
    os.close(tell)
    if error := os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1]):
        raise Missing(f"users of its own (uid_map): {os.strerror(error)}")


def write_maps(process: int, uid: int, gid: int, *, as_root: bool) -> int:
    """The error number of giving the process's new namespace its users, 0 for none."""
    maps = {"uid_map": f"{INSIDE} {uid} 1", "gid_map": f"{INSIDE} {gid} 1"}
    if as_root:  # 0 inside puts up the root, where only root may look at what is bound
        maps = dict.fromkeys(maps, f"0 0 1\n{INSIDE} {NOBODY} 1")
    try:
        for name, text in {**({} if as_root else {"setgroups": "deny"}), **maps}.items():
            with open(f"/proc/{process}/{name}", "w") as file:
                file.write(text)
    except OSError as error:
        return error.errno or 1
    return 0


def mount(
    what: str, source: str | None, target: str, *, kind: str | None = None, flags: int = 0, options: str | None = None
) -> None:
    """Put something up in the tree of files."""
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    data = None if options is None else options.encode()
    call(f"{what} (mount)", libc.mount, *texts, ctypes.c_ulong(flags), data)


def set_attributes(path: str, *, add: int = 0, take: int = 0, recursive: bool = False) -> None:
    """Change what may be done below a mount: what is added cannot undo what the system's own mounts forbid."""
    attributes = (ctypes.c_uint64 * 4)(add, take, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    arguments = (ctypes.c_long(AT_FDCWD), os.fsencode(path), ctypes.c_long(flags), attributes, ctypes.c_long(32))
    call("read-only mounts (mount_setattr, Linux 5.12)", libc.syscall, ctypes.c_long(MOUNT_SETATTR), *arguments)


def build_root(order: Mapping[str, Any]) -> None:
    """Make a root of what the order lists, with one folder to write to, and leave the system's behind."""
    call("a host name of its own (sethostname)", libc.sethostname, b"sandbox", 7)
    mount("mounts of its own", None, "/", flags=MS_REC | MS_PRIVATE)
    mount("a root of its own", "root", ROOT, kind="tmpfs", flags=MS_NOSUID | MS_NODEV, options="mode=755,size=1m")
    folder = f"{ROOT}/tmp"
    os.mkdir(folder)
    size = f"mode=700,uid={INSIDE},gid={INSIDE},size={order['folder_mb']}m,nr_inodes=4096"
    mount("a folder", "folder", folder, kind="tmpfs", flags=MS_NOSUID | MS_NODEV | MS_NOEXEC, options=size)
    for source, inside in order["read_only"]:
        target = ROOT + inside
        if os.path.isdir(source):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT))
        mount(f"{source} read only", source, target, flags=MS_BIND | MS_REC)
    for inside in order["hidden"]:
        mount(f"an empty {inside}", "hidden", ROOT + inside, kind="tmpfs", options="mode=755,size=4k")
    set_attributes(ROOT, add=MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, recursive=True)
    if not order["forks"]:  # what one program writes would be there for the next
        set_attributes(folder, take=MOUNT_ATTR_RDONLY)
    os.chdir(ROOT)
    pivot = ctypes.c_long(PIVOT_ROOT[os.uname().machine])
    call("the root's place (pivot_root)", libc.syscall, pivot, b".", b".")
    call("the root's place (umount)", libc.umount2, b".", MNT_DETACH)
    os.chdir("/tmp")


def give_up_rights() -> None:
    """Become the program's user, without a capability or a way to get one."""
    prctl("no new privileges (prctl)", PR_SET_NO_NEW_PRIVS, 1)
    if os.getuid() != INSIDE:
        os.setgroups([])
    os.setresgid(INSIDE, INSIDE, INSIDE)
    os.setresuid(INSIDE, INSIDE, INSIDE)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    call("no capabilities (capset)", libc.capset, header, (ctypes.c_uint32 * 6)())
    prctl("no dumps (prctl)", PR_SET_DUMPABLE, 0)


def limit(kind: int, most: int) -> None:
    """Set a limit that can only be lowered from here on."""
    already = resource.getrlimit(kind)[1]
    most = most if already == resource.RLIM_INFINITY else min(most, already)
    resource.setrlimit(kind, (most, most))


def set_limits(order: Mapping[str, Any]) -> None:
    """Bound what the program may use, and see that the bound on threads holds."""
    soft = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, soft[1]))
    try:
        if os.fork() == 0:
            os._exit(0)
        raise Missing("a limit on threads: it does not bind this user, who is root outside; start as another user")
    except BlockingIOError:  # as it should be
        limit(resource.RLIMIT_NPROC, order["num_threads"] + 1)
    limit(resource.RLIMIT_AS, order["memory_mb"] << 20)
    limit(resource.RLIMIT_FSIZE, order["folder_mb"] << 20)
    limit(resource.RLIMIT_NOFILE, 64)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_MEMLOCK, 0)
    limit(resource.RLIMIT_CPU, order["cpu_s"])


def filter_calls(code: bytes) -> None:
    """Allow the calls of the filter only, for good."""
    program = ctypes.create_string_buffer(code, len(code))
    header = (ctypes.c_uint64 * 2)(len(code) // 8, ctypes.addressof(program))  # struct sock_fprog, padded
    prctl("a filter of system calls (seccomp)", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(header))


def see_that_it_holds(lock: Callable[[], None]) -> None:
    """Try a layer in a child; `Missing` where the child cannot have it."""
    child = os.fork()
    if child == 0:
        try:
            lock()
        except Missing:
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise Missing("a filter of system calls (seccomp)")


def keep_descriptors(wanted: Sequence[int]) -> int:
    """Nothing is open but an empty standard input and output, and `wanted` from 3 on."""
    empty = os.open(os.devnull, os.O_RDWR)
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 100) for descriptor in [empty, empty, empty, *wanted]]
    for place, descriptor in enumerate(high):
        os.dup2(descriptor, place)
    return 3 + len(wanted)


def run_locked_up(order: Mapping[str, Any], line: socket.socket, wanted: Sequence[int], parent_lives: int) -> None:
    """The child's whole life: it locks itself up, then is the program."""
    report, parent_lives = (fcntl.fcntl(descriptor, fcntl.F_DUPFD, 200) for descriptor in (line.detach(), parent_lives))
    try:
        os.setsid()
        first_free = keep_descriptors(wanted)
        build_root(order)
        give_up_rights()
        die_with_parent()
        if select.select([parent_lives], [], [], 0)[0]:  # end of file: it ended before we asked
            os._exit(1)
        set_limits(order)
        lock = partial(filter_calls, b64decode(order["filter"]))
        see_that_it_holds(lock) if order["forks"] else lock()
    except (Missing, OSError) as error:
        os.write(report, json.dumps({"missing": str(error)}).encode() + b"\n")
        os._exit(1)
    os.closerange(first_free, 1 << 16)
    os.environ.clear()
    sys.argv[:] = [""]
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.modules[order["module"]].main(order["argument"], *([lock] if order["forks"] else []))
    os._exit(0)


def jail(line: socket.socket, wanted: Sequence[int]) -> None:
    """Read the order, lock a child up, and say how it ended; where the line is closed, the child is ended."""
    die_with_parent()
    text = line.makefile().readline()
    if not text:
        return  # whoever asked has gone
    order = json.loads(text)
    try:
        enter_namespaces()
    except (Missing, OSError) as error:
        line.sendall(json.dumps({"missing": str(error)}).encode() + b"\n")
        return
    die_with_parent()  # again: new rights may have undone it
    parent_lives, hold = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(hold)
        run_locked_up(order, line, wanted, parent_lives)
    for descriptor in wanted:
        os.close(descriptor)
    ended = os.pidfd_open(child)
    if ended not in select.select([ended, line], [], [])[0]:
        os.kill(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    report = {"code": os.waitstatus_to_exitcode(status), "cpu_s": used.ru_utime + used.ru_stime}
    line.sendall(json.dumps({**report, "memory_mb": used.ru_maxrss / 1024}).encode() + b"\n")


def serve(modules: Sequence[str]) -> None:
    """Start a jail for each request: a line to whoever asks, and the descriptors that the program gets.

    All of them are forks of this process, which has loaded the modules and has seen no order.
    """
    for module in modules:
        importlib.import_module(module)
    sys.path.pop()  # the project's, from the command that started this process
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a jail
    requests = socket.socket(fileno=0)
    while True:
        data, received, _, _ = socket.recv_fds(requests, 1, 16)
        if not data:
            return
        if os.fork() == 0:
            try:
                requests.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                jail(socket.socket(fileno=received[0]), received[1:])
            finally:
                os._exit(0)
        for descriptor in received:
            os.close(descriptor)
