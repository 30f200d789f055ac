"""What a loss call saw."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LossStats:
    """What a loss call saw, detached, one number per sequence [S].

    log_ratio is R = sum_t log pi - log pi_ref in nats. terminal_q is Q_T; for "group" its Q_0 is
    the group's baseline, and without a Q_0 ("linear", "advantage" with targets) it is taken as 0.
    residual is Q_T minus its target, for "cross_entropy" as probabilities, and None where the
    objective has no target of Q_T. loss is before the reduction; num_tokens counts unmasked tokens.
    """

    loss: Tensor
    terminal_q: Tensor
    log_ratio: Tensor
    q0: Tensor
    num_tokens: Tensor
    residual: Tensor | None

    def means(self) -> dict[str, Tensor]:
        """Means over the non-empty sequences as 0-d tensors, for a logger."""
        live = (self.num_tokens > 0).to(self.loss.dtype)
        count = live.sum().clamp(min=1)

        def mean(values: Tensor) -> Tensor:
            return (values * live).sum() / count

        out = {
            "loss": mean(self.loss),
            "terminal_q": mean(self.terminal_q),
            "log_ratio": mean(self.log_ratio),
            "q0": mean(self.q0),
            "num_tokens": mean(self.num_tokens.to(self.loss.dtype)),
            "clipped": mean((self.terminal_q > 0).to(self.loss.dtype)),
        }
        if self.residual is not None:
            out["residual"] = mean(self.residual)
            out["residual_abs"] = mean(self.residual.abs())
        return out
