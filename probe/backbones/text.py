"""CLIP's text tower: a causal Transformer whose pooler is the layer norm of the token that ends the text.

The parameters:

    embeddings/{token_embedding/embedding, position_embedding}
    encoder/layers_<i>/…                        (as in the vision tower)
    final_layer_norm/{scale, bias}
    text_projection/kernel                      (where the checkpoint has a projection)

Sources: Radford et al. 2021 (arXiv:2103.00020); the arithmetic is that of transformers' CLIPTextModel.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.nn import initializers

from probe.backbones.tower import check_activation, check_fields, is_count, is_number
from probe.backbones.vit import Encoder, LayerNorm

_LEGACY_EOS = 2  # what CLIP's first configs say by mistake: the token that ends a text is there its highest id


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The fields of transformers' CLIPTextConfig under their names, with their defaults.

    `projection_dim` is None where the checkpoint has no projection; the initializer fields matter only to a
    tower that starts from random weights.
    Raises: InputError naming the fields that no tower can be built from.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int | None = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77  # tokens, the first and the last included
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0  # probability, in training only
    initializer_range: float = 0.02
    initializer_factor: float = 1.0
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        counts = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        counts += ["max_position_embeddings"]
        counts += ["projection_dim"] if self.projection_dim is not None else []
        check_fields(self, is_count, "a positive integer", *counts)
        divisor = f"a divisor of hidden_size {self.hidden_size}"
        check_fields(self, lambda heads: self.hidden_size % heads == 0, divisor, "num_attention_heads")
        check_activation(self)
        numbers = ["layer_norm_eps", "attention_dropout", "initializer_range", "initializer_factor", "eos_token_id"]
        check_fields(self, is_number, "a number", *numbers)
        check_fields(self, lambda eps: eps > 0, "above 0", "layer_norm_eps")
        check_fields(self, lambda rate: 0 <= rate < 1, "at least 0 and below 1", "attention_dropout")


@struct.dataclass
class TextOutput:
    """What a text tower makes of a batch of texts; all float32, none normalised to unit length.

    last_hidden_state: [B, T, D], layer-normed.
    pooler_output: [B, D], that of the token that ends the text.
    projected: [B, P], the text's place in the space shared with images, where the checkpoint has a projection.
    """

    last_hidden_state: jax.Array
    pooler_output: jax.Array
    projected: jax.Array | None = None


class TextEmbeddings(nn.Module):
    """The tokens, each with its position's embedding."""

    config: TextConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, T] -> [B, T, D]."""
        config = self.config
        init = initializers.normal(0.02 * config.initializer_factor)
        embed = nn.Embed(config.vocab_size, config.hidden_size, embedding_init=init, name="token_embedding")
        shape = (config.max_position_embeddings, config.hidden_size)
        return embed(tokens) + self.param("position_embedding", init, shape)[: tokens.shape[1]]


class TextTower(nn.Module):
    """CLIP's text tower of any `TextConfig`."""

    config: TextConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> TextOutput:
        """Embeds texts.

        Args:
          tokens: [B, T] integers, as the checkpoint's tokenizer makes them: each row has a token that ends its text.
            What follows that token is not seen, since attention is causal.
          train: apply attention dropout (which needs the random stream "dropout" where it is not 0).
        Raises: ValueError if T is more than the tower has positions for.
        """
        config = self.config
        if tokens.ndim != 2 or tokens.shape[1] > config.max_position_embeddings:
            limit = config.max_position_embeddings
            raise ValueError(f"this tower takes tokens of shape [B, at most {limit}], got {tokens.shape}")
        hidden = TextEmbeddings(config, name="embeddings")(tokens)
        hidden = Encoder(config, is_causal=True, name="encoder")(hidden, train)
        hidden = LayerNorm(config.layer_norm_eps, name="final_layer_norm")(hidden)
        pooled = hidden[jnp.arange(len(tokens)), end_positions(tokens, config.eos_token_id)]
        if config.projection_dim is None:
            return TextOutput(last_hidden_state=hidden, pooler_output=pooled)
        init = initializers.normal(config.hidden_size**-0.5 * config.initializer_factor)
        projection = nn.Dense(config.projection_dim, use_bias=False, kernel_init=init, name="text_projection")
        return TextOutput(last_hidden_state=hidden, pooler_output=pooled, projected=projection(pooled))


def end_positions(tokens: jax.Array, eos_token_id: int) -> jax.Array:
    """[B, T] tokens -> [B], where each text ends: at its first eos_token_id, or at its highest id where the config
    has the 2 that CLIP's first configs have by mistake (their tokenizers give the end the highest id)."""
    is_end = tokens if eos_token_id == _LEGACY_EOS else tokens == eos_token_id
    return jnp.argmax(is_end, axis=1)
