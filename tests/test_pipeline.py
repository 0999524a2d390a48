"""Sampling, log-probabilities, masks and the update, on small random models, against slower and plainer ways."""
import contextlib
import copy
import itertools
import math
import random

import pytest
import torch
import transformers

import aspo
from aspo import Config, Sample, encode, micro_batches, pack, pick, roll_out, sample, token_logp, update

PROMPTS = ["1+2+3+4=", "5+5=", "1+1+1+1+1+1=", "2="]


def ids(tokenizer, text):
    return tokenizer(text).input_ids


def made_up_samples(tokenizer, groups=4, group_size=4, seed=0, stop=True):
    """Random responses of random lengths with random advantages."""
    rng = random.Random(seed)
    samples = []
    for q in range(groups):
        for _ in range(group_size):
            response = [rng.randrange(3, 18) for _ in range(rng.randint(1, 12))] + [tokenizer.eos_token_id] * stop
            samples.append(Sample("p", "1", ids(tokenizer, PROMPTS[q % 4]), response, "", 0.0, not stop, 0.0,
                                  reward=rng.random(), advantage=rng.gauss(0, 1)))
    return samples


# ---------------------------------------------------------------------------------------------- log-probabilities


def naive_logp(model, s, temperature):
    """One unpadded sequence, the full softmax, one position at a time."""
    sequence = s.prompt + s.response
    logits = model(torch.tensor([sequence])).logits[0] / temperature
    probabilities = logits.softmax(-1)
    at = range(len(s.prompt), len(sequence))
    return (torch.stack([probabilities[t - 1, sequence[t]].log() for t in at]),
            torch.stack([-(probabilities[t - 1] * probabilities[t - 1].log()).sum() for t in at]))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("order", ["groups", "shuffled"])
def test_token_logp_equals_one_sequence_at_a_time(tiny, temperature, order):
    model, tokenizer = tiny
    samples = made_up_samples(tokenizer)
    if order == "shuffled":
        random.Random(0).shuffle(samples)
    packed = pack(samples, "cpu")
    assert packed.tokens.numel() == sum(map(len, (ids(tokenizer, text) for text in PROMPTS))) + sum(len(s.response) - 1 for s in samples)
    logp, entropy = token_logp(model, packed, temperature)
    mask = packed.mask
    for i, s in enumerate(samples):
        expected_logp, expected_entropy = naive_logp(model, s, temperature)
        torch.testing.assert_close(logp[i][mask[i]], expected_logp, atol=1e-4, rtol=0)
        torch.testing.assert_close(entropy[i][mask[i]], expected_entropy, atol=1e-4, rtol=0)
    assert (logp[~mask] == 0).all()


def test_padding_side_changes_nothing(tiny):
    """The sampler pads on the left, the trainer on the right: logits after the prompt must be the same."""
    model, tokenizer = tiny
    prompts = [ids(tokenizer, text) for text in PROMPTS]
    left, _, _ = aspo.prefill(model, prompts, tokenizer.pad_token_id)
    for row, prompt in zip(left, prompts):
        torch.testing.assert_close(row, model(torch.tensor([prompt])).logits[0, -1], atol=1e-4, rtol=0)


def test_chunks_of_the_head_change_neither_values_nor_gradients(tiny, monkeypatch):
    model, tokenizer = tiny
    packed = pack(made_up_samples(tokenizer), "cpu")

    def run():
        model.zero_grad()
        logp, _ = token_logp(model, packed, 0.9)
        (logp * torch.arange(logp.numel()).view_as(logp).sin()).sum().backward()
        return logp.detach(), [p.grad.clone() for p in model.parameters()]

    logp, grads = run()
    monkeypatch.setattr(aspo, "CHUNK_LOGITS", 3 * model.config.vocab_size)  # three tokens at a time
    chunked_logp, chunked_grads = run()
    torch.testing.assert_close(chunked_logp, logp, atol=1e-5, rtol=0)
    for a, b in zip(chunked_grads, grads):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_gradient_is_that_of_one_sequence_at_a_time(tiny):
    """Through the shared prompt too: as if every response had been computed with a prompt of its own."""
    model, tokenizer = tiny
    samples = made_up_samples(tokenizer)
    weight = lambda i, n: torch.arange(n).add(10 * i).sin()
    grads = []
    for packed_way in (True, False):
        model.zero_grad()
        if packed_way:
            packed = pack(samples, "cpu")
            logp, _ = token_logp(model, packed, 0.9)
            sum((row[mask] * weight(i, int(mask.sum()))).sum() for i, (row, mask) in enumerate(zip(logp, packed.mask))).backward()
        else:
            for i, s in enumerate(samples):
                (naive_logp(model, s, 0.9)[0] * weight(i, len(s.response))).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert ((grads[0] - grads[1]).norm() / grads[1].norm()).item() < 1e-5


def test_packing_leaves_out_nothing_but_prompts_met_before_and_last_tokens():
    samples = [Sample("", "", [5, 6, 7], [8, 9, 1], "", 0, False, 0), Sample("", "", [5], [8, 1], "", 0, False, 0),
               Sample("", "", [5, 6, 7], [4], "", 0, True, 0)]
    packed = pack(samples, "cpu")
    assert packed.tokens.tolist() == [[5, 6, 7, 5, 8, 9, 8]]
    assert packed.positions.tolist() == [[0, 1, 2, 0, 3, 4, 1]]
    assert packed.targets.tolist() == [8, 9, 1, 8, 1, 4]  # up to and including the stop token
    assert packed.source.tolist() == [2, 4, 5, 3, 6, 2]
    assert packed.mask.tolist() == [[True, True, True], [True, True, False], [True, False, False]]
    seen, first_query, first_key = {}, 0, 0  # place -> places that it looks at, read off the blocks
    for block in packed.blocks:
        rows, _, q, k = block.visible.shape
        queries, keys = packed.queries[first_query:][:rows * q].view(rows, q), packed.keys[first_key:][:rows * k].view(rows, k)
        for r, i in itertools.product(range(rows), range(q)):
            if first_query + r * q + i in packed.back:  # else it is padding
                seen[int(queries[r, i])] = sorted(keys[r][block.visible[r, 0, i]].tolist())
        first_query, first_key = first_query + rows * q, first_key + rows * k
    assert seen == {0: [0], 1: [0, 1], 2: [0, 1, 2], 3: [3], 4: [0, 1, 2, 4], 5: [0, 1, 2, 4, 5], 6: [3, 6]}
    assert packed.queries[packed.back].tolist() == list(range(7))


def test_attention_takes_results_laid_out_by_tokens(tiny, monkeypatch):
    """As the kernels of a GPU return them: (B, heads, q, D) whose memory is (B, q, heads, D)."""
    model, tokenizer = tiny
    samples = made_up_samples(tokenizer)
    run = lambda: (token_logp(model, pack(samples, "cpu"), 1.0)[0].detach(), draw(model, tokenizer, [[5, 6]], 2, max_new_tokens=4,
                                                                                temperature=0))
    expected, attention = run(), aspo.scaled_dot_product_attention
    by_tokens = lambda *args, **kwargs: attention(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)
    monkeypatch.setattr(aspo, "scaled_dot_product_attention", by_tokens)
    result = run()
    assert torch.equal(result[0], expected[0]) and [r for r, *_ in result[1]] == [r for r, *_ in expected[1]]


@pytest.mark.parametrize("family, window", [("Llama", None), ("Mistral", 5), ("Qwen3", None), ("Gemma3Text", 5), ("GPT2", None)])
def test_packed_attention_is_the_models_own(family, window):
    """For other architectures, with sliding windows in all layers or in some, and with gradient checkpointing on."""
    if family == "GPT2":
        config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    else:
        config = getattr(transformers, f"{family}Config")(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, max_position_embeddings=64)
        if window:
            config.sliding_window = window
        if family == "Gemma3Text":  # both kinds of layers, and scores that are not divided by the root of the head size
            config.layer_types, config.query_pre_attn_scalar = ["sliding_attention", "full_attention"], 20
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    samples = made_up_samples(aspo.tiny_model()[1])
    expected = [naive_logp(model, s, 1.0)[0] for s in samples]
    assert aspo.probe(model) < 1e-4 and aspo.probe(model) < 1e-4  # the second time decoding is ours as well
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    packed = pack(samples, "cpu")
    logp, _ = token_logp(model, packed, 1.0)
    torch.testing.assert_close(logp[packed.mask], torch.cat(expected), atol=1e-4, rtol=0)
    logp.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_stop_token_is_trained_when_pad_is_eos(tiny):
    model, tokenizer = tiny
    eos = tokenizer.eos_token_id
    s = Sample("", "", ids(tokenizer, "1+1="), [4, eos], "", 1.0, False, 0.0, 1.0, advantage=1.0)
    before = naive_logp(model, s, 1.0)[0][-1].item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run_update(model, optimizer, [s, copy.copy(s)], Config(group_size=2, minibatch=1, prompts=1, epochs=1, lr=0.1))
    assert naive_logp(model, s, 1.0)[0][-1].item() > before + 0.01


# -------------------------------------------------------------------------------------------------------- sampling


def draw(model, tokenizer, prompts, group_size, **options):
    return sample(model, prompts, group_size, stop_ids=[tokenizer.eos_token_id], pad_id=tokenizer.pad_token_id, **options)


def generated(model, prompts, stop, new_tokens):
    """The same by transformers, one unpadded prompt at a time."""
    return [model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, pad_token_id=0,
                           max_new_tokens=new_tokens, eos_token_id=stop)[0, len(prompt):].tolist() for prompt in prompts]


@pytest.mark.parametrize("bucketed", [False, True])
def test_greedy_sampling_is_generate(tiny, bucketed, monkeypatch):
    """Mixed prompt lengths and groups; many rows stop early, so that the batch is compacted on the way; buckets as on CUDA.
    One decoder for all calls: what a larger call left in its buffers must not be seen by a smaller one."""
    monkeypatch.setattr(aspo, "CONTEXT_STEP", 16)
    model, tokenizer = tiny
    decoder = aspo.Decoder(model, bucketed=bucketed)
    prompts = [ids(tokenizer, text) for text in PROMPTS] + [ids(tokenizer, f"{a}+{b}=") for a in range(4) for b in (3, 7)]
    free = generated(model, prompts[4:5], -1, 45)[0]
    sizes, step = set(), aspo.Decoder.decode_step
    monkeypatch.setattr(aspo.Decoder, "decode_step",
                        lambda self, *args: (sizes.add((self.cache.rows, self.cache.columns)), step(self, *args)))
    for stop in sorted(set(free[-30:]))[:2]:  # an untrained model never says eos; stop at what it does say
        for some in (prompts, prompts[:3]):
            drawn = sample(model, some, 2, stop_ids=[stop], pad_id=0, max_new_tokens=45, temperature=0, decoder=decoder)
            responses = [response for response, _, _ in drawn]
            assert responses[::2] == responses[1::2] == generated(model, some, stop, 45)
        assert len({len(r) for r in responses}) > 1
    rows, columns = map(set, zip(*sizes))
    assert len(rows) > 2  # compaction happened
    if bucketed:
        assert rows <= {1, 2, 3, 4, 6, 8, 12, 16, 24} and columns <= {16, 32, 48, 64} and len(columns) > 2
    else:
        assert len(columns) > 30


@pytest.mark.parametrize("config", [
    dict(layer_types=["full_attention", "sliding_attention"]), dict(layer_types=["sliding_attention"] * 2)])
def test_sliding_windows_are_kept(config):
    """Layers that look back over 8 tokens only, beside or without others, where prompt and response are longer than that."""
    torch.manual_seed(0)
    model = aspo.Qwen2ForCausalLM(aspo.Qwen2Config(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, use_sliding_window=True, sliding_window=8, initializer_range=0.3, **config)).eval()
    prompts = [[*range(3, 3 + n)] for n in (2, 12, 7)]
    drawn = sample(model, prompts, 1, stop_ids=[], pad_id=0, max_new_tokens=20, temperature=0)
    assert [response for response, _, _ in drawn] == generated(model, prompts, -1, 20)
    model.config.sliding_window = 100  # the window mattered
    assert [response for response, _, _ in drawn] != [r for r, _, _ in sample(
        model, prompts, 1, stop_ids=[], pad_id=0, max_new_tokens=20, temperature=0)]


def test_a_decoder_sees_weights_that_change_in_place(tiny):
    """As the half-precision copy on CUDA does after every update; a graph reads the same addresses."""
    model, tokenizer = tiny
    decoder, prompts = aspo.Decoder(model, bucketed=True), [ids(tokenizer, text) for text in PROMPTS]
    greedy = lambda: [r for r, _, _ in draw(model, tokenizer, prompts, 2, max_new_tokens=20, temperature=0, decoder=decoder)]
    before, buffers = greedy(), decoder.cache.buffers
    torch.manual_seed(3)
    other = aspo.tiny_model()[0]
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters()):
            p.copy_(q)
    after = greedy()
    assert after == [r for r, _, _ in draw(other.eval(), tokenizer, prompts, 2, max_new_tokens=20, temperature=0)] != before
    assert decoder.cache.buffers is buffers


def test_half_precision_weights_leave_rotary_frequencies_alone(tiny):
    model, _ = tiny
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    half = aspo.with_weights_in(torch.bfloat16, copy.deepcopy(model))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and {p.dtype for p in model.parameters()} == {torch.float32}
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in half.named_buffers() if name in before)
    assert half.get_output_embeddings().weight is half.get_input_embeddings().weight  # still tied


def test_a_model_on_which_sampler_and_trainer_disagree_is_refused(tmp_path):
    from transformers import BloomConfig, BloomForCausalLM, GraniteConfig, GraniteForCausalLM

    _, tokenizer = aspo.tiny_model()
    small = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    for model in (GraniteForCausalLM(GraniteConfig(**small, intermediate_size=64, logits_scaling=4.0, initializer_range=0.3)),
                  BloomForCausalLM(BloomConfig(**small))):  # one scales its logits, one cannot take our mask
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(aspo.UserError, match="sampler and trainer do not agree"):
            aspo.load_model(Config(model=str(tmp_path)))


def test_samples_follow_the_softmax(tiny):
    """Chi-square of 20,000 first tokens at temperature 0.7 against the exact softmax: 17 degrees, p < 1e-4 above 49."""
    model, tokenizer = tiny
    prompt = ids(tokenizer, "1+2=")
    torch.manual_seed(1)
    responses = [response for response, _, _ in draw(model, tokenizer, [prompt], 20_000, max_new_tokens=1, temperature=0.7)]
    exact = (model(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1) * 20_000
    counts = torch.bincount(torch.tensor(responses)[:, 0], minlength=len(exact))
    assert ((counts - exact) ** 2 / exact).sum() < 49
    assert exact.max() > 3 * exact.min()  # a uniform sampler would not pass


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    torch.manual_seed(0)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(5000, 4)
    token, logp, entropy = pick(logits, 1.0, top_p=0.7)
    share = token.bincount(minlength=4) / 5000
    assert share.tolist() == pytest.approx([5 / 8, 3 / 8, 0, 0], abs=0.03)
    assert entropy[0].item() == pytest.approx(1.1421, abs=1e-3)  # of the whole softmax
    assert {round(value, 4) for value in logp.exp().tolist()} == {0.5, 0.3}


@pytest.mark.parametrize("uniform, expected", [(0.0, 2), (1 - 2**-53, 1), (0.25, 2), (0.75, 1)])
def test_a_token_of_probability_0_is_never_drawn(uniform, expected, monkeypatch):
    """Whatever the uniform number from [0, 1): its ends fall on the first and the last token that can be drawn."""
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, uniform))
    token, _, entropy = pick(torch.tensor([[-math.inf, 1.0, 1.0, -math.inf]]), 1.0)
    assert token.item() == expected and entropy.item() == pytest.approx(math.log(2))
    assert 0 <= pick(torch.full((1, 4), math.nan), 1.0)[0].item() < 4  # a model that broke fails by its gradients, not here


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_sampler_and_trainer_agree_on_the_policy(tiny, temperature):
    """What the sampler saw, through cache and compaction, is the trainer's on the same tokens at the same temperature."""
    model, tokenizer = tiny
    torch.manual_seed(2)
    cfg = Config(data="arithmetic", instruction="", max_new_tokens=40, temperature=temperature, sample_rows=8)
    samples = roll_out(model, tokenizer, aspo.all_arithmetic_problems()[:6], 4, cfg)
    assert {len(s.response) for s in samples} != {40}
    packed = pack(samples, "cpu")
    logp, entropy = token_logp(model, packed, temperature)
    mask = packed.mask
    for i, s in enumerate(samples):
        torch.testing.assert_close(s.sampler_logp, logp[i][mask[i]], rtol=0, atol=1e-4)
        assert s.entropy == pytest.approx(entropy[i][mask[i]].mean().item(), abs=1e-4)
        assert (s.response[-1] == tokenizer.eos_token_id) != s.truncated
        assert tokenizer.eos_token_id not in s.response[:-1]


def test_sampling_never_recomputes_under_gradient_checkpointing(tiny):
    model, tokenizer = tiny
    prompts = [ids(tokenizer, text) for text in PROMPTS]
    greedy = lambda: [response for response, _, _ in draw(model, tokenizer, prompts, 2, max_new_tokens=20, temperature=0)]
    plain = greedy()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    widths = []
    model.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    assert greedy() == plain
    assert len(widths) > 2 and set(widths[1:]) == {1}  # the cache is on: one new token a step


def test_dynamic_sampling_replaces_uniform_groups(tiny, monkeypatch):
    model, tokenizer = tiny
    asked = []

    def fake(model, tokenizer, problems, group_size, cfg, bar=None, decoder=None):
        asked.append([row["problem"] for row in problems])
        made = []
        for row in problems:  # even problems give mixed rewards, odd ones equal rewards
            mixed = int(row["problem"]) % 2 == 0
            made += [Sample(row["problem"], "", [3], [4], "", 0, False, 0, reward=float(mixed and k == 0)) for k in range(group_size)]
        return made

    monkeypatch.setattr(aspo, "roll_out", fake)
    stream = aspo.ProblemStream([{"problem": str(i), "answer": ""} for i in range(100)], seed=0)
    samples = aspo.collect(model, tokenizer, stream, Config(prompts=8, group_size=2, max_refills=20))
    assert len(samples) == 16 and all(int(s.problem) % 2 == 0 for s in samples)
    assert len(asked) > 1 and all(len(more) < 8 for more in asked[1:])
    asked.clear()
    samples = aspo.collect(model, tokenizer, stream, Config(prompts=8, group_size=2))
    assert len(asked) == 1 and len(samples) == 16


def test_problem_stream_visits_everything_in_an_order_of_its_seed():
    problems = [{"problem": i} for i in range(10)]
    take = lambda seed, n: [row["problem"] for row in aspo.ProblemStream(problems, seed).take(n)]
    assert sorted(take(0, 10)) == list(range(10)) and take(0, 25) == take(0, 25)
    assert take(0, 20)[10:] != take(0, 10) != take(1, 10)


# ---------------------------------------------------------------------------------------------------------- update


def run_update(model, optimizer, samples, cfg, reference=None):
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return update(model, reference, optimizer, schedule, scaler, samples, cfg, contextlib.nullcontext)


def step_taken(tiny, samples, reference=None, **knobs):
    """The change of all weights by one call of update with SGD at lr 1, which is minus the gradient for one step."""
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    cfg = Config(**(dict(prompts=4, group_size=4, minibatch=4, epochs=1, grad_clip=1e9) | knobs))
    stats, norms = run_update(model, torch.optim.SGD(model.parameters(), lr=knobs.get("lr", 1.0)), samples, cfg, reference=reference)
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before, stats, norms


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("agg", ["token", "sequence", "constant"])
def test_gradient_does_not_depend_on_the_micro_batch(tiny, agg):
    samples = lambda: made_up_samples(tiny[1])
    whole, _, _ = step_taken(tiny, samples(), micro_tokens=10**6, loss_agg=agg)
    for micro_tokens in (1, 40, 90):
        cut, _, _ = step_taken(tiny, samples(), micro_tokens=micro_tokens, loss_agg=agg)
        assert relative(cut, whole) < 1e-5
    # and it is the gradient of the definition, one sequence at a time
    model, total = copy.deepcopy(tiny[0]), 0.0
    tokens = sum(len(s.response) for s in samples())
    for s in samples():
        logp = naive_logp(model, s, 1.0)[0]
        total = total - s.advantage * {"token": logp.sum() / tokens, "sequence": logp.mean() / 16,
                                       "constant": logp.sum() / 16 / Config().max_new_tokens}[agg]
    total.backward()
    expected = -torch.cat([p.grad.flatten() for p in model.parameters()])
    assert relative(whole, expected) < 1e-4


def test_first_step_is_the_same_for_aspo_and_grpo_and_later_ones_differ(tiny):
    knobs = dict(lr=0.3)
    one = {loss: step_taken(tiny, made_up_samples(tiny[1]), loss=loss, **knobs) for loss in ("aspo", "grpo", "no-is")}
    for change, stats, norms in one.values():
        assert relative(change, one["grpo"][0]) < 1e-6 and len(norms) == 1
        assert (stats["log_ratio"] == 0).all() and (stats["weight"] == 1).all()
    several = {loss: step_taken(tiny, made_up_samples(tiny[1]), loss=loss, minibatch=2, epochs=2, **knobs) for loss in one}
    for change, stats, norms in several.values():
        assert len(norms) == 4 and (stats["log_ratio"] != 0).any()
    assert relative(several["aspo"][0], several["grpo"][0]) > 1e-3
    assert relative(several["no-is"][0], several["grpo"][0]) > 1e-3


def test_old_logp_is_fixed_before_the_first_step(tiny):
    samples = made_up_samples(tiny[1])
    expected = [naive_logp(tiny[0], s, 1.0)[0].detach() for s in samples]
    step_taken(tiny, samples, minibatch=1, epochs=3, lr=0.3)
    for s, values in zip(samples, expected):
        torch.testing.assert_close(s.old_logp, values, atol=1e-5, rtol=0)


def test_samples_without_signal_count_but_are_not_computed(tiny):
    samples = made_up_samples(tiny[1], groups=2)
    for s in samples[4:]:
        s.advantage, s.reward = 0.0, 1.0
    full, stats, _ = step_taken(tiny, samples, minibatch=2, prompts=2)
    assert len(stats["advantage"]) == sum(len(s.response) for s in samples[:4])
    alone, _, _ = step_taken(tiny, samples[:4], minibatch=2, prompts=2)
    dropped, _, _ = step_taken(tiny, samples, minibatch=2, prompts=2, drop_uniform_groups=True)
    share = sum(len(s.response) for s in samples[:4]) / sum(len(s.response) for s in samples)
    assert relative(full, alone * share) < 1e-5 and relative(dropped, alone) < 1e-5
    nothing, stats, norms = step_taken(tiny, samples[4:], minibatch=1, prompts=1)
    assert (nothing == 0).all() and norms == [] and stats == {}


def test_truncated_responses_can_be_masked(tiny):
    samples = made_up_samples(tiny[1], groups=2)
    for s in samples[::2]:
        s.truncated = True
    masked, _, _ = step_taken(tiny, samples, minibatch=2, prompts=2, mask_truncated=True)
    alone, _, _ = step_taken(tiny, samples[1::2], minibatch=2, prompts=2)
    assert relative(masked, alone) < 1e-5


def test_kl_pulls_towards_the_reference(tiny):
    reference = copy.deepcopy(tiny[0])
    moved = copy.deepcopy(tiny[0])
    torch.manual_seed(5)
    for p in moved.parameters():
        p.data += 0.02 * torch.randn_like(p)
    samples = made_up_samples(tiny[1])
    for s in samples:
        s.advantage = 0.0
    kl = []
    optimizer = torch.optim.SGD(moved.parameters(), lr=0.05)
    for _ in range(10):
        stats, norms = run_update(moved, optimizer, samples, Config(kl_coef=1.0, prompts=4, group_size=4, minibatch=4, epochs=1),
                                  reference=reference)
        kl.append(stats["kl_ref"].mean().item())
    assert kl[0] > 1e-4 and kl[-1] < 0.7 * kl[0]


def test_micro_batches_keep_everything_within_the_budget():
    samples = made_up_samples(aspo.tiny_model()[1], groups=8)
    cost = lambda batch: sum(map(len, {tuple(s.prompt) for s in batch})) + sum(len(s.response) for s in batch)
    for budget in range(40, 61):
        batches = micro_batches(samples, budget)
        assert sum(batches, []) == samples and len(batches) > 4
        assert max(pack(batch, "cpu").tokens.numel() for batch in batches) <= budget
        assert all(cost(batch) <= budget < cost([*batch, after[0]]) for batch, after in zip(batches, batches[1:]))  # full, not over
    assert all(len(b) == 1 for b in micro_batches(samples, 1))
    assert micro_batches([], 60) == []


DROPOUT = {
    "OPT": dict(hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, dropout=0.5),  # a number
    "GPT2": dict(n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.5, embd_pdrop=0.5),  # modules
}


@pytest.mark.parametrize("family", DROPOUT)
def test_dropout_is_off(family, tmp_path):
    """A model whose config asks for dropout must still give the same log-probabilities twice in train mode."""
    tokenizer = aspo.tiny_model()[1]
    config = getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=1,
                                                      **DROPOUT[family])
    packed = pack(made_up_samples(tokenizer), "cpu")
    twice = lambda model: [token_logp(model, packed, 1.0)[0] for _ in range(2)]
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert not torch.equal(*twice(model.train()))  # as it comes
    torch.testing.assert_close(*twice(aspo.load_model(Config(model=str(tmp_path)))[0].train()), atol=0, rtol=0)


def test_stop_tokens_come_from_both_places(tiny):
    model, tokenizer = tiny
    model.generation_config.eos_token_id = [7, 9]
    assert aspo.stop_tokens(model, tokenizer) == sorted([7, 9, tokenizer.eos_token_id])


def test_prompts_use_the_chat_template_and_the_instruction(tiny):
    _, tokenizer = tiny
    assert tokenizer.decode(encode(tokenizer, "1+2", Config(instruction=""))) == "1+2="
    assert tokenizer.decode(encode(tokenizer, "1+2", Config(instruction="3"))) == "1+2\n3="


def test_demonstrations_work_in_steps_and_sometimes_slip(monkeypatch):
    rng = random.Random(0)
    demos = [aspo.sloppy_demonstration("3+1+5+2", rng, slip=0.25) for _ in range(400)]
    assert all(d.count("=") == 2 and d.split("=")[0].count("+") == 2 for d in demos)
    right = sum(d.endswith("\n#### 11") for d in demos) / 400
    assert 0.34 < right < 0.50  # three additions, all without a slip: .75 ** 3 = .42, four standard errors around it
    seen = []
    monkeypatch.setattr(aspo, "sloppy_demonstration", lambda problem, rng, slip: seen.append(slip) or "1+1=2")
    aspo.sft_warmup(*aspo.tiny_model(), [{"problem": "1+1", "answer": "2"}], Config(sft_steps=1, sft_slip=0.4))
    assert set(seen) == {0.4}
    monkeypatch.undo()
    assert {aspo.sloppy_demonstration("3+1+5", rng, slip=0) for _ in range(50)} == {"4+5=9\n#### 9", "3+6=9\n#### 9"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_graphs_sample_as_plain_steps_do(tiny):
    model, tokenizer = tiny[0].cuda(), tiny[1]
    prompts = [ids(tokenizer, text) for text in PROMPTS]
    plain, graphs = (aspo.Decoder(model, graphs=on) for on in (False, True))
    for stop in (5, 9):
        greedy = [[r for r, _, _ in sample(model, prompts, 4, stop_ids=[stop], pad_id=0, max_new_tokens=60, temperature=0, decoder=d)]
                  for d in (plain, graphs)]
        assert greedy[0] == greedy[1]
    assert graphs.graphs and not plain.graphs
    drawn = []
    for _ in range(2):  # the first captures, the second replays; a replay must draw new tokens every time
        torch.manual_seed(0)
        drawn.append([r for r, _, _ in sample(model, prompts, 64, stop_ids=[], pad_id=0, max_new_tokens=60, decoder=graphs)])
    assert len(set(map(tuple, drawn[1]))) > 200


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_run_in_mixed_precision(tmp_path):
    out = tmp_path / "run"
    assert aspo.main(["--device", "cuda", "--steps", "2", "--sft_steps", "5", "--out", str(out), "--gradient_checkpointing"]) == 0
    model = aspo.AutoModelForCausalLM.from_pretrained(out / "checkpoint")
    assert next(model.parameters()).dtype == torch.float32


def test_cpu_trains_in_fp32():
    assert aspo.choose_precision(torch.device("cpu")) is None
