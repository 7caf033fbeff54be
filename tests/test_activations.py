"""Cached activations: what was written comes back in any order, or an error; memory holds what is asked for alone."""

import random
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from probe.errors import CorruptError, InputError, MismatchError
from probe.training import activations
from probe.training.activations import Activations


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(activations, "SHARD_BYTES", 500)


def values(num_rows=20):
    return np.random.default_rng(0).normal(size=(num_rows, 5, 8)).astype(np.float32)


def opened(folder, num_rows=20, **identity):
    return Activations(folder, {"seed": 0, **identity}, num_rows=num_rows, shape=(5, 8))


def written(folder, rows):
    table = opened(folder, len(rows))
    table.create()
    for part in table.missing():
        table.seal(part, rows[part.start : part.stop])
    return table


def test_rows_come_back_to_the_bit_in_any_order(tmp_path):
    rows = values()
    expected_bytes = opened(tmp_path / "table").num_bytes([range(20)])
    table = written(tmp_path / "table", rows)
    assert len(list(table.folder.glob("*.h5"))) == 7  # of 3 rows
    assert table.missing() == []
    again = opened(table.folder)
    assert again.check_same()
    for order in (np.arange(20), np.array([19, 0, 7, 7, 3]), np.array([11])):
        found = again.read(order)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, rows[order])
    again.close()
    assert rows.nbytes < expected_bytes


def test_only_what_is_missing_is_made_again_to_the_same_bytes(tmp_path):
    rows = values()
    table = written(tmp_path / "table", rows)
    before = {path.name: path.read_bytes() for path in table.folder.iterdir()}
    (table.folder / sorted(before)[2]).unlink()
    assert table.missing() == [range(6, 9)]
    table.seal(range(6, 9), rows[6:9])
    assert {path.name: path.read_bytes() for path in table.folder.iterdir()} == before


def test_plain_h5py_reads_a_shard(tmp_path):
    rows = values()
    path = sorted(written(tmp_path / "table", rows).folder.glob("*.h5"))[1]
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["activations"][...], rows[3:6].reshape(3, -1))
        assert file["row"][...].tolist() == [3, 4, 5]


def test_every_flipped_byte_is_an_error(tmp_path):
    """Wherever in the file it is: the name holds the hash."""
    rows = values()
    path = sorted(written(tmp_path / "table", rows).folder.glob("*.h5"))[0]
    content, rng = path.read_bytes(), random.Random(0)
    for _ in range(60):
        damaged = bytearray(content)
        damaged[rng.randrange(len(damaged))] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        with pytest.raises(CorruptError, match=f"{path.name}: damaged .*Remove it and run the same command again"):
            opened(path.parent).read(np.array([0]))


def test_a_byte_that_flips_while_the_shard_is_open_is_an_error(tmp_path, monkeypatch):
    """HDF5's own checksums see it, where the chunk is not in memory: a row of this size is a chunk."""
    monkeypatch.setattr(activations, "SHARD_BYTES", 4 << 20)
    rows = np.random.default_rng(0).normal(size=(4, 300, 512)).astype(np.float32)
    table = Activations(tmp_path, {}, num_rows=4, shape=rows.shape[1:])
    table.create()
    table.seal(range(4), rows)
    np.testing.assert_array_equal(table.read(np.array([0])), rows[:1])
    (path,) = tmp_path.glob("*.h5")
    content = path.read_bytes()
    at = content.index(rows[2].tobytes())
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([content[at] ^ 1]))
    np.testing.assert_array_equal(table.read(np.array([3])), rows[3:])
    with pytest.raises(CorruptError, match=r"`activations` cannot be read"):
        table.read(np.array([2]))
    table.close()


def test_a_shard_under_another_number_is_an_error(tmp_path):
    paths = sorted(written(tmp_path / "table", values()).folder.glob("*.h5"))
    other = paths[0].with_name(paths[0].name.replace("000000-", "000001-"))
    paths[1].unlink()
    paths[0].rename(other)
    with pytest.raises(CorruptError, match=r"does not hold the rows 3 to 5"):
        opened(tmp_path / "table").read(np.array([4]))
    with pytest.raises(CorruptError, match="shard 0 is missing"):
        opened(tmp_path / "table").read(np.array([0]))


def test_others_and_what_is_not_ours_are_refused(tmp_path):
    table = written(tmp_path / "table", values())
    with pytest.raises(MismatchError, match=r"Fields that differ: num_rows is 20 there and 9 now; seed is 0 .* 7 now$"):
        opened(table.folder, 9, seed=7).check_same()
    (tmp_path / "photos").mkdir()
    assert not opened(tmp_path / "photos").check_same()
    (tmp_path / "photos" / "holiday.jpg").touch()
    with pytest.raises(InputError, match=r"photos exists and holds no activations.json"):
        opened(tmp_path / "photos").check_same()


def test_more_shards_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "_MAX_OPEN", 2)
    rows = values()
    table = written(tmp_path / "table", rows)
    order = np.random.default_rng(0).permutation(20)
    np.testing.assert_array_equal(table.read(order), rows[order])
    assert len(table._open) == 2
    table.close()


READER = """
import resource, sys
from pathlib import Path
import numpy as np
from probe.training.activations import Activations
table = Activations(Path(sys.argv[1]), {}, num_rows=int(sys.argv[2]), shape=(50, 768))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
table.read(np.array([0]))
before = peak()
order = np.random.default_rng(0).permutation(table.num_rows)
for start in range(0, table.num_rows, 16):
    assert table.read(order[start : start + 16])[0, 0, 0] == order[start]
print((peak() - before) * 1024)
"""


def test_reading_in_any_order_holds_no_more_than_a_batch(tmp_path, monkeypatch):
    """150 MB in shards of 15 MB, in the memory of a few batches of 2.5 MB."""
    monkeypatch.setattr(activations, "SHARD_BYTES", 15 << 20)
    num_rows = 1000
    table = Activations(tmp_path, {}, num_rows=num_rows, shape=(50, 768))
    table.create()
    for part in table.missing():
        table.seal(part, np.broadcast_to(np.float32(part)[:, None, None], (len(part), 50, 768)))
    code = READER.replace("table = ", f"import probe.training.activations as a; a.SHARD_BYTES = {15 << 20}\ntable = ")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(num_rows)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(re.findall(r"\d+", done.stdout)[-1]) < 40e6
    assert sum(path.stat().st_size for path in Path(tmp_path).glob("*.h5")) > 150e6
