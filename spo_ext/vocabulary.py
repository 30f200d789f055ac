"""An LM head stored in an order of one's own, such as likely entries first.

`max_dropped_mass` leaves out blocks of 256 consecutive rows of the weight, so it leaves out more
where likely entries lie together. Here the parameter itself is stored in the order, once; at a step
only the targets are renumbered. Ids, logits and checkpoints stay those of the tokenizer.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spo_ext.arguments import same_device


def _check_integer(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: {name} must be int64 or int32, got {tensor.dtype}")


def frequency_order(counts: Tensor) -> Tensor:
    """Token ids by how often they occur, the most frequent first; equal counts by id.

    Args:
        counts: [V], integer or floating, >= 0, of the tokens to train on. V is the number of rows
            of the head, which may exceed the tokenizer's. From much text take
            `torch.bincount(ids, minlength=V)`; from a few thousand tokens the probabilities
            `softmax(logits, -1)` summed over them, which rank those that did not occur as well.

    Returns:
        int64 [V] on the device of counts: the id of every row, for `OrderedHead`.
    """
    if counts.dim() != 1 or counts.dtype == torch.bool or counts.is_complex():
        raise ValueError(
            "frequency_order: counts must be [V], integer or floating, "
            f"got {counts.dtype} {list(counts.shape)}"
        )
    wrong = (~(counts >= 0)).nonzero()  # a NaN as well
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(f"frequency_order: counts must be >= 0, got {counts[i]} for id {i}")
    return counts.argsort(descending=True, stable=True)


def _checked_order(order: Tensor, weight: Tensor) -> Tensor:
    _check_integer("OrderedHead", "order", order)
    size = len(weight)
    if order.shape != (size,):
        raise ValueError(
            f"OrderedHead: order must be [{size}] like the rows of weight, got {list(order.shape)}"
        )
    order = order.detach().to(weight.device, torch.int64, copy=True)
    found = order.sort().values
    wrong = (found != torch.arange(size, device=order.device)).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(
            f"OrderedHead: order must hold every id in [0, {size}) once, "
            f"got {int(found[i])} in the place of {i} when sorted"
        )
    return order


class _OrderedRows(nn.Module):
    """Parameters [V, ..] stored in `order`; in a state_dict they are by id, as copies. Of the order
    itself it has nothing: the keys are those of the plain module."""

    order: Tensor
    row_of: Tensor

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("row_of", order.argsort(), persistent=False)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, _ in self.named_parameters(recurse=False):
            destination[prefix + name] = destination[prefix + name].index_select(0, self.row_of)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        ordered = dict(state_dict)  # the caller's stays as it is
        for name, _ in self.named_parameters(recurse=False):
            saved = ordered.get(prefix + name)
            if saved is not None and saved.shape[:1] == self.order.shape:  # else reported below
                ordered[prefix + name] = saved.index_select(0, self.order.to(saved.device))
        super()._load_from_state_dict(ordered, prefix, *arguments)


class OrderedHead(_OrderedRows):
    """An LM head whose rows are stored in an order of the vocabulary.

        head = OrderedHead(linear, frequency_order(counts))
        loss = spo_ext.linear_loss(hidden, head.weight, head.targets(targets), ..., bias=head.bias)

    `weight` [V, d] and `bias` [V] are new parameters, with the values, dtype, device and
    requires_grad of those of `linear`: make the optimizer afterwards. Row i belongs to entry
    `order[i]`, entry v to row `row_of[v]`, both int64 [V]; so `head.weight.grad[head.row_of]` is
    by id.

    `state_dict` and `load_state_dict` are by id, so a checkpoint is the usual one and may be loaded
    under any order. An optimizer's state is not: resume it under the same order. What writes
    parameters without `load_state_dict` (`load_checkpoint_in_model` of accelerate) must run before
    the order is given. Not tried with sharded parameters (FSDP, ZeRO-3).

    Args:
        linear: an nn.Linear from d to V. Left as it is.
        order: [V], int64 or int32, every id once.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was. A subclass of
            nn.Linear is refused, since it may compute something else (quantization, LoRA).
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, order: Tensor) -> None:
        if type(linear) is not nn.Linear:
            kind = type(linear).__name__
            raise TypeError(f"OrderedHead: linear must be an nn.Linear, got {kind}")
        super().__init__(_checked_order(order, linear.weight))
        for name, parameter in (("weight", linear.weight), ("bias", linear.bias)):
            if parameter is None:
                self.register_parameter(name, None)
                continue
            rows = parameter.detach().index_select(0, self.order)
            self.register_parameter(name, nn.Parameter(rows, parameter.requires_grad))
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.train(linear.training)

    def targets(self, targets: Tensor, ignore_index: int = -100) -> Tensor:
        """The row of every target, for `token_logprobs` and `linear_loss` with this weight.

        `ignore_index` stays, and so does an id that is out of range, which those then report, on
        CUDA by a device-side assert: nothing here waits for the device.

        Args:
            targets: [..], int64 or int32 token ids, or `ignore_index`.
            ignore_index: outside [0, V), where it would name a row.

        Returns:
            [..], the dtype of targets.
        """
        _check_integer("OrderedHead.targets", "targets", targets)
        if 0 <= ignore_index < self.out_features:
            raise ValueError(
                f"OrderedHead.targets: ignore_index must be outside [0, {self.out_features}), "
                f"got {ignore_index}; put -100 in its place"
            )
        same_device("OrderedHead.targets", "weight", self.weight, targets=targets)
        last = self.out_features - 1
        rows = self.row_of[targets.clamp(0, last).long()].to(targets.dtype)
        return torch.where((targets >= 0) & (targets <= last), rows, targets)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits by id, [.., V], of hidden [.., d]: for generation. The columns are moved, which
        costs a second [.., V]; a loss needs neither."""
        return functional.linear(hidden, self.weight, self.bias).index_select(-1, self.row_of)

    def extra_repr(self) -> str:
        has_bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}"


class OrderedEmbedding(_OrderedRows):
    """The input embeddings of a model whose LM head shares their weight: looked up by id, stored as
    the head is."""

    weight: nn.Parameter

    def __init__(self, embedding: nn.Embedding, head: OrderedHead) -> None:
        super().__init__(head.order.clone())
        self.weight = head.weight
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        padding = self.padding_idx = embedding.padding_idx
        self._padding_row = None if padding is None else int(head.row_of[padding])
        self._options = (
            embedding.max_norm, embedding.norm_type, embedding.scale_grad_by_freq, embedding.sparse,
        )  # fmt: skip
        self.train(embedding.training)

    def forward(self, ids: Tensor) -> Tensor:
        """The embeddings [.., d] of token ids [..]."""
        # index_select, since an index in brackets would take -1 for the last entry
        rows = self.row_of.index_select(0, ids.reshape(-1)).view(ids.shape)
        return functional.embedding(rows, self.weight, self._padding_row, *self._options)


def order_vocabulary(model: nn.Module, order: Tensor) -> OrderedHead:
    """Put an `OrderedHead` in the place of the LM head of a Hugging Face causal language model.

    The model computes what it did, up to rounding, takes and gives token ids, and saves plain
    checkpoints. Input embeddings tied to the head stay tied. Call it right after loading the model:
    before the optimizer, hooks, adapters or a distributed wrapper, and after
    `resize_token_embeddings`, which transformers refuses for such a head.

    Args:
        model: has get_ and set_output_embeddings, and the same for input embeddings.
        order: see `OrderedHead`.

    Returns:
        The new head, which is `model.get_output_embeddings()`.

    Raises:
        TypeError: the head is no plain nn.Linear, or embeddings tied to it no plain nn.Embedding
            (Gemma's are not: they scale).
        ValueError: the head shares a parameter with anything else (T5); or see `OrderedHead`.
    """
    causal_lm: Any = model
    linear, embedding = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
    head = OrderedHead(linear, order)
    tied = getattr(embedding, "weight", None) is linear.weight
    if tied and type(embedding) is not nn.Embedding:
        raise TypeError(
            "order_vocabulary: input embeddings tied to the LM head must be an nn.Embedding, "
            f"got {type(embedding).__name__}"
        )
    shared = {id(parameter) for parameter in linear.parameters()}
    places = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if shared & {id(parameter) for parameter in module.parameters(recurse=False)}
    ]
    if len(places) != 1 + tied:
        raise ValueError(
            "order_vocabulary: parameters of the LM head must be its own, or shared with the input "
            f"embeddings alone, got them in {', '.join(places)}"
        )
    causal_lm.set_output_embeddings(head)
    if tied:
        causal_lm.set_input_embeddings(OrderedEmbedding(embedding, head))
        # In a state_dict the two are copies, which save_pretrained would both write.
        name = next(name for name, module in model.named_modules() if module is head)
        ignored = getattr(model, "_keys_to_ignore_on_save", None) or []
        causal_lm._keys_to_ignore_on_save = [*ignored, f"{name}.weight"]
    return head
