"""Runs a program in its own namespaces, with a view of the disk that contains only some folders.

The evaluator runs this file as a script with its own interpreter (``python -I -S sandbox.py``), so it imports
only the standard library. The first line of standard input is a :class:`Spec` in JSON. The first line of
standard output is ``{"isolation": [...], "contained": ...}``. The program starts when a second line of input
arrives; everything after it is the program's input, and all further output is the program's.

There are three processes. The launcher creates the namespaces and waits. Its child, the guard, is process 1
of the PID namespace. It builds the view, starts the program and, when the program ends, kills everything that
the program started. In a PID namespace, killing the guard kills all other processes, too, and the program can
neither see nor signal the launcher or the evaluator.

References
----------
namespaces(7), user_namespaces(7), pid_namespaces(7), pivot_root(2), landlock(7), capabilities(7), seccomp(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import select
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if os.name == "posix":
    import resource

LINUX = sys.platform.startswith("linux")
LIBC: Any = ctypes.CDLL(None, use_errno=True) if LINUX else None

NEW_MOUNT, NEW_UTS, NEW_IPC = 0x00020000, 0x04000000, 0x08000000
NEW_USER, NEW_PID, NEW_NET = 0x10000000, 0x20000000, 0x40000000
NAMES = {NEW_MOUNT: "mount", NEW_PID: "PID", NEW_NET: "network", NEW_IPC: "IPC", NEW_UTS: "UTS"}

READ_ONLY, NO_SUID, NO_DEVICES, NO_EXECUTION, REMOUNT = 1, 2, 4, 8, 32
NO_ACCESS_TIME, NO_FOLDER_ACCESS_TIME, RELATIVE_ACCESS_TIME = 1024, 2048, 1 << 21
BIND, RECURSIVE, PRIVATE, DETACH = 4096, 16384, 1 << 18, 2
OPTIONS = {
    "ro": READ_ONLY,
    "nosuid": NO_SUID,
    "nodev": NO_DEVICES,
    "noexec": NO_EXECUTION,
    "noatime": NO_ACCESS_TIME,
    "nodiratime": NO_FOLDER_ACCESS_TIME,
    "relatime": RELATIVE_ACCESS_TIME,
}
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "loongarch64": 41, "ppc64le": 203, "s390x": 217}
SYSTEM_CALLS = {"x86_64": (0xC000003E, 29, 272, 56), "aarch64": (0xC00000B7, 194, 97, 220)}
"""For each machine the number of its architecture, and the numbers of shmget, unshare and clone."""
CLONE3 = 435
OTHER_CALLS = 0x40000000  # the first system call of x32, a second set of numbers
SET_SECCOMP = 22
SET_DEATH_SIGNAL, SET_DUMPABLE, DROP_FROM_BOUNDING_SET, SET_SUBREAPER, SET_NO_NEW_PRIVILEGES = (
    1,
    4,
    24,
    36,
    38,
)
TASKS = 1024 + 16 * (os.cpu_count() or 1)  # processes and threads at once; more would starve the evaluator
OVERRIDE_PERMISSIONS = 1
"""The only capability that root keeps: reading other users' files in the folders that it sees."""

NO_FILES = "the submission could read and write other files"
"""Beginning of the note if nothing restricts the view."""
GPU_FOLDERS = ("amdgpu*", "cuda*", "intel", "nvidia", "rocm*")  # in /opt; other folders there stay hidden
SYSTEM = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/gnu/store"),
    *(str(path) for name in GPU_FOLDERS for path in sorted(Path("/opt").glob(name))),
)
SETTINGS = (
    "alternatives", "fonts", "group", "host.conf", "ld.so.cache", "ld.so.conf", "ld.so.conf.d",
    "locale.alias", "localtime", "magic", "mime.types", "nsswitch.conf", "nvidia", "OpenCL",
    "os-release", "passwd", "ssl", "timezone", "vulkan",
)  # fmt: skip
"""Names in ``/etc`` that programs and their libraries need."""
DEVICES = ("null", "zero", "full", "random", "urandom")
GPU_DEVICES = ("nvidia*", "dri", "kfd", "dxg")
MACHINE = ("/sys/devices", "/sys/bus", "/sys/class", "/sys/module", "/sys/kernel/mm", "/sys/fs/cgroup")


@dataclass(frozen=True)
class Spec:
    """The program to run, and what it may see."""

    command: list[str]  # the program's absolute path and its arguments
    environment: dict[str, str]
    folder: str  # its working folder
    readable: list[str]  # absolute paths of files and folders that it may read, in addition to the system's
    hidden: list[str]  # files and folders inside ``readable`` that it must not see
    writable: list[str]  # absolute paths of folders that it may write to
    scratch: str
    """A folder with empty folders ``root``, for building the view, and ``tmp``, the program's ``/tmp``."""
    memory: int  # maximum size of ``/dev/shm`` in bytes
    file_size: int  # maximum size in bytes of a file that it writes
    without: list[str]  # names of namespaces, or ``Landlock``, that must not be used; set by tests
    user: int | None = None
    """Id of the user and group that it runs as, if the system allows it; by default the evaluator's own."""


def main() -> None:
    """Read a :class:`Spec` and run its program; exit with its exit code, or 128 + the fatal signal."""
    if LINUX:
        die_with_parent()
    spec = Spec(**json.loads(_read_line()))
    notes: list[str] = []
    made = enter_namespaces(spec.without, notes, spec.user) if LINUX else set()
    alive, hold = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(hold)
        _guard(spec, made, notes, alive)
        os._exit(1)  # not reached
    for stream in (0, 1):
        _replace_with_nothing(stream)
    os.chdir("/")
    _, status = os.waitpid(child, 0)
    os._exit(_code(status))


def enter_namespaces(without: Sequence[str], notes: list[str], user_inside: int | None = None) -> set[int]:
    """Move this process into new namespaces, and its next child into a PID namespace.

    An ordinary user also needs a user namespace, in which the user's id stays the same, or becomes
    ``user_inside``. Everything that the system does not allow is added to ``notes``. Returns the flags of the
    new namespaces.
    """
    wanted = [flag for flag, name in NAMES.items() if name not in without]
    failures = {flag: "not asked for" for flag in NAMES if flag not in wanted}
    made: set[int] = set()

    def enter() -> None:
        for flag in wanted:
            if flag not in made:
                try:
                    _call("unshare", flag)
                    made.add(flag)
                except OSError as error:
                    failures[flag] = error.strerror or "unknown error"

    enter()
    if len(made) < len(wanted) and "user" not in without:
        user, group = os.geteuid(), os.getegid()
        try:
            _call("unshare", NEW_USER)
        except OSError as error:
            failures = {flag: f"user namespaces: {error.strerror}" for flag in wanted if flag not in made} | {
                flag: why for flag, why in failures.items() if flag not in wanted
            }
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/setgroups").write_text("deny")
                Path("/proc/self/uid_map").write_text(f"{user_inside or user} {user} 1")
                Path("/proc/self/gid_map").write_text(f"{user_inside or group} {group} 1")
            enter()
    meaning_of = {
        NEW_PID: "the submission could see and signal other processes",
        NEW_NET: "the submission could reach the network",
        NEW_IPC: "the submission could reach the shared memory of other programs",
    }
    for flag, meaning in meaning_of.items():
        if flag not in made:
            notes.append(f"{meaning}: {NAMES[flag]} namespaces are not allowed ({failures[flag]})")
    if NEW_MOUNT not in made:
        notes.insert(0, f"mount namespaces are not allowed ({failures[NEW_MOUNT]})")
    return made


def _guard(spec: Spec, made: set[int], notes: list[str], alive: int) -> None:
    """Build the view, run the program, and exit when it ends. This is all that the guard does."""
    contained = NEW_PID in made
    if LINUX:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})  # for sigwait
        die_with_parent(signal.SIGKILL if contained else signal.SIGTERM)
        if select.select([alive], [], [], 0)[0]:  # the launcher died before the line above
            os._exit(1)
        if not contained:
            LIBC.prctl(SET_SUBREAPER, 1, 0, 0, 0)  # orphans become the guard's children
    if contained:
        limit_processes()
    landlock = _restrict_view(spec, made, notes)
    has_view = landlock is None and not any(note.startswith(NO_FILES) for note in notes)
    if spec.user not in (None, os.geteuid()) and not (has_view and os.geteuid() == 0):
        notes.append("the submission ran as the evaluator's user: the system does not allow another one")
    line = {"isolation": notes, "contained": contained}
    _write_all(1, json.dumps(line).encode() + b"\n")
    _read_line()
    child = os.fork()
    if child == 0:
        _become(spec, landlock, spec.user if has_view and os.geteuid() == 0 else None)
    if LINUX:
        LIBC.prctl(SET_DUMPABLE, 0, 0, 0, 0)  # so that the program cannot read the guard's memory
        drop_privileges()
    for stream in (0, 1):
        _replace_with_nothing(stream)
    code = _wait_for(child)
    if not contained:
        end_children()
    os._exit(code)


def _restrict_view(spec: Spec, made: set[int], notes: list[str]) -> int | None:
    """Restrict the view to the folders of ``spec``; return a Landlock rule set if that is needed."""
    if not LINUX:
        notes[:] = [f"{NO_FILES}: {sys.platform} has no namespaces"]
        return None
    if NEW_MOUNT in made and NEW_PID in made:
        try:
            notes += build_view(spec)
            return None
        except OSError as error:
            notes.insert(0, f"the view of the disk could not be restricted ({error})")
    elif NEW_MOUNT in made:
        notes.insert(0, "mount namespaces need PID namespaces")
    why = notes.pop(0)
    try:
        if "Landlock" in spec.without:
            raise OSError(0, "not asked for")
        rules = landlock_rules(spec)
    except OSError as error:
        notes.insert(
            0,
            f"{NO_FILES}: {why}, nor is Landlock ({error.strerror})",
        )
        return None
    notes.insert(
        0, f"the submission could see the names of other files: {why}; Landlock kept it from reading them"
    )
    notes[1:1] = landlock_gaps(landlock_version())
    return rules


def _become(spec: Spec, landlock: int | None, user: int | None) -> None:
    """Replace this process by the program, which runs as ``user`` if this process is root's."""
    try:
        if user is not None:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        if LINUX:
            die_with_parent()  # after the change of user, which cancels it
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        size = spec.file_size if hard == resource.RLIM_INFINITY else min(spec.file_size, hard)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        os.chdir(spec.folder)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # the default, which the program may change
            signal.signal(number, signal.SIG_DFL)
        if LINUX:
            drop_privileges()
            forbid_hidden_memory()
            if landlock is not None:
                _call("syscall", 446, landlock, 0)
        os.closerange(3, 1024)
        os.execve(spec.command[0], spec.command, spec.environment)
    except (OSError, ValueError) as error:
        _write_all(1, json.dumps({"unstarted": str(error)}).encode() + b"\n")
    os._exit(127)


def _wait_for(child: int) -> int:
    """Wait for the child and return its exit code; SIGTERM ends the wait. Other ended children are reaped."""
    if not LINUX:
        return _code(os.waitpid(child, 0)[1])
    ended: dict[int, int] = {}
    while child not in ended:
        if signal.sigwait({signal.SIGTERM, signal.SIGCHLD}) == signal.SIGTERM:
            return 128 + signal.SIGTERM
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                ended[found[0]] = found[1]
    return _code(ended[child])


def end_children(spare: Callable[[int], bool] = lambda _: False, timeout: float = 60.0) -> None:
    """Kill and reap the children of this process, and orphans that become its children meanwhile (Linux).

    A chain of processes, of which each starts the next and exits, always has a member that is a child of this
    process. So this repeats until no child is left, and it is fast, because a member lives for less than a
    millisecond. It also kills each child's process group, which no member leaves by starting another.

    Parameters
    ----------
    spare : callable
        Whether to leave a child alone.
    timeout : float
        Seconds until it gives up.
    """
    deadline = time.monotonic() + timeout
    while (below := [pid for pid in children() if not spare(pid)]) and time.monotonic() < deadline:
        for pid in below:
            with contextlib.suppress(OSError):
                if (group := os.getpgid(pid)) != os.getpgrp():
                    os.killpg(group, signal.SIGKILL)
                os.kill(pid, signal.SIGKILL)
        for pid in below:
            with contextlib.suppress(OSError):
                os.waitpid(
                    pid, os.WNOHANG
                )  # a process that another one traces cannot be reaped before that ends


def children() -> list[int]:
    """Process ids of the children of this process's main thread, which also adopts its orphans."""
    with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children", "rb") as file:
        return [int(pid) for pid in file.read().split()]
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # "pid (name) state parent …"; the name may contain any characters
            if int(stat.read_text(errors="replace").rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(stat.parent.name))
    return found


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask Linux to send this process a signal when its parent dies for any reason."""
    if LIBC is not None:
        LIBC.prctl(SET_DEATH_SIGNAL, number, 0, 0, 0)


def adopt_orphans() -> None:
    """Make descendants that lose their parent children of this process (Linux only)."""
    if LIBC is not None:
        LIBC.prctl(SET_SUBREAPER, 1, 0, 0, 0)


def limit_processes() -> None:
    """Limit the processes and threads of this PID namespace, if Linux supports it (since 6.14)."""
    numbers = os.uname().release.split("-")[0].split(".")
    version = [int(number) for number in numbers[:2] if number.isdigit()]
    if version >= [6, 14]:  # in older versions this would limit the whole system
        with contextlib.suppress(OSError):
            Path("/proc/sys/kernel/pid_max").write_text(str(TASKS))


def forbid_hidden_memory() -> None:
    """Forbid this process and its children to make user namespaces and System V shared memory.

    No process's memory includes shared segments, or a ``tmpfs`` that is mounted in a user namespace.
    Does nothing on machines that :data:`SYSTEM_CALLS` lacks, or if Linux has no seccomp.
    """
    if platform.machine() not in SYSTEM_CALLS:
        return
    architecture, shared_segment, unshare, clone = SYSTEM_CALLS[platform.machine()]
    load, equal, at_least, any_bit, result = 0x20, 0x15, 0x35, 0x45, 0x06
    number_at, architecture_at, flags_at = 0, 4, 16  # in struct seccomp_data
    program = [  # (operation, lines to skip if true, lines to skip if false, value)
        (load, 0, 0, architecture_at),
        (equal, 0, 8, architecture),
        (load, 0, 0, number_at),
        (at_least, 6, 0, OTHER_CALLS),
        (equal, 5, 0, shared_segment),
        (equal, 4, 0, CLONE3),  # a filter cannot read its flags; the C library then uses clone
        (equal, 1, 0, unshare),
        (equal, 0, 3, clone),
        (load, 0, 0, flags_at),
        (any_bit, 0, 1, NEW_USER),
        (result, 0, 0, 0x00050000 | errno.ENOSYS),
        (result, 0, 0, 0x7FFF0000),  # allow
    ]
    lines = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = struct.pack("HP", len(program), ctypes.addressof(lines))
    with contextlib.suppress(OSError):
        _call("prctl", SET_SECCOMP, 2, header, 0, 0)


def drop_privileges() -> None:
    """Permanently drop all capabilities, and forbid this process and its children to gain new privileges.

    Root keeps the capability to read other users' files, because readable folders may belong to another user.
    """
    kept = 1 << OVERRIDE_PERMISSIONS if os.geteuid() == 0 else 0
    for number in range(64):
        if not kept >> number & 1:
            LIBC.prctl(DROP_FROM_BOUNDING_SET, number, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)  # effective, permitted, inheritable; low and high
    _call("capset", header, sets)
    _call("prctl", SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)


# The view of the disk


def build_view(spec: Spec) -> list[str]:
    """Create and enter a root that contains only the folders of ``spec``; return what is not isolated.

    Raises
    ------
    OSError
        If the system does not allow it; the old root is then unchanged.
    """
    if platform.machine() not in PIVOT_ROOT:
        raise OSError(0, f"no system call number for {platform.machine()}")
    view = _View(os.path.join(spec.scratch, "root"))
    view.begin()
    notes = view.system_folders(spec)
    for path, shown in _rules(spec):
        if shown:
            view.expose(path)
        else:
            view.hide(path)
    for path in spec.writable:
        view.expose(path, writable=True)
    view.devices(spec.memory)
    view.enter()
    return notes


def _rules(spec: Spec) -> list[tuple[str, bool]]:
    """Paths, and whether each is shown. Folders come before their content; the last rule for a path wins."""
    rules = [(path, False) for path in spec.hidden] + [(path, True) for path in spec.readable]
    # Sorted by resolved paths, so that a hidden path always comes after the folder that contains it.
    return sorted(set(rules), key=lambda rule: (os.path.realpath(rule[0]).split("/"), rule[1]))


class _View:
    """A new root folder under construction. All paths are paths of the old root."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.rules: list[tuple[str, bool]] = []  # paths, and whether they are shown or hidden

    def begin(self) -> None:
        _mount(None, "/", None, RECURSIVE | PRIVATE)
        _mount("tmpfs", self.root, "tmpfs", NO_SUID | NO_DEVICES, "mode=755,size=16m")

    def expose(self, path: str, *, writable: bool = False) -> None:
        """Show a file or folder, and the symbolic links in its path."""
        path = self._follow(path)
        if not writable and next(
            (shown for rule, shown in reversed(self.rules) if _is_below(path, rule)), False
        ):
            return
        target = self.root + path
        self._make(path)
        _mount(path, target, None, BIND | RECURSIVE)
        if writable:
            self.remount(target, NO_SUID | NO_DEVICES)
            return
        for place, _ in list(_mounts(target)):
            self.remount(place, READ_ONLY | NO_SUID)
        self.rules.append((path, True))

    def _follow(self, path: str) -> str:
        """Copy the symbolic links in a path to the new root; return the path without links."""
        done = ""
        names = [name for name in path.split("/") if name]
        for _ in range(1000):
            if not names:
                return done or "/"
            name = names.pop(0)
            if name == "..":
                done = os.path.dirname(done).rstrip("/")
            elif os.path.islink(here := f"{done}/{name}"):
                link = os.readlink(here)
                if not os.path.lexists(self.root + here):
                    self._make(done or "/", folder=True)
                    os.symlink(link, self.root + here)
                if link.startswith("/"):
                    done = ""
                names = [part for part in link.split("/") if part not in ("", ".")] + names
            else:
                done = here
        raise OSError(0, f"{path}: too many symbolic links")

    def _make(self, path: str, *, folder: bool | None = None) -> None:
        """Create the mount point of a file or folder."""
        target = self.root + path
        if os.path.exists(target):
            return
        if os.path.isdir(path) if folder is None else folder:
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o644))

    def system_folders(self, spec: Spec) -> list[str]:
        """Show what every program needs: libraries, /proc, /sys and /tmp; return what is not isolated."""
        notes = []
        for path in (*SYSTEM, *(f"/etc/{name}" for name in SETTINGS)):
            if os.path.exists(path):
                self.expose(path)
        for path in MACHINE:
            if os.path.isdir(path):
                with contextlib.suppress(OSError):  # optional: not all systems allow it
                    self.expose(path)
        os.mkdir(f"{self.root}/proc")
        plain = NO_SUID | NO_DEVICES | NO_EXECUTION
        try:
            _mount("proc", f"{self.root}/proc", "proc", plain)
        except OSError as error:
            if os.geteuid() == 0:  # with the old /proc, root could read the evaluator's memory
                raise
            _mount("/proc", f"{self.root}/proc", None, BIND | RECURSIVE)
            notes.append(
                "the submission could see other processes' names and arguments: "
                f"/proc cannot be mounted ({error.strerror})"
            )
        os.mkdir(f"{self.root}/tmp")
        self.remount(f"{self.root}/proc", READ_ONLY | plain)
        _mount(f"{spec.scratch}/tmp", f"{self.root}/tmp", None, BIND)
        self.remount(f"{self.root}/tmp", NO_SUID | NO_DEVICES)
        return notes

    def devices(self, memory: int) -> None:
        """Show harmless devices and GPUs."""
        folder = f"{self.root}/dev"
        os.mkdir(folder)
        names = [name for name in DEVICES if os.path.exists(f"/dev/{name}")]
        names += [path.name for pattern in GPU_DEVICES for path in Path("/dev").glob(pattern)]
        for name in names:
            self._make(f"/dev/{name}")
            _mount(f"/dev/{name}", f"{folder}/{name}", None, BIND | RECURSIVE)
            for place, _ in list(_mounts(f"{folder}/{name}")):  # for its permissions: it can be written to
                self.remount(place, READ_ONLY | NO_SUID | NO_EXECUTION)
        os.mkdir(f"{folder}/shm")
        _mount("tmpfs", f"{folder}/shm", "tmpfs", NO_SUID | NO_DEVICES, f"mode=1777,size={memory}")
        for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
            os.symlink(f"/proc/self/fd{target}", f"{folder}/{name}")

    def hide(self, path: str) -> None:
        """Hide a folder behind an empty folder, and a file behind ``/dev/null``."""
        target = self.root + path
        if not os.path.lexists(target) or os.path.islink(target):
            return
        if os.path.isdir(target):
            _mount("tmpfs", target, "tmpfs", NO_SUID | NO_DEVICES, "mode=755,size=1m")
        else:
            _mount("/dev/null", target, None, BIND)
        self.rules.append((path, False))

    def remount(self, place: str, flags: int) -> None:
        """Add flags to a mount; its other flags stay."""
        kept = next((flags for found, flags in reversed(list(_mounts(place))) if found == place), 0)
        _mount(None, place, None, BIND | REMOUNT | flags | kept)

    def enter(self) -> None:
        """Make this folder the root, and unmount the old root."""
        for place in (*(path for path, shown in self.rules if not shown), ""):
            self.remount(self.root + place, READ_ONLY | NO_SUID | NO_DEVICES)
        os.chdir(self.root)
        _call("syscall", PIVOT_ROOT[platform.machine()], b".", b".")
        _call("umount2", b".", DETACH)
        os.chdir("/")


def _mounts(below: str) -> Iterator[tuple[str, int]]:
    """Mount points at or below a path, with their flags."""
    for line in Path("/proc/self/mountinfo").read_bytes().decode("utf-8", "surrogateescape").splitlines():
        fields = line.split(" ")
        place = _unescape(fields[4])
        if _is_below(place, below):
            yield place, sum(OPTIONS.get(option, 0) for option in fields[5].split(","))


def _unescape(text: str) -> str:
    r"""Decode a path from mountinfo, where ``\040`` means a space."""
    for code, letter in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, letter)
    return text


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


# Landlock, for systems that do not allow namespaces


EXECUTE, WRITE_FILE, READ_FILE, READ_FOLDER = 1, 2, 4, 8


def landlock_version() -> int:
    """The kernel's version of Landlock; raise OSError if it has none."""
    return _call("syscall", 444, None, 0, 1)


def landlock_gaps(version: int) -> list[str]:
    """What a version of Landlock does not prevent, one sentence each."""
    gaps = [
        "the submission could change permissions and times of other files: Landlock does not prevent that"
    ]
    if version < 3:
        gaps.append(f"the submission could cut other files short: Landlock {version} does not prevent that")
    return gaps


def landlock_rules(spec: Spec) -> int:
    """The file descriptor of a rule set that allows only the folders of ``spec``.

    Raises
    ------
    OSError
        If the system has no Landlock.
    """
    version = landlock_version()
    every = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1  # rights over files
    fields = [every, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0]  # files; TCP; signals, sockets
    count = 1 + (version >= 4) + (version >= 6)
    attributes = (ctypes.c_uint64 * count)(*fields[:count])
    rules = _call("syscall", 444, attributes, ctypes.sizeof(attributes), 0)
    read = EXECUTE | READ_FILE | READ_FOLDER
    settings = (f"/etc/{name}" for name in SETTINGS)
    readable = (*SYSTEM, *settings, "/proc", "/sys", *spec.readable)
    for path in dict.fromkeys(map(os.path.realpath, readable)):
        for part, whole in _around(path, [each for each in spec.hidden if each != path]):
            _allow(rules, part, read if whole else READ_FOLDER)
    gpus = [str(path) for pattern in GPU_DEVICES for path in Path("/dev").glob(pattern)]
    for path in (
        *(f"/dev/{name}" for name in DEVICES),
        *gpus,
        "/dev/shm",
        *spec.writable,
        f"{spec.scratch}/tmp",
    ):
        _allow(rules, os.path.realpath(path), every)
    return rules


def _around(path: str, hidden: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Split a path into parts so that nothing hidden is in a part that is allowed as a whole.

    Yields paths, and whether each may be allowed as a whole. If not, the folder may only be listed, which
    Python needs to find modules in it, and its entries follow.
    """
    if path in hidden:
        return
    whole = not any(_is_below(each, path) for each in hidden)
    yield path, whole
    if whole:
        return
    with contextlib.suppress(OSError):
        for name in os.listdir(path):
            yield from _around(os.path.join(path, name), hidden)


def _allow(rules: int, path: str, rights: int) -> None:
    """Allow rights for a path and everything below it, if it exists."""
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    if not os.path.isdir(path):
        rights &= EXECUTE | WRITE_FILE | READ_FILE | 1 << 14  # 14: to truncate

    class Rule(ctypes.Structure):
        _pack_ = 1
        _fields_ = (("rights", ctypes.c_uint64), ("place", ctypes.c_int32))

    try:
        _call("syscall", 445, rules, 1, ctypes.byref(Rule(rights, place)), 0)
    finally:
        os.close(place)


# System calls and descriptors


def _call(name: str, *arguments: Any) -> int:
    """Call a function of the C library; raise OSError if it fails."""
    values = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = int(getattr(LIBC, name)(*values))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    try:
        _call("mount", *texts[:3], flags, texts[3])
    except OSError as error:
        raise OSError(error.errno, f"mount of {target}: {error.strerror}") from error


def _read_line() -> bytes:
    """Read exactly one line of standard input; the rest is the program's input."""
    line = bytearray()
    while not line.endswith(b"\n"):
        part = os.read(0, 1)
        if not part:
            os._exit(1)
        line += part
    return bytes(line)


def _write_all(stream: int, content: bytes) -> None:
    with contextlib.suppress(OSError):
        while content:
            content = content[os.write(stream, content) :]


def _replace_with_nothing(stream: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, stream)
    os.close(nothing)


def _code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    main()
