"""The compiled program that turns images into embeddings: one for `embed`, `predict` and whoever compares with them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from probe.backbones.backbone import Backbone

EmbedFn = Callable[[dict[str, Any], Any], dict[str, jax.Array]]


def make_embed_fn(backbone: Backbone, views: Sequence[str]) -> EmbedFn:
    """Compiles (variables, images [B, H, W, 3] uint8) -> {view: [B, D] float32}.

    Matrix products are in full float32 on every device; at one batch shape an image's embedding does not depend, to
    the bit, on where in the batch it stands or on what fills the rest.

    Args:
      views: which of `backbone.views` to return; what none of them needs is not computed.
    """

    @jax.jit
    def embed_fn(variables: dict[str, Any], images: Any) -> dict[str, jax.Array]:
        with jax.default_matmul_precision("highest"):
            output = backbone.apply(variables, images)
        features = {"pooler": output.pooler_output, "projected": output.projected}
        return {view: features[view] for view in views}

    return embed_fn
