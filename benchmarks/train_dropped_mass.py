"""Does max_dropped_mass change what a language model learns? Same data, seeds, Adam; eps differs.

    python benchmarks/train_dropped_mass.py OUT.json [--steps 500] [--seeds 2]

A small causal transformer learns the Python sources of the standard library, cut into words of a
BPE vocabulary that is trained on them. Held-out loss is reported over all words, and over those
that are rarest in training, since a word that no token kept a block of gets no gradient.
"""

import argparse
import json
import sysconfig
import time
from pathlib import Path

import machine
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn

import spo_ext

VOCABULARY, DEPTH, LENGTH, BATCH = 8192, 128, 128, 12
EPS = {"0": 0.0, "2^-10": 2.0**-10, "2^-6": 2.0**-6}


def corpus(megabytes: float = 6.0) -> str:
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in folder.glob("*.py") if path.is_file())
    files += sorted(path for path in folder.glob("*/*.py") if "test" not in str(path))
    text, size = [], 0
    for path in files:
        if "site-packages" in str(path) or size > megabytes * 1e6:
            continue
        text.append(path.read_text(errors="ignore"))
        size += len(text[-1])
    return "\n".join(text)


def encoded(text: str) -> Tensor:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size=VOCABULARY, show_progress=False)
    return torch.tensor(tokenizer.encode(text).ids)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, DEPTH)
        self.places = nn.Embedding(LENGTH, DEPTH)
        layer = nn.TransformerEncoderLayer(
            DEPTH, 4, 4 * DEPTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(DEPTH)
        self.head = nn.Parameter(torch.randn(VOCABULARY, DEPTH) * 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Last hidden states, [B, T, d]."""
        steps = tokens.shape[1]
        states = self.words(tokens) + self.places.weight[:steps]
        mask = nn.Transformer.generate_square_subsequent_mask(steps)
        return self.norm(self.body(states, mask=mask, is_causal=True))


@torch.no_grad()
def held_out(model: Model, data: Tensor, rare: Tensor) -> dict[str, float]:
    pieces = data[: len(data) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)[:150]
    logprobs = torch.cat(
        [
            spo_ext.token_logprobs(model(p[:, :-1]), model.head, p[:, 1:].contiguous())
            for p in pieces.split(25)
        ]
    )
    of_rare = rare[pieces[:, 1:]]
    return {"loss": -logprobs.mean().item(), "loss_of_rare": -logprobs[of_rare].mean().item()}


def train(eps: float, seed: int, steps: int, data: Tensor, test: Tensor, rare: Tensor) -> dict:  # type: ignore[type-arg]
    torch.manual_seed(seed)
    model = Model()
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    curve, shares, seconds = [], [], 0.0
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - 0.9 * step / steps)
        starts = torch.randint(len(data) - LENGTH - 1, (BATCH,))
        pieces = torch.stack([data[s : s + LENGTH + 1] for s in starts])
        start = time.perf_counter()
        logprobs, dropped = spo_ext.token_logprobs(
            model(pieces[:, :-1]),
            model.head,
            pieces[:, 1:].contiguous(),
            max_dropped_mass=eps,
            return_dropped_mass=True,
        )
        optimiser.zero_grad()
        (-logprobs.mean()).backward()
        optimiser.step()
        seconds += time.perf_counter() - start
        shares.append((dropped.mean() / eps).item() if eps else 0.0)
        if step % 50 == 49:
            curve.append({"step": step + 1, **held_out(model, test, rare)})
    return {
        "seed": seed,
        "curve": curve,
        "seconds": seconds,
        "dropped_of_eps": sum(shares[-50:]) / 50,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    ids = encoded(corpus())
    data, test = ids[: len(ids) * 19 // 20], ids[len(ids) * 19 // 20 :]
    counts = torch.bincount(data, minlength=VOCABULARY)
    rare = counts <= counts.sort().values[VOCABULARY // 2]  # the rarer half of the words
    runs: dict[str, list[object]] = {name: [] for name in EPS}
    for seed in range(arguments.seeds):
        for name, eps in EPS.items():
            run = train(eps, seed, arguments.steps, data, test, rare)
            runs[name].append(run)
            print(name, seed, json.dumps(run["curve"][-1]), f"{run['seconds']:.0f} s", flush=True)
    setting = {
        "tokens": len(data),
        "vocabulary": VOCABULARY,
        "depth": DEPTH,
        "tokens_per_step": LENGTH * BATCH,
        "rare_share_of_text": counts[rare].sum().item() / len(data),
    }
    report = {"commit": machine.commit(), "setting": setting, "runs": runs}
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
