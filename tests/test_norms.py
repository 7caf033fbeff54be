"""Layer norm: its value and gradients, and that a deep tower's backward pass does not do its work again and again."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.backbones import ViTConfig, build_tower
from probe.backbones.norms import layer_norm

EPSILON = 1e-5


@settings(deadline=None, max_examples=10)
@given(mean=st.sampled_from([0.0, 30.0]), deviation=st.sampled_from([1e-2, 1.0]), seed=st.integers(0, 99))
@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 16)])
def test_values_and_gradients_are_those_of_linen_in_float64(shape, mean, deviation, seed):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(mean, deviation, shape)
    scale, bias, cotangent = rng.normal(size=shape[-1]), rng.normal(size=shape[-1]), rng.normal(size=shape)

    def linen(inputs, scale, bias):
        module = nn.LayerNorm(epsilon=EPSILON, use_fast_variance=False)
        return module.apply({"params": {"scale": scale, "bias": bias}}, inputs)

    @jax.jit
    def ours(inputs, scale, bias, cotangent):
        outputs, pull = jax.vjp(lambda *arrays: layer_norm(*arrays, EPSILON), inputs, scale, bias)
        return outputs, *pull(cotangent)

    found = ours(*(np.float32(array) for array in (inputs, scale, bias, cotangent)))
    with jax.enable_x64(True):
        # what float32 makes of the inputs is not the norm's doing
        outputs, pull = jax.vjp(linen, *(np.float64(np.float32(array)) for array in (inputs, scale, bias)))
        wanted = outputs, *pull(np.float64(np.float32(cotangent)))
    # A number has 2⁻²⁴ of `mean` as error, and `deviation` is what it is then divided by.
    tolerance = 1e-5 * max(1.0, mean / deviation / 10)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())


def test_no_loop_of_a_deep_tower_adds_up_the_residual_stream_anew():
    """XLA fuses cheap additions into each of their readers: a gradient's loops then grow with the depth."""

    def most_operands(num_layers):
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
        tower = build_tower(ViTConfig(**sizes, projection_dim=None, num_hidden_layers=num_layers))
        pixels = jnp.zeros((2, 8, 8, 3))
        variables = jax.eval_shape(tower.init, jax.random.key(0), pixels)
        gradient = jax.grad(lambda variables: tower.apply(variables, pixels).pooler_output.sum())
        program = jax.jit(gradient).lower(variables).compile().as_text()
        entry = program[program.index("\nENTRY") :]
        return max(fusion.count("%") for fusion in re.findall(r" fusion\(([^)]*)\)", entry))

    assert most_operands(8) == most_operands(4)
