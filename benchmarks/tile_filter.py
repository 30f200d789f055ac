"""The gradient filter of cut-cross-entropy (arXiv 2411.09009) restated for the CPU.

The backward pass computes the logits again, tile by tile, and leaves out every tile of 128 tokens
and 256 entries in which no gradient of a logit reaches 2^-12. It has no bound on what a token
loses. PyTorch's operators do the work: products over all tokens and one block of entries at a time.
"""

from typing import Any

import torch
from torch import Tensor

TOKENS, WORDS = 128, 256
THRESHOLD = 2.0**-12


class TileFilter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        lse = torch.full((len(hidden),), -torch.inf)
        label = torch.empty(len(hidden))
        for first in range(0, len(weight), WORDS):
            logits = (hidden @ weight[first : first + WORDS].T).float()
            lse = torch.logaddexp(lse, logits.logsumexp(-1))
            rows = ((targets >= first) & (targets < first + WORDS)).nonzero()[:, 0]
            label[rows] = logits[rows, targets[rows] - first]
        ctx.save_for_backward(hidden, weight, targets, lse)
        return label - lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, targets, lse = ctx.saved_tensors
        grad_hidden = torch.zeros(hidden.shape)
        grad_weight = torch.zeros_like(weight)
        padding = -len(hidden) % TOKENS
        for first in range(0, len(weight), WORDS):
            words = weight[first : first + WORDS]
            scores = (hidden @ words.T).float().sub_(lse[:, None]).exp_().neg_()
            rows = ((targets >= first) & (targets < first + WORDS)).nonzero()[:, 0]
            scores[rows, targets[rows] - first] += 1
            largest = torch.nn.functional.pad(scores.abs().amax(-1), (0, padding))
            alive = (largest.view(-1, TOKENS).amax(-1) >= THRESHOLD).repeat_interleave(TOKENS)
            rows = alive[: len(hidden)].nonzero()[:, 0]
            if len(rows) == 0:
                continue
            scores = scores[rows].mul_(grads[0][rows, None]).to(hidden.dtype)
            grad_hidden[rows] += scores @ words
            grad_weight[first : first + WORDS] = scores.T @ hidden[rows]
        return grad_hidden.to(hidden.dtype), grad_weight, None


def tile_filter(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return TileFilter.apply(hidden, weight, targets)  # type: ignore[no-any-return,no-untyped-call]
