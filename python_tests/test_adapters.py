"""Adapters of PEFT, on the LM head and elsewhere, against the model's own logits in float64."""

import copy

import pytest
import torch
from test_huggingface import family, tokens

import spo_ext
from spo_ext.integrations.adapters import head_product
from spo_ext.integrations.huggingface import add_token_logprobs

peft = pytest.importorskip("peft")

TEMPERATURE = 0.7
SAVED = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
HEADS = {
    "target": {"target_modules": ["q_proj", "lm_head"]},
    "rslora": {"target_modules": ["lm_head"], "use_rslora": True, "lora_alpha": 32, "r": 5},
    "bias": {"target_modules": ["lm_head"], "lora_bias": True},
    "dora": {"target_modules": ["lm_head"], "use_dora": True},
    "parameters": {"target_modules": ["q_proj"], "target_parameters": ["lm_head.weight"]},
    "all-linear": {"target_modules": "all-linear"},
    "saved": SAVED,
    "saved with embeddings": SAVED | {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [7, 8]}},
}
TIED = {
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [7, 8]},
    "embeddings": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "saved": SAVED | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}
CASES = [
    pytest.param(name, peft.LoraConfig(**settings), tied, id=f"{kind}{name}")
    for kind, tied, cases in (("", False, HEADS), ("tied ", True, TIED))
    for name, settings in cases.items()
]
PLACES = [["q_proj", "v_proj"], ["lm_head"]]
METHODS = [
    ("LoHa", {}), ("LoKr", {}), ("BOFT", {"boft_block_size": 4}),
    ("OFT", {"r": 0, "oft_block_size": 4}), ("HRA", {}), ("Vera", {"r": 4}),
    ("FourierFT", {"n_frequency": 20}), ("IA3", {"feedforward_modules": []}),
    ("AdaLora", {"total_step": 10}),
]  # fmt: skip
PROMPTS = [
    ("PromptTuning", {"num_virtual_tokens": 4}),
    ("PromptEncoder", {"num_virtual_tokens": 4, "encoder_hidden_size": 32}),
    ("PrefixTuning", {"num_virtual_tokens": 4}),
    ("AdaptionPrompt", {"adapter_len": 4, "adapter_layers": 1}),
]


def adapted(config, name="Qwen2", **settings):
    """In float64, with every trained number moved away from where the adapter does nothing."""
    model = family(name, settings).double()
    if getattr(model.lm_head, "bias", None) is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def own_logprobs(model, input_ids, attention_mask):
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    logits = logits[:, -input_ids.shape[1] :][:, :-1] / TEMPERATURE  # virtual tokens come first
    return logits.log_softmax(-1).gather(2, input_ids[:, 1:, None]).squeeze(2)


def gradients(model, logprobs, mask):
    weights = torch.linspace(-1, 1, mask.numel(), dtype=logprobs.dtype).view_as(mask)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad((logprobs * weights)[mask].sum(), trained, allow_unused=True)


def check(model, holds_on_left=True):
    """Log-probabilities and gradients, padded and by index, with the adapter on and off."""
    input_ids, attention_mask, targets = tokens()
    if not holds_on_left:
        attention_mask = torch.ones_like(attention_mask)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    counted = targets[:, 1:] != -100
    want = own_logprobs(model, **inputs)
    with model.disable_adapter(), torch.no_grad():
        base = own_logprobs(model, **inputs)
    assert (want - base)[counted].abs().max() > 1e-4
    add_token_logprobs(model, temperature=TEMPERATURE)
    got = model(**inputs, logprob_targets=targets)
    torch.testing.assert_close(got[counted], want[counted], rtol=0, atol=1e-6)
    index = torch.arange(input_ids.numel()).view_as(input_ids)[:, :-1][counted]
    chosen = {"logprob_targets": input_ids[:, 1:][counted], "logprob_index": index}
    torch.testing.assert_close(model(**inputs, **chosen), got[counted], rtol=0, atol=1e-9)
    pairs = zip(gradients(model, got, counted), gradients(model, want, counted), strict=True)
    for gradient, expected in pairs:
        assert (gradient is None) == (expected is None)
        if gradient is not None:
            assert (gradient - expected).norm() <= 1e-6 * expected.norm() + 1e-12
    with model.disable_adapter(), torch.no_grad():
        off = model(**inputs, logprob_targets=targets)
    torch.testing.assert_close(off[counted], base[counted], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "config", "tied"), CASES)
def test_lora_reaches_the_head_in_every_form(name, config, tied):
    check(adapted(config, tie_word_embeddings=tied))


@pytest.mark.parametrize("name", ["target", "bias", "dora", "saved", "tokens"])
def test_a_head_with_a_bias(name):
    settings = HEADS[name]
    check(adapted(peft.LoraConfig(**settings), "Phi"))


@pytest.mark.parametrize("places", PLACES, ids=str)
@pytest.mark.parametrize(("name", "settings"), METHODS)
def test_other_methods(name, settings, places):
    check(adapted(getattr(peft, f"{name}Config")(target_modules=places, **settings)))


@pytest.mark.parametrize(("name", "settings"), PROMPTS)
def test_virtual_tokens_move_no_position(name, settings):
    config = getattr(peft, f"{name}Config")(task_type="CAUSAL_LM", **settings)
    model = adapted(config, "Llama")
    if name == "AdaptionPrompt":
        for module in model.modules():
            if hasattr(module, "adaption_gate"):
                torch.nn.init.ones_(module.adaption_gate)
    check(model, holds_on_left=False)


def test_several_adapters_at_once_and_merged_ones():
    model = adapted(peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=4))
    other = peft.LoraConfig(target_modules=["lm_head"], r=3, lora_alpha=7, init_lora_weights=False)
    model.add_adapter("other", other, autocast_adapter_dtype=False)
    model.double().base_model.set_adapter(["default", "other"])
    check(model)
    input_ids, attention_mask, targets = tokens()
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "logprob_targets": targets}
    with torch.no_grad():
        want = model(**inputs)
        model.merge_adapter()
        torch.testing.assert_close(model(**inputs), want)


def test_small_updates_of_a_16_bit_head_are_not_rounded_away():
    """log pi - log pi_ref of an update 1e-3 as large as W, against float64 of the same numbers."""
    head = torch.nn.Linear(64, 300, bias=False).bfloat16()
    torch.nn.init.normal_(head.weight, std=0.3)
    module = torch.nn.Sequential()
    module.add_module("lm_head", head)
    layer = peft.get_peft_model(module, peft.LoraConfig(target_modules=["lm_head"], r=4))
    layer = layer.base_model.model.lm_head
    b = layer.lora_B["default"].weight
    torch.nn.init.normal_(b, std=1e-3)
    hidden, targets = torch.randn(200, 64).bfloat16(), torch.randint(0, 300, (200,))
    with torch.no_grad():
        product = head_product(layer, hidden)
        got = spo_ext.token_logprobs(product.hidden, product.weight, targets)
        got -= spo_ext.token_logprobs(hidden, head.weight, targets)
        update = layer.scaling["default"] * b.double() @ layer.lora_A["default"].weight.double()
        logits = [
            hidden.double() @ w.t() for w in (head.weight.double() + update, head.weight.double())
        ]
        new, old = (z.log_softmax(1).gather(1, targets[:, None]).squeeze(1) for z in logits)
        merged = (head.weight.double() + update).bfloat16()
        rounded = spo_ext.token_logprobs(hidden, merged, targets) - spo_ext.token_logprobs(
            hidden, head.weight, targets
        )
    want = new - old
    assert (got - want).norm() < 0.01 * want.norm()
    assert (rounded - want).norm() > 0.5 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_adds_nothing_changes_no_bit(dtype):
    model = family("Qwen2", {}).to(dtype)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head", "q_proj"], r=3))
    add_token_logprobs(model.eval())
    input_ids, _, targets = tokens()
    with torch.no_grad():
        on = model(input_ids=input_ids, logprob_targets=targets)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=input_ids, logprob_targets=targets), on)


class Packed(torch.nn.Linear):
    """Holds its weight as integers, like the layers of quantisation libraries."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = torch.nn.Parameter(
            (linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False
        )
        self.bias = linear.bias

    def forward(self, hidden):
        return torch.nn.functional.linear(hidden, self.weight.to(hidden) * self.scale, self.bias)


@pytest.mark.parametrize("name", ["Qwen2", "Phi"])
@pytest.mark.parametrize("adapter", [False, True])
def test_quantised_heads(name, adapter):
    model = family(name, {}).double()
    model.set_output_embeddings(Packed(model.lm_head))
    if adapter:
        config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False).double()
    input_ids, attention_mask, targets = tokens()
    counted = targets[:, 1:] != -100
    want = own_logprobs(model, input_ids, attention_mask)
    add_token_logprobs(model, temperature=TEMPERATURE)
    got = model(input_ids=input_ids, attention_mask=attention_mask, logprob_targets=targets)
    torch.testing.assert_close(got[counted], want[counted], rtol=0, atol=1e-6)
    for gradient, expected in zip(
        gradients(model, got, counted), gradients(model, want, counted), strict=True
    ):
        assert (gradient - expected).norm() <= 1e-6 * expected.norm() + 1e-12


class Linear8bitLt(torch.nn.Linear):
    """By its name, that of bitsandbytes."""


def test_heads_that_are_refused_by_name():
    def refused(model, message):
        with pytest.raises(TypeError, match=message):
            add_token_logprobs(model)

    eight = family("Qwen2", {})
    eight.set_output_embeddings(Linear8bitLt(32, 300))
    refused(eight, "LLM.int8 rounds the hidden states as well, got .*Linear8bitLt")
    config = peft.LoraConfig(target_modules=["lm_head"], use_dora=True, lora_dropout=0.1)
    refused(
        adapted(config), "LM head must be without dropout in its adapter.* got peft.tuners.lora"
    )
    refused(adapted(peft.LilyConfig(target_modules=["lm_head"], r=4)), "without LilyLayer")
    none = family("Qwen2", {})
    none.set_output_embeddings(torch.nn.Identity())
    refused(none, "must be a linear layer, adapted by PEFT, quantised or neither, got .*Identity")


def test_lora_dropout_on_the_head_is_of_the_low_rank_part():
    config = peft.LoraConfig(target_modules=["lm_head"], lora_dropout=0.5)
    layer = adapted(config).get_base_model().lm_head.train()
    hidden = torch.randn(5, 32, dtype=torch.float64)
    torch.manual_seed(1)
    product = head_product(layer, hidden)
    torch.manual_seed(1)
    torch.testing.assert_close(product.hidden @ product.weight.t(), layer(hidden))


def test_a_batch_of_several_adapters_is_refused_on_the_head():
    model = adapted(peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]))
    add_token_logprobs(model)
    input_ids, _, targets = tokens()
    with pytest.raises(ValueError, match="adapter_names must be left out"):
        model(input_ids=input_ids, logprob_targets=targets, adapter_names=["default"] * 3)


def test_a_deep_copy_has_an_adapter_of_its_own():
    model = adapted(peft.LoraConfig(target_modules=["lm_head"]))
    add_token_logprobs(model)
    other = copy.deepcopy(model)
    input_ids, _, targets = tokens()
    inputs = {"input_ids": input_ids, "logprob_targets": targets}
    want = model(**inputs)
    torch.nn.init.normal_(model.get_base_model().lm_head.lora_B["default"].weight)
    assert torch.equal(other(**inputs), want) and not torch.equal(model(**inputs), want)
