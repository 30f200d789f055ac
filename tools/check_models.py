"""Compares what spo_ext makes of tiny models with their own logits, one sequence at a time.

python tools/check_models.py [--out models.jsonl] [type ...]

Of every causal type of transformers by default; `images` adds types that also read images, used
with text alone, and `peft` the methods of PEFT on one model. Each runs in a process of its own,
with a limit of memory and time. Prints one line for each, and the table of docs/models.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import queue
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import CAUSAL, IMAGES, tiny_model
from torch import Tensor

import spo_ext
from spo_ext.integrations.heads import ordinary_tokens
from spo_ext.rollout import Sampling
from spo_ext.rollout.embedded import ModelGenerator
from spo_ext.store.records import Prompt
from spo_ext.trainer.batches import Layout, Tokens, collate
from spo_ext.trainer.model import (
    HeadSettings,
    answer_logprobs,
    choose_layout,
    completion_logprobs,
)

SIZES = ((7, 33), (3, 12), (20, 25), (1, 4), (5, 1), (2, 9))
TEMPERATURE = 0.7
LOGPROBS, GRADIENTS = 1e-4, 1e-4  # nats in float32; of the largest of a parameter
MEMORY_GIB, SECONDS = 9, 600
PEFT = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "VERA", "PROMPT_TUNING", "P_TUNING",
        "PREFIX_TUNING", "ADAPTION_PROMPT")  # fmt: skip


def check(kind: str) -> dict[str, Any]:
    """`outcome` right, wrong, refused, crash or not built, with what was measured."""
    found: dict[str, Any] = {"type": kind}
    try:
        model = _peft(kind[5:]) if kind.startswith("peft:") else tiny_model(kind)
        sequences = draw(model)
        own = [own_logprobs(model, one) for one in sequences]
    except Exception as error:
        return found | {"outcome": "not built", "words": _words(error)}
    plain = tiny_model("llama" if kind.startswith("peft:") else kind)
    if not kind.startswith("peft:"):
        found |= _of_trl(tiny_model(kind), sequences, own)
    try:
        answer_logprobs(model, HeadSettings(TEMPERATURE))
        layout = choose_layout("auto", model, training=True)
    except (TypeError, ValueError) as error:
        return found | {"outcome": "refused", "words": _words(error)}
    except Exception as error:
        return found | {"outcome": "crash", "words": _words(error)}
    try:
        found |= {"layout": layout, "difference": difference(model, sequences, own, layout)}
        if not kind.startswith("peft:"):
            found["gradients"] = gradients(model, plain, sequences, layout)
    except Exception as error:
        return found | {"outcome": "crash", "words": _words(error)}
    # A model that is worse than that with itself in float64 cannot be better here.
    allowed = max(LOGPROBS, 3 * rounding(plain, sequences, own))
    right = found["difference"] <= allowed and found.get("gradients", 0.0) <= GRADIENTS
    try:
        generator = ModelGenerator(model)
        drawn = rollouts(generator, model, sequences)
        found |= {"rollouts": drawn, "shared": generator._shared}
        right &= drawn <= allowed
    except ValueError as error:
        found["rollouts"] = _words(error)
    except Exception as error:
        return found | {"outcome": "crash", "words": _words(error)}
    return found | {"outcome": "right" if right else "wrong"}


def draw(model: Any) -> list[Tokens]:
    words = ordinary_tokens(model)
    rng = torch.Generator().manual_seed(0)
    take = lambda n: words[torch.randint(len(words), (n,), generator=rng)].tolist()  # noqa: E731
    return [Tokens(take(prompt), take(size)) for prompt, size in SIZES]


def own_logprobs(model: Any, tokens: Tokens) -> Tensor:
    """log_softmax of the model's own logits, of the sequence alone."""
    ids = torch.tensor([tokens.all])
    logits = model(input_ids=ids, use_cache=False).logits[0, -ids.shape[1] :].double()
    logprobs = (logits / TEMPERATURE)[len(tokens.prompt) - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(tokens.completion)[:, None])[:, 0]


@torch.no_grad()
def difference(model: Any, sequences: list[Tokens], own: list[Tensor], layout: Layout) -> float:
    """The largest, in eval mode and in training mode."""
    worst = 0.0
    for training in (False, True):
        model.train(training)
        logprobs, _ = completion_logprobs(model, collate(sequences, layout))
        worst = max(worst, float((logprobs.double() - torch.cat(own)).abs().max()))
    model.eval()
    return worst


@torch.no_grad()
def rounding(plain: Any, sequences: list[Tokens], own: list[Tensor]) -> float:
    try:
        exact = [own_logprobs(plain.double(), one) for one in sequences]
    except RuntimeError:  # no such kernel
        return 0.0
    finally:
        plain.float()
    return float((torch.cat(exact) - torch.cat(own)).abs().max())


def gradients(model: Any, plain: Any, sequences: list[Tokens], layout: Layout) -> float:
    """Largest difference of a parameter's gradient of a squared loss, as a part of its largest."""
    batch = collate(sequences, layout)
    for one, answer in (
        (model, lambda: completion_logprobs(model, batch)[0].double()),
        (plain, lambda: torch.cat([own_logprobs(plain, tokens) for tokens in sequences])),
    ):
        one.zero_grad(set_to_none=True)
        logprobs = answer()
        rewards = torch.arange(len(sequences)) / len(sequences)
        ref = torch.full_like(logprobs, -2.0)
        spo_ext.loss(logprobs, ref, rewards.to(logprobs), 0.3, beta=0.1, objective="squared",
                     cu_seqlens=batch.cu_seqlens).backward()  # fmt: skip
    worst, pairs = 0.0, zip(model.parameters(), plain.parameters(), strict=True)
    theirs = [other.grad.abs().max() for other in plain.parameters() if other.grad is not None]
    least = 1e-3 * float(max(theirs))
    for one, other in pairs:
        mine, right = (torch.zeros_like(p) if p.grad is None else p.grad for p in (one, other))
        worst = max(worst, float((mine - right).abs().max() / right.abs().max().clamp(min=least)))
    return worst


def rollouts(generator: ModelGenerator, model: Any, sequences: list[Tokens]) -> float:
    prompts = [Prompt(str(i), one.prompt) for i, one in enumerate(sequences)]
    drawn = generator.generate(prompts, Sampling(2, TEMPERATURE, max_new_tokens=12, seed=3))
    return max(
        float((own_logprobs(model, Tokens(one.prompt, new.token_ids)).float()
               - torch.tensor(new.logprobs)).abs().max())
        for one, news in zip(sequences, drawn, strict=True) for new in news
    )  # fmt: skip


@torch.no_grad()
def _of_trl(model: Any, sequences: list[Tokens], own: list[Tensor]) -> dict[str, Any]:
    """Largest difference of TRL's fused head, with padding on the right, and as TRL pads."""
    from trl.trainer.utils import add_fused_lm_head

    from spo_ext.integrations.agreement import _left

    found: dict[str, Any] = {}
    for name, batch in (("right", collate(sequences, "padded")), ("left", _left(sequences))):
        try:
            if name == "right":
                add_fused_lm_head(model, temperature=TEMPERATURE)
            ids, mask = batch.model_inputs["input_ids"], batch.model_inputs["attention_mask"]
            labels = torch.full_like(ids, -100).flatten()
            width = ids.shape[1]
            ids = torch.cat([ids, ids[:, :1]], 1) if name == "right" else ids
            mask = torch.cat([mask, torch.zeros_like(mask[:, :1])], 1) if name == "right" else mask
            labels = torch.full(ids.shape, -100)
            rows, columns = batch.index // width, batch.index % width
            ids[rows, columns + 1] = batch.targets
            mask[rows, columns + 1] = 1
            labels[rows, columns + 1] = batch.targets
            output = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
            logprobs = output.log_probs[:, -ids.shape[1] + 1 :][rows, columns]
            found[f"trl_{name}"] = float((logprobs.double() - torch.cat(own)).abs().max())
        except Exception as error:
            found[f"trl_{name}"] = _words(error)
    return found


def _peft(method: str) -> Any:
    import peft

    of: Any = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[method]]
    options: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if "TUNING" in method:
        options |= {"num_virtual_tokens": 3}
    elif method == "ADAPTION_PROMPT":
        options |= {"adapter_len": 3, "adapter_layers": 1}
    else:
        options |= {"target_modules": ["q_proj", "v_proj"]}
    options |= {"total_step": 10} if method == "ADALORA" else {}
    options |= {"feedforward_modules": []} if method == "IA3" else {}
    model = peft.get_peft_model(tiny_model("llama"), of(**options))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _run(kinds: Any, found: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_GIB << 30, MEMORY_GIB << 30))
    torch.set_num_threads(1)
    found.put(check(kinds))


def alone(kind: str) -> dict[str, Any]:
    """check(kind) in a forked process."""
    context = multiprocessing.get_context("fork")
    found: Any = context.Queue()
    process = context.Process(target=_run, args=(kind, found))
    process.start()
    start = time.monotonic()
    while True:
        try:
            result: dict[str, Any] = found.get(timeout=0.5)
            break
        except queue.Empty:
            if not process.is_alive() and found.empty():
                result = {"type": kind, "outcome": "crash", "words": f"died: {process.exitcode}"}
                break
            if time.monotonic() - start > SECONDS:
                process.kill()
                result = {"type": kind, "outcome": "crash", "words": f"over {SECONDS} s"}
                break
    process.join()
    return result | {"seconds": round(time.monotonic() - start, 1)}


def table(rows: list[dict[str, Any]]) -> str:
    """What docs/models.md says of them."""
    lines = ["| outcome | number | types |", "|---|---|---|"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        how = f"right, {row['layout']}" if row["outcome"] == "right" else row["outcome"]
        groups.setdefault(how, []).append(row)
    for how in sorted(groups, key=lambda name: -len(groups[name])):
        names = ", ".join(row["type"] for row in groups[how])
        lines.append(f"| {how} | {len(groups[how])} | {names} |")
    built = [row for row in rows if row["outcome"] != "not built"]
    within: Callable[[Any], bool] = lambda x: isinstance(x, float) and x <= LOGPROBS  # noqa: E731
    for name, words in (("trl_right", "padded on the right"), ("trl_left", "padded as TRL does")):
        got = [row[name] for row in built if name in row]
        wrong = sum(isinstance(x, float) and not x <= LOGPROBS for x in got)
        lines.append(f"\nTRL's fused head, {words}: {sum(map(within, got))} right, {wrong} wrong, "
                     f"{sum(isinstance(x, str) for x in got)} errors.")  # fmt: skip
    lines += [
        f"\n`{row['type']}`: {row.get('words') or row.get('rollouts')}"
        for row in rows
        if row["outcome"] != "right" or isinstance(row.get("rollouts"), str)
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("types", nargs="*", help="types of transformers, images, peft")
    parser.add_argument("--out", type=Path, help="JSON lines; types that are in it are left out")
    options = parser.parse_args()
    for name in (
        "peft",
        "trl.trainer.utils",
        "transformers.generation",
        "transformers.cache_utils",
    ):
        importlib.import_module(name)  # once, not in every process
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if (
        options.out and options.out.exists()) else []  # fmt: skip
    sets = {"images": IMAGES, "peft": [f"peft:{method}" for method in PEFT]}
    wanted = [kind for name in options.types for kind in sets.get(name, [name])] or CAUSAL
    for kind in [kind for kind in wanted if kind not in {row["type"] for row in rows}]:
        rows.append(alone(kind))
        print(json.dumps(rows[-1]), flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    rows = [row for row in rows if row["type"] in wanted]
    print(table(rows))
    return int(any(row["outcome"] in ("wrong", "crash") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
