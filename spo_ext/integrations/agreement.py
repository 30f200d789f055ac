"""Whether a model's log-probabilities are those of its own logits, one sequence at a time.

`check_agreement` is asked once, before the first use, and says how the model can be served.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

Way = Literal["row", "rows", "padded", "left", "equal"]


def check_agreement(
    model: Any, ways: Sequence[Way], *, training: bool = False, owner: str = "SPO"
) -> Way:
    """The first of the ways in which every sequence gets what it would get alone.

    Ways to call the model, of which the caller names those that it can use, the best first:
        "row", "rows", "padded": as `spo_ext.trainer.batches.collate` lays sequences out.
        "left": padding on the left, input_ids and attention_mask alone, as TRL calls a model. Where
            it is not right "padded" may be: move the padding to the right.
        "equal": only sequences of one length in a batch, input_ids alone.

    The model answers logprob_targets already (see `add_token_logprobs`, which has compared its
    head with its logits). Call it with the weights, dtype and autocast that will be used, before
    DDP or FSDP. No gradient, mode, cache or random state is changed.

    Args:
        training: also compare the model in training mode with itself in eval mode, as for a policy
            without dropout.

    Raises:
        ValueError: if none of the ways is right, or the model looks ahead; says what was seen.
    """
    raise NotImplementedError


def rope_limit(config: Any) -> int | None:
    """The length above which rotary frequencies depend on the longest sequence of a batch (long
    rope, dynamic NTK), or None. Sequences on both sides of it do not go together."""
    raise NotImplementedError
