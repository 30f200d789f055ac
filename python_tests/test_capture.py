"""benchmarks/capture.py on a small model that is made here."""

import capture
import states
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM


def test_captures_what_the_head_sees(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    tokens = torch.randint(300, (100,))
    found = capture.capture(model, tokens, length=50)
    assert found["weight"].shape == (300, 32)
    logits = model(input_ids=tokens.view(2, 50)).logits.flatten(0, 1)
    again = found["samp1_hidden"].float() @ found["weight"].float().T
    assert (again - logits).abs().max() < 0.05 * logits.abs().max()
    assert torch.equal(found["samp2_hidden"], found["samp1_hidden"] * 2)
    assert all(found[f"{name}_targets"].max() < 300 for name in capture.SHARPNESS)
    path = tmp_path / "states.safetensors"
    save_file(found, path)
    monkeypatch.setenv("SPO_HEAD_STATES", str(path))
    loaded = states.load_states("samp1.5")
    assert loaded.source == "states.safetensors:samp1.5"
    assert torch.equal(loaded.targets, load_file(path)["samp1.5_targets"].long())
