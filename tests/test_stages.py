"""Where the time goes: what is waited adds up to the whole, and the bound is what was waited for."""

import math
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probe.backbones import load_backbone, make_embed_fn
from probe.machine import PRECISIONS, count_flops, matmul_rate
from probe.stages import StageTimes, describe_stages

SECONDS = st.floats(0, 1e4)


@given(waits=st.tuples(*[SECONDS] * 4), own=SECONDS, files=SECONDS, decode=SECONDS)
def test_what_was_waited_and_the_program_add_up_to_the_whole(waits, own: float, files: float, decode: float) -> None:
    images, device, write, compiling = waits
    stages = StageTimes(files, decode, 0.0, compiling, images, device, write, wall_s=sum(waits) + own)
    seconds = stages.seconds()
    assert set(seconds) == {"files", "decode", "device", "write", "compile", "program"}
    assert min(seconds.values()) >= 0
    assert math.isclose(sum(seconds.values()), stages.wall_s, rel_tol=1e-9, abs_tol=1e-6)
    assert math.isclose(seconds["files"] + seconds["decode"], images, abs_tol=1e-6)
    bound = stages.bound()
    assert bound != "compile"
    if bound != "none":
        assert seconds[bound] == max(value for stage, value in seconds.items() if stage != "compile")
    assert describe_stages(stages.to_json()).startswith("stage ")


@pytest.mark.parametrize("slow", ["images", "program"])
def test_time_is_counted_where_it_is_spent(slow: str) -> None:
    def images() -> Iterator[int]:
        for index in range(5):
            time.sleep(0.02 if slow == "images" else 0)
            yield index

    stages = StageTimes()
    for _ in stages.waited(images()):
        stages.decode_s += 0.01
        time.sleep(0.02 if slow == "program" else 0)
    stages.stop()
    assert stages.bound() == ("decode" if slow == "images" else "program")
    assert (stages.images_wait_s >= 0.1) == (slow == "images")
    assert stages.wall_s >= 0.1


def test_a_device_that_ran_dry_is_noticed() -> None:
    class Output:
        def __init__(self, ready: bool) -> None:
            self._ready = ready

        def is_ready(self) -> bool:
            return self._ready

    stages = StageTimes()
    for ready in (True, False, True, True):  # whether it was done when the next batch came
        stages.sending()
        stages.sent(Output(ready), 8)
    stages.stop()
    assert (stages.num_dry, stages.num_batches, stages.num_images) == (2, 4, 32)
    assert "ran out of work before 2 of 4 batches" in describe_stages(stages.to_json())


def test_flops_are_those_of_the_published_shape(tiny_clip, tiny_resnet) -> None:
    """Counted by hand for the tiny CLIP tower; a product's rate in its own terms for any precision."""
    size = 16, 24, 8
    left, right = (jax.ShapeDtypeStruct(shape, jnp.int8) for shape in (size[:2], size[1:]))
    product = jax.jit(lambda x, y: jax.lax.dot(x, y, preferred_element_type=jnp.int32))
    assert count_flops(product, left, right) == 2 * math.prod(size)
    backbone = load_backbone(tiny_clip)
    images = jax.ShapeDtypeStruct((3, 16, 16, 3), np.uint8)
    counted = count_flops(make_embed_fn(backbone, backbone.views), images)
    width, mlp, tokens, patches = 16, 32, 5, 4
    block = tokens * (4 * width * width + 2 * width * mlp) + 2 * tokens * tokens * width
    one_row = width * width * 2 + 2 * width * mlp + 2 * tokens * width + 2 * tokens * width * width
    stem = patches * 8 * 8 * 3 * width + width * 8  # and the projection
    # the last block may be computed for the class token alone
    assert 2 * 3 * (stem + block + one_row) <= counted <= 2 * 3 * (stem + 2 * block)
    resnet = load_backbone(tiny_resnet)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8)
    assert count_flops(make_embed_fn(resnet, ("pooler",)), images) > 2 * 16 * 16 * 4 * 3 * 49


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_rate_is_measured_in_every_precision(precision: str) -> None:
    assert 1e8 < matmul_rate(precision) < 1e16
