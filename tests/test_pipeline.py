"""Sampling, log-probabilities and the update, on small random models, against slower and plainer ways.

Both engines are held to transformers' own forward of one unpadded sequence at a time.
"""
import copy
import functools
import itertools
import math
import random
import types

import pytest
import torch
import transformers
from conftest import PROBLEM, policy_of, set_logits_at_once
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import aspo
from aspo import FAST, PLAIN, Config, Sample, pack, pick

PROMPTS = ["1+2+3+4=", "5+5=", "1+1+1+1+1+1=", "2="]
ENGINES, CPU = ("fast", "plain"), torch.device("cpu")
SMALL = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
OTHER = dict(model="other", instruction="", max_new_tokens=20)  # knobs of a policy for any of these models


def ids(tokenizer, text):
    return tokenizer(text).input_ids


def made_up_samples(tokenizer, groups=4, group_size=4, seed=0, stop=True):
    """Random responses of random lengths with random advantages."""
    rng = random.Random(seed)
    samples = []
    for q in range(groups):
        for _ in range(group_size):
            response = [rng.randrange(3, 18) for _ in range(rng.randint(1, 12))] + [tokenizer.eos_token_id] * stop
            samples.append(Sample("p", "1", ids(tokenizer, PROMPTS[q % 4]), response, truncated=not stop,
                                  reward=rng.random(), advantage=rng.gauss(0, 1),
                                  sampler_logp=torch.zeros(len(response))))
    return samples


def shuffled(samples):
    return random.Random(0).sample(samples, len(samples))


def random_model(family, seed=0, **config):
    """Of any architecture, with weights large enough for every mistake to show."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**config)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.generation_config.eos_token_id = None
    return model


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def flat_gradient(model):
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


# ---------------------------------------------------------------------------------------------- log-probabilities


def naive_logp(model, s, temperature=1.0):
    """One unpadded sequence, the full softmax, one position at a time."""
    sequence = s.prompt + s.response
    logits = model(torch.tensor([sequence]), use_cache=False).logits[0].float() / temperature
    probabilities = logits.softmax(-1)
    at = range(len(s.prompt), len(sequence))
    return (torch.stack([probabilities[t - 1, sequence[t]].log() for t in at]),
            torch.stack([-(probabilities[t - 1] * probabilities[t - 1].log()).sum() for t in at]))


def naive_gradient(model, samples, temperature=1.0):
    """Of the sum of log-probabilities, each with a weight of its own."""
    model.zero_grad()
    logps, entropies = zip(*(naive_logp(model, s, temperature) for s in samples))
    sum((logp * weights(i, logp)).sum() for i, logp in enumerate(logps)).backward()
    return torch.cat(logps).detach(), torch.cat(entropies).detach(), flat_gradient(model)


def weights(i, logp):
    return torch.arange(len(logp)).add(10 * i).sin()


def engine_gradient(policy, samples):
    """The same by the policy's engine, all samples in one micro-batch."""
    policy.model.zero_grad()
    logp, entropy, mask = policy.token_logp(samples)
    assert (logp[~mask] == 0).all() and (entropy[~mask] == 0).all()
    assert mask.sum(1).tolist() == [len(s.response) for s in samples]
    rows = [row[where] for row, where in zip(logp, mask)]
    sum((row * weights(i, row)).sum() for i, row in enumerate(rows)).backward()
    return torch.cat(rows).detach(), entropy[mask], flat_gradient(policy.model)


def assert_same(found, expected, tolerance=1e-5):
    for a, b in zip(found[:2], expected[:2]):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    assert found[2].isfinite().all() and relative(found[2], expected[2]) < tolerance


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("order", [list, shuffled])
def test_token_logp_equals_one_sequence_at_a_time(tiny, engine, temperature, order):
    """Values, entropies and gradients, through a shared prompt too."""
    model, tokenizer = tiny
    samples = order(made_up_samples(tokenizer))
    expected = naive_gradient(model, samples, temperature)
    assert_same(engine_gradient(policy_of(model, tokenizer, engine=engine, temperature=temperature), samples), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_logits_a_few_rows_at_a_time_change_nothing(tiny, engine, monkeypatch):
    policy = policy_of(*tiny, engine=engine, temperature=0.9)
    samples = made_up_samples(tiny[1])
    expected = engine_gradient(policy, samples)
    set_logits_at_once(monkeypatch, 3 * policy.model.config.vocab_size)
    rows, compute = [], aspo.logp_and_entropy
    monkeypatch.setattr(aspo, "logp_and_entropy",
                        lambda logits, *args: (rows.append(logits.shape[0]), compute(logits, *args))[1])
    assert_same(engine_gradient(policy, samples), expected)
    assert len(rows) > 4 and max(rows) <= 3


FAMILIES = {
    "Llama": SMALL,
    "Mistral": SMALL | dict(sliding_window=None),
    "Qwen3": SMALL,
    "Gemma3Text": SMALL | dict(  # scores that are not divided by the root of the head size
        layer_types=["full_attention"] * 2, query_pre_attn_scalar=20),
    "GPT2": dict(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "Phi": SMALL | dict(partial_rotary_factor=0.5),
}
WINDOWED = {
    "Mistral": SMALL | dict(sliding_window=5),
    "Gemma3Text": SMALL | dict(  # both kinds of layers
        layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=20, sliding_window=5),
    "Qwen2": SMALL | dict(use_sliding_window=True, sliding_window=5, max_window_layers=0),
}
CASES = [(family, config, engine) for family, config in FAMILIES.items() for engine in ENGINES] + [
    (family, config, "plain") for family, config in WINDOWED.items()]


@functools.cache
def expected_of(family, window):
    """(model, samples, values of one sequence at a time), once for both engines."""
    model = random_model(family, **(WINDOWED if window else FAMILIES)[family])
    samples = made_up_samples(aspo.tiny_model()[1])
    return model, samples, naive_gradient(model, samples)


@pytest.mark.parametrize("family, config, engine", CASES)
def test_engines_are_the_models_own_forward(family, config, engine, monkeypatch):
    """Other architectures: in fp32, under gradient checkpointing, and under autocast to bf16's own precision."""
    window = config is WINDOWED.get(family)
    model, samples, expected = expected_of(family, window)
    model = copy.deepcopy(model)
    policy = policy_of(model, aspo.tiny_model()[1], **OTHER, engine=engine)
    assert policy.engine is (FAST if engine == "fast" else PLAIN)
    assert_same(engine_gradient(policy, samples), expected)
    if window:  # it matters
        model.config.sliding_window = 60
        assert relative(engine_gradient(policy, samples)[0], expected[0]) > 1e-2
        model.config.sliding_window = 5

    policy.dtype = torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        own = naive_gradient(model, samples)  # rounded, but one sequence at a time
    for sign in (aspo.lower_right, lambda queries, keys, _: causal_lower_right(queries, keys)):  # the latter on CUDA
        monkeypatch.setattr(aspo, "lower_right", sign)
        for found, rounded, exact in zip(engine_gradient(policy, samples), own, expected):
            assert found.isfinite().all()
            assert relative(found, exact) < 1.5 * relative(rounded, exact)
    policy.dtype = torch.float32
    monkeypatch.undo()

    aspo.recompute_layers(model)
    layers_run, layer = [], next(m for m in model.modules() if isinstance(m, transformers.GradientCheckpointingLayer))
    layer.register_forward_pre_hook(lambda *_: layers_run.append(1))
    inner = next(m for m in layer.modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D")
    inner.register_forward_pre_hook(lambda *_: layers_run.append(2))
    assert_same(engine_gradient(policy, samples), expected)
    assert layers_run.count(2) == 2  # forward, and again in the backward pass


@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_shorter_than_the_text_goes_to_the_plain_engine(family, capsys):
    tokenizer = aspo.tiny_model()[1]
    policy = policy_of(random_model(family, **WINDOWED[family]), tokenizer, **OTHER)
    said = capsys.readouterr().out
    assert policy.engine is PLAIN
    assert said.startswith("engine plain") and said.count("\n") == 1 and "sliding_window" in said
    assert greedy(policy, [[5, 6, 7], [5]], 20) == generated(policy.model, [[5, 6, 7], [5]], 20)
    with pytest.raises(aspo.UserError, match="--engine fast does not carry"):
        policy_of(random_model(family, **WINDOWED[family]), tokenizer, **OTHER, engine="fast")
    wide = policy_of(random_model(family, **WINDOWED[family] | dict(sliding_window=64)), tokenizer, **OTHER)
    assert not capsys.readouterr().out and wide.engine is FAST


def test_packing_leaves_out_nothing_but_prompts_met_before_and_last_tokens():
    samples = [Sample("", "", [5, 6, 7], [8, 9, 1]), Sample("", "", [5, 6, 7], [4]), Sample("", "", [5], [8, 1])]
    packed = pack(samples, CPU)
    assert packed.tokens.tolist() == [[5, 6, 7, 8, 9, 5, 8]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert packed.targets.tolist() == [8, 9, 1, 4, 8, 1]  # up to and including the stop token
    assert packed.source.tolist() == [2, 3, 4, 2, 5, 6]
    assert packed.mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    seen = {}  # place -> places that it looks at
    for prompt, own, mask in packed.parts:
        keys = torch.tensor([*range(prompt.start, prompt.stop), *range(own.start, own.stop)])
        seen |= {own.start + i: keys[row].tolist() for i, row in enumerate(mask)}
    assert seen == {0: [0], 1: [0, 1], 2: [0, 1, 2], 3: [0, 1, 2, 3], 4: [0, 1, 2, 3, 4], 5: [5], 6: [5, 6]}


@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 9), (4, 4), (5, 12)])
def test_the_mask_is_the_sign_for_the_flash_kernel(queries, keys):
    """What stands in for it on CUDA, causal_lower_right, means the same."""
    mask, sign = aspo.lower_right(queries, keys, CPU), causal_lower_right(queries, keys)
    assert torch.equal(mask, sign._materialize())
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, 8) for heads, n in ((4, queries), (2, keys), (2, keys)))
    attend = functools.partial(aspo.scaled_dot_product_attention, scale=0.3, enable_gqa=True)
    k4, v4 = (x.repeat_interleave(2, 1) for x in (k, v))
    torch.testing.assert_close(attend(q, k, v, mask), attend(q, k4, v4, sign))


def test_attention_takes_results_laid_out_by_tokens(tiny, monkeypatch):
    """As the kernels of a GPU return them: (B, heads, q, D) whose memory is (B, q, heads, D)."""
    policy, samples = policy_of(*tiny, engine="fast"), made_up_samples(tiny[1])
    run = lambda: (engine_gradient(policy, samples), greedy(policy, [[5, 6], [5, 6]], 6))
    expected, attention = run(), aspo.scaled_dot_product_attention
    monkeypatch.setattr(aspo, "scaled_dot_product_attention", lambda *args, **kwargs: attention(
        *args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2))
    result = run()
    assert_same(result[0], expected[0])
    assert result[1] == expected[1]


def test_entropy_is_exact_under_autocast_at_the_size_of_a_real_vocabulary():
    torch.manual_seed(0)
    logits, targets = 2 * torch.randn(4, 151_936), torch.tensor([0, 7, 151_935, 12])
    p = logits.double().softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        logp, entropy = aspo.logp_and_entropy(logits, targets, 1.0)
        _, sampled_logp, sampled_entropy = pick(logits, 1.0)
    exact = -(p * p.log()).sum(-1)
    for found in (entropy, sampled_entropy):
        torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=0)
    torch.testing.assert_close(logp.double(), p.log().gather(1, targets[:, None])[:, 0], atol=1e-4, rtol=0)


def test_stop_token_is_trained_when_pad_is_eos(tiny):
    model, tokenizer = tiny
    eos = tokenizer.pad_token_id = tokenizer.eos_token_id
    for engine in ENGINES:
        s = Sample("", "", ids(tokenizer, "1+1="), [4, eos], advantage=1.0, sampler_logp=torch.zeros(2))
        long = Sample("", "", ids(tokenizer, "1+1="), [4] * 9, sampler_logp=torch.zeros(9))
        before = naive_logp(model, s)[0][-1].item()
        policy = sgd(policy_of(copy.deepcopy(model), tokenizer, engine=engine, group_size=2, minibatch=1, prompts=1,
                               epochs=1, kl_coef=0.0), 0.1)
        assert policy.pad_id == eos
        aspo.update(policy, [s, long], policy.cfg)
        assert naive_logp(policy.model, s)[0][-1].item() > before + 0.01


# -------------------------------------------------------------------------------------------------------- sampling


def drawn(policy, prompts, new_tokens, temperature=1.0, stop_ids=(), top_p=1.0):
    """policy.generate with other settings than those of its run."""
    settings = dict(max_new_tokens=new_tokens, temperature=temperature, stop_ids=list(stop_ids), top_p=top_p)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setattr(policy, name, value)
        return policy.generate(prompts)


def greedy(policy, prompts, new_tokens, stop_ids=()):
    return [response for response, _, _ in drawn(policy, prompts, new_tokens, 0, stop_ids)]


def generated(model, prompts, new_tokens, stop=None):
    """The same by transformers, one unpadded prompt at a time."""
    attention, model.config._attn_implementation = model.config._attn_implementation, "sdpa"
    try:
        return [model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                               do_sample=False, pad_token_id=0, max_new_tokens=new_tokens,
                               eos_token_id=stop)[0, len(prompt):].tolist() for prompt in prompts]
    finally:
        model.config._attn_implementation = attention


@pytest.mark.parametrize("bucketed", [False, True, None], ids=["exact", "bucketed", "plain engine"])
def test_greedy_sampling_is_generate(tiny, bucketed, monkeypatch):
    """Mixed prompt lengths and groups; many rows stop early, so that the batch is compacted; sizes as on CUDA.

    One decoder for all calls: what a larger call left in its buffers must not be seen by a smaller one.
    """
    monkeypatch.setattr(aspo, "COLUMN_STEP", 16)
    model, tokenizer = tiny
    prompts = [ids(tokenizer, text) for text in [*PROMPTS, *(f"{a}+{b}=" for a in range(4) for b in (3, 7))]]
    free = generated(model, prompts[4:5], 45)[0]
    policy = policy_of(model, tokenizer, engine="plain" if bucketed is None else "fast")
    decoder = policy.decoder = aspo.Decoder(model, bucketed=bucketed)
    sizes, step = set(), aspo.Decoder.step
    monkeypatch.setattr(aspo.Decoder, "step",
                        lambda self: (sizes.add((self.cache.rows, self.cache.columns)), step(self)))
    for stop in sorted(set(free[-30:]))[:2]:  # an untrained model never says eos; stop at what it does say
        for some in (prompts, prompts[:3]):
            responses = greedy(policy, [p for p in some for _ in range(2)], 45, [stop])
            assert responses[::2] == responses[1::2] == generated(model, some, 45, stop)
        assert len({len(r) for r in responses}) > 1
    assert policy.decoder is decoder
    if bucketed is None:
        assert not sizes
        return
    rows, columns = map(set, zip(*sizes))
    assert len(rows) > 2  # compaction happened
    if bucketed:
        assert rows <= {1, 2, 3, 4, 6, 8, 12, 16, 24} and columns <= {16, 32, 48, 64} and len(columns) > 2
    else:
        assert len(columns) > 30


def test_both_engines_give_the_same(tiny):
    """Greedy tokens, log-probabilities, entropies, and the gradient of an update."""
    fast, plain = (policy_of(copy.deepcopy(tiny[0]), tiny[1], engine=engine) for engine in ENGINES)
    prompts = [ids(tiny[1], text) for text in PROMPTS for _ in range(2)]
    a, b = (drawn(policy, prompts, 30, 0, [5, 9]) for policy in (fast, plain))
    assert [response for response, _, _ in a] == [response for response, _, _ in b]
    for (_, logp, entropy), (_, other_logp, other_entropy) in zip(a, b):
        torch.testing.assert_close(logp, other_logp, atol=1e-4, rtol=0)
        assert entropy == pytest.approx(other_entropy, abs=1e-4)
    knobs = dict(minibatch=2, epochs=2, loss="aspo")
    changes = [step_taken(tiny, made_up_samples(tiny[1]), engine=engine, lr=0.3, **knobs)[0] for engine in ENGINES]
    assert relative(*changes) < 1e-3


@pytest.mark.parametrize("bucketed", [False, True])
def test_sampling_in_parts_gives_each_prompt_its_own_response(tiny, bucketed):
    """--sample_rows splits a rollout anywhere, also within a group; the order stays."""
    policy = policy_of(*tiny, engine="fast", sample_rows=5)
    policy.decoder = aspo.Decoder(policy.sampler, bucketed=bucketed)
    prompts = [ids(tiny[1], text) for text in PROMPTS for _ in range(3)]
    assert greedy(policy, prompts, 12) == generated(policy.model, prompts, 12)


def test_a_decoder_sees_weights_that_change_in_place(tiny):
    """As the half-precision copy on CUDA does after every update; a graph reads the same addresses."""
    model, tokenizer = tiny
    policy, prompts = policy_of(model, tokenizer, engine="fast"), [ids(tokenizer, text) for text in PROMPTS]
    policy.decoder = aspo.Decoder(model, bucketed=True)
    before, buffers = greedy(policy, prompts, 20), policy.decoder.cache.buffers
    torch.manual_seed(3)
    other = aspo.tiny_model()[0].eval()
    expected = generated(other, prompts, 20)
    policy.sampler = copy.deepcopy(model)  # a copy apart from what learns
    policy.decoder.model = policy.sampler
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters()):
            p.copy_(q)
    assert greedy(policy, prompts, 20) == before
    policy.refresh_sampler()
    assert greedy(policy, prompts, 20) == expected != before
    assert policy.decoder.cache.buffers is buffers


def test_half_precision_weights_leave_rotary_frequencies_alone(tiny):
    model, _ = tiny
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    for dtype in (torch.bfloat16, torch.float16):
        half = aspo.weights_in(dtype, copy.deepcopy(model))
        assert {p.dtype for p in half.parameters()} == {dtype}
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        buffers = dict(half.named_buffers())
        assert before and all(torch.equal(buffers[name], buffer) for name, buffer in before.items())
        assert half.get_output_embeddings().weight is half.get_input_embeddings().weight  # still tied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sampling_in_half_precision_is_near_the_trainer(tiny, dtype):
    """As on CUDA: weights and cache in half precision in one, autocast in the other."""
    policy = policy_of(*tiny, engine="fast")
    policy.dtype, policy.sampler = dtype, aspo.weights_in(dtype, copy.deepcopy(policy.model))
    torch.manual_seed(0)
    prompts = [ids(tiny[1], text) for text in PROMPTS for _ in range(8)]
    responses = drawn(policy, prompts, 30, stop_ids=[1, 5])
    assert policy.decoder.cache.buffers[0][0].dtype == dtype
    samples = [Sample("", "", p, tokens, sampler_logp=logp) for p, (tokens, logp, _) in zip(prompts, responses)]
    logp, _, mask = policy.token_logp(samples)
    sampled = torch.cat([s.sampler_logp for s in samples])
    exact = torch.cat([naive_logp(policy.model, s)[0] for s in samples])
    unit = torch.finfo(dtype).eps
    for found in (sampled, logp[mask]):
        assert unit / 30 < (found - exact).abs().mean().item() < unit  # rounded, and no more than that


# A model on which padding has an effect: neither engine can be right.
class Padding(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        out = super().forward(input_ids, attention_mask=attention_mask, **kwargs)
        out.logits = out.logits * (1 + 0.1 * input_ids.shape[0])
        return out


def test_a_model_on_which_neither_engine_is_right_is_refused():
    tokenizer = aspo.tiny_model()[1]
    torch.manual_seed(0)
    model = Padding(transformers.LlamaConfig(**SMALL, initializer_range=0.3, eos_token_id=None))
    with pytest.raises(aspo.UserError, match="sampler and trainer do not agree on a Padding"):
        policy_of(model, tokenizer, **OTHER)


@pytest.mark.parametrize("family, config, reason", [
    ("Granite", SMALL | dict(logits_scaling=4.0), "logits_scaling"),
    ("Bloom", dict(vocab_size=50, hidden_size=32, n_layer=2, n_head=4), "takes no mask of ours"),
])
def test_what_the_fast_engine_does_not_carry_goes_to_the_plain_one(family, config, reason, capsys):
    policy = policy_of(random_model(family, **config), aspo.tiny_model()[1], **OTHER)
    said = capsys.readouterr().out
    assert policy.engine is PLAIN and said.startswith("engine plain") and said.count("\n") == 1
    assert reason in said or family == "Bloom"
    samples = made_up_samples(aspo.tiny_model()[1])
    assert_same(engine_gradient(policy, samples), naive_gradient(policy.model, samples))


SIZES = [4, 64, 100, 1000]


@pytest.mark.parametrize("size", SIZES)
def test_draw_follows_the_probabilities(size):
    """Chi-square of 100,000 draws; tokens of probability 0, a whole block of them too, are never drawn.

    The sum exceeds its mean, the degrees of freedom, by five standard deviations once in a million times or two.
    """
    torch.manual_seed(size)
    probs = (2 * torch.randn(size)).softmax(-1)
    probs[::3] = 0
    probs[size // 2:size // 2 + size // 8] = 0
    probs[-1] = 0
    probs /= probs.sum()
    n = 100_000
    tokens = torch.cat([aspo.draw(probs.expand(10_000, size)) for _ in range(n // 10_000)])
    counts, expected = tokens.bincount(minlength=size), n * probs
    assert len(counts) == size and (counts[probs == 0] == 0).all()
    often = expected >= 5
    counts = torch.cat([counts[often], counts[~often].sum()[None]]).double()
    expected = torch.cat([expected[often], expected[~often].sum()[None]]).double()
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom) + 5
    assert freedom >= 1 and expected.max() > 3 * expected.min()  # a uniform sampler would not pass


def test_rows_are_drawn_apart():
    """Two rows of one batch with different probabilities, and independent of each other."""
    torch.manual_seed(0)
    probs = torch.tensor([[0.9, 0.1, 0], [0.0, 0.5, 0.5]]).repeat(20_000, 1)
    first, second = aspo.draw(probs).view(-1, 2).T
    assert first.bincount(minlength=3).div(20_000).tolist() == pytest.approx([0.9, 0.1, 0], abs=0.01)
    assert second.bincount(minlength=3).div(20_000).tolist() == pytest.approx([0, 0.5, 0.5], abs=0.015)
    assert second[first == 1].float().mean().item() == pytest.approx(1.5, abs=0.05)


@pytest.mark.parametrize("engine", ENGINES)
def test_samples_follow_the_softmax(tiny, engine):
    """Chi-square of first tokens at temperature 0.7 against the exact softmax: 17 degrees, p < 1e-4 above 49."""
    policy, n = policy_of(*tiny, engine=engine), 20_000 if engine == "fast" else 4_000
    policy.sample_rows = n
    prompt = ids(tiny[1], "1+2=")
    torch.manual_seed(1)
    responses = drawn(policy, [prompt] * n, 1, 0.7)
    logits = policy.model(torch.tensor([prompt])).logits[0, -1] / 0.7
    exact = logits.softmax(-1)
    counts = torch.bincount(torch.tensor([response for response, _, _ in responses])[:, 0], minlength=len(exact))
    assert ((counts - n * exact) ** 2 / (n * exact)).sum() < 49
    assert exact.max() > 3 * exact.min()  # a uniform sampler would not pass
    entropy = -(exact.double() * exact.double().log()).sum().item()
    for response, logp, h in responses[:50]:
        assert logp.item() == pytest.approx(exact[response[0]].log().item(), abs=1e-5)
        assert h == pytest.approx(entropy, abs=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_top_p_draws_from_the_smallest_set_that_reaches_p(tiny, engine):
    policy, prompt = policy_of(*tiny, engine=engine), ids(tiny[1], "1+2=")
    policy.sample_rows = 1000
    probs, order = policy.model(torch.tensor([prompt])).logits[0, -1].softmax(-1).sort(descending=True)
    allowed = order[:int((probs.cumsum(-1) < 0.5).sum()) + 1].tolist()
    torch.manual_seed(0)
    assert {tokens[0] for tokens, _, _ in drawn(policy, [prompt] * 1000, 1, top_p=0.5)} == set(allowed)
    assert len(allowed) < len(order) - 3


def test_top_p_by_hand():
    torch.manual_seed(0)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(5000, 4)
    token, logp, entropy = pick(logits, 1.0, top_p=0.7)
    share = token.bincount(minlength=4) / 5000
    assert share.tolist() == pytest.approx([5 / 8, 3 / 8, 0, 0], abs=0.03)
    assert entropy[0].item() == pytest.approx(1.1421, abs=1e-3)  # of the whole softmax
    assert {round(value, 4) for value in logp.exp().tolist()} == {0.5, 0.3}
    assert pick(logits[:5], 0)[0].tolist() == [0] * 5


@pytest.mark.parametrize("uniform, expected", [(0.0, 2), (1 - 2**-53, 1), (0.25, 2), (0.75, 1)])
def test_a_token_of_probability_0_is_never_drawn(uniform, expected, monkeypatch):
    """Whatever the uniform number from [0, 1): its ends fall on the first and the last token that can be drawn."""
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, uniform))
    token, _, entropy = pick(torch.tensor([[-math.inf, 1.0, 1.0, -math.inf]]), 1.0)
    assert token.item() == expected and entropy.item() == pytest.approx(math.log(2))
    assert 0 <= pick(torch.full((1, 4), math.nan), 1.0)[0].item() < 4  # a broken model fails by its gradients, not here
    for size in (130, 151_936):  # the likely ones in one block or in two, small and large ones beside zeros
        logits = torch.full((1, size), -math.inf)
        logits[0, [1, size // 2, size - 2]] = torch.tensor([0.0, -30.0, 0.0])
        ends = {0.0: size - 2, 1 - 2**-53: 1, 0.25: size - 2, 0.75: 1}
        assert pick(logits, 1.0)[0].item() == ends[uniform]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_sampler_and_trainer_agree_on_the_policy(tiny, engine, temperature):
    """What the sampler saw, through cache and compaction, is the trainer's on the same tokens and temperature."""
    torch.manual_seed(2)
    policy = policy_of(*tiny, engine=engine, temperature=temperature, sample_rows=8)
    eos = tiny[1].eos_token_id
    problems = aspo.make_problems(aspo.arithmetic()[:6], "sums")
    samples = aspo.roll_out(policy, problems, 4, policy.cfg)
    assert [s.problem for s in samples] == [p["problem"] for p in problems for _ in range(4)]
    assert {len(s.response) for s in samples} != {40}
    logp, entropy, mask = policy.token_logp(samples)
    for i, s in enumerate(samples):
        torch.testing.assert_close(s.sampler_logp, logp[i][mask[i]], rtol=0, atol=1e-4)
        assert s.entropy == pytest.approx(entropy[i][mask[i]].mean().item(), abs=1e-4)
        assert (s.response[-1] == eos) != s.truncated and eos not in s.response[:-1]
        assert s.text == tiny[1].decode([token for token in s.response if token > 2])


@pytest.mark.parametrize("engine", ENGINES)
def test_sampling_never_recomputes_under_gradient_checkpointing(tiny, engine):
    prompts = [ids(tiny[1], text) for text in PROMPTS]
    expected = generated(tiny[0], prompts, 20)
    policy = policy_of(*tiny, engine=engine, gradient_checkpointing=True)
    widths = []
    policy.sampler.model.embed_tokens.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    assert greedy(policy, prompts, 20) == expected
    assert len(widths) == 20 and set(widths[1:]) == {1}  # the cache is on: one new token a step


def test_a_models_own_sampling_settings_do_not_matter(tiny):
    """top_k, repetition_penalty and their like would make the sampler another policy than the one in the ratio."""
    model, prompts = tiny[0], [ids(tiny[1], text) for text in PROMPTS]
    expected = generated(model, prompts, 12)
    own = model.generation_config
    own.update(do_sample=True, top_k=1, repetition_penalty=9.0, no_repeat_ngram_size=2, max_length=3, min_new_tokens=2)
    for engine in ENGINES:
        policy = policy_of(model, tiny[1], engine=engine)
        assert greedy(policy, prompts, 12) == expected
        torch.manual_seed(0)
        assert len({tuple(r) for r, _, _ in drawn(policy, prompts[:1] * 20, 12)}) == 20
        assert model.generation_config is own  # it is saved with the model


# ------------------------------------------------------------------------------------- what a CUDA graph relies on

HOST_READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default", "allclose", "lift_fresh")


def tensors(*trees):
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


class Recording(TorchDispatchMode):
    """Keeps operations with the tensors that they used; replays them on the same memory, as a CUDA graph does."""

    def __init__(self):
        super().__init__()
        self.log = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        self.log.append((op, args, kwargs or {}, result))
        return result

    def replay(self):
        for op, args, kwargs, result in self.log:
            if op.is_view or "prim" in str(op) or "detach" in str(op):
                continue
            new = op(*args, **kwargs)
            if not op._schema.is_mutable:
                for old, value in zip(tensors(result), tensors(new)):
                    old.copy_(value)


def record(decoder, size):
    """Decoder.record without a GPU: a capture runs nothing, so all state is put back."""
    state = [*tensors(list(vars(decoder).values())), *tensors(decoder.cache.buffers), decoder.cache.column]
    before, generator = [x.clone() for x in state], torch.get_rng_state()
    with Recording() as recording:
        decoder.step()
    for x, old in zip(state, before):
        x.copy_(old)
    torch.set_rng_state(generator)
    decoder.graphs[size] = recording


@pytest.mark.parametrize("options", [dict(temperature=0), dict(), dict(temperature=0.7, top_p=0.9)], ids=str)
@pytest.mark.parametrize("family", ["Qwen2", "GPT2"])
def test_replayed_steps_give_the_tokens_of_plain_ones(family, options, monkeypatch):
    """Over changing prompts, stops and weights. A step reads nothing on the host and moves no tensor."""
    monkeypatch.setattr(aspo, "COLUMN_STEP", 16)
    monkeypatch.setattr(aspo.Decoder, "record", record)
    model = random_model(family, **(SMALL if family == "Qwen2" else FAMILIES["GPT2"]))
    policy = policy_of(model, aspo.tiny_model()[1], **OTHER, engine="fast")
    plain, graphs = (aspo.Decoder(model, bucketed=True) for _ in range(2))
    graphs.graphs_on = True
    prompts = [[5, 6, 7], [8], [9, 4, 4, 4, 4]] * 2
    for prompts, stop_ids in ((prompts, range(20)), (prompts[:2], [11, 12]), (prompts, range(10, 30))):
        results = []
        for policy.decoder in (plain, graphs):
            torch.manual_seed(0)
            results.append(drawn(policy, prompts, 20, stop_ids=stop_ids, **options))
        for (tokens, logp, entropy), (other, other_logp, other_entropy) in zip(*results):
            assert tokens == other and torch.equal(logp, other_logp) and entropy == other_entropy
        with torch.no_grad():
            next(model.parameters()).mul_(1.1)
    assert len({rows for rows, *_ in graphs.graphs}) > 1 and not plain.graphs
    addresses = lambda: [x.data_ptr() for x in (*tensors(list(vars(graphs).values())), *tensors(graphs.cache.buffers))]
    before = addresses()
    graphs.filled += 1
    record(graphs, "another")
    assert addresses() == before
    log = graphs.graphs["another"].log
    assert len(log) > 50 and not [str(op) for op, *_ in log if any(name in str(op) for name in HOST_READS)]


def test_a_capture_that_fails_goes_on_without_graphs(tiny, monkeypatch, capsys):
    policy, prompts = policy_of(*tiny, engine="fast"), [ids(tiny[1], text) for text in PROMPTS]
    expected = greedy(policy, prompts, 12)

    def fail(self, size):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(aspo.Decoder, "record", fail)
    policy.decoder.graphs_on = True
    assert greedy(policy, prompts, 12) == expected
    assert capsys.readouterr().out.splitlines() == [
        "sampling goes on without CUDA graphs: operation not permitted when stream is capturing"]


# ------------------------------------------------------------------------------------------------ problems and refills


def test_dynamic_sampling_replaces_uniform_groups(monkeypatch):
    asked = []

    def fake(policy, problems, n, cfg, reward):
        asked.append([row["problem"] for row in problems])
        made = []
        for row in problems:  # even problems give mixed rewards, odd ones equal rewards
            mixed = int(row["problem"]) % 2 == 0
            made += [Sample(row["problem"], "", [3], [4], reward=float(mixed and k == 0)) for k in range(n)]
        return made

    monkeypatch.setattr(aspo, "roll_out", fake)
    cfg = Config(prompts=8, group_size=2, max_refills=20)
    stream = aspo.Stream([{"problem": str(i), "answer": ""} for i in range(100)], seed=0)
    run = types.SimpleNamespace(stream=stream, reward=None)
    first = fake(None, stream.take(8), 2, cfg, None)
    samples = aspo.refill(None, first, run, cfg)
    assert len(samples) == 16 and all(int(s.problem) % 2 == 0 for s in samples)
    assert len(asked) > 1 and all(len(more) < 8 for more in asked[1:])
    assert [s for s in first if int(s.problem) % 2 == 0] == samples[:sum(int(s.problem) % 2 == 0 for s in first)]
    asked.clear()
    odd = [s for s in first if int(s.problem) % 2]
    samples = aspo.refill(None, odd * 8, run, Config(prompts=8, group_size=2, max_refills=1))
    assert len(asked) == 1 and len(samples) == len(odd * 8)  # uniform groups of the last refill stay


def test_problem_stream_visits_everything_in_an_order_of_its_seed():
    problems = [{"problem": i} for i in range(10)]
    take = lambda seed, n: [row["problem"] for row in aspo.Stream(problems, seed).take(n)]
    assert sorted(take(0, 10)) == list(range(10)) and take(0, 25) == take(0, 25)
    assert take(0, 20)[10:] != take(0, 10) != take(1, 10)


# ---------------------------------------------------------------------------------------------------------- update


def sgd(policy, lr):
    """Plain gradient descent: for one step the change of the weights is minus the gradient."""
    policy.optimizer = torch.optim.SGD(policy.model.parameters(), lr=lr)
    policy.schedule = torch.optim.lr_scheduler.ConstantLR(policy.optimizer, 1.0)
    return policy


def step_taken(tiny, samples, reference=None, lr=1.0, **knobs):
    """The change of all weights by one call of update."""
    knobs = dict(prompts=4, group_size=4, minibatch=4, epochs=1, grad_clip=1e9) | knobs
    policy = sgd(policy_of(copy.deepcopy(tiny[0]), tiny[1], **knobs), lr)
    before = torch.cat([p.detach().flatten().clone() for p in policy.model.parameters()])
    if reference:
        policy.add_reference(reference)
    stats, norms = aspo.update(policy, samples, policy.cfg)
    assert all(p.grad is None or not p.grad.any() for p in policy.model.parameters())
    merged = {name: torch.cat([s[name] for s in stats]) for name in (stats[0] if stats else ())}
    return torch.cat([p.detach().flatten() for p in policy.model.parameters()]) - before, merged, norms


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("agg", ["token", "sequence", "constant"])
def test_gradient_does_not_depend_on_the_micro_batch(tiny, engine, agg):
    samples = lambda: made_up_samples(tiny[1])
    whole, _, _ = step_taken(tiny, samples(), micro_tokens=10**6, loss_agg=agg, engine=engine)
    for micro_tokens in (1, 40, 90):
        cut, _, _ = step_taken(tiny, samples(), micro_tokens=micro_tokens, loss_agg=agg, engine=engine)
        assert relative(cut, whole) < 1e-5
    # and it is the gradient of the definition, one sequence at a time
    model, total = copy.deepcopy(tiny[0]), 0.0
    tokens = sum(len(s.response) for s in samples())
    for s in samples():
        logp = naive_logp(model, s)[0]
        total = total - s.advantage * {"token": logp.sum() / tokens, "sequence": logp.mean() / 16,
                                       "constant": logp.sum() / 16 / 40}[agg]
    total.backward()
    assert relative(whole, -flat_gradient(model)) < 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_first_step_is_the_same_for_all_methods_and_later_ones_differ(tiny, engine):
    knobs = dict(lr=0.3, engine=engine, micro_tokens=60)
    losses = ("aspo", "grpo", "no-is")
    one = {loss: step_taken(tiny, made_up_samples(tiny[1]), loss=loss, **knobs) for loss in losses}
    for change, stats, norms in one.values():
        assert relative(change, one["grpo"][0]) < 1e-6 and len(norms) == 1
        assert (stats["log_ratio"] == 0).all() and (stats["weight"] == 1).all()
    several = {loss: step_taken(tiny, made_up_samples(tiny[1]), loss=loss, minibatch=2, epochs=2, **knobs)
               for loss in losses}
    for change, stats, norms in several.values():
        assert len(norms) == 4 and (stats["log_ratio"] != 0).any()
    assert relative(several["aspo"][0], several["grpo"][0]) > 1e-3
    assert relative(several["no-is"][0], several["grpo"][0]) > 1e-3


@pytest.mark.parametrize("engine", ENGINES)
def test_old_logp_is_fixed_before_the_first_step(tiny, engine):
    samples = made_up_samples(tiny[1])
    expected = [naive_logp(tiny[0], s)[0].detach() for s in samples]
    step_taken(tiny, samples, minibatch=1, epochs=3, lr=0.3, engine=engine)
    for s, values in zip(samples, expected):
        torch.testing.assert_close(s.old_logp, values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_samples_without_signal_count_but_are_not_computed(tiny, engine):
    samples = made_up_samples(tiny[1], groups=2)
    for s in samples[4:]:
        s.advantage, s.reward = 0.0, 1.0
    knobs = dict(minibatch=2, prompts=2, engine=engine)
    full, stats, _ = step_taken(tiny, samples, **knobs)
    assert len(stats["advantage"]) == sum(len(s.response) for s in samples[:4])
    alone, _, _ = step_taken(tiny, samples[:4], **knobs)
    share = sum(len(s.response) for s in samples[:4]) / sum(len(s.response) for s in samples)
    assert relative(full, alone * share) < 1e-5
    nothing, stats, norms = step_taken(tiny, samples[4:], minibatch=1, prompts=1, engine=engine)
    assert (nothing == 0).all() and norms == [] and stats == {}


def test_truncated_responses_can_be_masked(tiny):
    samples = made_up_samples(tiny[1], groups=2)
    for s in samples[::2]:
        s.truncated = True
    masked, _, _ = step_taken(tiny, samples, minibatch=2, prompts=2, mask_truncated=True)
    alone, _, _ = step_taken(tiny, samples[1::2], minibatch=2, prompts=2)
    assert relative(masked, alone) < 1e-5
    both, _, _ = step_taken(tiny, samples, minibatch=2, prompts=2)
    assert relative(both, alone) > 0.1


@pytest.mark.parametrize("engine", ENGINES)
def test_kl_pulls_towards_the_reference(tiny, engine):
    moved = copy.deepcopy(tiny[0])
    torch.manual_seed(5)
    for p in moved.parameters():
        p.data += 0.02 * torch.randn_like(p)
    samples = made_up_samples(tiny[1])
    for s in samples:
        s.advantage = 0.0
    policy = sgd(policy_of(moved, tiny[1], engine=engine, kl_coef=1.0, group_size=4, minibatch=4, epochs=1), 0.05)
    policy.add_reference(copy.deepcopy(tiny[0]))
    expected = naive_logp(tiny[0], samples[0])[0]
    torch.testing.assert_close(policy.reference_logp(samples[:1])[0], expected, atol=1e-5, rtol=0)
    kl = []
    for _ in range(10):
        stats, _ = aspo.update(policy, samples, policy.cfg)
        kl.append(torch.cat([s["kl_ref"] for s in stats]).mean().item())
    assert kl[0] > 1e-4 and kl[-1] < 0.7 * kl[0]


def test_the_sampler_is_the_old_policy_of_the_metrics(tiny):
    """sampler_mismatch is |log pi_old - the sampler's|: 0 for what was sampled here, in fp32."""
    torch.manual_seed(0)
    policy = sgd(policy_of(*tiny, prompts=2, group_size=4, minibatch=2, epochs=1), 0.0)
    samples = aspo.roll_out(policy, aspo.make_problems(aspo.arithmetic()[:2], "sums"), 4, policy.cfg)
    for i, s in enumerate(samples):
        s.advantage = (-1.0) ** i
    stats, _ = aspo.update(policy, samples, policy.cfg)
    assert torch.cat([s["mismatch"] for s in stats]).max() < 1e-4
    samples[0].sampler_logp = samples[0].sampler_logp + 0.5
    stats, _ = aspo.update(policy, samples, policy.cfg)
    found = torch.cat([s["mismatch"] for s in stats])
    assert (found > 0.4).sum() == len(samples[0].response)


def test_packed_micro_batches_keep_everything_within_the_budget():
    samples = made_up_samples(aspo.tiny_model()[1], groups=8)
    cost = lambda batch: sum(map(len, {tuple(s.prompt) for s in batch})) + sum(len(s.response) for s in batch)
    for budget in range(40, 61):
        batches = FAST.micro_batches(samples, budget)
        assert sum(batches, []) == samples and len(batches) > 4
        assert max(pack(batch, CPU).tokens.numel() for batch in batches) <= budget
        assert all(cost(batch) <= budget < cost([*batch, after[0]]) for batch, after in itertools.pairwise(batches))
    assert all(len(b) == 1 for b in FAST.micro_batches(samples, 1))
    assert FAST.micro_batches([], 60) == []


def test_padded_micro_batches_keep_everything_within_the_budget():
    """Padding included; the longest first, which shows at once what fits."""
    samples = made_up_samples(aspo.tiny_model()[1], groups=8)
    length = lambda s: len(s.prompt + s.response)
    for budget in range(40, 61):
        batches = PLAIN.micro_batches(samples, budget)
        assert sorted(map(id, sum(batches, []))) == sorted(map(id, samples)) and len(batches) > 4
        assert length(batches[0][0]) == max(map(length, samples))
        widths = [max(map(length, batch)) for batch in batches]
        assert widths == sorted(widths, reverse=True)
        for batch, width in zip(batches, widths):
            assert len(batch) * width <= budget
        assert all((len(batch) + 1) * width > budget for batch, width in zip(batches[:-1], widths))  # full
    assert all(len(b) == 1 for b in PLAIN.micro_batches(samples, 1))
    assert PLAIN.micro_batches([], 60) == []


MOE = SMALL | dict(num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.5)
RANDOM = {
    "OPT": dict(vocab_size=50, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=64, dropout=0.5, layerdrop=0.5),  # numbers
    "GPT2": FAMILIES["GPT2"] | dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),  # modules
    "Mixtral": MOE | dict(sliding_window=None),
    "Phimoe": MOE | dict(input_jitter_noise=0.5, sliding_window=None),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", RANDOM)
def test_nothing_random_is_in_the_update(family, checkpointing):
    """Whatever a config asks for in train mode: log-probabilities are the model's, and the first ratios exactly 1."""
    tokenizer = aspo.tiny_model()[1]
    model = random_model(family, **RANDOM[family])
    samples = made_up_samples(tokenizer, groups=2)
    expected = naive_gradient(model, samples)
    first, second = (naive_logp(model.train(), samples[0])[0] for _ in range(2))
    assert not torch.equal(first, second)  # as it comes
    policy = sgd(policy_of(model, tokenizer, **OTHER, gradient_checkpointing=checkpointing, prompts=2, group_size=4,
                           minibatch=2, epochs=1), 1e-3)
    assert_same(engine_gradient(policy, samples), expected)
    stats, norms = aspo.update(policy, samples, policy.cfg)
    assert all((s["log_ratio"] == 0).all() for s in stats) and norms[0] > 0


# -------------------------------------------------------------------------------------------- prompts and stop tokens


def test_stop_tokens_come_from_the_config_and_the_tokenizer(tiny):
    model, tokenizer = tiny
    model.generation_config.eos_token_id = [7, 9]
    assert aspo.stop_tokens(model, tokenizer) == sorted([7, 9, tokenizer.eos_token_id])
    model.generation_config.eos_token_id = 8
    assert aspo.stop_tokens(model, tokenizer) == sorted([8, tokenizer.eos_token_id])
    tokenizer.eos_token = model.generation_config.eos_token_id = None
    with pytest.raises(aspo.UserError, match="no token is known that ends a response"):
        aspo.stop_tokens(model, tokenizer)


TURN = "{% for m in messages %}<turn>{{ m['content'] }}ENDING{% endfor %}"


@pytest.mark.parametrize("ending, found", [
    ("<end>", ["<end>"]), ("<end>\n", ["<end>"]), ("\n<end>", ["<end>"]), ("<end>##", ["<end>"]),  # one that follows
    ("", []), ("\n\n", []), ("#", []), ("##", [])])  # text, which an answer may hold as well
def test_a_stop_token_that_stands_in_the_chat_template_alone(tiny, ending, found):
    """Base models with a template: the end of a turn is in no list of stop ids."""
    model, tokenizer = tiny
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "<end>"]})
    tokenizer.chat_template = TURN.replace("ENDING", ending)
    assert aspo.stop_tokens(model, tokenizer) == sorted([1, *tokenizer.convert_tokens_to_ids(found)])


@pytest.mark.parametrize("engine", ENGINES)
def test_every_stop_token_ends_a_response(tiny, engine):
    policy, prompts = policy_of(*tiny, engine=engine), [ids(tiny[1], text) for text in PROMPTS for _ in range(8)]
    torch.manual_seed(0)
    stops = {1, 4, 9}
    responses = [tokens for tokens, _, _ in drawn(policy, prompts, 30, stop_ids=sorted(stops))]
    assert {tokens[-1] for tokens in responses} >= stops
    assert not any(stops & set(tokens[:-1]) for tokens in responses)


def test_prompts_use_the_chat_template_and_the_instruction(tiny):
    model, tokenizer = tiny
    encode = lambda problem, **knobs: tokenizer.decode(policy_of(model, tokenizer, **knobs).encode(problem))
    assert encode(PROBLEM, instruction="") == "1+2="
    assert encode(PROBLEM, instruction="3") == "1+2\n3="
    chat = PROBLEM | {"messages": [{"role": "user", "content": "4+4"}]}  # has an instruction of its own
    assert encode(chat, instruction="5") == "4+4="


def test_a_prompt_never_ends_in_a_stop_token(tiny):
    """Some tokenizers end every text with one, which tells the model that all has been said."""
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = tiny
    tokenizer.chat_template = None
    policy = policy_of(model, tokenizer, **OTHER)
    expected = policy.encode(PROBLEM)
    eos = tokenizer.eos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A <eos> <eos>", special_tokens=[("<eos>", eos)])
    assert tokenizer("1+2").input_ids[-2:] == [eos, eos]
    assert policy.encode(PROBLEM) == expected and eos not in expected


def test_demonstrations_work_in_steps_and_sometimes_slip():
    rng = random.Random(0)
    demos = [aspo.sloppy_demonstration("3+1+5+2", rng) for _ in range(400)]
    assert all(d.count("=") == 2 and d.split("=")[0].count("+") == 2 for d in demos)
    right = sum(d.endswith("\n#### 11") for d in demos) / 400
    assert 0.34 < right < 0.50  # three additions, all without a slip: .75 ** 3 = .42, four standard errors around it
    exact = types.SimpleNamespace(random=lambda: 0.9, randrange=rng.randrange, choice=rng.choice)
    assert {aspo.sloppy_demonstration("3+1+5", exact) for _ in range(50)} == {"4+5=9\n#### 9", "3+6=9\n#### 9"}


# ------------------------------------------------------------------------------------------------------------- CUDA

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_cuda
def test_cuda_graphs_sample_as_plain_steps_do(tiny):
    policy = policy_of(*tiny, device="cuda", engine="fast")
    prompts = [ids(tiny[1], text) for text in PROMPTS for _ in range(4)]
    plain, graphs = aspo.Decoder(policy.sampler), aspo.Decoder(policy.sampler)
    plain.graphs_on = False
    for stop in (5, 9):
        results = []
        for policy.decoder in (plain, graphs):
            results.append(greedy(policy, prompts, 60, [stop]))
        assert results[0] == results[1]
    assert graphs.graphs and not plain.graphs
    responses = []
    for _ in range(2):  # the first captures, the second replays; a replay must draw new tokens every time
        torch.manual_seed(0)
        responses.append([r for r, _, _ in drawn(policy, prompts * 16, 60)])
    assert len(set(map(tuple, responses[1]))) > 200


@needs_cuda
def test_cuda_run_in_mixed_precision(tmp_path):
    out = tmp_path / "run"
    assert aspo.main(["--device", "cuda", "--steps", "2", "--sft_steps", "5", "--out", str(out),
                      "--gradient_checkpointing"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "checkpoint")
    assert next(model.parameters()).dtype == torch.float32


def test_cpu_trains_in_fp32(tiny):
    policy = policy_of(*tiny, device="cpu")
    assert policy.dtype == torch.float32 and policy.sampler is policy.model and not policy.scaler.is_enabled()
    with policy.half_precision():
        assert not torch.is_autocast_enabled("cpu")
