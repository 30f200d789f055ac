"""Spoils some items of benchmarks/gpu.sh: copied into the folder that they import spo_ext from,
where Python runs it at its start. SPO_STUB says as JSON which item fails how, once it calls an
operator.
"""

import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from typing import Any


def act(fault: str) -> None:
    if fault == "hang":
        time.sleep(1e6)
    if fault == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if fault in ("exit", "leave"):
        os._exit(7 if fault == "exit" else 0)
    if fault == "error":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if fault == "garbage":
        print('{"check": "nothing"}')


def spoiled(function: Any, fault: str) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        act(fault)
        out = function(*arguments, **options)
        several = isinstance(out, tuple)
        first = out[0] if several else out
        if fault == "lie":
            first = first * 1.01
        if fault == "nan":
            first = first * float("nan")
        if fault in ("lie backward", "hang backward") and first.requires_grad:
            first.register_hook(lambda grad: act(fault.removesuffix(" backward")) or grad * 1.01)
        return (first, *out[1:]) if several else first

    return call


class Hook(importlib.abc.MetaPathFinder):
    def __init__(self, fault: str) -> None:
        self.fault = fault

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "spo_ext":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec and spec.loader
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            import torch

            torch.mm = spoiled(torch.mm, self.fault)  # what the item "gemm" checks
            for op in ("token_logprobs", "logprobs_from_logits", "loss", "soft_q"):
                setattr(module, op, spoiled(getattr(module, op), self.fault))

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


faults = json.loads(os.environ.get("SPO_STUB", "{}"))
if sys.orig_argv[-2].endswith("gpu_items.py") and sys.orig_argv[-1] in faults:
    sys.meta_path.insert(0, Hook(faults[sys.orig_argv[-1]]))
