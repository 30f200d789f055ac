"""Precision, memory and logging options of transformers.TrainingArguments under SPO."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from test_trainer_model import LAYOUTS, answer, by_logits, make_sequences
from trainer_cases import VOCABULARY, fill, make_model, make_tokenizer, with_adapters
from trainer_process import settings

from spo_ext.store import Origin, PromptValue, Trajectory, TrajectoryStore
from spo_ext.trainer import SPOConfig, SPOTrainer
from spo_ext.trainer.batches import Tokens, collate
from spo_ext.trainer.feed import score_store
from spo_ext.trainer.model import HeadSettings, answer_logprobs, completion_logprobs

SQUARED = {"mixture": "offline", "rollouts": "none", "objective": "squared", "group_size": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with TrajectoryStore(tmp_path / "store.db") as store:
        fill(store)
        store.put_q0({p.id: PromptValue(0.3, 4, 0.5, 1.0) for p in store.prompts("train")})
    return tmp_path


class Gradients(SPOTrainer):
    """Keeps the loss and the gradients of the first micro-batch."""

    def training_step(self, model: nn.Module, *rest: Any) -> Tensor:
        loss = super().training_step(model, *rest)
        if not hasattr(self, "first"):
            named = model.named_parameters()
            self.first = {n: p.grad.clone() for n, p in named if p.grad is not None}
            self.first["loss"] = loss.detach().clone()
        return loss


def learn(folder: Path, run: str, model: Any = None, **options: Any) -> Gradients:
    """After two steps of a run of its own."""
    changes = {**SQUARED, "max_steps": 2, "output_dir": str(folder / run), "run": run, **options}
    config = SPOConfig(**settings(folder, **changes))
    trainer = Gradients(make_model() if model is None else model, config, make_tokenizer())
    trainer.train()
    return trainer


def lines(trainer: SPOTrainer) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def equal_adapters() -> Any:
    """Adapters that add nothing yet."""
    model = with_adapters(make_model())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    return model


def low_precision(kind: str) -> dict[str, Any]:
    if kind == "weights":
        return {"model": make_model().bfloat16()}
    return {"bf16": True, "model": equal_adapters() if kind == "adapters" else None}


@pytest.mark.parametrize("kind", ["autocast", "adapters", "weights"])
@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_bf16_policy_and_reference_agree_exactly(folder: Path, kind: str, packing: str) -> None:
    """The same weights give the same bits, so the first step sees no divergence that is not."""
    trainer = learn(folder, "low", packing=packing, **low_precision(kind))
    first, second = lines(trainer)
    assert (first["spo/log_ratio"], first["kl"]) == (0.0, 0.0)
    assert second["kl"] > 0
    exact = lines(learn(folder, "exact", equal_adapters() if kind == "adapters" else None))
    assert second["loss"] != exact[1]["loss"]  # it was another arithmetic,
    assert first["grad_norm"] == pytest.approx(exact[0]["grad_norm"], rel=0.02)  # of the same


def test_each_precision_has_reference_scores_of_its_own(folder: Path) -> None:
    learn(folder, "low", bf16=True)
    learn(folder, "exact")
    with TrajectoryStore(folder / "store.db") as store:
        low, exact = sorted(store.reference_fingerprints(), reverse=True)
    assert low == f"bf16-{exact}"


def test_cached_scores_must_be_of_the_same_precision(folder: Path) -> None:
    with TrajectoryStore(folder / "store.db") as store:
        exact, _ = score_store(store, make_model(), make_tokenizer(), temperature=1.0, quiet=True)
        with pytest.raises(ValueError, match="mixed precision 'bf16' .it has none: run spo score"):
            learn(folder, "a", reference="cached", bf16=True, reference_fingerprint=exact)
        score_store(
            store, make_model(), make_tokenizer(), temperature=1.0, precision="bf16", quiet=True
        )
    cached = learn(folder, "b", reference="cached", bf16=True)
    assert lines(cached)[0]["kl"] < 1e-4  # scored in other batches


def test_gradient_checkpointing_computes_the_same(folder: Path) -> None:
    plain = learn(folder, "plain")
    saving = learn(folder, "saving", gradient_checkpointing=True)
    assert saving.model.is_gradient_checkpointing
    assert plain.first.keys() == saving.first.keys() and len(plain.first) > 20
    for name, gradient in plain.first.items():
        assert torch.equal(saving.first[name], gradient), name


def test_tied_embeddings_get_both_gradients(folder: Path) -> None:
    model = make_model(tie_word_embeddings=True, kind="llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = learn(folder, "tied", model, max_steps=1, per_device_train_batch_size=32)
    model.load_state_dict(start, strict=False)
    model.zero_grad()
    loss = torch.zeros(())
    with TrajectoryStore(folder / "store.db") as store:
        prompts = {prompt.id: prompt.token_ids for prompt in store.prompts("train")}
        for row in store.trajectories():
            ids = torch.tensor([[*prompts[row.prompt_id], *row.token_ids]])
            logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            taken = logprobs.gather(-1, ids[0, 1:, None])[-len(row.token_ids) :].sum()
            loss = loss + (0.3 + 0.5 * (taken - taken.detach()) - row.reward) ** 2 / 32
    loss.backward()
    assert float(loss) == pytest.approx(float(trainer.first["loss"]), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trainer.first[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_dropout_stays_out_of_reference_scores(folder: Path) -> None:
    learn(folder, "plain")
    learn(folder, "dropping", make_model(attention_dropout=0.5))
    with TrajectoryStore(folder / "store.db") as store:
        names = list(store.reference_fingerprints())  # two: the configs differ, the weights do not
        rows = [row.id for row in store.trajectories()]
        one, other = (store.ref_logprobs(rows, name) for name in names)
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    assert len(pairs) == 16
    torch.testing.assert_close([a for a, _ in pairs], [b for _, b in pairs], rtol=0, atol=1e-6)


def test_dropped_mass_reaches_the_head(folder: Path) -> None:
    """The forward pass stays exact; the gradient leaves words out."""
    sharp = make_model(vocab_size=2048)
    with torch.no_grad():
        sharp.lm_head.weight.mul_(20)
    full = learn(folder, "full", sharp, learning_rate=0.0)
    some = learn(folder, "some", sharp, learning_rate=0.0, max_dropped_mass=0.2)
    assert lines(some)[0]["loss"] == lines(full)[0]["loss"]
    kept, whole = some.first["lm_head.weight"], full.first["lm_head.weight"]
    assert not torch.equal(kept, whole)
    assert float((kept - whole).norm() / whole.norm()) < 0.2


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_implementations_agree(attention: str, layout: Any) -> None:
    device = "cpu"
    if attention == "flex_attention":
        if not torch.cuda.is_available():
            pytest.skip("flex attention has no backward pass on the CPU, and compiles for long")
        device = "cuda"
    expected = torch.cat([by_logits(make_model(), tokens, 1.0) for tokens in make_sequences()])
    model = make_model()
    model.set_attn_implementation(attention)
    model.to(device)
    answer_logprobs(model, HeadSettings())
    found = answer(model, layout).double().cpu()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def test_tensorboard_gets_every_series(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = learn(folder, "board", report_to="tensorboard")
    [file] = (folder / "board").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    for name in ("loss", "kl", "spo/residual", "spo/log_ratio", "store/reuse"):
        written = [event.value for event in events.Scalars(f"train/{name}")]
        assert written == pytest.approx([line[name] for line in lines(trainer)], rel=1e-6), name


def test_trackio_gets_every_series(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("trackio is not installed")
    import sqlite3

    import trackio.sqlite_storage as storage
    import trackio.utils as utils

    for module in (storage, utils):  # read from the environment once
        monkeypatch.setattr(module, "TRACKIO_DIR", folder / "trackio")
    trainer = learn(folder, "tracked", report_to="trackio", project="spo")
    with sqlite3.connect(folder / "trackio" / "spo.db") as database:
        rows = [row[0] for row in database.execute("select metrics from metrics")]
    words = " ".join(row.decode() if isinstance(row, bytes) else row for row in rows)
    for name in ("loss", "kl", "spo/residual"):
        assert f"train/{name}" in words
    assert str(lines(trainer)[1]["spo/residual"])[:8] in words


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("auto_find_batch_size", True),
        ("label_smoothing_factor", 0.1),
        ("neftune_noise_alpha", 5.0),
        ("train_sampling_strategy", "group_by_length"),
        ("use_liger_kernel", True),
        ("bf16_full_eval", True),
        ("fp16_full_eval", True),
    ],
)
def test_options_that_would_break_or_be_ignored(folder: Path, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"SPOConfig: {name} must be .*got {value!r}"):
        SPOConfig(**settings(folder, **SQUARED, **{name: value}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"replay_ratio": 2.0}, "replay_ratio must be a number >= 1.0 and <= 1, got 2.0"),
        (
            {"replay_ratio": 2.0, "sync_every": 2, "rollouts": "external"},
            "replay_ratio must be 1 for rollouts 'external', which others write, got 2.0",
        ),
    ],
)
def test_a_replay_that_cannot_be(folder: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SPOConfig(**settings(folder, **changes))


def test_what_a_failure_is(folder: Path) -> None:
    assert SPOConfig(**settings(folder, reward_range=[-1.0, 3.0])).failure_below == 1.0
    assert SPOConfig(**settings(folder, taper_below=0.25)).failure_below == 0.25


def test_rarely_solved_prompts_count_more(folder: Path) -> None:
    """One of four is right everywhere, so rarity 2 scales the group's loss by (3/4)^2."""
    group = {"objective": "group", "group_size": 4, "max_steps": 1, "taper": False}
    even, rare = (learn(folder, f"r{n}", rarity=n, **group) for n in (0.0, 2.0))
    assert "spo/weight" not in lines(even)[0]
    assert lines(rare)[0]["spo/weight"] == pytest.approx(9 / 16)
    loss = float(even.first["loss"])
    assert float(rare.first["loss"]) == pytest.approx(9 / 16 * loss, rel=1e-5)
    with pytest.raises(ValueError, match="group_size must be at least 2 for a rarity > 0, got 1"):
        SPOConfig(**settings(folder, **SQUARED, rarity=1.0))


def test_a_tapered_failure_counts_as_much_as_the_policy_would_still_write_it(folder: Path) -> None:
    """Behaviour log-probabilities of 0 say that it was certain of what it wrote."""
    with TrajectoryStore(folder / "store.db") as store:
        prompts = list(store.prompts("train"))
        origin = Origin("model", model="certain")
        for prompt in prompts:
            rows = [
                Trajectory(prompt.id, ids, reward, origin, "eos", behaviour_logprobs=[0.0, 0.0])
                for ids, reward in (([5, 6], 0.0), ([6, 5], 1.0))
            ]
            store.append(rows)
    only = {"mixture": {"model:certain": 1.0}, "max_steps": 1, "per_device_train_batch_size": 16}
    found = {taper: learn(folder, str(taper), taper=taper, **only) for taper in (True, False)}
    model, tokens = make_model(), [Tokens(p.token_ids or [], [5, 6]) for p in prompts]
    answer_logprobs(model, HeadSettings())
    logprobs, _ = completion_logprobs(model, collate(tokens, "padded"))
    failed = logprobs.detach().view(-1, 2).sum(1).exp()
    weight = lines(found[True])[0]["spo/weight"]
    assert weight == pytest.approx((1 + float(failed.mean())) / 2, rel=1e-4) and weight < 0.9
    assert "spo/weight" not in lines(found[False])[0]
    assert float(found[True].first["loss"]) != pytest.approx(float(found[False].first["loss"]))


def mixture_of_experts(coefficient: float) -> Any:
    import transformers as hf

    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"num_local_experts": 4, "max_position_embeddings": 128}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    return hf.MixtralForCausalLM(
        hf.MixtralConfig(**shape, **ends, router_aux_loss_coef=coefficient)
    )


def test_router_loss_of_a_mixture_of_experts(folder: Path) -> None:
    """coefficient times the mean of the model's own loss over micro-batches is added."""
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    options |= {"max_steps": 1, "packing": "padded"}
    without, of_config, given = (
        lines(learn(folder, name, mixture_of_experts(coefficient), **options, **more))[0]
        for name, coefficient, more in (
            ("without", 0.5, {"router_aux_loss_coef": 0.0}),
            ("config", 0.5, {}),
            ("given", 0.0, {"router_aux_loss_coef": 0.25}),
        )
    )
    assert "aux_loss" not in without and of_config["aux_loss"] == given["aux_loss"]
    assert of_config["aux_loss"] > 1.5  # 2 experts a token
    for line, coefficient in ((of_config, 0.5), (given, 0.25)):
        added = coefficient * line["aux_loss"]
        assert line["loss"] == pytest.approx(without["loss"] + added, rel=1e-4)


def test_a_router_loss_that_there_is_not(folder: Path) -> None:
    with pytest.raises(ValueError, match="SPOConfig: router_aux_loss_coef must be left out .*0.1"):
        learn(folder, "plain", router_aux_loss_coef=0.1)
