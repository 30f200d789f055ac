"""Token log-probabilities from inside the forward pass, against the model's own logits."""

import copy

import pytest
import torch
from integration_cases import eager_logprobs, example, run_on_two_ranks

import spo_ext

transformers = pytest.importorskip("transformers")
huggingface = pytest.importorskip("spo_ext.integrations.huggingface")

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
# The last number is the head's: another scale, or a cap that reaches the logits.
FAMILIES = [
    ("Qwen2", {}, {}),
    ("Gemma2", {"final_logit_softcapping": 0.5}, {}),
    ("Cohere", {"logit_scale": 0.3}, {}),
    ("Granite", {"logits_scaling": 3.0}, {}),
    ("FalconH1", {"lm_head_multiplier": 2.0, "mamba_d_ssm": 32, "mamba_n_heads": 4}, {}),
    ("Phi", {}, {"bias": True}),
]


def family(name, settings):
    config = getattr(transformers, f"{name}Config")(vocab_size=300, **SMALL, **settings)
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def tokens(vocabulary=300):
    """input_ids, attention_mask, and targets with holes, [3, 7]."""
    input_ids = torch.randint(2, vocabulary, (3, 7))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 5:] = 0
    attention_mask[2, :2] = 0  # on the left, where causal attention would see it
    targets = input_ids.masked_fill(attention_mask == 0, -100)
    targets[:, :3] = -100
    return input_ids, attention_mask, targets


@pytest.mark.parametrize(("name", "settings", "expected"), FAMILIES)
def test_equals_the_models_own_logits(name, settings, expected):
    model = family(name, settings)
    if expected:
        assert model.lm_head.bias is not None
        torch.nn.init.normal_(model.lm_head.bias)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    input_ids, attention_mask, targets = tokens()
    want = eager_logprobs(model, input_ids, attention_mask, 0.7)
    before = model(input_ids, attention_mask=attention_mask).logits
    huggingface.add_token_logprobs(model, temperature=0.7)
    got = model(input_ids, attention_mask=attention_mask, logprob_targets=targets)
    counted = targets[:, 1:] != -100
    torch.testing.assert_close(got.double(), want.where(counted, 0), rtol=0, atol=2e-5)
    assert torch.equal(model(input_ids, attention_mask=attention_mask).logits, before)


def test_entropy_and_gradients():
    model = family("Qwen2", {})
    input_ids, attention_mask, targets = tokens()
    logits = model(input_ids, attention_mask=attention_mask).logits[:, :-1] / 0.7
    counted = targets[:, 1:] != -100
    distribution = torch.distributions.Categorical(logits=logits)
    want = distribution.log_prob(input_ids[:, 1:]).where(counted, 0)
    want_grads = torch.autograd.grad(want.sum(), list(model.parameters()))
    huggingface.add_token_logprobs(model, temperature=0.7)
    logprobs, entropy = model(
        input_ids, attention_mask=attention_mask, logprob_targets=targets, logprob_entropy=True
    )
    torch.testing.assert_close(entropy, distribution.entropy().where(counted, 0))
    grads = torch.autograd.grad(logprobs.sum(), list(model.parameters()))
    for got, expected in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_deep_copy_is_a_model_of_its_own():
    model = family("Qwen2", {})
    huggingface.add_token_logprobs(model)
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.lm_head.weight)
    input_ids, attention_mask, targets = tokens()
    want = eager_logprobs(other, input_ids, attention_mask, 1.0)
    got = other(input_ids, attention_mask=attention_mask, logprob_targets=targets)
    assert not torch.equal(other(input_ids).logits, model(input_ids).logits)
    torch.testing.assert_close(
        got.double(), want.where(targets[:, 1:] != -100, 0), rtol=0, atol=2e-5
    )


def test_generation_stays_as_it_was():
    model = family("Qwen2", {})
    prompt = tokens()[0][:, :4]
    want = model.generate(prompt, max_new_tokens=5, do_sample=False)
    huggingface.add_token_logprobs(model)
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), want)


def test_images_reach_the_model():
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 8, "patch_size": 4}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.Qwen2Config(vocab_size=300, **SMALL),
        image_token_index=299,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    input_ids, _, _ = tokens(299)
    input_ids[:, 1:5] = 299  # four patches
    targets = input_ids.clone()
    targets[:, :5] = -100
    images = {"pixel_values": torch.randn(3, 3, 8, 8)}
    logits = model(input_ids, **images).logits[:, :-1]
    want = logits.log_softmax(-1).gather(2, input_ids[:, 1:, None]).squeeze(2)
    huggingface.add_token_logprobs(model)
    got = model(input_ids=input_ids, logprob_targets=targets, **images)
    counted = targets[:, 1:] != -100
    torch.testing.assert_close(got[counted], want[counted], rtol=0, atol=2e-5)
    images["pixel_values"] = images["pixel_values"].flip(0)
    other = model(input_ids=input_ids, logprob_targets=targets, **images)
    assert (other - got)[counted].abs().max() > 1e-4


MIXTURES = [
    ("Mixtral", {"num_local_experts": 4}),
    ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
]


@pytest.mark.parametrize(("name", "settings"), MIXTURES)
def test_router_loss_is_the_models_own(name, settings):
    model = family(name, settings)
    input_ids, attention_mask, targets = tokens()
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    want = model(**inputs, output_router_logits=True)
    router = [parameter for name, parameter in model.named_parameters() if "router" in name]
    router += [parameter for name, parameter in model.named_parameters() if "gate.weight" in name]
    want_grads = torch.autograd.grad(want.aux_loss, router)
    huggingface.add_token_logprobs(model)
    plain = model(**inputs, logprob_targets=targets)
    asked = {"logprob_targets": targets, "output_router_logits": True}
    logprobs, aux_loss = model(**inputs, **asked)
    assert torch.equal(logprobs, plain)
    torch.testing.assert_close(aux_loss, want.aux_loss)
    assert aux_loss > 1  # its least value is the number of experts that a token takes
    for got, expected in zip(torch.autograd.grad(aux_loss, router), want_grads, strict=True):
        torch.testing.assert_close(got, expected)
    again, entropy, loss = model(**inputs, **asked, logprob_entropy=True)
    assert (
        torch.equal(again, plain) and torch.equal(loss, aux_loss) and entropy.shape == plain.shape
    )


def test_what_is_refused():
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        huggingface.add_token_logprobs(family("Qwen2", {}), temperature=0)
    model = family("Qwen2", {})
    huggingface.add_token_logprobs(model)
    input_ids, _, targets = tokens()
    with pytest.raises(ValueError, match="output_router_logits must be left out.* got Qwen2For"):
        model(input_ids, logprob_targets=targets, output_router_logits=True)


def losses(model, rows):
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    ref, rewards, q0 = (batch.pop(name) for name in ("ref_logprobs", "rewards", "q0"))
    targets = batch.pop("labels")
    logprobs = model(**batch, logprob_targets=targets)
    mask = targets[:, 1:] != -100
    return spo_ext.loss(logprobs, ref, rewards, q0, beta=0.1, objective="squared", mask=mask)


def _ddp_rank(rank, model, rows, want):
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    losses(wrapped, rows[4 * rank : 4 * rank + 4]).backward()
    for parameter, grad in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-5, atol=1e-6)


def test_ddp_averages_the_gradients():
    tiny = example("tiny")
    model = tiny.tiny_model()
    huggingface.add_token_logprobs(model, temperature=tiny.TEMPERATURE)
    rows = tiny.rows(model)
    want = torch.autograd.grad(losses(model, rows), list(model.parameters()))
    run_on_two_ranks(_ddp_rank, model, rows, want)
