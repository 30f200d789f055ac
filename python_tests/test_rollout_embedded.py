"""ModelGenerator against the model's own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rollout_cases import END, tiny_model, words

from spo_ext.rollout import Generation, ModelGenerator, Sampling
from spo_ext.store import Prompt

SAMPLING = Sampling(n=3, temperature=0.7, top_p=1.0, max_new_tokens=12, seed=4)


def flat(groups: list[list[Generation]]) -> list[Generation]:
    return [each for group in groups for each in group]


def logprobs_of(model: Any, prompt: Prompt, generation: Generation, temperature: float) -> Any:
    """[T, V] by one forward pass, without padding and cache."""
    ids = [*(prompt.token_ids or ()), *generation.token_ids]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float()
    start = len(prompt.token_ids or ())
    return (logits[start - 1 : -1] / temperature).log_softmax(-1)


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_logprobs_are_those_of_the_policy_at_the_temperature(top_p: float) -> None:
    model = tiny_model()
    sampling = Sampling(n=4, temperature=0.7, top_p=top_p, max_new_tokens=12, seed=4)
    prompts = [Prompt(str(i), token_ids=range(1, 2 + 5 * i)) for i in range(4)]  # 1 to 16 tokens
    groups = ModelGenerator(model, batch_size=6).generate(prompts, sampling)
    assert [len(group) for group in groups] == [4] * 4
    for prompt, group in zip(prompts, groups, strict=True):
        for each in group:
            expected = logprobs_of(model, prompt, each, 0.7)
            tokens = torch.tensor(each.token_ids)[:, None]
            assert each.logprobs is not None
            got = torch.tensor(each.logprobs)
            assert torch.allclose(got, expected.gather(1, tokens).squeeze(1), atol=2e-5)
            # What is likelier than the token has less than top_p together.
            likelier = (expected > expected.gather(1, tokens) + 1e-5).float() * expected.exp()
            assert likelier.sum(1).max() < top_p
    finishes = {each.finish for each in flat(groups)}
    assert finishes == {"eos", "truncated"}


def test_what_is_drawn_has_the_distribution_of_the_policy() -> None:
    model = tiny_model()
    prompt = Prompt("a", token_ids=[7, 8])
    sampling = Sampling(n=4000, temperature=0.6, max_new_tokens=1)
    [group] = ModelGenerator(model, batch_size=4000).generate([prompt], sampling)
    expected = logprobs_of(model, prompt, Generation((0,), "truncated"), 0.6)[0].exp()
    counts = torch.bincount(torch.tensor([each.token_ids[0] for each in group]), minlength=257)
    likely = expected > 0.01
    assert likely.sum() > 10
    deviation = (counts / 4000 - expected).abs() / (expected / 4000).sqrt()
    assert deviation[likely].max() < 4.5  # standard errors
    assert abs(float(counts[~likely].sum()) / 4000 - float(expected[~likely].sum())) < 0.04


def test_every_end_token_ends_and_belongs_to_the_completion() -> None:
    model = tiny_model(end_weight=1.0)
    for ends in ([END, 9, 11, 30, 31, 32], END, list(range(120))):
        model.generation_config.eos_token_id = ends
        every = set(ends) if isinstance(ends, list) else {ends}
        found = flat(ModelGenerator(model).generate(words(12), SAMPLING))
        for each in found:
            *before, last = each.token_ids
            assert not every & set(before)
            assert (last in every) == (each.finish == "eos")
            assert each.finish == "eos" or len(each.token_ids) == 12
            assert each.logprobs is not None and len(each.logprobs) == len(each.token_ids)
        assert {each.finish for each in found} >= {"eos"}
        assert model.generation_config.eos_token_id == ends


def test_completions_share_their_prompts_cache_and_leave_when_they_end() -> None:
    model = tiny_model(end_weight=1.0)
    generator = ModelGenerator(model)
    prompts = [Prompt(str(i), token_ids=range(1, 3 + 4 * i)) for i in range(3)]
    generator.generate(prompts[:1], Sampling(max_new_tokens=1))  # the trial
    shapes: list[tuple[int, ...]] = []
    hook = model.model.register_forward_pre_hook(
        lambda _module, _args, inputs: shapes.append(tuple(inputs["input_ids"].shape)),
        with_kwargs=True,
    )
    shared = generator.generate(prompts, SAMPLING)
    hook.remove()
    assert shapes[:2] == [(3, 10), (9, 1)] or shapes[1][0] < 9
    rows = [count for count, _ in shapes[1:]]
    assert rows == sorted(rows, reverse=True) and rows[-1] < 9
    assert sum(rows) == sum(len(each.token_ids) - 1 for each in flat(shared))
    generator._sharing_cache = False  # by model.generate
    again = generator.generate(prompts, SAMPLING)
    assert [each.token_ids for each in flat(again)] == [each.token_ids for each in flat(shared)]


def test_padding_that_is_the_end_token_changes_nothing() -> None:
    model = tiny_model(end_weight=1.0)
    before = ModelGenerator(model).generate(words(6), SAMPLING)
    model.generation_config.pad_token_id = END
    assert ModelGenerator(model).generate(words(6), SAMPLING) == before
    # A prompt that holds the end token, as chats do, is read whole.
    prompt = Prompt("chat", token_ids=[5, END, END, 6])
    [[each]] = ModelGenerator(model).generate([prompt], Sampling(max_new_tokens=1))
    expected = logprobs_of(model, prompt, each, 1.0)[0, each.token_ids[0]]
    assert each.logprobs is not None and abs(each.logprobs[0] - float(expected)) < 2e-5


def test_without_an_end_in_the_model_the_tokenizers_ends() -> None:
    model = tiny_model(end_weight=1.0, eos_token_id=None)
    sampling = Sampling(n=8, max_new_tokens=20)
    assert {x.finish for x in flat(ModelGenerator(model).generate(words(6), sampling))} == {
        "truncated"
    }

    class Tokenizer:
        eos_token_id = END

    found = flat(ModelGenerator(model, Tokenizer()).generate(words(6), sampling))
    assert any(each.finish == "eos" for each in found)


def test_a_seed_decides_the_completions_whatever_the_batch() -> None:
    model = tiny_model(end_weight=1.0)
    prompts = words(5)
    expected = ModelGenerator(model, batch_size=64).generate(prompts, SAMPLING)
    again = ModelGenerator(model, batch_size=64).generate(prompts, SAMPLING)
    assert again == expected
    ids = [[each.token_ids for each in group] for group in expected]
    for batch_size in (1, 4):
        found = ModelGenerator(model, batch_size=batch_size).generate(prompts[::-1], SAMPLING)
        assert [[each.token_ids for each in group] for group in found[::-1]] == ids
    other = Sampling(**{**_fields(SAMPLING), "seed": 5})
    changed = ModelGenerator(model).generate(prompts, other)
    assert [[each.token_ids for each in group] for group in changed] != ids
    # Samples of a prompt are not each other.
    assert all(len(set(group)) == 3 for group in ids)


def test_nothing_of_the_caller_is_changed() -> None:
    model = tiny_model().train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    own = model.generation_config
    own.repetition_penalty = 1.7
    modes = [module.training for module in model.modules()]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    torch.manual_seed(11)
    state = torch.get_rng_state()
    ModelGenerator(model).generate(words(2), SAMPLING)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert model.generation_config is own and own.repetition_penalty == 1.7
    assert torch.is_grad_enabled()


def test_nothing_else_filters_and_dropout_is_off() -> None:
    prompts = words(3)
    expected = ModelGenerator(tiny_model()).generate(prompts, SAMPLING)
    model = tiny_model(attention_dropout=0.5).train()
    fields = {"top_k": 3, "repetition_penalty": 3.0, "suppress_tokens": list(range(100))}
    for name, value in {**fields, "temperature": 0.1, "top_p": 0.1, "do_sample": True}.items():
        setattr(model.generation_config, name, value)
    assert ModelGenerator(model).generate(prompts, SAMPLING) == expected


def test_an_adapter_generates() -> None:
    peft = pytest.importorskip("peft")
    base = tiny_model()
    plain = ModelGenerator(tiny_model()).generate(words(2), SAMPLING)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    prompts = words(2)
    found = ModelGenerator(model).generate(prompts, SAMPLING)
    assert found != plain
    for prompt, group in zip(prompts, found, strict=True):
        expected = logprobs_of(model, prompt, group[0], 0.7)
        tokens = torch.tensor(group[0].token_ids)[:, None]
        got = torch.tensor(group[0].logprobs)
        assert torch.allclose(got, expected.gather(1, tokens).squeeze(1), atol=2e-5)
    with model.disable_adapter():
        without = flat(ModelGenerator(model).generate(prompts, SAMPLING))
    assert [each.token_ids for each in without] == [each.token_ids for each in flat(plain)]


def test_bad_input_is_refused_by_name() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"prompts\[1\].token_ids must be at least one token id"):
        ModelGenerator(model).generate([*words(1), Prompt("text only")], SAMPLING)
    with pytest.raises(ValueError, match="ModelGenerator: model must be a model with generate"):
        ModelGenerator(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got 0"):
        ModelGenerator(model, batch_size=0)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits of the model must not be NaN"):
        ModelGenerator(model).generate(words(1), SAMPLING)
    assert ModelGenerator(tiny_model()).generate([], SAMPLING) == []


def _fields(sampling: Sampling) -> dict[str, Any]:
    return {name: getattr(sampling, name) for name in Sampling.__dataclass_fields__}
