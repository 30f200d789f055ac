"""The levels of isolation, strongest first, as command lines that start one worker.

Inside, the file system is read-only and holds Python's own files, /proc, three devices and a
private /tmp: no home directory, no repository, no installed packages (some ship the answers to
public benchmarks). Names of levels:

bwrap    bubblewrap: own user, process, network, mount, IPC namespaces. One such process, the
         nursery, loads Python once; each worker is a fork of it in namespaces of its own.
unshare  the same from util-linux and mount(8), for machines without bubblewrap.
rlimits  a plain process with limits and the system-call filter. NOT a boundary: it sees the file
         system and the user's other processes.

Started by root, a worker changes to a user of its own, for the kernel enforces no process limit on
root; anyone else, and root where that fails, gets a user namespace instead.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spo_ext.sandbox.records import Limits
from spo_ext.sandbox.syscall_filter import build_filter
from spo_ext.sandbox.worker import CLONE

Level = Literal["bwrap", "unshare", "rlimits"]
LEVELS: tuple[Level, ...] = ("bwrap", "unshare", "rlimits")

# Users that distributions keep for services without an account of their own.
SPARE_USERS = range(61184, 65520)
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
# A fixed hash seed makes the order of sets, and with it a reward, repeatable.
ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONUTF8": "1",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    # Numeric libraries start as many threads as there are cores, each with room of its own.
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
LINKS = {
    "/dev/fd": "/proc/self/fd",
    "/dev/stdin": "/proc/self/fd/0",
    "/dev/stdout": "/proc/self/fd/1",
    "/dev/stderr": "/proc/self/fd/2",
}
MODULES = ("codec", "relation", "prelude", "child", "exam", "police", "worker")
PACKAGES = "/packages"  # where those that the user allows are, inside

# Run by /bin/sh: arguments are the new root, the size of /tmp, then read-only paths each with its
# place inside, "--", hidden paths, "--", the worker's command.
UNSHARE_SCRIPT = """
set -eu
root=$1 size=$2; shift 2
mount -t tmpfs -o mode=755 tmpfs "$root"
bind() {
  if [ -d "$1" ]; then mkdir -p "$root$2"
  else mkdir -p "$root${2%/*}"; : >"$root$2"; fi
  mount --rbind "$1" "$root$2"
}
while [ "$1" != -- ]; do
  bind "$1" "$2"; mount -o remount,bind,ro,nosuid,nodev "$root$2"; shift 2
done; shift
while [ "$1" != -- ]; do mount -t tmpfs -o ro tmpfs "$root$1"; shift; done; shift
for device in /dev/null /dev/zero /dev/urandom; do bind $device $device; done
mkdir "$root/proc" "$root/tmp" "$root/dev/shm"
mount -t proc proc "$root/proc"
for folder in /tmp /dev/shm; do
  mount -t tmpfs -o "mode=1777,size=$size" tmpfs "$root$folder"
done
ln -s /proc/self/fd "$root/dev/fd"
for link in stdin:0 stdout:1 stderr:2; do
  ln -s "/proc/self/fd/${link#*:}" "$root/dev/${link%:*}"
done
mount -o remount,bind,ro "$root"
exec chroot "$root" "$@"
"""


@dataclass(frozen=True)
class Launcher:
    """One way to start a worker."""

    level: Level
    change_user: bool
    packages: tuple[str, ...] = ()
    nursery: bool = True

    def missing(self) -> str:
        """Return why this way is not worth a try here, or "" if it is."""
        tools = {"bwrap": ("bwrap",), "unshare": ("unshare", "mount", "setpriv"), "rlimits": ()}
        lacking = [tool for tool in tools[self.level] if shutil.which(tool) is None]
        if lacking:
            return f"{', '.join(lacking)} not found"
        if self.level == "rlimits" and self.change_user and not _open_to_all():
            return "Python's files are closed to other users"
        return ""

    def describe(self) -> str:
        user = "a user without an account" if self.change_user else f"user {os.geteuid()}"
        calls = "with" if build_filter() else f"WITHOUT (unknown on {os.uname().machine})"
        barrier = {
            "bwrap": "bubblewrap namespaces, no network, read-only Python files only",
            "unshare": "util-linux namespaces, no network, read-only Python files only",
            "rlimits": "NO isolation of files and processes, only resource limits",
        }[self.level]
        return f"{barrier}, as {user}, {calls} the system-call filter"

    def pick_user(self) -> int | None:
        """A user for one worker. Each its own, so that no worker uses up another's processes."""
        return secrets.choice(SPARE_USERS) if self.change_user else None

    @property
    def needs_scratch(self) -> bool:
        """Whether a worker needs an empty directory on this machine, as its root or its /tmp."""
        return self.level != "bwrap"

    @property
    def has_nursery(self) -> bool:
        """Whether the command starts a process that forks the workers, each when asked for."""
        return self.level == "bwrap" and self.nursery and os.uname().machine in CLONE

    def command(self, limits: Limits, user: int | None, scratch: str) -> list[str]:
        """The command line of one worker, or of the nursery; `scratch` is its directory, or ""."""
        worker = self._worker_command(limits, user, scratch)
        if self.level == "bwrap":
            return [*self._bwrap(limits), "--", *worker]
        if self.level == "unshare":
            places = [path for pair in self._places().items() for path in pair]
            paths = [*places, "--", *_hidden_paths(), "--"]
            script = ["/bin/sh", "-c", UNSHARE_SCRIPT, "sh", scratch, str(limits.file_bytes)]
            return [*self._unshare(), *script, *paths, *worker]
        return worker

    def _worker_command(self, limits: Limits, user: int | None, scratch: str) -> list[str]:
        plain = self.level == "rlimits"
        found = package_paths(self.packages)
        folders = sorted({os.path.dirname(path) for path in found}) if plain else [PACKAGES]
        config = {
            "user": user,
            "nursery": self.has_nursery,
            "file_bytes": limits.file_bytes,
            "private_user": self._has_private_user(),
            "folders": [scratch] if plain else ["/tmp", "/dev/shm"],
            "filter": build_filter().hex(),
            "packages": self.packages,
            "package_folders": folders if found else [],
        }
        # -S: no installed packages, -s: not the user's either.
        return [_python(), "-s", "-S", "-c", _worker_source(), json.dumps(config)]

    def _places(self) -> dict[str, str]:
        """What can be read inside, and where: Python as it lies here, and the allowed packages."""
        places = {path: path for path in _read_only_paths()}
        found = package_paths(self.packages)
        return places | {path: f"{PACKAGES}/{os.path.basename(path)}" for path in found}

    def _has_private_user(self) -> bool:
        """Whether the kernel counts the worker's processes apart from all others."""
        if self.change_user:
            return True
        release = tuple(int(number) for number in re.findall(r"\d+", os.uname().release)[:2])
        return self.level != "rlimits" and release >= (5, 14)  # Counts per user namespace.

    def _bwrap(self, limits: Limits) -> list[str]:
        command = [_tool("bwrap"), "--die-with-parent", "--new-session", "--as-pid-1"]
        command += ["--cap-drop", "ALL"]
        # For the nursery to make namespaces, for a worker to change its user, and to make sure that
        # no capability can come back, which it does before it runs anything.
        capabilities = ["CAP_SYS_ADMIN", "CAP_SETPCAP"] if self.has_nursery else []
        if self.change_user:
            command += [f"--unshare-{kind}" for kind in ("ipc", "pid", "net", "uts", "cgroup-try")]
            capabilities += ["CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"]
        else:
            command += ["--unshare-all"]
        for capability in capabilities:
            command += ["--cap-add", capability]
        places = self._places()
        for folder in _parents([*places.values(), *DEVICES]):
            # By itself bubblewrap closes them to all but root.
            command += ["--perms", "0755", "--dir", folder]
        for path, place in places.items():
            command += ["--ro-bind", path, place]
        for path in _hidden_paths():
            command += ["--tmpfs", path, "--remount-ro", path]
        for path in DEVICES:
            command += ["--dev-bind", path, path]
        for place, target in LINKS.items():
            command += ["--symlink", target, place]
        command += ["--proc", "/proc"]
        for folder in ("/tmp", "/dev/shm"):
            command += ["--perms", "1777", "--size", str(limits.file_bytes), "--tmpfs", folder]
        return [*command, "--remount-ro", "/", "--chdir", "/tmp"]

    def _unshare(self) -> list[str]:
        command = [_tool("setpriv"), "--pdeathsig", "KILL", _tool("unshare")]
        command += ["--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child"]
        return command + ([] if self.change_user else ["--user", "--map-root-user"])


def launchers(level: Level, packages: tuple[str, ...] = ()) -> list[Launcher]:
    """The ways to reach a level, best first."""
    choices = (True, False) if os.geteuid() == 0 else (False,)
    # Some containers allow the namespaces of bubblewrap, but none in them.
    nurseries = (True, False) if level == "bwrap" else (False,)
    return [
        Launcher(level, change_user, packages, nursery)
        for change_user in choices
        for nursery in nurseries
    ]


def package_paths(packages: Sequence[str]) -> list[str]:
    """Where the packages lie here, with the shared objects that a wheel puts beside them.

    Raises ValueError for a package that is not installed, or is no name of one.
    """
    paths = []
    for name in packages:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None or spec.origin is None or not os.path.isfile(spec.origin):
            raise ValueError(f"Sandbox: packages must be installed packages, got {name!r}")
        locations = spec.submodule_search_locations
        paths.append(os.path.realpath(locations[0] if locations else spec.origin))
        libraries = os.path.join(os.path.dirname(paths[-1]), f"{name}.libs")
        paths += [libraries] if os.path.isdir(libraries) else []
    return paths


def _tool(name: str) -> str:
    return shutil.which(name) or name


def _python() -> str:
    """The interpreter that a virtual environment, if this is one, was made from."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _read_only_paths() -> list[str]:
    """What Python needs: itself, its library, shared objects."""
    prefix = os.path.realpath(sys.base_prefix)
    wanted = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
    wanted += [os.path.join(prefix, "lib"), os.path.join(prefix, "lib64"), _python()]
    return [path for path in dict.fromkeys(wanted) if os.path.exists(path)]


def _hidden_paths() -> list[str]:
    """Directories of installed packages below the read-only paths."""
    found = [glob.glob(f"{path}/python*/*-packages") for path in _read_only_paths()]
    return sorted(path for paths in found for path in paths)


def _parents(paths: Sequence[str]) -> list[str]:
    """Every directory above these paths but /, from the top down."""
    return sorted({str(folder) for path in paths for folder in Path(path).parents} - {"/"})


def _open_to_all() -> bool:
    """Whether a user with no rights at all can reach and read Python's files."""
    files = [Path(_python()), Path(os.path.realpath(os.__file__))]
    folders = [folder for file in files for folder in file.parents]
    return all(os.stat(file).st_mode & stat.S_IROTH for file in files) and all(
        os.stat(folder).st_mode & stat.S_IXOTH for folder in folders
    )


def _worker_source() -> str:
    """One text that defines the worker's modules by name and runs the last."""
    folder = Path(__file__).parent
    texts = {name: (folder / f"{name}.py").read_text(encoding="utf-8") for name in MODULES}
    return f"""
import sys
sys.path[:] = filter(None, sys.path)  # Not the working directory.
import json, types
for name, text in {texts!r}.items():
    module = types.ModuleType("spo_ext.sandbox." + name)
    sys.modules[module.__name__] = module
    exec(compile(text, name + ".py", "exec"), module.__dict__)
module.main(json.loads(sys.argv[1]))
"""
