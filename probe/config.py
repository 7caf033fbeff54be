"""One frozen dataclass per verb: validated where it is made, it is the command line, and is saved with runs.

Past this point nothing re-checks a value and nothing has a second default. Importing this module loads
neither jax nor numpy, so that `probe --help` answers at once.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

from probe.errors import ConfigError

T = TypeVar("T")
_no_default_shown = arg(help_behavior_hint="")
Flag = Annotated[FlagCreatePairsOff[bool], _no_default_shown]  # `--overwrite`, never `--overwrite False` read as true
IfGiven = Annotated[T | None, _no_default_shown]  # None where it is not given; its text says what stands in then


def to_json(config: Any) -> dict[str, Any]:
    """The config as plain JSON values: paths as text, tuples as lists."""
    return dict(json.loads(json.dumps(dataclasses.asdict(config), default=str)))


def _require(condition: bool, option: str, rule: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"--{option} must be {rule}, got {value}")


def _positive(option: str, value: float) -> None:
    _require(0 < value < math.inf, option, "positive and finite", value)


def _not_negative(option: str, value: float) -> None:
    _require(0 <= value < math.inf, option, "zero or more, and finite", value)


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Run the backbone once over every image and cache the embeddings; run it again to continue or to update."""

    images: Annotated[Positional[Path], arg(metavar="IMAGES")]
    """Folders root/class/* or root/{train,val,test}/class/*; a .csv, .tsv, .jsonl or .parquet manifest; .tar shards
    in WebDataset layout; a .zip file; or what Hugging Face datasets saved."""
    backbone: str
    """Hub id (openai/clip-vit-base-patch32, or with @revision) or a local folder in Hugging Face layout."""
    out: Path
    """Cache folder to create or to continue."""
    batch_size: IfGiven[int] = None
    """Images per step, fixed by whoever creates the cache (if not given: 32, or what the cache says)."""
    decode: IfGiven[Literal["exact", "fast"]] = None
    """How JPEGs are decoded, fixed likewise (if not given: exact, or what the cache says). exact: as transformers, to
    the bit. fast: those over four times as large as the backbone reads at 1/2, 1/4 or 1/8 of their size."""
    dtype: IfGiven[Literal["float32", "float16"]] = None
