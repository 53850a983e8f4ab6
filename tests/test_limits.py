"""How much memory may be taken, told by trees as kernels, service managers and containers lay them out."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mfs import limits

G = 1 << 30
V1, V2 = "/sys/fs/cgroup/memory", "/sys/fs/cgroup"


class Tree:
    """A root directory with the tables of one process in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\nMemAvailable: {32 << 20} kB\n")

    def write(self, path: str, text: str) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def process(self, *places: str, mounts: tuple[str, ...]) -> None:
        """places: lines of /proc/self/cgroup. mounts: 'ROOT MOUNTPOINT v1|v2'."""
        self.write("proc/self/cgroup", "".join(f"{line}\n" for line in places))
        lines = ["23 1 0:21 / /proc rw - proc proc rw"]
        for number, mount in enumerate(mounts):
            mounted, mountpoint, version = mount.split(" ")
            kind = "cgroup2 cgroup2 rw" if version == "v2" else "cgroup cgroup rw,memory"
            lines.append(f"{30 + number} 23 0:{30 + number} {mounted} {mountpoint} rw,nosuid shared:9 - {kind}")
        self.write("proc/self/mountinfo", "\n".join(lines) + "\n")

    def v2(self, group: str, most: int | str = "max", used: int = 0, stat: str = "", high: int | str = "max") -> None:
        self.write(f"{group}/memory.max", f"{most}\n")
        self.write(f"{group}/memory.high", f"{high}\n")
        self.write(f"{group}/memory.current", f"{used}\n")
        self.write(f"{group}/memory.stat", f"anon 5\n{stat}")

    def v1(self, group: str, most: int, used: int = 0, stat: str = "", **more: int) -> None:
        self.write(f"{group}/memory.limit_in_bytes", f"{most}\n")
        self.write(f"{group}/memory.usage_in_bytes", f"{used}\n")
        self.write(f"{group}/memory.stat", f"cache 5\n{stat}")
        for name, number in more.items():
            self.write(f"{group}/memory.{name}", f"{number}\n")

    @property
    def free(self) -> int:
        return limits.available(self.root).free_bytes


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    assert soft == resource.RLIM_INFINITY, f"the limit on address space here ({soft}, {hard}) would show"
    return Tree(tmp_path)


def test_without_groups_the_machine_counts(tree: Tree) -> None:
    assert limits.available(tree.root) == limits.Available(64 * G, 32 * G, "this machine")
    tree.process("0::/", mounts=("/ /sys/fs/cgroup v2",))  # a real root has no memory.max
    tree.write(f"{V2}/memory.stat", "anon 5\n")
    assert tree.free == 32 * G


def test_a_units_limit_binds(tree: Tree) -> None:
    tree.process("0::/system.slice/mfs.service", mounts=("/ /sys/fs/cgroup v2",))
    tree.v2(f"{V2}/system.slice/mfs.service", 4 * G, 1 * G)
    tree.v2(f"{V2}/system.slice")
    found = limits.available(tree.root)
    assert found == limits.Available(
        4 * G, 3 * G, "the control group /sys/fs/cgroup/system.slice/mfs.service (memory.max)"
    )


def test_the_least_of_all_ancestors_binds(tree: Tree) -> None:
    tree.process("0::/slurm/job_7/step_0", mounts=("/ /sys/fs/cgroup v2",))
    tree.v2(f"{V2}/slurm/job_7/step_0", 30 * G, 1 * G)
    tree.v2(f"{V2}/slurm/job_7", 8 * G, 6 * G)
    tree.v2(f"{V2}/slurm", 10 * G, 3 * G)
    assert tree.free == 2 * G
    assert limits.available(tree.root).total_bytes == 8 * G


@pytest.mark.parametrize(
    ("stat", "free"),
    [
        ("", 1 * G // 2),
        (f"file {3 * G}\ninactive_file {2 * G}\nactive_file {G}\nshmem 0\n", 7 * G // 2),
        (f"file {3 * G}\nshmem {3 * G}\ninactive_anon {3 * G}\ninactive_file 0\n", G // 2),  # slots are no cache
        (f"inactive_file {9 * G}\n", 4 * G),  # counted at another moment: never more than the limit
    ],
)
def test_page_cache_is_not_used_memory(tree: Tree, stat: str, free: int) -> None:
    tree.process("0::/", mounts=("/ /sys/fs/cgroup v2",))
    tree.v2(V2, 4 * G, 7 * G // 2, stat)
    assert tree.free == free


def test_memory_high_counts(tree: Tree) -> None:
    tree.process("0::/a", mounts=("/ /sys/fs/cgroup v2",))
    tree.v2(f"{V2}/a", 8 * G, 1 * G, high=4 * G)
    assert limits.available(tree.root).bound_by == "the control group /sys/fs/cgroup/a (memory.high)"
    assert tree.free == 3 * G


def test_a_group_over_its_limit_has_nothing_free(tree: Tree) -> None:
    tree.process("0::/a", mounts=("/ /sys/fs/cgroup v2",))
    tree.v2(f"{V2}/a", 1 * G, 2 * G)
    assert tree.free == 0


def test_version_1_with_its_ancestors(tree: Tree) -> None:
    tree.process("4:cpu,memory:/slurm/uid_0/job_1", "0::/", mounts=("/ /sys/fs/cgroup/memory v1",))
    tree.v1(f"{V1}/slurm/uid_0/job_1", 1 << 63, 1 * G, use_hierarchy=1)
    tree.v1(f"{V1}/slurm/uid_0", 6 * G, 5 * G, f"total_inactive_file {G}\ninactive_file 7\n", use_hierarchy=1)
    assert tree.free == 2 * G
    tree.v1(f"{V1}/slurm/uid_0", 6 * G, 5 * G, use_hierarchy=0)  # stands alone: what is below is not its
    assert tree.free == 32 * G


def test_version_1_counts_swap_limits_and_what_cannot_be_seen(tree: Tree) -> None:
    tree.process("4:memory:/", mounts=("/ /sys/fs/cgroup/memory v1",))
    tree.v1(V1, 1 << 63, 2 * G, f"hierarchical_memory_limit {5 * G}\n")
    assert tree.free == 3 * G  # the limit stands above the namespace
    memsw = {"memsw.limit_in_bytes": 4 * G, "memsw.usage_in_bytes": 2 * G}
    tree.v1(V1, 1 << 63, 2 * G, f"hierarchical_memory_limit {5 * G}\n", **memsw)
    assert tree.free == 2 * G


def test_a_containers_own_directory_bound_at_the_root(tree: Tree) -> None:
    """Docker on version 1: no namespace of groups; the mount shows the container's directory only."""
    tree.process("4:memory:/docker/abc/sub", mounts=("/docker/abc /sys/fs/cgroup/memory v1",))
    tree.v1(V1, 3 * G, 1 * G)
    tree.v1(f"{V1}/sub", 5 * G)
    assert tree.free == 2 * G


@pytest.mark.parametrize(
    ("place", "mounted", "group"),
    [
        ("/", "/", ""),  # the usual namespace
        ("/../../a", "/../..", "a"),  # a process that was moved out of it, where the mount shows more
        ("/x/y", "/x", "y"),
    ],
)
def test_namespaces(tree: Tree, place: str, mounted: str, group: str) -> None:
    tree.process(f"0::{place}", mounts=(f"{mounted} /sys/fs/cgroup v2",))
    tree.v2(f"{V2}/{group}", 2 * G, 1 * G)
    assert tree.free == G


def test_a_process_whose_groups_have_no_names_for_it_is_looked_for(tree: Tree) -> None:
    """The host's hierarchy is bound into a container with a namespace of its own: two groups above have no names."""
    tree.process("0::/in", mounts=("/../.. /sys/fs/cgroup v2",))
    tree.v2(f"{V2}/pods/other/in", 1 * G, 1 * G)
    tree.write(f"{V2}/pods/other/in/cgroup.procs", "1\n")
    tree.v2(f"{V2}/pods/ours", 6 * G, 1 * G)
    tree.v2(f"{V2}/pods/ours/in", 9 * G)
    tree.write(f"{V2}/pods/ours/in/cgroup.procs", f"1\n{os.getpid()}\n")
    assert tree.free == 5 * G


def test_hybrids_and_names_with_blanks(tree: Tree) -> None:
    mounts = ("/ /sys/fs/cgroup/unified v2", "/ /sys/fs/cgroup/me\\040mory v1")
    tree.process("9:name=systemd:/", "4:memory:/a b:c", "0::/a b:c", mounts=mounts)
    tree.write("/sys/fs/cgroup/unified/a b:c/cgroup.procs", "")
    tree.v1("/sys/fs/cgroup/me mory/a b:c", 2 * G, 1 * G)
    assert tree.free == G


@pytest.mark.parametrize("mounts", [(), ("/ /elsewhere/cgroup v2",)])
def test_where_the_tables_say_nothing_the_usual_place_is_read(tree: Tree, mounts: tuple[str, ...]) -> None:
    tree.process("0::/gone", mounts=mounts)
    tree.v2(V2, 2 * G, 1 * G)
    assert tree.free == G


@pytest.mark.parametrize("text", ["", "max\n", "nonsense", "-5"])
def test_what_cannot_be_read_does_not_bind(tree: Tree, text: str) -> None:
    tree.process("0::/a", "nonsense", mounts=("/ /sys/fs/cgroup v2",))
    tree.v2(f"{V2}/a", 1 * G)
    for name in ("memory.max", "memory.stat", "memory.current"):
        tree.write(f"{V2}/a/{name}", text)
    assert tree.free == 32 * G


def in_a_child(program: str, **options: object) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, **options)  # type: ignore[call-overload]
    return str(done.stdout.strip())


def test_address_space_counts() -> None:
    said = in_a_child(
        "import resource; from mfs import limits\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)); a = limits.available()\n"
        "print(a.free_bytes < 1 << 30, a.bound_by)"
    )
    assert said == "True RLIMIT_AS (ulimit -v)"


def test_a_real_group_inside_a_real_group() -> None:
    """As systemd and Slurm make them; where this machine lets us."""
    own = next(iter(limits.groups()), None)
    name = {"memory.usage_in_bytes": "memory.limit_in_bytes", "memory.current": "memory.max"}
    found = [limit for used, limit in name.items() if own is not None and (own / used).exists()]
    if own is None or not found:
        pytest.skip("no memory controller here")
    outer = own / f"mfs-test-{os.getpid()}"
    inner = outer / "inner"
    try:
        inner.mkdir(parents=True)
        (outer / found[0]).write_text(str(700 << 20))
        program = (
            f"import os; open({str(inner / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
            "from mfs import limits; a = limits.available(); print(a.total_bytes >> 20, a.free_bytes >> 20)"
        )
        total, free = map(int, in_a_child(program).split())
    except OSError as error:
        pytest.skip(f"no group of our own can be made: {error}")
    finally:
        for folder in (inner, outer):
            if folder.exists():
                folder.rmdir()
    assert total == 700
    assert 500 < free <= 700
