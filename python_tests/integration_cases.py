"""The examples as modules, and the truth about their losses in float64, from whole logits."""

import copy
import importlib
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    """The module of examples/, imported as a script there would be."""
    for package in ("transformers", "datasets"):
        pytest.importorskip(package)
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module(name)


@torch.no_grad()
def eager_logprobs(
    model: Any, input_ids: Tensor, attention_mask: Tensor, temperature: float
) -> Tensor:
    """float64 [B, T - 1] of the tokens from the second one on: log_softmax of all logits."""
    double = copy.deepcopy(model).double().eval()
    for module in double.modules():
        vars(module).pop("forward", None)  # TRL's patch, even in a copy, calls the first model
    logits = double(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(2, input_ids[:, 1:, None]).squeeze(2)


def run_on_two_ranks(check: Callable[..., None], *arguments: Any) -> None:
    """check(rank, *arguments) in two forked processes of one gloo group, as under torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(2):
            child = os.fork()
            if child == 0:
                _rank(check, rank, folder, arguments)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def _rank(check: Callable[..., None], rank: int, folder: str, arguments: Any) -> None:
    status = 1
    signal.alarm(120)  # ends this process, should it wait for ever
    try:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)  # what the parent process was
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # read, but not used
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2
        )
        check(rank, *arguments)
        torch.distributed.barrier()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
