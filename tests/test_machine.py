"""What a process may use, from fake trees of /proc and /sys; and what happens when more is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyggml_bridge import LLM, CQError, machine
from pyggml_bridge.machine import Machine
from pyggml_bridge.models import load_model
from tests.byte_tokenizer import byte_keys
from tests.test_commands import assert_refused, run
from tests.tiny_gguf import Tiny, write_tiny

MB = 1 << 20
KEYS = byte_keys()
TINY = Tiny(vocab=len(KEYS["tokenizer.ggml.tokens"]), hidden=64, ffn=64, head_dim=16)


def tree(root: Path, files: dict[str, object]) -> Machine:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return Machine(root)


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    4194304 kB"}
V2 = {"proc/self/cgroup": "0::/pod/box"}
V1 = {"proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n3:pids:/docker/abc\n0::/"}
DIR = "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("files", "megabytes"),
    [
        ({}, 4096),
        ({f"{DIR}/pod/box/memory.max": "max", f"{DIR}/pod/box/memory.current": 5 * MB}, 4096),
        ({f"{DIR}/pod/box/memory.max": 700 * MB, f"{DIR}/pod/box/memory.current": 200 * MB}, 500),
        ({f"{DIR}/pod/memory.max": 700 * MB, f"{DIR}/pod/memory.current": 200 * MB}, 500),  # the parent's limit
        ({f"{DIR}/memory.max": 700 * MB, f"{DIR}/memory.current": 200 * MB}, 500),  # a namespace of its own
        (
            {
                f"{DIR}/pod/box/memory.max": 700 * MB,
                f"{DIR}/pod/box/memory.current": 600 * MB,
                f"{DIR}/pod/box/memory.stat": f"anon 5\ninactive_file {250 * MB}\nactive_file 7",
            },
            350,
        ),
        ({f"{DIR}/pod/box/memory.max": 700 * MB, f"{DIR}/pod/box/memory.current": 900 * MB}, 0),
        ({f"{DIR}/pod/box/memory.max": 9000 * MB, f"{DIR}/pod/box/memory.current": 0}, 4096),
    ],
)
def test_memory_is_what_the_container_has_left_with_version_2(tmp_path, files, megabytes):
    assert tree(tmp_path, MEMINFO | V2 | files).available_memory() == megabytes * MB


@pytest.mark.parametrize("folder", ["memory/docker/abc", "memory"])  # on the host, and inside of the container
def test_memory_is_what_the_container_has_left_with_version_1(tmp_path, folder):
    files = {
        f"{DIR}/{folder}/memory.limit_in_bytes": 700 * MB,
        f"{DIR}/{folder}/memory.usage_in_bytes": 300 * MB,
        f"{DIR}/{folder}/memory.stat": f"inactive_file 1\ntotal_inactive_file {100 * MB}",
    }
    assert tree(tmp_path, MEMINFO | V1 | files).available_memory() == 500 * MB
    unlimited = files | {f"{DIR}/{folder}/memory.limit_in_bytes": 9223372036854771712}
    assert tree(tmp_path, unlimited).available_memory() == 4096 * MB


def test_a_system_without_these_files_has_no_known_limit(tmp_path):
    empty = Machine(tmp_path)
    assert empty.available_memory() == 1 << 62
    assert (empty.fast_cores({0, 1, 5}), empty.logical_cpus({0, 1, 5}), empty.max_threads()) == (3, 3, 1024)


def cpus(n: int, per_core: int = 1, **files: list[object]) -> dict[str, object]:
    """n processors, per_core of them in a physical core; files: what each processor's file of this name says."""
    folder, found = "sys/devices/system/cpu", {}
    for cpu in range(n):
        first = cpu - cpu % per_core
        siblings = ",".join(map(str, range(first, first + per_core)))
        found[f"{folder}/cpu{cpu}/topology/thread_siblings_list"] = siblings
        found |= {f"{folder}/cpu{cpu}/{name.replace('__', '/')}": values[cpu] for name, values in files.items()}
    return found


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({}, 4),
        (V2 | {f"{DIR}/pod/box/cpu.max": "max 100000"}, 4),
        (V2 | {f"{DIR}/pod/box/cpu.max": "50000 100000"}, 1),  # half a processor
        (V2 | {f"{DIR}/pod/box/cpu.max": "250000 100000"}, 3),
        (V2 | {f"{DIR}/pod/cpu.max": "200000 100000", f"{DIR}/pod/box/cpu.max": "max 100000"}, 2),
        (V2 | {f"{DIR}/cpu.max": "600000 100000"}, 4),  # more than there are cores
        (V1 | {f"{DIR}/cpu/docker/abc/cpu.cfs_quota_us": -1, f"{DIR}/cpu/docker/abc/cpu.cfs_period_us": 100000}, 4),
        (V1 | {f"{DIR}/cpu,cpuacct/cpu.cfs_quota_us": 150000, f"{DIR}/cpu,cpuacct/cpu.cfs_period_us": 100000}, 2),
    ],
)
def test_threads_are_the_physical_cores_that_the_quota_keeps_busy(tmp_path, files, threads):
    assert tree(tmp_path, cpus(8, per_core=2) | files).fast_cores(set(range(8))) == threads


def test_threads_count_only_processors_that_the_process_is_bound_to(tmp_path):
    assert tree(tmp_path, cpus(8, per_core=2)).fast_cores({0, 1, 2}) == 2


def test_efficiency_cores_are_left_out(tmp_path):
    both = set(range(8))
    intel = tree(tmp_path / "intel", cpus(8) | {"sys/devices/cpu_core/cpus": "0-2,5"})
    assert intel.fast_cores(both) == 4
    assert intel.fast_cores({3, 4}) == 2  # bound to efficiency cores only
    arm = tree(tmp_path / "arm", cpus(8, cpu_capacity=[400] * 4 + [900, 900, 900, 1024]))
    assert arm.fast_cores(both) == 4
    clocks = tree(tmp_path / "clocks", cpus(8, cpufreq__cpuinfo_max_freq=[5100000] * 2 + [3500000] * 6))
    assert clocks.fast_cores(both) == 2
    boosts = tree(tmp_path / "boosts", cpus(8, cpufreq__cpuinfo_max_freq=[5700000] * 2 + [5200000] * 6))
    assert boosts.fast_cores(both) == 8  # the cores that boost a little higher are no other kind


def test_threads_are_bounded_by_what_the_container_can_start(tmp_path):
    assert tree(tmp_path, V1 | {f"{DIR}/pids/pids.max": 50, f"{DIR}/pids/pids.current": 20}).max_threads() == 30
    assert tree(tmp_path, V2 | {f"{DIR}/pod/pids.max": "max", f"{DIR}/pod/pids.current": 2}).max_threads() == 1024


# ---- more than the machine has ----


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("machine")
    write_tiny(folder / "m.gguf", TINY, KEYS)
    (folder / "text.txt").write_text("Once upon a time. " * 20)
    return folder / "m.gguf"


def test_a_context_that_does_not_fit_is_refused_with_both_numbers(model, monkeypatch):
    text = model.with_name("text.txt")
    for done in (
        run("run", model, "--raw", "-p", "Once", "-c", 10**9),
        run("bench", model, "-p", 10**9, "-n", 0),
        run("bench", model, "-d", 10**9),
        run("perplexity", model, "-f", text, "-c", 10**9),
        run("run", model, "--raw", "-p", "Once", "-c", 10**18),
    ):
        assert_refused(done, "positions", "GB of memory", "GB are available")
    with pytest.raises(CQError, match=r"GB of memory, .* GB are available"):
        LLM(model, n_ctx=10**9)


def test_nothing_is_allocated_for_a_context_that_does_not_fit(model, monkeypatch):
    """Each limit by itself: just enough for the tables and the cache is not enough with the buffers."""
    context = 3 * 4 * 1024 * 16 + 2 * 2 * 2 * 2 * 1024 * 16  # rope's tables; keys and values of two layers and heads
    monkeypatch.setattr(machine, "available_memory", lambda: context - 1)
    monkeypatch.setattr("pyggml_bridge.models.importlib.import_module", lambda _: pytest.fail("tables were made"))
    with pytest.raises(CQError, match="a context of 1024 positions: needs"):
        load_model(model, n_ctx=1024)
    monkeypatch.undo()
    monkeypatch.setattr(machine, "available_memory", lambda: context)
    with pytest.raises(CQError, match="1024 positions, batches of 512 tokens and 1 threads: needs"):
        load_model(model, n_ctx=1024, n_threads=1)


def test_more_threads_than_can_be_started_are_refused(model):
    text = model.with_name("text.txt")
    for done in (
        run("run", model, "--raw", "-p", "Once", "-t", 100000),
        run("bench", model, "-t", 100000),
        run("bench", model, "--kernels", "-t", 100000),
        run("perplexity", model, "-f", text, "-c", 32, "-t", 100000),
    ):
        assert_refused(done, "--threads 100000: expected 1 .. ")
    with pytest.raises(CQError, match=r"threads 100000: expected 1 \.\. "):
        LLM(model, n_threads=100000)


def test_more_threads_than_processors_run_and_one_line_says_so(model):
    done = run("run", model, "--raw", "-p", "Once", "-n", 2, "-t", 200)
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if line.startswith("warning: --threads 200: this process may")]
    assert "warning" not in run("run", model, "--raw", "-p", "Once", "-n", 2, "-t", 1).stderr
