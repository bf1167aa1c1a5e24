"""The pool of large tensors, in processes of their own: once it is there, it stays."""

import random
import shutil
import signal
import subprocess
import sys

import pytest

from tests.conftest import printed
from twinlora.numerics import cpu, pool

KIB, MIB = 1 << 10, 1 << 20
pytestmark = pytest.mark.skipif(pool.refusal() is not None, reason=str(pool.refusal()))
START = "import torch; from twinlora.numerics import cpu, pool; pool.install(); use = cpu.extension().pool_use; "


def test_torch_takes_large_blocks_from_it_and_gives_them_back():
    code = START + (
        "x = torch.empty(1 << 20); print(use()); y = torch.empty(16368); print(use()); z = torch.empty(16369); "
        "print(use()); del x, y, z; print(use())"
    )
    x, z = 4 * MIB, 64 * KIB
    assert printed(code).splitlines() == [str(line) for line in [(x, x), (x, x), (x + z, x + z), (x + z, 0)]]


def test_what_was_allocated_before_it_came_is_freed_as_before():
    code = (
        "import torch; from twinlora.numerics import pool; x = torch.ones(1 << 20); y = x.numpy(); pool.install(); "
        "del x, y; from twinlora.numerics import cpu; print(cpu.extension().pool_use())"
    )
    assert printed(code) == "(0, 0)"


def test_a_tensor_holds_what_is_written_to_it_while_others_come_and_go():
    """In several threads: no two blocks overlap."""
    code = START + (
        """
import random, threading
torch.set_num_threads(1)
wrong = []
def work(number):
    chance, held = random.Random(number), []
    for step in range(400):
        value = number * 1000 + step
        held.append((value, torch.full((chance.randrange(1 << 14, 1 << 17),), value, dtype=torch.int32)))
        if len(held) > 8:
            value, tensor = held.pop(chance.randrange(len(held)))
            wrong.extend([value] if not bool((tensor == value).all()) else [])
threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
print(wrong, use()[1])
"""
    )
    assert printed(code) == "[] 0"


def events(seed, count):
    """Blocks of random sizes, given back in any order, all of them in the end."""
    chance = random.Random(seed)
    out, held, taken = [], [], 0
    while len(out) < count or held:
        if len(out) < count and (not held or chance.random() < 0.55):
            out.append(chance.choice([MIB, 3 * MIB // 2, 100_001, chance.randrange(64 * KIB, 2 * MIB)]))
            held.append(taken)
            taken += 1
        else:
            out.append(-held.pop(chance.randrange(len(held))))
    return out


@pytest.mark.parametrize("seed", range(3))
def test_what_is_foretold_is_what_torch_then_takes(seed):
    blocks = events(seed, 2000)
    code = START + (
        f"""
held, count = {{}}, 0
for event in {blocks}:
    if event > 0:
        held[count] = torch.empty(event, dtype=torch.uint8)
        count += 1
    else:
        del held[-event]
print(use())
"""
    )
    assert printed(code) == str((pool.extent(blocks), 0))


def best_fit(blocks):
    """How far blocks extend a range if each goes to the smallest hole, the first of equal ones: by looking at all."""
    held, end, count = {}, 0, 0
    for event in blocks:
        if event <= 0:
            del held[-event]
            continue
        size, at, holes = -(-event // 64) * 64, 0, []
        for start, length in sorted(held.values()):
            holes.append((start - at, at))
            at = start + length
        holes.append((end - at, at))
        held[count] = min([hole for hole in holes if hole[0] >= size], default=(0, at))[1], size
        end = max(end, sum(held[count]))
        count += 1
    return end


@pytest.mark.parametrize("seed", range(20))
def test_a_block_goes_to_the_smallest_hole(seed):
    blocks = events(seed, 300)
    assert pool.extent(blocks) == best_fit(blocks)


def test_holes_are_used_by_blocks_of_their_size_and_neighbours_become_one():
    assert pool.extent([MIB, MIB, 0, MIB]) == 2 * MIB
    assert pool.extent([MIB, MIB, MIB, 0, -1, 2 * MIB]) == 3 * MIB
    assert pool.extent([MIB, MIB, -1, 3 * MIB]) == 4 * MIB, "the last hole is extended"
    assert pool.extent([MIB, MIB, 0, 3 * MIB // 2]) == 7 * MIB // 2


def test_small_blocks_count_for_the_most_that_is_held():
    assert pool.extent([MIB, 1000, 1000, -1, 1000, -2, -3]) == MIB + 2 * 1024
    assert pool.extent([]) == 0


def test_a_block_that_is_not_there_cannot_be_given_back():
    with pytest.raises(ValueError, match="twice"):
        pool.extent([MIB, 0, 0])
    with pytest.raises(IndexError):
        pool.extent([MIB, -1])


def test_small_objects_between_large_ones_leave_no_holes():
    """glibc 2.36 takes up to twice as much here: they lie in the edges of blocks, whose places no longer suffice."""
    code = START + (
        """
import ctypes
from twinlora import machine
c = ctypes.CDLL(None)
c.malloc.restype = ctypes.c_void_p
torch.set_num_threads(1)
before = machine.rss_bytes()
for step in range(60):
    held = []
    for layer in range(20):
        held.append(torch.ones(1 << 20, dtype=torch.uint8))
        kept = [c.malloc(size) for size in range(24, 96, 8)]
    del held
print(machine.rss_bytes() - before)
"""
    )
    assert int(printed(code)) < 24 * MIB


def test_a_limit_on_the_address_space_is_kept():
    """One that was there: no pool. One that comes later: the pool no longer grows, and torch says so as ever."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 34, 1 << 34)); "
    none = limit + "from twinlora.numerics import cpu, pool; pool.install(); print(pool.refusal()); import torch; "
    said, use = printed(none + "x = torch.ones(1 << 20); print(cpu.extension().pool_use())").splitlines()
    assert "ulimit -v" in said
    assert use == "(0, 0)"
    code = START + (
        """
import resource
from pathlib import Path
x = torch.ones(64 << 20, dtype=torch.uint8)
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (32 << 20)
resource.setrlimit(resource.RLIMIT_AS, (size, size))
del x
x = torch.ones(64 << 20, dtype=torch.uint8)
try:
    torch.ones(256 << 20, dtype=torch.uint8)
except RuntimeError as error:
    print("can't allocate memory" in str(error))
"""
    )
    assert printed(code) == "True"


def test_a_child_process_has_a_pool_of_its_own():
    code = START + (
        """
import os, threading
torch.set_num_threads(1)
stop = threading.Event()
def churn():
    while not stop.is_set():
        torch.empty(1 << 20)
threads = [threading.Thread(target=churn) for _ in range(2)]
[thread.start() for thread in threads]
ends = []
for _ in range(50):
    if not (child := os.fork()):
        os._exit(int(torch.ones(1 << 16).sum().item() != 1 << 16))
    ends.append(os.waitpid(child, 0)[1])
stop.set()
[thread.join() for thread in threads]
print(set(ends))
"""
    )
    assert printed(code) == "{0}"


def test_without_the_extension_there_is_none(monkeypatch):
    monkeypatch.setattr(cpu, "extension", lambda: None)
    pool.install()
    pool.trim()
    assert "extension" in str(pool.refusal())
    assert pool.extent([MIB]) == 0


def test_it_can_be_refused(monkeypatch):
    monkeypatch.setenv("TWINLORA_POOL", "off")
    assert printed(START + "x = torch.ones(1 << 20); print(pool.refusal(), use())") == "TWINLORA_POOL=off (0, 0)"


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_allocations_that_somebody_else_has_taken_over_stay_theirs():
    """As a profiler does that puts its own into the same slots."""
    code = r"""
import ctypes, re, subprocess, torch
from pathlib import Path
from twinlora.numerics import cpu, pool
file = Path(torch.__file__).parent / "lib/libc10.so"
table = subprocess.run(["readelf", "-rW", file], capture_output=True, text=True, check=True).stdout
offset = int(re.search(r"^(\w+) .* posix_memalign@", table, re.MULTILINE)[1], 16)
maps = Path("/proc/self/maps").read_text().splitlines()
base = min(int(line.split("-")[0], 16) for line in maps if line.endswith("libc10.so"))
kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
real, sizes = kind(("posix_memalign", ctypes.CDLL(None))), []
theirs = kind(lambda *args: sizes.append(args[2]) or real(*args))
ctypes.c_void_p.from_address(base + offset).value = ctypes.cast(theirs, ctypes.c_void_p).value
pool.install()
x = torch.empty(1 << 20)
print(pool.refusal(), sizes[-1], cpu.extension().pool_use())
"""
    expected = f"something else, like a profiler of memory, has taken torch's allocations over {4 * MIB} (0, 0)"
    assert printed(code) == expected


def test_a_block_that_is_not_in_use_cannot_be_freed():
    code = START + (
        "import ctypes; c10 = ctypes.CDLL(torch.__path__[0] + '/lib/libc10.so'); free = c10._ZN3c108free_cpuEPv; "
        "free.argtypes = [ctypes.c_void_p]; x = torch.empty(1 << 20); where = x.data_ptr() + AT; free(where); free(where)"
    )
    for at in (0, 64):
        done = subprocess.run([sys.executable, "-c", code.replace("AT", str(at))], capture_output=True, text=True)
        assert done.returncode == -signal.SIGABRT
        assert "freed that is not in use" in done.stderr


def test_more_than_there_is_is_refused_as_ever():
    """Not promised and then killed for."""
    code = START + (
        """
import os
memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
try:
    torch.empty(int(1.9 * memory), dtype=torch.uint8)
    print("promised")
except RuntimeError as error:
    print("can't allocate memory" in str(error))
"""
    )
    alone = printed("import torch\n" + code.removeprefix(START))
    assert printed(code) == alone


def test_what_is_free_can_be_given_back():
    code = START + (
        "from twinlora import machine; held = [torch.ones(1 << 18) for _ in range(64)]; full = machine.rss_bytes(); "
        "del held[::2]; pool.trim(); print(full - machine.rss_bytes(), all(bool((x == 1).all()) for x in held))"
    )
    freed, whole = printed(code).split()
    assert int(freed) > 30 * MIB
    assert whole == "True"
