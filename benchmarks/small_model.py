"""A small causal transformer and two corpora for it, of the Python standard library.

"tables" is encodings/: a softmax that gets sharp, and most of the vocabulary never occurs. "code"
is the rest: a flat one. Both are cut into words of one BPE vocabulary, so that the words "tables"
never uses are ordinary words of "code". "sorted" is "tables" with ids in order of frequency, as a
vocabulary with reserved words at its end: whole blocks of neighbours never occur.
"""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn

VOCABULARY, DEPTH, LAYERS, LENGTH, HELD_OUT_EVERY = 8192, 64, 2, 128, 20


@dataclass(frozen=True)
class Setting:
    train: Tensor  # ids, in the order of the text
    test: Tensor  # [pieces, LENGTH + 1]
    never: Tensor  # [V] bool: not in `train`
    rare: Tensor  # [V] bool: the rarer half of the words in `train`

    def batch(self, pieces: int) -> Tensor:
        starts = torch.randint(len(self.train) - LENGTH - 1, (pieces,))
        return torch.stack([self.train[s : s + LENGTH + 1] for s in starts])

    def describe(self) -> dict[str, float]:
        counts = torch.bincount(self.train, minlength=VOCABULARY)
        return {
            "tokens": len(self.train),
            "words_never": self.never.sum().item(),
            "words_rare": self.rare.sum().item(),
            "largest_count_of_rare": counts[self.rare].max().item(),
            "share_of_rare_in_text": counts[self.rare].sum().item() / len(self.train),
        }


def settings() -> dict[str, Setting]:
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.glob("*.py")) + sorted(library.glob("*/*.py"))
    files = [p for p in files if "test" not in str(p) and "site-packages" not in str(p)]
    tables = [p for p in files if p.parent.name == "encodings"]
    texts = {
        name: "\n".join(path.read_text(errors="ignore") for path in paths)
        for name, paths in (("tables", tables), ("code", sorted(set(files) - set(tables))))
    }
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts.values(), vocab_size=VOCABULARY, show_progress=False)
    found = {name: split(torch.tensor(tokenizer.encode(t).ids)) for name, t in texts.items()}
    return {**found, "sorted": by_frequency(found["tables"])}


def by_frequency(setting: Setting) -> Setting:
    counts = torch.bincount(setting.train, minlength=VOCABULARY)
    order = counts.argsort(descending=True, stable=True)
    rank = order.argsort()
    moved = rank[setting.train], rank[setting.test]
    return Setting(*moved, setting.never[order], setting.rare[order])


def split(ids: Tensor, stretch: int = 16) -> Setting:
    """Every HELD_OUT_EVERY-th stretch of pieces is held out, so that it is like the rest."""
    size = stretch * (LENGTH + 1)
    stretches = ids[: len(ids) // size * size].view(-1, size)
    out = torch.arange(len(stretches)) % HELD_OUT_EVERY == HELD_OUT_EVERY // 2
    train = stretches[~out].flatten()
    counts = torch.bincount(train, minlength=VOCABULARY)
    occurs = counts > 0
    rare = occurs & (counts <= counts[occurs].median())
    test = stretches[out].view(-1, LENGTH + 1)
    test = test[torch.linspace(0, len(test) - 1, min(120, len(test))).long()]
    return Setting(train, test, ~occurs, rare)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, DEPTH)
        self.places = nn.Embedding(LENGTH, DEPTH)
        layer = nn.TransformerEncoderLayer(
            DEPTH, 4, 4 * DEPTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(DEPTH)
        for table in (self.words, self.places):  # PyTorch's 1 learns slower
            nn.init.normal_(table.weight, std=0.1)
        self.head = nn.Parameter(torch.randn(VOCABULARY, DEPTH) * 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Last hidden states, [B, T, d]."""
        steps = tokens.shape[1]
        states = self.words(tokens) + self.places.weight[:steps]
        mask = nn.Transformer.generate_square_subsequent_mask(steps)
        out: Tensor = self.norm(self.body(states, mask=mask, is_causal=True))
        return out
