"""Options of GRPOConfig in the mixin's loss, against formulas written out in float64."""

import copy

import pytest
import torch
from integration_cases import example
from test_trl import run

pytest.importorskip("trl")


def start(folder, **options):
    """A trainer after two steps, and a batch of its last generation with gradients wanted."""
    module, kept = example("trl_grpo"), []
    compute = module.SPOGRPOTrainer._compute_loss

    def record(self, model, inputs):
        kept.append(inputs)
        return compute(self, model, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.SPOGRPOTrainer, "_compute_loss", record)
        trainer = run(folder, per_device_train_batch_size=8, **options)
    trainer.model.train()
    return trainer, kept[-1]


def gradients(loss, model):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def distributions(model, inputs):
    """Log-probabilities and entropies of the completions' tokens, float64 [B, T], by eager code."""
    double = copy.deepcopy(model).double()
    double.set_experts_implementation("eager")
    for module in double.modules():
        vars(module).pop("forward", None)
    ids, mask = (
        torch.cat([inputs[f"prompt_{part}"], inputs[f"completion_{part}"]], 1)
        for part in ("ids", "mask")
    )
    length = inputs["completion_ids"].shape[1]
    logits = double(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1]
    logprobs = (logits / example("tiny").TEMPERATURE).log_softmax(-1)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    return double, logprobs.gather(2, inputs["completion_ids"][..., None]).squeeze(2), entropies


def residuals(logprobs, inputs):
    mask = inputs["completion_mask"]
    log_ratio = ((logprobs - inputs["ref_per_token_logps"].double()) * mask).sum(1)
    return inputs["spo_q0"] + example("tiny").BETA * log_ratio - inputs["spo_rewards"]


def high(entropies, mask, share):
    """The share of the tokens with the highest entropies."""
    kept = entropies.detach()[mask].sort(descending=True).values
    return mask & (entropies >= kept[round(share * len(kept)) - 1])


def bonus(logprobs, entropies, inputs):
    mask = inputs["completion_mask"].bool()
    return residuals(logprobs, inputs).square().mean() - 0.3 * entropies[mask].mean()


def filtered(logprobs, entropies, inputs):
    taught = high(entropies, inputs["completion_mask"].bool(), 0.5)
    chosen = torch.where(taught, logprobs, logprobs.detach())
    return residuals(chosen, inputs).square().mean()


def filtered_bonus(logprobs, entropies, inputs):
    taught = high(entropies, inputs["completion_mask"].bool(), 0.5)
    return filtered(logprobs, entropies, inputs) - 0.3 * entropies[taught].mean()


def unmasked(logprobs, entropies, inputs):
    """Half of the completions were written by another policy, 0.6 nats per token away."""
    residual = residuals(logprobs, inputs)
    far = torch.arange(len(residual)) % 2 == 0
    assert ((residual > 0) & far).any() and ((residual < 0) & far).any()
    return torch.where((residual > 0) & far, 0, residual.square()).mean()


CASES = [
    ({"entropy_coef": 0.3}, bonus),
    ({"top_entropy_quantile": 0.5}, filtered),
    ({"top_entropy_quantile": 0.5, "entropy_coef": 0.3}, filtered_bonus),
    ({"off_policy_mask_threshold": 0.5}, unmasked),
]


@pytest.mark.parametrize(("options", "formula"), CASES)
def test_options_of_the_loss(tmp_path, options, formula):
    trainer, inputs = start(tmp_path, **options)
    if formula is unmasked:
        with torch.no_grad():
            _, logprobs, _ = distributions(trainer.model, inputs)
        away = 0.6 * (torch.arange(len(logprobs)) % 2 == 0)[:, None]
        inputs["old_per_token_logps"] = logprobs.float() + away
        inputs["spo_q0"] = inputs["spo_q0"] + torch.tensor([-0.5, -0.5, 0.5, 0.5] * 2)
    loss = trainer._compute_loss(trainer.model, inputs)
    double, logprobs, entropies = distributions(trainer.model, inputs)
    want = formula(logprobs, entropies, inputs)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert want.item() != pytest.approx(residuals(logprobs, inputs).square().mean().item()) or (
        formula is filtered  # which changes the gradient alone
    )
    pairs = zip(gradients(loss, trainer.model), gradients(want, double), strict=True)
    for gradient, expected in pairs:
        assert (gradient - expected).norm() < 1e-4 * expected.norm() + 1e-7


def test_adaptive_entropy(tmp_path):
    """Off while the entropy is above the target; moves by its step once an optimiser step."""
    options = {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_coef_delta": 0.02}
    above, inputs = start(tmp_path, **options, entropy_target=0.1, gradient_accumulation_steps=2)
    assert above.entropy_coef == pytest.approx(0.1 - 2 * 0.02)
    _, _, entropies = distributions(above.model, inputs)
    assert above._last_world_entropy > entropies.min() > 0.1
    off = above._compute_loss(above.model, inputs)
    plain = residuals(distributions(above.model, inputs)[1], inputs).square().mean() / 2
    assert off.item() == pytest.approx(plain.item(), rel=1e-5)
    below, _ = start(tmp_path, **options, entropy_target=100.0)
    assert below.entropy_coef == pytest.approx(0.1 + 2 * 0.02)
    log = [line for line in below.state.log_history if "policy_loss" in line]
    assert log[0]["loss"] == pytest.approx(log[0]["policy_loss"], abs=1e-5)  # nothing measured yet
    bonus = 0.12 * log[1]["entropy"]
    assert log[1]["loss"] == pytest.approx(log[1]["policy_loss"] - bonus, abs=1e-4)


def test_rewards_normalized_one_by_one(tmp_path, monkeypatch):
    module = example("trl_grpo")
    first, second = (
        module.reward,
        lambda completion_ids, **_: [i[0] * 100.0 for i in completion_ids],
    )
    monkeypatch.setattr(module, "reward", [first, second])
    aggregation = {"multi_objective_aggregation": "normalize_then_sum"}
    _, inputs = start(tmp_path, **aggregation, reward_weights=[1.0, 0.5], max_steps=1)
    ids = [row[mask.bool()].tolist() for row, mask in zip(*completions(inputs), strict=True)]
    parts = [torch.tensor(f(ids), dtype=torch.float64) for f in (first, second)]
    want = torch.zeros(8, dtype=torch.float64)
    prompts = inputs["prompt_ids"].tolist()
    for prompt in {tuple(prompt) for prompt in prompts}:
        rows = [i for i, other in enumerate(prompts) if tuple(other) == prompt]
        for weight, part in zip((1.0, 0.5), parts, strict=True):
            own = part[rows]
            want[rows] += weight * (own - own.mean()) / (own.std() + 1e-4)
    torch.testing.assert_close(inputs["spo_rewards"].double(), want, rtol=1e-4, atol=1e-4)


def completions(inputs):
    return inputs["completion_ids"], inputs["completion_mask"]


def test_router_loss_of_a_mixture_of_experts(tmp_path, monkeypatch):
    saved_instead(monkeypatch, "Mixtral", num_local_experts=4, router_aux_loss_coef=0.5)
    trainer, inputs = start(tmp_path)
    assert (trainer.aux_loss_enabled, trainer.router_aux_loss_coef) == (True, 0.5)
    loss = trainer._compute_loss(trainer.model, inputs)
    double, logprobs, _ = distributions(trainer.model, inputs)
    ids, mask = (
        torch.cat([inputs[f"prompt_{part}"], inputs[f"completion_{part}"]], 1)
        for part in ("ids", "mask")
    )
    aux = double(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    want = residuals(logprobs, inputs).square().mean() + 0.5 * aux
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert trainer._metrics["train"]["aux_loss"][-1] == pytest.approx(aux.item(), rel=1e-5)
    name, gate = next(pair for pair in double.named_parameters() if "gate" in pair[0])
    own = dict(trainer.model.named_parameters())[name]
    (expected,), (gradient,) = torch.autograd.grad(want, gate), torch.autograd.grad(loss, own)
    assert (gradient - expected).norm() < 1e-4 * expected.norm()


def saved_instead(monkeypatch, name, **changes):
    """The example's model is another one."""
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    shape |= {"vocab_size": example("tiny").tiny_model().config.vocab_size}
    shape |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    config = getattr(transformers, f"{name}Config")(**shape | changes)
    config.initializer_range = 0.3

    def save(folder):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder)
        return folder

    monkeypatch.setattr(example("trl_grpo"), "save_tiny_model", save)


def test_a_model_that_counts_padding_on_the_left_gets_it_on_the_right(tmp_path, monkeypatch):
    saved_instead(monkeypatch, "GPT2", resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)
    trainer, inputs = start(tmp_path)
    ids, mask = (
        torch.cat([inputs[f"prompt_{part}"], inputs[f"completion_{part}"]], 1)
        for part in ("ids", "mask")
    )
    ids = torch.nn.functional.pad(ids, (3, 0))  # beside a longer prompt
    mask = torch.nn.functional.pad(mask, (3, 0))
    length = inputs["completion_ids"].shape[1]
    with torch.no_grad():
        got, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, length, compute_entropy=True
        )
        _, want, entropy = distributions(trainer.model, inputs)
    counted = inputs["completion_mask"].bool()
    assert set(trainer._right_padded.values()) == {True}
    for ours, theirs in ((got, want), (entropies, entropy)):
        torch.testing.assert_close(ours[counted], theirs[counted].float(), rtol=0, atol=2e-5)


def test_models_that_depend_on_the_longest_sequence(tmp_path, monkeypatch):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    saved_instead(monkeypatch, "Llama", max_position_embeddings=8, rope_parameters=rope)
    with pytest.raises(
        ValueError, match="SPOMixin: prompt and completion must be at most 8 tokens"
    ):
        start(tmp_path)


def test_warns_of_dropout(tmp_path, monkeypatch, caplog):
    saved_instead(monkeypatch, "Llama", attention_dropout=0.1)
    start(tmp_path, max_steps=1)
    assert "the policy has dropout" in caplog.text
    caplog.clear()
    start(tmp_path, max_steps=1, disable_dropout=True)
    assert "the policy has dropout" not in caplog.text
