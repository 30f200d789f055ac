"""Head states of any Hugging Face causal language model, for the benchmarks.

    python benchmarks/capture.py MODEL TEXT_FILE OUT.safetensors [--tokens 4096] [--length 512]

MODEL is a name or a folder. Writes `weight` [V, d] and, for sharpness x in 1, 1.5, 2 and 3,
`sampx_hidden` [N, d] (the last hidden states times x) and `sampx_targets` [N], sampled from their
softmax: what rollouts look like at that sharpness. The text only gives the states. Then
SPO_HEAD_STATES=OUT.safetensors make bench.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

SHARPNESS = {"samp1": 1.0, "samp1.5": 1.5, "samp2": 2.0, "samp3": 3.0}


@torch.no_grad()
def last_states(model: torch.nn.Module, tokens: Tensor, length: int) -> Tensor:
    """The input of the LM head at every token, [N, d]: whatever the model calls its parts."""
    found: list[Tensor] = []
    head = model.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    for piece in tokens.split(length):
        model(input_ids=piece[None].to(head.weight.device))
    hook.remove()
    return torch.cat([states.flatten(0, -2).cpu() for states in found])


@torch.no_grad()
def sampled(hidden: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    """One word per state, [N]."""
    return torch.cat(
        [
            torch.multinomial((h.float() @ weight.float().T).softmax(-1), 1, generator=generator)
            for h in hidden.split(256)
        ]
    )[:, 0]


def capture(model: torch.nn.Module, tokens: Tensor, length: int) -> dict[str, Tensor]:
    states = last_states(model.eval(), tokens, length).bfloat16()
    weight = model.get_output_embeddings().weight.detach().cpu().bfloat16()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    out = {"weight": weight}
    for name, sharpness in SHARPNESS.items():
        hidden = states * sharpness
        out[f"{name}_hidden"] = hidden
        out[f"{name}_targets"] = sampled(hidden, weight, generator).int()
    return {name: tensor.contiguous() for name, tensor in out.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=512, help="tokens per forward pass")
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    ids = tokenizer(arguments.text.read_text(), return_tensors="pt")["input_ids"][0]
    if len(ids) < arguments.tokens:
        parser.error(f"{arguments.text} has {len(ids)} tokens, fewer than {arguments.tokens}")
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    save_file(capture(model, ids[: arguments.tokens], arguments.length), arguments.out)


if __name__ == "__main__":
    main()
