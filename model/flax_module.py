"""The decoder as a Flax Linen module, for tools that expect one; its params are the very tree of
`model.init`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from model.config import ModelConfig
from model.decoder import forward
from model.parameters import abstract, init
from model.runtime import DEFAULT_RUNTIME, Runtime


class Decoder(nn.Module):
    """`Decoder(config).apply({"params": params}, tokens)` is `forward(params, tokens, config)`.

    config: what the model is.
    runtime: how it runs.
    """

    config: ModelConfig
    runtime: Runtime = DEFAULT_RUNTIME

    @nn.compact
    def __call__(
        self, tokens: jax.Array | None, *, deterministic: bool = True, **options: Any
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Logits and aux, as `forward` gives them; dropout draws from the "dropout" key if not
        deterministic.
        """
        params = {
            name: self.param(name, _part, name, self.config) for name in abstract(self.config)
        }
        rng = None if deterministic else self.make_rng("dropout")
        return forward(params, tokens, self.config, self.runtime, rng=rng, **options)


def _part(rng: jax.Array, name: str, config: ModelConfig) -> Any:
    """The branch `name` of the initial params."""
    return init(config, rng, branch=name)[name]
