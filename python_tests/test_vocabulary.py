"""A head whose rows are in another order: the same numbers, ids and checkpoints as before."""

import copy
import pickle

import pytest
import torch
from conftest import GRAD_TOLERANCE, LOGPROB_TOLERANCE, doubled, eager, relative_error
from test_dropped_mass import check_certificate
from torch import nn

import spo_ext
from spo_ext.vocabulary import OrderedEmbedding

on_each_device = pytest.mark.usefixtures("device")


def heads(vocabulary, depth, dtype=torch.float32, bias=True):
    linear = nn.Linear(depth, vocabulary, bias=bias, dtype=dtype)
    nn.init.normal_(linear.weight, std=2 / depth**0.5)
    return linear, spo_ext.OrderedHead(linear, torch.randperm(vocabulary))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.uint8])
@pytest.mark.parametrize("size", [0, 1, 7, 3000])
def test_frequent_words_come_first_and_ties_by_id(size, dtype):
    counts = torch.randint(0, 5, (size,)).to(dtype)
    order = spo_ext.frequency_order(counts)
    assert order.dtype == torch.int64
    assert order.tolist() == sorted(range(size), key=lambda word: (-counts[word].item(), word))


@on_each_device
@pytest.mark.parametrize("options", [dict(), dict(softcap=5.0)])
@pytest.mark.parametrize("dtype", list(GRAD_TOLERANCE))
@pytest.mark.parametrize("shape", [(1, 1, 3), (15, 257, 65), (60, 3000, 40)])
def test_log_probabilities_and_gradients_by_id(shape, dtype, options):
    tokens, vocabulary, depth = shape
    linear, head = heads(vocabulary, depth, dtype)
    hidden = torch.randn(tokens, depth).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,))
    targets[1:3] = -100
    truth = [doubled(t) for t in (hidden, linear.weight, linear.bias)]
    want, _ = eager.token_logprobs(truth[0], truth[1], targets, bias=truth[2], **options)
    upstream = torch.randn(tokens)
    want_grads = torch.autograd.grad(want, truth, upstream.double())
    logprobs = spo_ext.token_logprobs(
        hidden, head.weight, head.targets(targets), bias=head.bias, **options
    )
    upstream = upstream.to(logprobs.dtype)
    grads = torch.autograd.grad(logprobs, (hidden, head.weight, head.bias), upstream)
    by_id = grads[0], grads[1][head.row_of], grads[2][head.row_of]
    assert relative_error(logprobs, want) <= LOGPROB_TOLERANCE[dtype]
    for got, right in zip(by_id, want_grads, strict=True):
        assert relative_error(got, right) <= GRAD_TOLERANCE[dtype]


@on_each_device
def test_the_loss_is_the_same():
    linear, head = heads(700, 16, torch.float64, bias=False)
    hidden, targets = torch.randn(4, 9, 16, dtype=torch.float64), torch.randint(700, (4, 9))
    targets[2, 5:] = -1
    rest = torch.full((4, 9), -6.0), torch.linspace(-1, 0, 4), 0.1
    options = dict(beta=0.1, objective="squared", ignore_index=-1)
    want = spo_ext.linear_loss(hidden, linear.weight, targets, *rest, **options)
    got = spo_ext.linear_loss(hidden, head.weight, head.targets(targets, -1), *rest, **options)
    assert want > 0 and relative_error(got, want) < 1e-12


@pytest.mark.parametrize("eps", [2.0**-10, 2.0**-4])
def test_likely_words_together_keep_fewer_pairs_under_the_same_certificate(eps):
    """Of 4000 words 200 are likely, wherever their ids are; the first dimension says which."""
    linear = nn.Linear(24, 4000, bias=False, dtype=torch.float64)
    likely = torch.randperm(4000)[:200]
    linear.weight.data.normal_(std=0.2)[:, 0] = -12
    linear.weight.data[likely, 0] = 0
    targets = likely[torch.randint(200, (1400,))]
    hidden = linear.weight.detach()[targets] * 4 + 0.5 * torch.randn(1400, 24, dtype=torch.float64)
    hidden[:, 0] = 1
    seen, measured = targets[:1200], slice(1200, None)
    frequency = spo_ext.frequency_order(torch.bincount(seen, minlength=4000))
    shares = []
    for order in (frequency, torch.randperm(4000)):
        head = spo_ext.OrderedHead(linear, order)
        states = hidden[measured].requires_grad_()
        rows = head.targets(targets[measured])
        shares.append(check_certificate(states, head.weight, rows, eps))
    assert shares[0] < 0.5 * shares[1]


@on_each_device
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ids_that_are_no_words_pass_through(dtype):
    _, head = heads(50, 4)
    targets = torch.tensor([[0, 49, -100], [-1, 50, 2**31 - 1]], dtype=dtype)
    rows = head.targets(targets)
    assert rows.dtype == dtype and head.order[rows[0, :2].long()].tolist() == [0, 49]
    assert torch.equal(rows.flatten()[2:], targets.flatten()[2:])


def test_an_id_out_of_range_is_reported_as_it_was_given():
    _, head = heads(50, 4)
    for wrong in (-1, 50):
        rows = head.targets(torch.tensor([3, wrong]))
        with pytest.raises(IndexError, match=rf"must be in \[0, 50\).*got {wrong} at position 1"):
            spo_ext.token_logprobs(torch.randn(2, 4), head.weight, rows)


def test_compiles_as_one_graph():
    _, head = heads(300, 8)
    hidden, targets = torch.randn(20, 8), torch.randint(300, (20,))

    def logprobs(hidden, targets):
        return spo_ext.token_logprobs(hidden, head.weight, head.targets(targets), bias=head.bias)

    compiled = torch.compile(logprobs, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, targets), logprobs(hidden, targets))


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_checkpoints_are_by_id(dtype, bias, tmp_path):
    linear, head = heads(300, 8, dtype, bias)
    torch.save(head.state_dict(), tmp_path / "head.pt")
    saved = torch.load(tmp_path / "head.pt")
    plain = linear.state_dict()
    assert saved.keys() == plain.keys()
    assert all(torch.equal(saved[name], plain[name]) for name in plain)
    _, other = heads(300, 8, dtype, bias)
    given = {name: tensor.clone() for name, tensor in plain.items()}
    other.load_state_dict(given)
    assert all(torch.equal(given[name], plain[name]) for name in plain)
    assert torch.equal(other.weight, linear.weight[other.order])
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        other.load_state_dict({**plain, "weight": torch.zeros(299, 8)})


def test_copies_keep_the_order(tmp_path):
    linear = nn.Linear(8, 300).eval()
    linear.bias.requires_grad_(False)
    head = spo_ext.OrderedHead(linear, torch.randperm(300))
    torch.save(head, tmp_path / "head.pt")
    loaded = torch.load(tmp_path / "head.pt", weights_only=False)
    hidden = torch.randn(5, 8)
    for same in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), loaded, head.double()):
        assert same.weight.requires_grad and not same.bias.requires_grad and not same.training
        logits = same(hidden.to(same.weight.dtype))
        assert logits.dtype == same.weight.dtype and same.row_of.dtype == torch.int64
        assert relative_error(logits, linear(hidden)) < 1e-6


def small_model(kind, tied):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if kind == "gpt2":
        sizes = dict(vocab_size=301, n_embd=32, n_layer=2, n_head=2, n_positions=64)
        return GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=tied)).eval()
    sizes = dict(vocab_size=301, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    config = LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied, pad_token_id=5)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_language_model_computes_and_learns_the_same(kind, tied):
    model = small_model(kind, tied)
    ordered = copy.deepcopy(model)
    head = spo_ext.order_vocabulary(ordered, torch.randperm(301))
    assert (ordered.get_input_embeddings().weight is head.weight) == tied
    ordered.tie_weights()
    ordered = copy.deepcopy(ordered)
    assert head is not ordered.get_output_embeddings()
    assert isinstance(ordered.get_input_embeddings(), OrderedEmbedding) == tied
    shared = ordered.get_input_embeddings().weight is ordered.get_output_embeddings().weight
    assert shared == tied and ordered.num_parameters() == model.num_parameters()
    ids = torch.randint(301, (3, 12))
    ids[0, :4] = 5
    for step in range(3):
        outputs = [m(input_ids=ids, labels=ids) for m in (model, ordered)]
        assert relative_error(outputs[1].logits, outputs[0].logits) < 1e-5 * 10**step
        for m, output in zip((model, ordered), outputs, strict=True):
            output.loss.backward()
            torch.optim.SGD(m.parameters(), lr=0.5).step()
            m.zero_grad()
    after = ordered.state_dict()
    for name, weight in model.state_dict().items():
        assert relative_error(after[name], weight) < 1e-4
    prompt = dict(input_ids=ids[1:, :5], max_new_tokens=10, do_sample=False, pad_token_id=5)
    assert torch.equal(ordered.generate(**prompt), model.generate(**prompt))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_saved_language_model_is_the_plain_one(kind, tied, tmp_path):
    from safetensors.torch import load_file

    model = small_model(kind, tied)
    model.save_pretrained(tmp_path / "plain")
    spo_ext.order_vocabulary(model, torch.randperm(301))
    model.save_pretrained(tmp_path / "ordered")
    plain, ordered = (load_file(tmp_path / f / "model.safetensors") for f in ("plain", "ordered"))
    assert plain.keys() == ordered.keys()
    assert all(torch.equal(ordered[name], plain[name]) for name in plain)
    again = type(model).from_pretrained(tmp_path / "ordered")
    assert type(again.get_output_embeddings()) is nn.Linear
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    model.load_state_dict(plain, strict=not tied)  # tied, the head's own key is not in the file
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


def order_with(value):
    return lambda: spo_ext.OrderedHead(nn.Linear(2, 3), value)


def shared_bias():
    model = small_model("llama", tied=False)
    model.lm_head = nn.Linear(32, 301)
    model.model.also = nn.Module()
    model.model.also.bias = model.lm_head.bias
    return spo_ext.order_vocabulary(model, torch.arange(301))


def scaled_embedding():
    model = small_model("llama", tied=True)
    model.model.embed_tokens.__class__ = type("Scaled", (nn.Embedding,), {})
    return spo_ext.order_vocabulary(model, torch.arange(301))


ERRORS = [
    (lambda: spo_ext.frequency_order(torch.ones(2, 3)), r"counts must be \[V\].*got .*\[2, 3\]"),
    (lambda: spo_ext.frequency_order(torch.tensor([True])), r"integer or floating, got torch.bool"),
    (lambda: spo_ext.frequency_order(torch.tensor([0, -2])), r">= 0, got -2 for id 1"),
    (lambda: spo_ext.frequency_order(torch.tensor([torch.nan])), r">= 0, got nan for id 0"),
    (order_with(torch.arange(4)), r"order must be \[3\] like the rows of weight, got \[4\]"),
    (order_with(torch.tensor([0, 2, 2])), r"every id in \[0, 3\) once, got 2 in the place of 1"),
    (order_with(torch.tensor([-1, 0, 1])), r"once, got -1 in the place of 0"),
    (order_with(torch.ones(3)), r"order must be int64 or int32, got torch.float32"),
    (lambda: spo_ext.OrderedHead(heads(3, 2)[1], torch.arange(3)), r"nn.Linear, got OrderedHead"),
    (lambda: heads(3, 2)[1].targets(torch.ones(2)), r"targets must be int64 .*got torch.float32"),
    (lambda: heads(3, 2)[1].targets(torch.tensor([0]), 2), r"must be outside \[0, 3\), got 2"),
    (shared_bias, r"must be its own, or shared .*got them in model.also, lm_head"),
    (scaled_embedding, r"tied to the LM head must be an nn.Embedding, got Scaled"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_errors_say_what_must_be_and_what_was(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
