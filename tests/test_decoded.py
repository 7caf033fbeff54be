"""Decoded images as numbered rows."""

import numpy as np
import pytest

from probe.backbones import load_backbone
from probe.errors import InputError
from probe.sources import open_source
from probe.training.decoded import ImageRows


@pytest.fixture
def preprocessing(tiny_clip):
    return load_backbone(str(tiny_clip)).preprocessing


def test_rows_in_memory_and_decoded_anew_are_the_same(image_folder, preprocessing):
    (image_folder / "train" / "green" / "003.png").write_bytes(b"no picture")
    source = open_source(image_folder)
    kept = ImageRows.decode(source, preprocessing, num_workers=1)
    anew = ImageRows.decode(source, preprocessing, num_workers=1, max_bytes=0)
    assert kept.pixels.shape == (48, 16, 16, 3)
    assert kept.in_memory.sum() == 47
    assert anew.pixels is None
    assert kept.failures == anew.failures
    assert [failure["path"] for failure in kept.failures] == ["train/green/003.png"]
    order = np.random.default_rng(0).permutation(47)[:21]
    for one, other in zip(kept.batches(order, 8), anew.batches(order, 8), strict=True):
        np.testing.assert_array_equal(one.inputs, other.inputs)
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_array_equal(one.mask, other.mask)
    assert len(source.examples) == 48
    assert (
        kept.labels.tolist() == anew.labels.tolist() == [source.class_names.index(e.labels[0]) for e in kept.examples]
    )


def test_an_image_that_vanishes_stops_the_run(image_folder, preprocessing):
    rows = ImageRows.decode(open_source(image_folder), preprocessing, num_workers=1, max_bytes=0)
    (image_folder / "train" / "red" / "000.png").unlink()
    with pytest.raises(InputError, match=r"train/red/000\.png: .*it could be read when the run began"):
        list(rows.batches(np.arange(48), 8))


def test_a_folder_of_broken_images_is_an_error(image_folder, preprocessing):
    for path in image_folder.rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(InputError, match="none of its 48 images can be read"):
        ImageRows.decode(open_source(image_folder), preprocessing, num_workers=1)
