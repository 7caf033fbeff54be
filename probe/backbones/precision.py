"""The arithmetic of the inference towers: what kernels are stored and multiplied in.

    float32   operands and sums in float32 on every device, also where hardware would round them
    tf32      operands of float32 that a GPU rounds to 10 bits of mantissa; only where asked for
    bfloat16  operands rounded to 8 bits of mantissa, sums in float32
    int8      operands of 8 bits, sums in int32: activations scaled by token, kernels by output channel

Norms, softmax and the residual stream are float32 in each of them.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

Operand = Literal["float32", "tf32", "bfloat16", "int8"]


@dataclasses.dataclass(frozen=True)
class Precision:
    """A precision, and, of int8, the products that lose so much by it that they stay in bfloat16."""

    name: Operand = "float32"
    in_bfloat16: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As it is recorded in caches and runs."""
        return {"name": self.name, "in_bfloat16": list(self.in_bfloat16)}

    @classmethod
    def from_json(cls, record: dict[str, Any] | None) -> "Precision":
        """Reads it back; what recorded none was made in float32."""
        return cls() if record is None else cls(record["name"], tuple(record["in_bfloat16"]))

    def operand(self, product: str) -> Operand:
        """How the product of that name is computed."""
        if self.name == "int8":
            return "bfloat16" if product in self.in_bfloat16 else "int8"
        return self.name


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel [K, N], as it is multiplied, and the bias [N] float32 that is added.

    values: float32 or bfloat16; or int8, and then
    scale: [N] float32, what a step of each output channel stands for;
    equalizer: [K] float32, by which inputs are multiplied before they are rounded (the rows are divided by it).
    """

    values: Any
    bias: Any
    scale: Any
    equalizer: Any
    operand: Operand = dataclasses.field(metadata={"static": True})

    def columns(self, chosen: slice) -> "Kernel":
        """The kernel of some of the outputs."""
        scale = None if self.scale is None else self.scale[chosen]
        return dataclasses.replace(self, values=self.values[:, chosen], bias=self.bias[chosen], scale=scale)


def make_kernel(kernel: np.ndarray, bias: np.ndarray, operand: Operand, peaks: np.ndarray | None = None) -> Kernel:
    """Prepares a kernel on the host.

    Args:
      kernel: [K, N]; bias: [N].
      peaks: [K], the largest magnitudes that the inputs were seen with; int8 then shares their spread between inputs
        and kernel, so that a few large channels do not take the steps of all others (Xiao et al. 2022,
        arXiv:2211.10438).
    """
    bias = np.asarray(bias, np.float32)
    if operand == "bfloat16":
        return Kernel(np.asarray(kernel, np.float32).astype(ml_dtypes.bfloat16), bias, None, None, operand)
    if operand != "int8":
        return Kernel(np.asarray(kernel, np.float32), bias, None, None, operand)
    equalizer = np.ones(len(kernel)) if peaks is None else _equalizer(np.asarray(peaks, np.float64), kernel)
    rows = np.asarray(kernel, np.float64) / equalizer[:, None]
    scale = np.maximum(np.abs(rows).max(axis=0), np.finfo(np.float32).tiny) / 127
    values = np.rint(rows / scale).astype(np.int8)
    return Kernel(values, bias, scale.astype(np.float32), equalizer.astype(np.float32), operand)


def _equalizer(peaks: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """[K]: sqrt(kernel's peak / input's peak) of each channel, about 1 on average.

    Powers of two: multiplying by them rounds nothing, and a last digit of a peak, which may differ between machines,
    hardly ever changes them.
    """
    weights = np.abs(kernel).max(axis=1).astype(np.float64)
    known = (peaks > 0) & (weights > 0)
    exponent = np.zeros(len(peaks))
    exponent[known] = np.log2(weights[known] / peaks[known]) / 2
    exponent[known] -= exponent[known].mean() if known.any() else 0
    return np.asarray(np.exp2(np.rint(exponent)))


def dense(inputs: jax.Array, kernel: Kernel) -> jax.Array:
    """[M, K] float32 @ kernel + bias -> [M, N] float32; each row by itself, to the bit."""
    if kernel.operand == "int8":
        inputs = inputs * kernel.equalizer
        step = jnp.maximum(jnp.max(jnp.abs(inputs), axis=1, keepdims=True), np.finfo(np.float32).tiny) / 127
        steps = jnp.clip(jnp.round(inputs / step), -127, 127).astype(jnp.int8)
        sums = lax.dot(steps, kernel.values, preferred_element_type=jnp.int32)
        return jnp.add(sums.astype(jnp.float32) * step * kernel.scale, kernel.bias)
    inputs, precision = inputs.astype(operand_dtype(kernel.operand)), lax_precision(kernel.operand)
    products = lax.dot(inputs, kernel.values, precision=precision, preferred_element_type=jnp.float32)
    return jnp.add(products, kernel.bias)


def operand_dtype(operand: Operand) -> Any:
    """What operands are rounded to where both are activations, as in attention: int8 keeps bfloat16 there."""
    return jnp.float32 if operand in ("float32", "tf32") else jnp.bfloat16


def lax_precision(operand: Operand) -> lax.Precision:
    """All of float32's digits, or, of tf32, as many as a GPU takes of its own."""
    return lax.Precision.HIGHEST if operand == "float32" else lax.Precision.DEFAULT
