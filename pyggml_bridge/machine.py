"""What this process may use of the machine: memory, processors and threads, within the limits of its container.

Linux describes all of these in files. Where a file is missing, as on other systems, its limit is ignored.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Set
from pathlib import Path

from pyggml_bridge.errors import CQError

MAX_THREADS = 1024
FAST = 0.7  # a core whose highest clock or capacity is below this share of the best core's is an efficiency core


class Machine:
    """The machine that the files under `root` describe."""

    def __init__(self, root: Path = Path("/")) -> None:
        """root: the folder of proc and sys; tests have one of their own."""
        self._proc, self._sys = root / "proc", root / "sys"

    def available_memory(self) -> int:
        """Bytes that this process can take without swapping and without being killed for it."""
        amounts = [1 << 62, *self._cgroup_memory()]
        for line in _read(self._proc / "meminfo").splitlines():
            if line.startswith("MemAvailable:"):
                amounts.append(int(line.split()[1]) << 10)
        return max(0, min(amounts))

    def logical_cpus(self, allowed: Set[int]) -> int:
        """Of the processors `allowed`, as many as the CPU quota can keep busy, at least one."""
        return max(1, min([len(allowed), *(math.ceil(share) for share in self._cpu_quotas())]))

    def fast_cores(self, allowed: Set[int]) -> int:
        """Physical performance cores among the processors `allowed`, as many as the CPU quota can keep busy.

        Hyper-threads share the units that the kernels saturate, and a slow core makes all others wait at each barrier.
        """
        cpus, folder = self._performance_cpus(allowed), self._sys / "devices/system/cpu"
        siblings = {_read(folder / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
        return min(len(siblings) or 1, self.logical_cpus(allowed))

    def max_threads(self) -> int:
        """Threads that this process can start, at most MAX_THREADS."""
        left = [MAX_THREADS]
        for folder in self._cgroups("pids"):
            limit, used = _integer(folder / "pids.max"), _integer(folder / "pids.current")
            if limit is not None and used is not None:
                left.append(limit - used)
        return max(1, min(left))

    def _performance_cpus(self, allowed: Set[int]) -> Set[int]:
        """Intel's hybrid processors list their performance cores; others differ in capacity (Arm) or clock."""
        if listed := _cpu_list(_read(self._sys / "devices/cpu_core/cpus")) & allowed:
            return listed
        for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
            speeds = {cpu: _integer(self._sys / f"devices/system/cpu/cpu{cpu}/{name}") or 0 for cpu in allowed}
            if speeds and min(speeds.values()) > 0:
                return {cpu for cpu, speed in speeds.items() if speed >= FAST * max(speeds.values())}
        return allowed

    # ---- control groups, versions 1 and 2 (kernel documentation: admin-guide/cgroup-v1, cgroup-v2) ----

    def _cgroups(self, controller: str) -> Iterator[Path]:
        """The folders of this process's groups that may limit what the controller counts, each with its parents.

        Inside a container the path may be one of the host's, which does not exist below the mount; its parents do.
        """
        mounts = self._sys / "fs/cgroup"
        for line in _read(self._proc / "self/cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            parts = [part for part in path.split("/") if part not in ("", "..")]
            for mount in (controller, controllers) if controllers else ("", "unified"):
                for depth in range(len(parts), -1, -1):
                    yield mounts.joinpath(mount, *parts[:depth])

    def _cgroup_memory(self) -> Iterator[int]:
        """What is left of each limit; the page cache that nobody has read lately can be had too."""
        for folder in self._cgroups("memory"):
            for limit, used, cache in (
                ("memory.max", "memory.current", "inactive_file"),
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            ):
                most, now = _integer(folder / limit), _integer(folder / used)
                if most is not None and now is not None:
                    stat = dict(line.split()[:2] for line in _read(folder / "memory.stat").splitlines())
                    yield most - now + int(stat.get(cache, 0))

    def _cpu_quotas(self) -> Iterator[float]:
        """Processors' worth of time that each group may take."""
        for folder in self._cgroups("cpu"):
            quota, _, period = _read(folder / "cpu.max").partition(" ")
            if period and quota != "max":
                yield int(quota) / int(period)
            old, old_period = _integer(folder / "cpu.cfs_quota_us"), _integer(folder / "cpu.cfs_period_us")
            if old is not None and old > 0 and old_period:
                yield old / old_period


def available_memory() -> int:
    """Bytes that this process can take without swapping and without being killed for it."""
    return Machine().available_memory()


def logical_cpus() -> int:
    """Processors that this process may use, hyper-threads counted."""
    return Machine().logical_cpus(_allowed_cpus())


def default_threads() -> int:
    """Physical performance cores that this process may use."""
    return Machine().fast_cores(_allowed_cpus())


def require_memory(needed: int, what: str) -> None:
    """CQError with both numbers if `what` needs more bytes than this process can take."""
    available = available_memory()
    if needed > available:
        sizes = f"{needed / 1e9:.2f} GB of memory, {available / 1e9:.2f} GB are available"
        raise CQError(f"{what}: needs {sizes}: ask for less")


def require_threads(n_threads: int, what: str) -> None:
    """CQError naming `what` unless this process can start so many threads."""
    most = Machine().max_threads()
    if not 1 <= n_threads <= most:
        raise CQError(f"{what} {n_threads}: expected 1 .. {most}")


def _allowed_cpus() -> Set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _read(path: Path) -> str:
    """A file's text without space around it; empty if there is no such file."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _integer(path: Path) -> int | None:
    """A file's number; None if there is no such file or it says "max"."""
    text = _read(path)
    return int(text) if text.lstrip("-").isdecimal() else None


def _cpu_list(text: str) -> Set[int]:
    """The processors of a list such as "0-3,8"."""
    ranges = [part.partition("-") for part in text.split(",") if part]
    return {cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1)}
