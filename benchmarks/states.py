"""Head states to measure on: real ones if SPO_HEAD_STATES names a file of them, else synthetic.

The file (safetensors) holds `weight` [V, d] and, for a set like `samp2`, `samp2_hidden` [N, d] and
`samp2_targets` [N]: last hidden states of a language model, times 2, and the tokens it sampled from
them. capture.py makes one from any model.
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadStates:
    source: str
    hidden: Tensor  # [N, d] float32
    weight: Tensor  # [V, d] float32
    targets: Tensor  # [N] int64


# Without a file, in the place of its sets.
SHARPNESS = {"samp1.5": 0.75, "samp2": 1.0, "samp3": 1.5}


def load_states(name: str = "samp2") -> HeadStates:
    path = os.environ.get("SPO_HEAD_STATES", "")
    if not path:
        return synthetic_states(sharpness=SHARPNESS.get(name, 1.0))
    from safetensors.torch import load_file

    data = load_file(path)
    hidden, targets = data[f"{name}_hidden"].float(), data[f"{name}_targets"].long()
    return HeadStates(f"{os.path.basename(path)}:{name}", hidden, data["weight"].float(), targets)


def widened(hidden: Tensor, weight: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Both turned into more dimensions; the logits stay the same."""
    turn = torch.randn(depth, hidden.shape[1], generator=torch.Generator().manual_seed(2))
    turn = torch.linalg.qr(turn).Q.T
    return hidden @ turn, weight @ turn


def synthetic_states(
    tokens: int = 4096,
    vocabulary: int = 24576,
    depth: int = 256,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    sharpness: float = 1.0,
) -> HeadStates:
    """Each token has a few likely entries, as in language: about one nat of entropy. Made on
    `device` in `dtype`, since 65536 states of a large head in float32 take long on a CPU."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(vocabulary, depth, generator=generator, device=device) / depth**0.5
    likely = torch.randint(vocabulary, (tokens, 3), generator=generator, device=device)
    hidden = torch.zeros(tokens, depth, device=device)
    for column, strength in enumerate((16.0, 15.0, 14.0)):
        hidden += weight[likely[:, column]] * strength * sharpness
    return HeadStates("synthetic", hidden.to(dtype), weight.to(dtype), likely[:, 0].clone())
