"""Names, versions and memory, over a store without tensors."""

from __future__ import annotations

import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from twinlora.errors import AdapterError
from twinlora.serve.registry import Busy, Loaded, Registry, UnknownModel, contained


class FakeStore:
    """Directories are `/content/bytes`; what is installed is remembered, and misuse is an error."""

    def __init__(self) -> None:
        self.resident: set[str] = set()
        self.changed: dict[str, str] = {}
        self.loads = 0
        self.gate = threading.Event()
        self.gate.set()

    def load(self, directory):
        self.gate.wait(5)
        self.loads += 1
        _, content, nbytes = directory.parts
        if content == "bad":
            raise AdapterError("bad adapter")
        content = self.changed.get(content, content)
        return Loaded(content.ljust(64, "0"), int(nbytes), None, (f"note {content}",), content)

    def blend(self, parts):
        return "+".join(f"{tensors}:{weight}" for tensors, weight in parts), 10

    def install(self, digest, tensors):
        assert digest not in self.resident
        self.resident.add(digest)

    def remove(self, digest):
        self.resident.remove(digest)


@pytest.fixture
def store():
    return FakeStore()


def registry(store, limit=100, **options):
    return Registry(store, "base", limit, **options)


def ready(registry, model):
    lease = registry.lease(model)
    if future := registry.load(lease):
        future.result()
    return lease


def settle(registry):
    registry._loader.submit(lambda: None).result()


def test_a_request_keeps_its_version_when_the_name_moves_on(store):
    served = registry(store)
    served.register("x", Path("/one/40")).result()
    old = ready(served, "x")
    served.register("x", Path("/two/40"), replace=True).result()
    new = ready(served, "x")
    assert (old.key[:3], new.key[:3]) == ("one", "two")
    assert len(store.resident) == 2
    served.release(old)
    settle(served)
    assert store.resident == {new.key}, "the replaced version has drained"
    assert served.lease(f"x@{new.key}").key == new.key
    with pytest.raises(UnknownModel, match="x is now x@two"):
        served.lease(f"x@{old.key}")


def test_unknown_names_are_errors_never_the_base(store):
    served = registry(store)
    served.register("x", Path("/one/40")).result()
    assert served.lease("base").key is None
    for name in ("X", "y", "", "x@", "x@one", "x:1+x:1", "base@", "../x"):
        with pytest.raises(UnknownModel):
            served.lease(name)
    served.unload("x")
    with pytest.raises(UnknownModel):
        served.lease("x")


def test_least_recently_used_content_leaves_and_comes_back(store):
    served = registry(store)
    for name in ("x", "y", "z"):
        served.register(name, Path(f"/{name}{name}/40")).result()
    assert sorted(d[0] for d in store.resident) == ["y", "z"]
    served.release(ready(served, "y"))
    held = ready(served, "x")
    assert sorted(d[0] for d in store.resident) == ["x", "y"]
    other = ready(served, "z")
    assert sorted(d[0] for d in store.resident) == ["x", "z"]
    third = served.lease("y")
    with pytest.raises(Busy, match="100 bytes"):
        served.load(third).result()
    served.release(third)
    served.release(held)
    served.release(other)
    assert served.resident_bytes == 80
    served.pin("x", True)
    served.release(ready(served, "y"))
    served.release(ready(served, "z"))
    assert "xx".ljust(64, "0") in store.resident


def test_nothing_goes_for_what_finds_no_room_all_the_same(store):
    served = registry(store)
    for name, size in (("x", 20), ("y", 80), ("z", 40)):
        served.register(name, Path(f"/{name}{name}/{size}")).result()
    served.release(ready(served, "x"))
    held = ready(served, "y")
    lease = served.lease("z")
    with pytest.raises(Busy):
        served.load(lease).result()
    assert "xx".ljust(64, "0") in store.resident
    served.release(held)


def test_an_adapter_was_used_until_its_request_ended(store):
    served = registry(store)
    for name in ("x", "y"):
        served.register(name, Path(f"/{name}{name}/40")).result()
    first = ready(served, "x")
    served.release(ready(served, "y"))
    served.release(first)
    served.register("z", Path("/zz/40")).result()
    assert sorted(d[0] for d in store.resident) == ["x", "z"]


def test_content_that_changed_on_disk_is_refused(store):
    served = registry(store, limit=50)
    served.register("x", Path("/one/40")).result()
    served.register("y", Path("/two/40")).result()
    store.changed["one"] = "evil"
    lease = served.lease("x")
    with pytest.raises(AdapterError, match="changed on disk"):
        served.load(lease).result()


def test_content_is_read_from_any_directory_that_still_has_it(store):
    served = registry(store, limit=50)
    served.register("x", Path("/one/40")).result()
    store.changed["copy"] = "one"
    served.register("y", Path("/copy/40")).result()
    served.unload("y")
    served.register("z", Path("/two/40")).result()
    del store.changed["copy"]
    served.release(ready(served, "x"))
    assert store.resident == {"one".ljust(64, "0")}


def test_a_name_that_is_unloaded_while_its_replacement_is_read_stays_unloaded(store):
    served = registry(store)
    served.register("x", Path("/one/10")).result()
    store.gate.clear()
    coming = served.register("x", Path("/two/10"), replace=True)
    served.unload("x")
    store.gate.set()
    with pytest.raises(AdapterError, match="'x' is not served"):
        coming.result()
    settle(served)
    assert not served.versions()
    assert not store.resident


def test_names(store):
    served = registry(store)
    for name in ("", "A", "a/b", "..", "-a", "base", "a" * 65, "a\n", "é"):
        with pytest.raises(AdapterError, match="adapter name"):
            served.register(name, Path("/one/1")).result()
    served.register("a.b-c_1", Path("/one/1")).result()
    with pytest.raises(AdapterError, match="is served already"):
        served.register("a.b-c_1", Path("/two/1")).result()
    with pytest.raises(AdapterError, match="is not served"):
        served.register("b", Path("/two/1"), replace=True).result()
    with pytest.raises(AdapterError, match="bad adapter"):
        served.register("a.b-c_1", Path("/bad/1"), replace=True).result()
    assert served.lease("a.b-c_1").key.startswith("one"), "a bad replacement changes nothing"


def test_blends_are_of_the_versions_of_now(store):
    served = registry(store, blends=True)
    for name in ("x", "y"):
        served.register(name, Path(f"/{name}{name}/5")).result()
    first = ready(served, "x:0.7+y:0.3")
    assert first.key in store.resident
    again = served.lease("x:0.70+y:0.3")
    assert again.key == first.key
    served.release(again)
    near = served.lease("x:0.700001+y:0.3"), served.lease("x:0.700002+y:0.3"), served.lease("x:1.700001+y:0.3")
    assert len({first.key, *(lease.key for lease in near)}) == 4
    assert served.lease("x:1.70+y:0.3").key != near[2].key
    for wrong in ("x:0.7", "x:0.7+x:0.3", "x:7+y:1", "x:a+y:1", "x:nan+y:1", "x:0.7+w:0.3", "x:0.7+"):
        with pytest.raises(UnknownModel):
            served.lease(wrong)
    served.release(first)
    settle(served)
    assert first.key in store.resident, "kept for the next request"
    served.register("x", Path("/other/5"), replace=True).result()
    second = ready(served, "x:0.7+y:0.3")
    assert second.key != first.key
    with pytest.raises(UnknownModel, match="--blends"):
        registry(store).lease("x:0.7+y:0.3")


def test_an_adapter_that_can_never_fit_is_refused(store):
    served = registry(store, limit=50)
    with pytest.raises(AdapterError, match="60 bytes; adapters have 50: raise --adapter-memory"):
        served.register("x", Path("/one/60")).result()
    assert not served.versions()


def test_a_slow_disk_blocks_no_name(store):
    served = registry(store)
    served.register("x", Path("/one/40")).result()
    store.gate.clear()
    slow = served.register("y", Path("/two/40"))
    served.release(served.lease("x"))
    assert [version.name for version in served.versions()] == ["x"]
    store.gate.set()
    assert slow.result().name == "y"


@pytest.mark.parametrize("seed", range(6))
def test_nothing_leaks_and_nothing_in_use_goes(store, seed):
    """Random leases, replacements, unloadings and pins from several threads."""
    served, names = registry(store, limit=60, blends=True), ["x", "y", "z", "w"]
    for name in names:
        served.register(name, Path(f"/{name}0/20")).result()

    def work(number):
        source = random.Random(seed * 100 + number)
        for step in range(60):
            name = source.choice(names)
            what = source.random()
            try:
                if what < 0.7:
                    model = name if what < 0.5 else f"{name}:0.5+{source.choice(names)}:0.5"
                    lease = served.lease(model)
                    try:
                        if future := served.load(lease):
                            future.result()
                        assert lease.key in store.resident
                    finally:
                        served.release(lease)
                elif what < 0.9:
                    served.register(name, Path(f"/{name}{number}{step}/20"), replace=None).result()
                elif what < 0.95:
                    served.unload(name)
                else:
                    served.pin(name, source.random() < 0.3)
            except (Busy, UnknownModel):
                pass

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, number) for number in range(4)]:
            done.result()
    settle(served)
    for name in [version.name for version in served.versions()]:
        served.unload(name)
    settle(served)
    assert not store.resident
    assert not served._contents


def test_containment(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for directory in (root / "good", root / "linked", outside):
        directory.mkdir(parents=True)
    (outside / "file").write_text("")
    (root / "escape").symlink_to(outside)
    (root / "linked" / "file").symlink_to(outside / "file")
    (root / "alias").symlink_to(root / "good")
    (root / "loop").symlink_to(root / "loop")
    (root / "inner").mkdir()
    (root / "inner" / "loop").symlink_to(root / "inner" / "loop")
    assert contained(root, "good") == contained(root, "alias") == (root / "good").resolve()
    for wrong in ("..", ".", "", "../outside", "/etc", "escape", "linked", "missing", str(outside)):
        with pytest.raises(AdapterError, match="adapters-dir"):
            contained(root, wrong)
    if sys.version_info < (3, 13):  # later a loop has a path: its own
        for wrong in ("loop", "inner"):
            with pytest.raises(AdapterError, match="adapters-dir"):
                contained(root, wrong)
    bare, empty = tmp_path / "bare", tmp_path / "empty"
    (bare / "good").mkdir(parents=True)
    empty.mkdir()
    for wrong in (".", "", "..", "../empty", str(empty)):
        with pytest.raises(AdapterError, match="inside of"):
            contained(bare, wrong)
