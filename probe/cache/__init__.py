"""The embedding cache: a folder that can be killed at any moment, rerun, copied, and trusted.

    cache.json     what it is made of, and the fingerprint over that: `manifest`
    plan/*.h5      what people say about images, an immutable revision per change: `plan`
    shards/*/*.h5  facts about bytes, content key → embedding, sealed once and for all: `shards`
    failed/*.jsonl one record per image that has no embedding

To relabel, move, or deduplicate is to write a new plan; nothing is embedded again. Every file is built in
memory and appears under its name whole (`probe.storage`); nothing is ever changed in place. `writer` adds,
`reader` reads, and only `hdf5` calls h5py.
"""

from probe.cache.arrays import write_cache as write_cache
from probe.cache.hdf5 import SafeFile as SafeFile
from probe.cache.hdf5 import build_image as build_image
from probe.cache.hdf5 import safe_open as safe_open
from probe.cache.manifest import Manifest as Manifest
from probe.cache.manifest import check_same as check_same
from probe.cache.manifest import describe_differences as describe_differences
from probe.cache.manifest import load_manifest as load_manifest
from probe.cache.manifest import make_manifest as make_manifest
from probe.cache.plan import FAILED as FAILED
from probe.cache.plan import Failure as Failure
from probe.cache.plan import Inputs as Inputs
from probe.cache.plan import Plan as Plan
from probe.cache.plan import load_plan as load_plan
from probe.cache.plan import make_inputs as make_inputs
from probe.cache.reader import Cache as Cache
from probe.cache.reader import Table as Table
from probe.cache.sealed import open_record as open_record
from probe.cache.sealed import read_file as read_file
from probe.cache.sealed import seal_record as seal_record
from probe.cache.shards import KNOWN as KNOWN
from probe.cache.shards import Facts as Facts
from probe.cache.shards import ShardContents as ShardContents
from probe.cache.upkeep import merge_caches as merge_caches
from probe.cache.upkeep import prune_cache as prune_cache
from probe.cache.upkeep import remove_cache as remove_cache
from probe.cache.verifying import remove_damaged as remove_damaged
from probe.cache.verifying import verify_cache as verify_cache
from probe.cache.writer import CacheWriter as CacheWriter
from probe.cache.writer import draft_plan as draft_plan
from probe.cache.writer import known_keys as known_keys
from probe.cache.writer import newest_complete as newest_complete
