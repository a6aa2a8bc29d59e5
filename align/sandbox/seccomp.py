"""The seccomp filter of a sandboxed program: a list of allowed system calls; every other one fails with EPERM."""

from __future__ import annotations

import errno
import platform
import struct

from align.registry import pick

# Name, number on x86_64, number on aarch64 (Linux: arch/x86/entry/syscalls/syscall_64.tbl, asm-generic/unistd.h).
# What Python needs for files, memory, signals, threads, clocks and waiting. Left out: exec, fork, socket, ptrace,
# mount, namespaces, prctl, process_vm_*, keys, bpf, perf, io_uring, System V memory, memfd, setting IDs or sessions.
ALLOWED = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, lseek 8 62, open 2 -, openat 257 56,
close 3 57, close_range 436 436, dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59, fcntl 72 25, flock 73 32,
ftruncate 77 46, truncate 76 45, fallocate 285 47, fadvise64 221 223, ioctl 16 29, sendfile 40 71, stat 4 -,
fstat 5 80, lstat 6 -, newfstatat 262 79, statx 332 291, access 21 -, faccessat 269 48, faccessat2 439 439,
readlink 89 -, readlinkat 267 78, getcwd 79 17, chdir 80 49, fchdir 81 50, getdents64 217 61, mkdir 83 -,
mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276,
symlink 88 -, symlinkat 266 36, chmod 90 -, fchmod 91 52, fchmodat 268 53, umask 95 166, utimensat 280 88,
fsync 74 82, fdatasync 75 83,
mmap 9 222, munmap 11 215, mprotect 10 226, mremap 25 216, madvise 28 233, brk 12 214, membarrier 324 283,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigtimedwait 128 137, sigaltstack 131 132,
kill 62 129, tgkill 234 131, tkill 200 130, pause 34 -, alarm 37 -, getitimer 36 102, setitimer 38 103,
futex 202 98, set_robust_list 273 99, set_tid_address 218 96, rseq 334 293, arch_prctl 158 -, sched_yield 24 124,
sched_getaffinity 204 123, exit 60 93, exit_group 231 94, wait4 61 260, waitid 247 95, restart_syscall 219 128,
nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169,
time 201 -, times 100 153, getrusage 98 165, getrlimit 97 163, sysinfo 99 179, uname 63 160,
getrandom 318 278, getcpu 309 168,
getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177,
getgroups 115 158, getpgrp 111 -,
poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21,
epoll_wait 232 -, epoll_pwait 281 22, eventfd 284 -, eventfd2 290 19,
sendto 44 206, recvfrom 45 207, shutdown 48 210, getsockopt 55 209, setsockopt 54 208, getsockname 51 204,
getpeername 52 205,
"""
CLONE = {"x86_64": 56, "aarch64": 220}  # allowed for threads only
SOCKETPAIR = {"x86_64": 53, "aarch64": 199}  # allowed for AF_UNIX only: asyncio wakes itself up with one
PRLIMIT64 = {"x86_64": 302, "aarch64": 261}  # allowed for the caller (0) only
CLONE3 = {"x86_64": 435, "aarch64": 435}  # fails with ENOSYS: its flags are in memory, so libc must use clone
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h

CLONE_THREAD = 0x00010000
CLONE_NEW_ANY = 0x7E020000  # a namespace of any kind
AF_UNIX = 1

LOAD, AND, JUMP_IF_EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06  # linux/bpf_common.h: 32-bit words
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data, little-endian
ALLOW, FAIL, KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000  # FAIL + errno


def syscall_filter() -> bytes:
    """Return the filter for this machine as an array of `struct sock_filter`."""
    machine = platform.machine()
    architecture = pick(AUDIT_ARCH, machine, "machine with known system calls")
    allowed = [int(number) for number in _numbers(machine) if number != "-"]
    steps = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_IF_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL_PROCESS),  # 32-bit programs use other numbers
        (LOAD, 0, 0, NUMBER),
        *_if_argument(CLONE[machine], CLONE_THREAD | CLONE_NEW_ANY, CLONE_THREAD),
        *_if_argument(SOCKETPAIR[machine], 0xFFFFFFFF, AF_UNIX),
        *_if_argument(PRLIMIT64[machine], 0xFFFFFFFF, 0),
        *_if_number(CLONE3[machine], FAIL | errno.ENOSYS),
        *(step for number in allowed for step in _if_number(number, ALLOW)),
        (RETURN, 0, 0, FAIL | errno.EPERM),
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def _numbers(machine: str) -> list[str]:
    column = list(AUDIT_ARCH).index(machine) + 1
    return [row.split()[column] for row in ALLOWED.split(",") if row.strip()]


def _if_number(number: int, action: int) -> list[tuple[int, int, int, int]]:
    """Return the steps that take an action for the system call `number`."""
    return [(JUMP_IF_EQUAL, 0, 1, number), (RETURN, 0, 0, action)]


def _if_argument(number: int, mask: int, value: int) -> list[tuple[int, int, int, int]]:
    """Return the steps that allow the system call `number` where its first argument under `mask` is `value`."""
    return [
        (JUMP_IF_EQUAL, 0, 5, number),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (AND, 0, 0, mask),
        (JUMP_IF_EQUAL, 0, 1, value),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, FAIL | errno.EPERM),
    ]
