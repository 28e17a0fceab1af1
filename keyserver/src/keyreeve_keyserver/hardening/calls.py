"""The lists of system calls: what the signer needs once it serves, and what no process of the key host but its launcher ever does.

The signer's list is what CPython 3.11 to 3.13 with asyncio and threads, glibc, OpenSSL and the audit log use between start and end: it reads
and writes what Landlock leaves it, talks over open sockets, begins threads. Nothing on it makes a socket, a process, or writable code.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from keyreeve_keyserver.hardening.seccomp import Argument, Call, Compare

_CLONE_THREAD, _PROT_WRITE, _PROT_EXEC = 0x0001_0000, 2, 4
_WRITE_AND_EXEC = _PROT_WRITE | _PROT_EXEC
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16

_FILES = """read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 close close_range dup dup2 dup3 pipe pipe2 lseek
open openat openat2 creat stat fstat lstat newfstatat fstatat64 statx statfs fstatfs access faccessat faccessat2 readlink readlinkat getdents
getdents64 getcwd mkdir mkdirat rename renameat renameat2 link linkat unlink unlinkat rmdir fchmod ftruncate
fallocate fsync fdatasync sync_file_range syncfs flock utimensat fadvise64 copy_file_range sendfile"""
# Landlock leaves the modes of files alone, and before ABI 3 their length: these two reach a file by its path, and so any of our user.
_BY_PATH = "chmod fchmodat truncate"
# Whom the kernel signals for a descriptor, and by what: F_SETOWN F_SETSIG F_SETOWN_EX; FIOSETOWN SIOCSPGRP.
_SIGNAL_FCNTLS, _SIGNAL_IOCTLS = (8, 10, 15), (0x8901, 0x8902)
_FCNTLS = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030)  # F_DUPFD to F_SETLKW, locks of open files, F_DUPFD_CLOEXEC
_MEMORY = "brk munmap mremap madvise msync mlock mlock2 munlock membarrier"
_THREADS = """futex futex_waitv set_robust_list get_robust_list rseq set_tid_address sched_yield sched_getaffinity sched_getparam
sched_getscheduler gettid getpid getppid getpgrp getuid geteuid getgid getegid getresuid getresgid getgroups exit exit_group getcpu"""
_CHILDREN = "wait4 waitid"  # the launcher's end is waited for; none can be begun
_TIME = "nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times getrusage getitimer setitimer restart_syscall"
_SIGNALS = "rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack pause"
_POLLING = (
    "epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 poll ppoll select pselect6 eventfd2"
)
_OPEN_SOCKETS = "recvfrom recvmsg sendmsg accept accept4 getsockname getpeername getsockopt setsockopt shutdown"
_MACHINE = "getrandom uname sysinfo getrlimit"
_IOCTLS = (0x5421, 0x5451, 0x5450, 0x541B, 0x5401, 0x5413)  # FIONBIO FIOCLEX FIONCLEX FIONREAD TCGETS TIOCGWINSZ
# What qatlib asks of an open vfio container when it needs another slab of memory: VFIO_IOMMU_MAP_DMA VFIO_IOMMU_UNMAP_DMA. Spec: linux/vfio.h
_CARD_IOCTLS = (0x3B71, 0x3B72)
_PR_SET_DUMPABLE = 4
_PRCTLS = (15, 16, 0x53564D41)  # PR_SET_NAME PR_GET_NAME PR_SET_VMA

_NEW_SOCKETS = "socket socketpair connect bind listen"
_PROCESSES = "execve execveat fork vfork"
_OTHERS_MEMORY = """ptrace process_vm_readv process_vm_writev process_madvise process_mrelease pidfd_open pidfd_getfd pidfd_send_signal kcmp
perf_event_open userfaultfd"""
_OTHER_PROCESSES = "kill tkill rt_sigqueueinfo rt_tgsigqueueinfo"
_KERNEL = """bpf io_uring_setup io_uring_enter io_uring_register keyctl add_key request_key init_module finit_module delete_module kexec_load
kexec_file_load reboot swapon swapoff acct syslog quotactl iopl ioperm modify_ldt personality settimeofday clock_settime adjtimex
clock_adjtime sethostname setdomainname vhangup nfsservctl lookup_dcookie"""
_MOUNTS = """mount umount2 pivot_root chroot unshare setns move_mount open_tree fsopen fsconfig fsmount fspick mount_setattr
name_to_handle_at open_by_handle_at fanotify_init mknod mknodat"""
_IDENTITY = """setuid setgid setreuid setregid setresuid setresgid setgroups setfsuid setfsgid capset chown fchown lchown fchownat"""
_REST = "memfd_create symlink symlinkat setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr umask chdir fchdir"

ABSENT = (Call("clone3"),)  # its flags lie in memory, where a filter cannot look: glibc falls back to clone


def signer_allows(*, card: bool = False) -> tuple[Call, ...]:
    """With this process's own id, to which alone it may send signals. `card`: a QAT card is open, and memory may be shared with it."""
    return (
        *_calls(_FILES, _MEMORY, _THREADS, _CHILDREN, _TIME, _SIGNALS, _POLLING, _OPEN_SOCKETS, _MACHINE),
        Call("clone", (_mask(0, _CLONE_THREAD, _CLONE_THREAD),)),
        Call("mmap", (_mask(2, _PROT_EXEC, 0),)),
        Call("mmap", (_mask(2, _WRITE_AND_EXEC, _PROT_EXEC),)),  # a library that is loaded late
        Call("mprotect", (_mask(2, _PROT_EXEC, 0),)),
        Call("tgkill", (Argument(0, Compare.EQ, os.getpid()),)),
        Call("sendto", (Argument(4, Compare.EQ, 0),)),  # no address: to the peer of the socket alone
        Call("prlimit64", (Argument(2, Compare.EQ, 0),)),  # reads a limit, sets none
        *(Call("ioctl", (_mask(1, 0xFFFF_FFFF, request),)) for request in _IOCTLS + (_CARD_IOCTLS if card else ())),
        *(Call("fcntl", (_mask(1, 0xFFFF_FFFF, command),)) for command in _FCNTLS),
        *(Call("prctl", (_mask(0, 0xFFFF_FFFF, option),)) for option in _PRCTLS),
    )


def signer_forbids() -> tuple[Call, ...]:
    """What fails with EPERM rather than ENOSYS, so that a log says what it was."""
    return (
        *_calls(
            _NEW_SOCKETS, _PROCESSES, _OTHERS_MEMORY, _OTHER_PROCESSES, _KERNEL, _MOUNTS, _IDENTITY, _REST, _BY_PATH
        ),
        *_signals_by_descriptors(),
        Call("clone", (_mask(0, _CLONE_THREAD, 0),)),
        Call("mmap", (_mask(2, _WRITE_AND_EXEC, _WRITE_AND_EXEC),)),
        Call("mprotect", (_mask(2, _PROT_EXEC, _PROT_EXEC),)),
    )


def worker_forbids(*, sockets: bool) -> tuple[Call, ...]:
    """`sockets`: it may make outgoing connections; it never listens."""
    forbidden = [
        *_calls(_PROCESSES, _OTHERS_MEMORY, _KERNEL, _MOUNTS, "listen tkill rt_sigqueueinfo"),
        # Landlock keeps signals in from ABI 6 on, and only where files are confined.
        *(Call(name, (Argument(0, Compare.NE, os.getpid()),)) for name in ("kill", "tgkill", "rt_tgsigqueueinfo")),
        *_signals_by_descriptors(),
        Call("clone", (_mask(0, _CLONE_THREAD, 0),)),
        Call("prctl", (_mask(0, 0xFFFF_FFFF, _PR_SET_DUMPABLE),)),
    ]
    if not sockets:
        return (*forbidden, *_calls("socket socketpair connect bind"))
    below = Argument(0, Compare.GT, _AF_NETLINK)
    between = [family for family in range(_AF_NETLINK) if family not in (_AF_UNIX, _AF_INET, _AF_INET6)]
    return (
        *forbidden,
        Call("socket", (below,)),
        *(Call("socket", (Argument(0, Compare.EQ, family),)) for family in between),
    )


def _signals_by_descriptors() -> Iterator[Call]:
    for name, requests in (("fcntl", _SIGNAL_FCNTLS), ("ioctl", _SIGNAL_IOCTLS)):
        yield from (Call(name, (_mask(1, 0xFFFF_FFFF, request),)) for request in requests)


def _mask(index: int, mask: int, value: int) -> Argument:
    return Argument(index, Compare.MASKED_EQ, mask, value)


def _calls(*texts: str) -> list[Call]:
    return [Call(name) for text in texts for name in text.split()]
