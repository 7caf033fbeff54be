"""A worker of an engine, in this process: shards in any order, in any worker's hands, make the local run's cache."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from probe.cache import Cache, CacheWriter, load_manifest, load_plan
from probe.config import EmbedConfig
from probe.embed import embed
from probe.engines.worker import Job, ShardWorker, describe_workers
from probe.errors import InputError, MismatchError
from probe.sources import open_source
from probe.storage import PARTIAL_PREFIX, tag_partials
from tests.checkpoints import write_tiny_clip
from tests.faults import files_of


@pytest.fixture
def local(image_folder: Path, tiny_clip: Path, tmp_path: Path) -> Path:
    """The cache of a local run: 48 images in 3 shards."""
    out = tmp_path / "local"
    embed(
        EmbedConfig(
            images=image_folder,
            backbone=str(tiny_clip),
            out=out,
            batch_size=8,
            precision="float32",
            shard_rows=16,
            num_workers=1,
        )
    )
    return out


class Run:
    """What a driver does: a plan for a cache like `local`, and the images of each of its shards."""

    def __init__(self, local: Path, images: Path, cache: Path, **job: object) -> None:
        self.writer = CacheWriter(cache, load_manifest(local))
        source = open_source(images)
        first = min((local / "plan").glob("*-open.h5"))
        self.plan = self.writer.plan(load_plan(first).inputs)
        self.shards = [
            (number, [source.examples[row] for row in self.writer.shard_rows(self.plan, number)])
            for number in range(self.writer.num_shards(self.plan))
        ]
        defaults = {"num_workers": 1, "max_pixels": 10**8, "stop_at_failure": False}
        self.job = Job(cache, self.plan.id, None, source.opener(), **(defaults | job))


@pytest.fixture
def worker(tiny_clip: Path) -> Iterator[ShardWorker]:
    worker = ShardWorker()
    worker.load(str(tiny_clip))
    yield worker
    worker.close()
    tag_partials("")


def test_shards_made_in_any_order_are_those_of_the_local_run(
    local: Path, image_folder: Path, worker: ShardWorker, tmp_path: Path
) -> None:
    run = Run(local, image_folder, tmp_path / "cache")
    worker.begin(run.job, "mine-")
    receipts = [worker.make(*shard) for shard in reversed(run.shards)]
    assert [(r.number, r.num_images, r.num_computed) for r in receipts] == [(n, 16, 16) for n in (2, 1, 0)]
    assert worker.make(*run.shards[1]).num_computed == 0, "sealed already"
    run.writer.complete(run.plan)
    assert files_of(run.writer.root) == files_of(local)


def test_an_image_in_two_shards_gets_one_embedding(
    image_folder: Path, local: Path, tiny_clip: Path, worker: ShardWorker, tmp_path: Path
) -> None:
    """The shards are made apart, so it is computed twice; the cache reads the same."""
    first, *_, last = sorted(image_folder.rglob("*.png"))
    last.write_bytes(first.read_bytes())
    again = tmp_path / "again"
    config = EmbedConfig(
        images=image_folder, backbone=str(tiny_clip), out=again, batch_size=8, precision="float32", shard_rows=16
    )
    assert embed(config)["num_computed"] == 47
    run = Run(again, image_folder, tmp_path / "cache")
    worker.begin(run.job, "mine-")
    assert sum(worker.make(*shard).num_computed for shard in run.shards) == 48
    run.writer.complete(run.plan)
    ours, theirs = Cache.open(run.writer.root), Cache.open(again)
    assert list(ours.table.names) == list(theirs.table.names)
    assert (ours.embeddings() == theirs.embeddings()).all()


def test_a_worker_that_would_make_something_else_is_refused(
    local: Path, image_folder: Path, tmp_path: Path, worker: ShardWorker
) -> None:
    other = ShardWorker()
    other.load(str(write_tiny_clip(tmp_path / "other", seed=1)))
    run = Run(local, image_folder, tmp_path / "cache")
    with pytest.raises(MismatchError, match=r"would not make what the cache .* backbone_fingerprint is .* there and"):
        other.begin(run.job, "mine-")
    (tmp_path / "cache" / "cache.json").unlink()
    with pytest.raises(InputError, match=r"does not see the cache .*: a run on several hosts needs a file system"):
        worker.begin(run.job, "mine-")


def test_an_unreadable_image_ends_the_run_that_asks_for_it(
    local: Path, image_folder: Path, worker: ShardWorker, tmp_path: Path
) -> None:
    sorted(image_folder.rglob("*.png"))[5].write_bytes(b"no picture")
    run = Run(local, image_folder, tmp_path / "cache", stop_at_failure=True)
    worker.begin(run.job, "mine-")
    with pytest.raises(InputError, match=r"test/green/001.png: format: .* pass --on-error skip"):
        worker.make(*run.shards[0])


def test_what_a_dead_worker_left_unfinished_is_known_by_its_tag(local: Path, image_folder: Path) -> None:
    mine, other = local / "shards" / "0000" / f"{PARTIAL_PREFIX}mine-1", local / "plan" / f"{PARTIAL_PREFIX}other-1"
    mine.touch()
    other.touch()
    CacheWriter(local, load_manifest(local)).sweep("mine-")
    assert not mine.exists()
    assert other.exists()


def test_the_table_of_workers_lines_up() -> None:
    worker = {
        "worker": 0, "host": "a", "pid": 12, "num_shards": 3, "num_images": 4096, "images_per_second": 31.26,
        "num_failed": 1, "num_retries": 0, "ended": "ActorDiedError",
    }  # fmt: skip
    assert describe_workers([worker]) == [
        "worker  host  pid  shards  images  images/s  failed  retries  ended",
        "0       a     12   3       4,096   31.3      1       0        ActorDiedError",
    ]
    assert describe_workers([]) == []
