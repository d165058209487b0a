"""data_cache.py: parts that are there whole or not at all, whatever happens, and rows read from them by memory map."""

import errno
import hashlib
import json
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimuse import data_cache as cache
from minimuse import utils
from minimuse.data_cache import Rows, Shards, fill, in_bytes
from minimuse.utils import content_hash as fingerprint

ROOT = Path(__file__).resolve().parent.parent
PRINT = fingerprint("a source")
SIZES = (3, 5, 0, 4, 2)  # rows of each part; one part without a usable image


def make(part, offset=0):
    """low (n, 4) uint16, high (n, 2) int32: every number tells its part and row."""
    low = np.arange(SIZES[part] * 4).reshape(-1, 4) + 100 * part + offset
    return {"low": low.astype(np.uint16), "high": low[:, :2].astype(np.int32) + 70_000}, {"part": part, "é": [1, 2]}


def all_of(name):
    return np.concatenate([make(part)[0][name] for part in range(len(SIZES))])


@pytest.fixture
def shards(tmp_path):
    return Shards(tmp_path / "root", "tokens", PRINT, len(SIZES), about={"source": "five parts"})


def run(shards, make=make, **ranks):
    return list(fill(shards, make, **ranks))


def file_of(shards, part, name="low"):
    return shards.folder / shards.record(part)[0]["arrays"][name]["file"]


def files(shards):
    return {path.name: path.read_bytes() for path in shards.folder.iterdir()}


class TestFingerprint:
    def test_worked_by_hand(self):
        assert fingerprint("a", 1) == hashlib.sha256(b'["a", 1]').hexdigest()

    def test_tells_apart(self):
        x = torch.arange(6.0)
        things = [
            ("ab", "c"),
            ("a", "bc"),
            (["a", "bc"],),
            (1,),
            (1.0,),
            (True,),
            (None,),
            ({"w": x},),
            ({"v": x},),
            ({"w": x + 1e-6},),
            ({"w": x.view(2, 3)},),
            ({"w": x.double()},),
            ({"w": x.bfloat16()},),
            ({"w": x.int()},),
            ({"w": torch.tensor(0.0)},),
            ({"w": torch.tensor(0, dtype=torch.int32)},),
            ({"w": torch.empty(0)},),
        ]
        prints = [fingerprint(*thing) for thing in things]
        assert len(set(prints)) == len(things), "two of these different things have one fingerprint"

    def test_what_does_not_count(self):
        layer = torch.nn.Linear(3, 4)
        state = layer.state_dict()
        assert fingerprint(state) == fingerprint(dict(reversed(state.items()))), "the order of keys"
        assert fingerprint(layer.weight.T) == fingerprint(layer.weight.T.contiguous()), "strides, and gradients"
        assert fingerprint(("a", 1)) == fingerprint(["a", 1]), "tuples are lists"

    def test_refuses_what_it_does_not_know(self):
        with pytest.raises(TypeError, match=r"content_hash got a \w*Path"):
            fingerprint(Path("a"))


@pytest.mark.parametrize(
    ("n", "words"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (999_600, "1 MB"), (6.3e12, "6.3 TB")]
)
def test_in_bytes(n, words):
    assert in_bytes(n) == words


class TestRoundTrip:
    def test_every_array_comes_back(self, shards):
        assert run(shards) == [(i, 5) for i in range(6)], "progress: a pair before each part and one at the end"
        low, high = Rows(shards, "low"), Rows(shards, "high")
        assert (low.shape, low[:].dtype, high[:].dtype) == ((14, 4), torch.uint16, torch.int32), "dtypes are kept"
        assert np.array_equal(low[:].numpy(), all_of("low"))
        assert np.array_equal(high[:].numpy(), all_of("high"))
        assert Rows(shards, "low", torch.long)[3].tolist() == [100, 101, 102, 103], "long on demand"
        assert [record["extra"] for record in shards.records()] == [make(p)[1] for p in range(5)]
        assert shards.verify() == {}

    def test_the_files_say_what_they_are(self, shards):
        run(shards)
        about = json.loads((shards.folder / "about.json").read_text())
        assert about == {"kind": "tokens", "fingerprint": PRINT, "about": {"source": "five parts"}}
        assert shards.folder.name == f"tokens-{PRINT[:16]}"
        entry = shards.record(1)[0]["arrays"]["low"]
        content = file_of(shards, 1).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert np.array_equal(np.load(file_of(shards, 1), allow_pickle=False), make(1)[0]["low"]), "plain .npy files"

    def test_the_json_comes_last_and_by_a_rename(self, shards, monkeypatch):
        replace, told = os.replace, []

        def watch(new, path):
            told.append((Path(path).name, Path(path).exists(), len(list(shards.folder.glob("*.npy")))))
            replace(new, path)

        monkeypatch.setattr(os, "replace", watch)
        run(shards, rank=0, world=4)
        assert told == [("about.json", False, 0), ("00000.json", False, 2), ("00004.json", False, 4)]

    def test_nothing_is_made_twice(self, shards):
        run(shards)
        before = files(shards)
        run(shards, make=lambda part: pytest.fail(f"part {part} was there"))
        assert files(shards) == before

    def test_rows_are_copies(self, shards):
        run(shards)
        rows = Rows(shards, "low")
        rows[0:3].fill_(7)
        assert np.array_equal(rows[:].numpy(), all_of("low")), "writing into a batch reached the cache"

    def test_objects_are_never_pickled(self, shards):
        with pytest.raises(ValueError, match="allow_pickle"):
            run(shards, make=lambda part: ({"low": np.array([{}], dtype=object)}, {}))
        assert [path.name for path in shards.folder.iterdir()] == ["about.json"], "a failed part leaves no file"

    def test_pickled_readers_read(self, shards):
        run(shards)
        rows = Rows(shards, "low")
        rows[:]
        again = pickle.loads(pickle.dumps(rows))
        assert (len(rows._maps), again._maps) == (4, {}), "the maps must not be pickled"
        assert torch.equal(again[:].int(), rows[:].int())

    def test_few_maps_stay_open(self, tmp_path, monkeypatch):
        monkeypatch.setattr(cache, "OPEN", 3)
        shards = Shards(tmp_path, "tokens", PRINT, 20)
        run(shards, make=lambda part: ({"low": np.array([part])}, {}))
        rows = Rows(shards, "low")
        assert rows[:].tolist() == list(range(20))
        assert [part for part, _ in rows._maps] == [17, 18, 19], "the last used"


class TestRows:
    @settings(max_examples=40, deadline=None)
    @given(
        sizes=st.lists(st.integers(0, 4), min_size=1, max_size=6),
        row=st.sampled_from([(), (3,), (2, 2)]),
        limit=st.none() | st.integers(1, 12),
        data=st.data(),
    )
    def test_indexing_is_that_of_one_array(self, sizes, row, limit, data):
        arrays = [
            np.random.default_rng(i).integers(0, 60_000, (n, *row)).astype(np.uint16) for i, n in enumerate(sizes)
        ]
        whole = np.concatenate(arrays)[:limit]
        with tempfile.TemporaryDirectory() as root:
            shards = Shards(root, "tokens", PRINT, len(sizes), limit=limit)
            run(shards, make=lambda part: ({"x": arrays[part]}, {}))
            rows, n = Rows(shards, "x"), len(whole)
            assert (len(rows), rows.shape) == (n, whole.shape)
            valid = st.integers(-n, n - 1) if n else st.nothing()
            chosen = data.draw(st.lists(valid, max_size=8)) if n else []
            for index in (chosen, torch.tensor(chosen, dtype=torch.long), np.array(chosen, np.int32)):
                assert np.array_equal(rows[index].numpy(), whole[np.array(chosen, int)])
            part = data.draw(st.slices(n)) if n else slice(None)
            assert np.array_equal(rows[part].numpy(), whole[part])
            if n:
                i = data.draw(valid)
                assert np.array_equal(rows[i].numpy(), whole[i])
                assert np.array_equal(rows[[[i], [0]]].numpy(), whole[[[i], [0]]]), "indices of any shape"
            for outside in (n, -n - 1, [0, n]):
                with pytest.raises(IndexError, match=f"of {n}"):
                    rows[outside]
            rows._maps.clear()

    @pytest.mark.parametrize("wrong", [[0.5], [True, False], "low", None, torch.tensor([1.0])])
    def test_refuses_what_is_no_index(self, shards, wrong):
        run(shards)
        with pytest.raises(TypeError, match="whole numbers or a slice"):
            Rows(shards, "low")[wrong]

    def test_says_what_does_not_fit(self, shards, tmp_path):
        run(shards)
        with pytest.raises(ValueError, match=r"no 'tokens' in part 0 .*: low, high"):
            Rows(shards, "tokens")
        for wrong in (lambda p: np.zeros((2, 3 + p)), lambda p: np.zeros((2, 3), np.int32 if p else np.uint16)):
            mixed = Shards(tmp_path, "tokens", fingerprint(id(wrong)), 2)
            run(mixed, make=lambda p, wrong=wrong: ({"low": wrong(p)}, {}))
            with pytest.raises(ValueError, match="differ in dtype or shape of 'low'"):
                Rows(mixed, "low")
        ragged = Shards(tmp_path, "text", PRINT, 1)
        run(ragged, make=lambda p: ({"spans": np.zeros((2, 2)), "values": np.zeros((9, 3))}, {}))
        with pytest.raises(ValueError, match="not one row an example"):
            Rows(ragged, "values")

    def test_a_missing_part_is_no_shorter_cache(self, shards):
        with pytest.raises(ValueError, match=r"part 0 of 5 is not in .*run fill"):
            Rows(shards, "low")
        run(shards, rank=0, world=2)
        with pytest.raises(ValueError, match="part 1 of 5"):
            Rows(shards, "low")


class TestFill:
    def test_two_ranks_are_one(self, shards, tmp_path):
        alone = Shards(tmp_path / "alone", "tokens", PRINT, len(SIZES))
        run(alone)
        assert run(shards, rank=1, world=2)[-1] == (2, 2), "parts 1, 3"
        assert run(shards, rank=0, world=2)[-1] == (3, 3), "parts 0, 2, 4"
        for name in ("low", "high"):
            assert np.array_equal(Rows(shards, name)[:].numpy(), Rows(alone, name)[:].numpy())
        assert all(
            file_of(shards, p, name).read_bytes() == file_of(alone, p, name).read_bytes()
            for p in range(5)
            for name in ("low", "high")
        )

    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
    @pytest.mark.parametrize("limit", [1, 3, 4, 8, 9, 14, 50])
    def test_a_limit_gives_the_same_rows_whoever_is_first(self, shards, limit, order):
        shards.limit = limit
        for rank in order:
            run(shards, rank=rank, world=3)
        assert np.array_equal(Rows(shards, "low")[:].numpy(), all_of("low")[:limit])

    def test_a_limit_spares_the_rest(self, shards):
        shards.limit, made = 8, []
        run(shards, make=lambda part: (made.append(part), make(part))[1])
        assert made == [0, 1], "3 + 5 rows are 8"

    def test_the_first_row_of_a_limit_may_be_read_before_the_rest_is_made(self, shards):
        shards.limit = 3
        run(shards, rank=0, world=5)
        assert len(Rows(shards, "low")) == 3

    @pytest.mark.parametrize("ranks", [{"rank": 2, "world": 2}, {"rank": -1, "world": 2}, {"world": 0}])
    def test_refuses_ranks_that_are_none(self, shards, ranks):
        with pytest.raises(ValueError, match="world - 1"):
            run(shards, **ranks)

    def test_two_at_once_with_other_results_break_nothing(self, shards):
        """Two jobs started on one folder by accident; GPUs seldom agree on the last bit."""
        barrier, failures = threading.Barrier(2), []

        def job(offset):
            try:
                for _ in fill(shards, lambda part: (barrier.wait(2), make(part, offset))[1]):
                    pass
            except threading.BrokenBarrierError:
                pass
            except Exception as error:
                failures.append(error)

        jobs = [threading.Thread(target=job, args=(offset,)) for offset in (0, 1000)]
        _ = [t.start() for t in jobs], [t.join(30) for t in jobs]
        assert not failures
        run(shards)
        assert shards.verify() == {}
        for part, n in enumerate(SIZES):
            low, high = (np.load(file_of(shards, part, name)) for name in ("low", "high"))
            assert np.array_equal(low[:, :2].astype(np.int32) + 70_000, high), f"part {part} ({n} rows) is of two jobs"

    def test_the_first_of_two_wins(self, shards):
        def slower(part):
            run(shards, make=make)  # another job makes all parts meanwhile
            return make(part, 1000)

        run(shards, make=slower)
        assert np.array_equal(Rows(shards, "low")[:].numpy(), all_of("low"))
        assert len(list(shards.folder.glob("*.npy"))) == 10, "the loser's files are gone"


KILLED = """
import os, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from test_data_cache import make, fill, Shards, PRINT, SIZES
fsync, calls = os.fsync, 0
def hang(fd):
    global calls
    calls += 1
    if calls == {at}:
        print("now", flush=True)
        time.sleep(60)
    fsync(fd)
os.fsync = hang
list(fill(Shards({folder!r}, "tokens", PRINT, len(SIZES)), make))
"""


# about.json; then of part 1: low, high, JSON
@pytest.mark.parametrize("at", [pytest.param(1, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow), 6, 7])
def test_killed_at_any_moment_then_resumed(shards, tmp_path, monkeypatch, at):
    code = KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path / "root"), at=at)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "now\n"
    process.kill()
    process.wait()
    process.stdout.close()
    there = [part for part in range(5) if shards.record(part)[0]]
    assert there == ([0] if at > 1 else []), "exactly the parts that were finished"
    assert shards.verify() == {}, "no half part counts"
    monkeypatch.setattr(cache, "ABANDONED", -1)  # the dead run's files are old by now
    made = []
    run(shards, make=lambda part: (made.append(part), make(part))[1])
    assert made == [part for part in range(5) if part not in there], "only what was missing"
    assert np.array_equal(Rows(shards, "high")[:].numpy(), all_of("high"))
    for part in range(5):
        whole = hashlib.sha256(file_of(shards, part).read_bytes()).hexdigest()
        assert whole == shards.record(part)[0]["arrays"]["low"]["sha256"]
    assert len(files(shards)) == 1 + 5 * 3, "nothing of the dead run is left"


class TestSweep:
    def test_only_what_dead_runs_left(self, shards):
        run(shards)
        before = files(shards)
        mine = [
            "00000.low.0123abcd.npy",
            "00007.low.0123abcd.npy",
            "00001.json.0123abcd.new",
            "about.json.0123abcd.new",
        ]
        yours = ["notes.txt", "00000.npy", "00000.low.npy", "backup.low.0123abcd.npy"]
        for name in (*mine, *yours):
            (shards.folder / name).write_bytes(b"x")
        run(shards)
        assert set(files(shards)) == {*before, *mine, *yours}, "what is young may be another process's"
        for name in files(shards):
            os.utime(shards.folder / name, (time.time() - 2 * cache.ABANDONED,) * 2)
        run(shards)
        assert set(files(shards)) == {*before, *yours}

    def test_stale_caches_stay_and_are_named(self, shards, tmp_path, caplog):
        old = Shards(tmp_path / "root", "tokens", fingerprint("another source"), 5)
        text = Shards(tmp_path / "root", "text", PRINT, 5)
        run(old, make=lambda part: make(part, 5000))
        run(text)
        before = files(old)
        with caplog.at_level(logging.INFO, "minimuse"):
            run(shards)
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == 1, "a cache of another kind is no stale one"
        assert str(old.folder) in told[0]
        assert in_bytes(sum(map(len, before.values()))) in told[0]
        assert files(old) == before, "never touched"
        assert np.array_equal(Rows(shards, "low")[:].numpy(), all_of("low")), "never read"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def other_header(path):
    path.write_bytes(path.read_bytes().replace(b"<u2", b"<i2"))


DAMAGE = {
    "truncated array": ("array", truncate, "bytes, not"),
    "empty array": ("array", lambda path: path.write_bytes(b""), "has 0 bytes"),
    "longer array": ("array", lengthen, "bytes, not"),
    "missing array": ("array", Path.unlink, "is missing"),
    "flipped bit": ("array", flip, "checksum"),
    "other header": ("array", other_header, "checksum"),
    "truncated JSON": ("json", truncate, "JSONDecodeError"),
    "empty JSON": ("json", lambda path: path.write_bytes(b""), "JSONDecodeError"),
    "binary JSON": ("json", lambda path: path.write_bytes(b"\xff\xfe\0"), "UnicodeDecodeError"),
    "other JSON": ("json", lambda path: path.write_text("[1]"), "damaged"),
    "number": ("json", lambda path: path.write_text("3"), "damaged"),
    "no checksum": ("json", lambda path: path.write_text('{"rows": 3}'), "sha256"),
    "changed JSON": (
        "json",
        lambda path: path.write_text(path.read_text().replace('"rows": 5', '"rows": 4')),
        "checksum",
    ),
}


class TestDamage:
    @pytest.mark.parametrize("kind", DAMAGE)
    def test_found_and_mended(self, shards, kind, caplog):
        run(shards)
        where, damage, reason = DAMAGE[kind]
        path = file_of(shards, 1) if where == "array" else shards.folder / "00001.json"
        damage(path)
        wrong = shards.verify()
        assert list(wrong) == [1]
        assert reason in wrong[1]
        assert str(path) in wrong[1], "the file is named"
        if kind != "flipped bit":
            with pytest.raises(ValueError, match=r"fill\(\)"):
                Rows(shards, "low")[:]
        made = []
        run(shards, make=lambda part: (made.append(part), make(part))[1])
        assert made == [1], "the whole parts are kept"
        assert ["part 1 is made anew" in record.getMessage() for record in caplog.records] == [True]
        assert np.array_equal(Rows(shards, "low")[:].numpy(), all_of("low"))
        assert shards.verify() == {}

    def test_beyond_a_size_lengths_alone(self, shards, monkeypatch):
        run(shards)
        flip(file_of(shards, 1))
        monkeypatch.setattr(cache, "CHECKED", 10)
        assert shards.verify() == {}, "hashing would read everything"
        truncate(file_of(shards, 3))
        assert list(shards.verify()) == [3]
        assert shards.verify([0, 1]) == {}, "of some parts alone"

    def test_a_mapped_file_is_neither_replaced_nor_changed(self, shards, monkeypatch):
        """Pitfall 23: Windows refuses to write, rename or delete a file that is mapped."""
        run(shards)
        rows = Rows(shards, "low")
        rows[:]
        mapped = {str(path) for path in shards.folder.glob("*.low.*.npy")}
        replace, unlink = os.replace, os.unlink

        def refuse(path):
            if str(path) in mapped:
                raise PermissionError(errno.EACCES, "mapped", str(path))

        monkeypatch.setattr(os, "replace", lambda a, b: (refuse(a), refuse(b), replace(a, b))[-1])
        monkeypatch.setattr(os, "unlink", lambda path, **kwargs: (refuse(path), unlink(path, **kwargs))[-1])
        monkeypatch.setattr(cache, "ABANDONED", -1)
        truncate(file_of(shards, 3, "high"))
        for _ in range(2):  # the second time sweeps what the first left
            run(shards)
        assert np.array_equal(rows[:].numpy(), all_of("low")), "a reader goes on"
        assert np.array_equal(Rows(shards, "high")[:].numpy(), all_of("high"))
        assert mapped <= {str(path) for path in shards.folder.iterdir()}


@pytest.mark.parametrize("at", [1, 2, 3])  # low, high, JSON of the part
@pytest.mark.parametrize("code", sorted(cache.FULL))
def test_a_full_disk(shards, monkeypatch, at, code):
    run(shards, make=make, rank=0, world=5)
    before, fsync, calls = files(shards), os.fsync, []

    def full(fd):
        calls.append(fd)
        if len(calls) == at:
            raise OSError(code, os.strerror(code))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"no space for part 1 of 5: it takes 80 bytes, .* free.*make room") as error:
        run(shards)
    assert (error.value.errno, error.value.filename) == (code, str(shards.folder)), "it says where"
    assert files(shards) == before, "no half part, and nothing in the way"
    monkeypatch.setattr(os, "fsync", fsync)
    run(shards)
    assert np.array_equal(Rows(shards, "low")[:].numpy(), all_of("low")), "with room again it goes on"


@pytest.mark.skipif(os.name == "nt", reason="Windows has other modes")
def test_what_is_written_whole_is_read_by_whom_the_user_lets(tmp_path):
    """Whatever mode the writer gives: a checkpoint that its owner alone can read fails on a shared machine."""

    def closed(path):
        path.unlink(missing_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))

    (tmp_path / "plain").touch()
    utils.atomic_write(tmp_path / "whole", closed)
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_other_errors_pass_through(shards, monkeypatch):
    def broken(fd):
        raise OSError(errno.EIO, "disk on fire")

    next(fill(shards, make))
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="disk on fire"):
        run(shards)
    assert [path.name for path in shards.folder.iterdir()] == ["about.json"]


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "../x"}, {"kind": ""}, {"fingerprint": "abc"}, {"fingerprint": "Z" * 64}, {"parts": 0}, {"limit": 0}],
)
def test_refuses_nonsense(tmp_path, wrong):
    with pytest.raises(ValueError, match="give"):
        Shards(tmp_path, **({"kind": "tokens", "fingerprint": PRINT, "parts": 3} | wrong))
    assert not list(tmp_path.iterdir()), "nothing is written"
