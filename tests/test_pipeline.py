"""Sampling, log-probabilities and the update of small random models, against slower and plainer ways: mostly
transformers' own forward of one unpadded sequence at a time. test_models.py does so for many kinds of model."""
import copy
import math

import pytest
import torch
from conftest import PROMPTS, ids, made_up_samples, policy_of, sgd_policy

import aspo
from aspo import Config, Sample, pick

def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def flat(model, of=lambda p: p.detach().clone()):
    return torch.cat([of(p).flatten() for p in model.parameters()])


def flat_gradient(model):
    return flat(model, lambda p: torch.zeros_like(p) if p.grad is None else p.grad)


# ---------------------------------------------------------------------------------------------- log-probabilities

def naive_logp(model, s, temperature=1.0):
    """Log-probabilities and entropies of one unpadded sequence, by the full softmax, one position at a time."""
    sequence = s.prompt + s.response
    probs = (model(torch.tensor([sequence]), use_cache=False).logits[0].float() / temperature).softmax(-1)
    at = range(len(s.prompt), len(sequence))
    return (torch.stack([probs[t - 1, sequence[t]].log() for t in at]),
            torch.stack([-(probs[t - 1] * probs[t - 1].log()).sum() for t in at]))


def gradient_of(model, logps):
    """Of the sum of log-probabilities, each with a weight of its own."""
    model.zero_grad()
    sum((logp * torch.arange(len(logp)).add(10 * i).sin()).sum() for i, logp in enumerate(logps)).backward()
    return flat_gradient(model)


def naive_gradient(model, samples, temperature=1.0):
    logps, entropies = zip(*(naive_logp(model, s, temperature) for s in samples))
    return torch.cat(logps).detach(), torch.cat(entropies).detach(), gradient_of(model, logps)


def own_gradient(policy, samples):
    """The same by token_logp, all samples in one micro-batch."""
    logp, entropy, mask = aspo.token_logp(policy, policy.model, samples)
    assert (logp[~mask] == 0).all() and (entropy[~mask] == 0).all()
    assert mask.sum(1).tolist() == [len(s.response) for s in samples]
    return logp[mask].detach(), entropy[mask], gradient_of(policy.model, [row[where] for row, where in zip(logp, mask)])


def assert_same(found, expected):
    for a, b in zip(found[:2], expected[:2]):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert found[2].isfinite().all() and relative(found[2], expected[2]) < 1e-5


def test_token_logp_equals_one_sequence_at_a_time(tiny, temperature=0.6):
    samples = made_up_samples(tiny[1])
    expected = naive_gradient(tiny[0], samples, temperature)
    assert_same(own_gradient(policy_of(*tiny, temperature=temperature), samples), expected)


def test_logits_a_few_rows_at_a_time_change_nothing(tiny, monkeypatch):
    policy, samples = policy_of(*tiny, temperature=0.9), made_up_samples(tiny[1])
    expected, rows, real = own_gradient(policy, samples), [], aspo.lm_head_logits
    monkeypatch.setattr(aspo, "LOGITS_AT_ONCE", 3 * policy.model.config.vocab_size)
    monkeypatch.setattr(aspo, "lm_head_logits", lambda model, hidden: rows.append(len(hidden)) or real(model, hidden))
    assert_same(own_gradient(policy, samples), expected)
    assert max(rows) == 3 and sum(rows) == 2 * len(expected[0])  # forward, and again in the backward pass


def test_gradient_checkpointing_gives_the_same_gradient_and_does_recompute(tiny):
    policy, samples = policy_of(*tiny, gradient_checkpointing=True), made_up_samples(tiny[1])
    runs = []
    policy.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    assert_same(own_gradient(policy, samples), naive_gradient(copy.deepcopy(tiny[0]), samples))
    assert len(runs) >= 2
    embedded, prompt = [], ids(tiny[1], "1+2=")
    policy.sampler.model.embed_tokens.register_forward_pre_hook(lambda module, args: embedded.append(args[0].shape))
    assert greedy(policy, [prompt] * 2, 6) == generated(policy.model, [prompt] * 2, 6)
    assert embedded[:6] == [(1, 4), *[(2, 1)] * 5]  # the cache is on: the group's prompt once, then one token a step


def test_entropy_is_exact_under_autocast_at_the_size_of_a_real_vocabulary(monkeypatch):
    monkeypatch.setattr(aspo, "lm_head_logits", lambda model, hidden: hidden)
    torch.manual_seed(0)
    logits, targets = 2 * torch.randn(4, 151_936), torch.tensor([0, 7, 151_935, 12])
    p = logits.double().softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        logp, entropy = aspo.logp_and_entropy(None, logits, targets, 1.0)
        _, _, sampled_entropy = pick(logits, 1.0)
    for found in (entropy, sampled_entropy):
        torch.testing.assert_close(found.double(), -(p * p.log()).sum(-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(logp.double(), p.log().gather(1, targets[:, None])[:, 0], atol=1e-4, rtol=0)


# -------------------------------------------------------------------------------------------------------- sampling

def drawn(policy, prompts, new_tokens, temperature=1.0, stop_ids=(), top_p=1.0):
    """policy.generate with other settings than those of its run."""
    trial = copy.copy(policy)
    trial.max_new_tokens, trial.temperature, trial.top_p = new_tokens, temperature, top_p
    trial.stop_ids = list(stop_ids)
    return trial.generate(prompts)


def greedy(policy, prompts, new_tokens, stop_ids=()):
    return [response for response, _, _ in drawn(policy, prompts, new_tokens, 0, stop_ids)]


def generated(model, prompts, new_tokens, stop=None):
    """The same by transformers, one unpadded prompt at a time."""
    return [model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                           do_sample=False, pad_token_id=0, max_new_tokens=new_tokens,
                           eos_token_id=stop)[0, len(prompt):].tolist() for prompt in prompts]


def test_greedy_sampling_is_generate_and_keeps_the_order(tiny):
    """Mixed prompt lengths and groups; many rows stop early and leave; sample_rows splits anywhere, in a group too."""
    policy = policy_of(*tiny)
    prompts = [ids(tiny[1], text) for text in [*PROMPTS, *(f"{a}+{b}=" for a in range(4) for b in (3, 7))]]
    stop = generated(policy.model, prompts[4:5], 30)[0][-1]  # an untrained model never says eos: what it does say
    expected = generated(policy.model, prompts, 30, stop)
    assert len({len(response) for response in expected}) > 1
    for policy.sample_rows in (100, 5):
        responses = greedy(policy, [p for p in prompts for _ in range(2)], 30, [stop])
        assert responses[::2] == responses[1::2] == expected
    policy.sample_rows, policy.temperature = 3, 0
    assert len(aspo.generate(policy, prompts)) == len(prompts)  # cutting them up is policy.generate's


def test_every_stop_token_ends_a_response_and_finished_rows_leave_the_batch(tiny):
    policy, prompts = policy_of(*tiny), [ids(tiny[1], text) for text in PROMPTS for _ in range(8)]
    torch.manual_seed(0)
    sizes, stops = [], {1, 4, 9}
    policy.sampler.model.embed_tokens.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    responses = [tokens for tokens, _, _ in drawn(policy, prompts, 30, stop_ids=sorted(stops))]
    assert {tokens[-1] for tokens in responses} >= stops
    assert not any(stops & set(tokens[:-1]) for tokens in responses)
    # The different prompts, then a row for each response, which is four steps late at most when it has ended.
    assert sizes[0] == 4 and sum(sizes[1:]) < sum(map(len, responses)) + 4 * 32 and sizes[-1] < sizes[1]


@pytest.mark.parametrize("size", [4, 100, 1000])
def test_draw_follows_the_probabilities(size):
    """Chi-square of 100,000 draws; tokens of probability 0, a whole stretch of them too, are never drawn.

    The sum exceeds its mean, the degrees of freedom, by five standard deviations once in a million times or two.
    """
    torch.manual_seed(size)
    probs, n = (2 * torch.randn(size)).softmax(-1), 100_000
    probs[::3] = 0
    probs[size // 2:size // 2 + size // 8] = 0
    probs[-1] = 0
    probs /= probs.sum()
    tokens = torch.cat([aspo.draw(probs.expand(10_000, size)) for _ in range(n // 10_000)])
    counts, expected = tokens.bincount(minlength=size), n * probs
    assert len(counts) == size and (counts[probs == 0] == 0).all()
    often = expected >= 5
    counts, expected = (torch.cat([x[often], x[~often].sum()[None]]).double() for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom) + 5
    assert freedom >= 1 and expected.max() > 3 * expected.min()  # a uniform sampler would not pass


@pytest.mark.parametrize("uniform, expected", [(0.0, 2), (1 - 2**-53, 1), (0.25, 2), (0.75, 1)])
def test_a_token_of_probability_0_is_never_drawn(uniform, expected, monkeypatch):
    """Whatever the uniform number from [0, 1): its ends fall on the first and the last token that can be drawn."""
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, uniform))
    assert pick(torch.tensor([[-math.inf, 1.0, 1.0, -math.inf]]), 1.0)[0].item() == expected
    assert 0 <= pick(torch.full((1, 4), math.nan), 1.0)[0].item() < 4  # of a broken model, which fails elsewhere
    logits = torch.full((1, 130), -math.inf)
    logits[0, [1, 65, 128]] = torch.tensor([0.0, -30.0, 0.0])
    assert pick(logits, 1.0)[0].item() == {2: 128, 1: 1}[expected]


def test_top_p_by_hand():
    torch.manual_seed(0)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(5000, 4)
    token, logp, entropy = pick(logits * 0.6, 0.6, top_p=0.7)  # at this temperature
    assert (token.bincount(minlength=4) / 5000).tolist() == pytest.approx([5 / 8, 3 / 8, 0, 0], abs=0.03)
    assert entropy[0].item() == pytest.approx(1.1421, abs=1e-3)  # of the whole softmax
    assert {round(value, 4) for value in logp.exp().tolist()} == {0.5, 0.3}
    assert pick(logits[:5], 0)[0].tolist() == [0] * 5


def test_sampler_and_trainer_agree_on_the_policy(tiny, temperature=1.5):
    """What the sampler saw, through cache and rows that leave, is the trainer's on the same tokens and temperature."""
    torch.manual_seed(2)
    policy, eos = policy_of(*tiny, temperature=temperature, sample_rows=8), tiny[1].eos_token_id
    problems = aspo.make_problems(aspo.BUILT_IN["arithmetic"][:6], "sums")
    samples = aspo.roll_out(policy, problems, 4, policy.cfg)
    assert [s.problem for s in samples] == [p["problem"] for p in problems for _ in range(4)]
    assert {len(s.response) for s in samples} != {40}
    logp, entropy, mask = aspo.token_logp(policy, policy.model, samples)
    for i, s in enumerate(samples):
        torch.testing.assert_close(s.sampler_logp, logp[i][mask[i]], rtol=0, atol=1e-4)
        assert s.entropy == pytest.approx(entropy[i][mask[i]].mean().item(), abs=1e-4)
        assert (s.response[-1] == eos) != s.truncated and eos not in s.response[:-1]


def test_what_is_cut_off_scores_nothing_and_long_responses_are_penalised(tiny):
    """Of a reward that pays 1 for everything; one below 0 stays."""
    problems = aspo.make_problems(aspo.BUILT_IN["arithmetic"][:8], "sums")
    policy = policy_of(*tiny, max_new_tokens=20, overlong_buffer=10)
    torch.manual_seed(0)
    samples = aspo.roll_out(policy, problems, 4, policy.cfg, lambda response, problem: 1.0)
    assert {s.truncated for s in samples} == {True, False} == {len(s.response) > 10 for s in samples}
    for s in samples:
        assert s.correct == (not s.truncated)
        assert s.reward == pytest.approx(s.correct - max(0, len(s.response) - 10) / 10)
    for s in aspo.roll_out(policy, problems, 4, policy.cfg, lambda response, problem: -2.0):
        assert s.correct == -2


@pytest.mark.filterwarnings("ignore:.*GradScaler")  # fp16's, which wants a GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_copy_for_sampling_in_half_precision(tiny, dtype):
    """As on CUDA: weights in half precision in one, autocast in the other. Rotary frequencies stay in fp32."""
    policy = policy_of(*tiny, lr=0.1, lr_warmup=0)
    policy.dtype = dtype
    policy.place(learning=True)
    assert {p.dtype for p in policy.sampler.parameters()} == {dtype}
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    buffers = dict(policy.model.named_buffers())
    assert buffers and all(b.equal(buffers[name]) for name, b in policy.sampler.named_buffers())
    assert policy.sampler.get_output_embeddings().weight is policy.sampler.get_input_embeddings().weight  # still tied

    torch.manual_seed(0)
    prompts = [ids(tiny[1], text) for text in PROMPTS for _ in range(8)]
    samples = [Sample("", "", prompt, tokens, sampler_logp=logp) for prompt, (tokens, logp, _) in zip(
        prompts, drawn(policy, prompts, 30, stop_ids=[1, 5]))]
    logp, _, mask = aspo.token_logp(policy, policy.model, samples)
    exact = torch.cat([naive_logp(policy.model, s)[0] for s in samples])
    unit = torch.finfo(dtype).eps
    for found in (torch.cat([s.sampler_logp for s in samples]), logp[mask]):
        assert unit / 30 < (found - exact).abs().mean().item() < unit  # rounded, and no more than that

    before = flat(policy.sampler)
    for p in policy.model.parameters():
        p.data += 0.1
    policy.refresh_sampler()
    assert flat(policy.sampler).equal(flat(policy.model).to(dtype)) and not flat(policy.sampler).equal(before)


def stream(n, seed=0, position=0):
    """A run that gives problems, and nothing else."""
    problems = [{"problem": str(i), "answer": ""} for i in range(n)]
    nothing = dict.fromkeys(("out", "policy", "reward", "heldout", "step", "before"))
    return aspo.Run(Config(seed=seed), problems=problems, position=position, **nothing)


def test_dynamic_sampling_replaces_uniform_groups(monkeypatch):
    asked, run = [], stream(100)

    def fake(policy, problems, n, cfg, reward):
        """Even problems give mixed rewards, odd ones equal rewards."""
        asked.append(len(problems))
        return [Sample(p["problem"], "", [3], [4], reward=float(int(p["problem"]) % 2 == 0 and k == 0))
                for p in problems for k in range(n)]

    monkeypatch.setattr(aspo, "roll_out", fake)
    first = fake(None, run.take(8), 2, None, None)
    run.cfg = Config(group_size=2, max_refills=20)
    samples = aspo.refill(run, first)
    assert len(samples) == 16 and all(int(s.problem) % 2 == 0 for s in samples)
    assert all(s in samples for s in first if int(s.problem) % 2 == 0) and all(n < 8 for n in asked[1:])
    assert all(a.problem == b.problem for a, b in zip(samples[::2], samples[1::2]))  # groups side by side
    run.cfg = Config(group_size=2, max_refills=1)
    uniform = [s for s in first if int(s.problem) % 2] * 8
    assert len(aspo.refill(run, uniform)) == len(uniform)  # those of the last refill stay


def test_problems_are_all_visited_in_an_order_of_the_seed():
    def take(n, seed=0, position=0):
        return [int(row["problem"]) for row in stream(10, seed, position).take(n)]

    assert sorted(take(10)) == list(range(10)) and take(25)[12:] == take(13, position=12)
    assert take(20)[10:] != take(10) != take(10, seed=1)


# ---------------------------------------------------------------------------------------------------------- update

def step_taken(tiny, samples, **knobs):
    """The change of all weights by one call of update, its stats and norms."""
    policy = sgd_policy(tiny, **knobs)
    before = flat(policy.model)
    stats, norms = aspo.update(policy, samples, policy.cfg)
    assert all(p.grad is None or not p.grad.any() for p in policy.model.parameters())
    merged = {name: torch.cat([s[name] for s in stats]) for name in (stats[0] if stats else ())}
    return flat(policy.model) - before, merged, norms


@pytest.mark.parametrize("agg", ["token", "sequence", "constant"])
def test_gradient_does_not_depend_on_the_micro_batch(tiny, agg):
    """And it is the gradient of the definition, one sequence at a time."""
    samples, model, total = made_up_samples(tiny[1]), copy.deepcopy(tiny[0]), 0.0
    tokens = sum(len(s.response) for s in samples)
    for s in samples:
        logp = naive_logp(model, s)[0]
        total = total - s.advantage * {"token": logp.sum() / tokens, "sequence": logp.mean() / 16,
                                       "constant": logp.sum() / 16 / 40}[agg]
    total.backward()
    for micro_tokens in (10**6, 90, 1):
        change, _, _ = step_taken(tiny, samples, micro_tokens=micro_tokens, loss_agg=agg)
        assert relative(change, -flat_gradient(model)) < 1e-4


def test_first_step_is_the_same_for_all_methods_and_later_ones_differ(tiny):
    samples, common = lambda: made_up_samples(tiny[1]), dict(lr=0.3, loss_agg="token")
    one = {loss: step_taken(tiny, samples(), loss=loss, **common) for loss in aspo.WEIGHTS}
    for change, stats, norms in one.values():
        assert relative(change, one["grpo"][0]) < 1e-6 and len(norms) == 1
        assert (stats["log_ratio"] == 0).all() and (stats["weight"] == 1).all()
    several = {loss: step_taken(tiny, samples(), loss=loss, minibatch=2, epochs=2, micro_tokens=60, **common)
               for loss in aspo.WEIGHTS}
    for loss, (change, stats, norms) in several.items():
        assert len(norms) == 4 and (stats["log_ratio"] != 0).any()
        assert loss not in ("aspo", "no-is") or relative(change, several["grpo"][0]) > 1e-3


def test_old_logp_is_fixed_before_the_first_step(tiny, monkeypatch):
    samples = made_up_samples(tiny[1])
    expected = [naive_logp(tiny[0], s)[0].detach() for s in samples]
    step_taken(tiny, samples, minibatch=1, epochs=3, lr=0.3)
    for s, values in zip(samples, expected):
        torch.testing.assert_close(s.old_logp, values, atol=1e-5, rtol=0)
    monkeypatch.setattr(aspo, "remember_old_logp", None)  # where a rollout has one step, pi_old is pi
    assert len(step_taken(tiny, made_up_samples(tiny[1]))[2]) == 1


def test_samples_without_signal_count_but_are_not_computed(tiny):
    samples = made_up_samples(tiny[1], groups=2)
    for s in samples[4:]:
        s.advantage, s.reward = 0.0, 1.0
    full, stats, _ = step_taken(tiny, samples, minibatch=2, prompts=2)
    assert len(stats["advantage"]) == sum(len(s.response) for s in samples[:4])
    alone, _, _ = step_taken(tiny, samples[:4], minibatch=2, prompts=2)
    share = sum(len(s.response) for s in samples[:4]) / sum(len(s.response) for s in samples)
    assert relative(full, alone * share) < 1e-5
    nothing, stats, norms = step_taken(tiny, samples[4:], minibatch=1, prompts=1)
    assert (nothing == 0).all() and norms == [] and stats == {}


def test_stop_token_is_trained_when_pad_is_eos(tiny):
    tokenizer = tiny[1]
    eos = tokenizer.pad_token_id = tokenizer.eos_token_id
    s = Sample("", "", ids(tokenizer, "1+1="), [4, eos], advantage=1.0, sampler_logp=torch.zeros(2))
    long = Sample("", "", ids(tokenizer, "1+1="), [4] * 9, sampler_logp=torch.zeros(9))
    policy = sgd_policy(tiny, lr=0.1, group_size=2, minibatch=1, prompts=1)
    aspo.update(policy, [s, long], policy.cfg)
    assert naive_logp(policy.model, s)[0][-1] > naive_logp(tiny[0], s)[0][-1] + 0.01


def test_kl_pulls_towards_the_reference(tiny):
    """Samples without an advantage are trained on too. The reference itself does not move."""
    samples, moved = made_up_samples(tiny[1]), copy.deepcopy(tiny[0])
    torch.manual_seed(5)
    for p in moved.parameters():
        p.data += 0.02 * torch.randn_like(p)
    for s in samples:
        s.advantage = 0.0
    policy = sgd_policy((moved, tiny[1]), lr=0.05, kl_coef=1.0)
    policy.reference = aspo.prepare(copy.deepcopy(tiny[0]))
    kl = [torch.cat([s["kl_ref"] for s in aspo.update(policy, samples, policy.cfg)[0]]) for _ in range(8)]
    d = torch.cat([naive_logp(tiny[0], s)[0] - naive_logp(moved, s)[0] for s in samples])
    assert kl[0].sum().item() == pytest.approx((d.exp() - d - 1).sum().item(), rel=1e-3)
    assert kl[0].mean() > 1e-4 and kl[-1].mean() < 0.8 * kl[0].mean()
    assert flat(policy.reference).equal(flat(tiny[0]))


def test_micro_batches_keep_everything_within_the_budget():
    """Padding included; the longest first, which shows at once what fits."""
    samples = made_up_samples(aspo.tiny_model()[1], groups=8)
    length = lambda s: len(s.prompt + s.response)
    for budget in (40, 60):
        batches = aspo.micro_batches(samples, budget)
        assert sorted(map(id, sum(batches, []))) == sorted(map(id, samples))
        widths = [max(map(length, batch)) for batch in batches]
        assert widths == sorted(widths, reverse=True)
        assert all(len(batch) * width <= budget < (len(batch) + 1) * width
                   for batch, width in zip(batches[:-1], widths))  # full
    assert all(len(batch) == 1 for batch in aspo.micro_batches(samples, 1)) and aspo.micro_batches([], 60) == []


# -------------------------------------------------------------------------------------------- prompts and stop tokens

def test_stop_tokens_come_from_the_config_and_the_tokenizer(tiny):
    model, tokenizer = tiny
    model.generation_config.eos_token_id = [7, 9]
    assert aspo.stop_tokens(model, tokenizer) == sorted([7, 9, tokenizer.eos_token_id])
    model.generation_config.eos_token_id = 8
    assert aspo.stop_tokens(model, tokenizer) == sorted([8, tokenizer.eos_token_id])


@pytest.mark.parametrize("ending, found", [
    ("<end>", ["<end>"]), ("\n<end>\n", ["<end>"]), ("", []), ("##", [])])  # text, which an answer may hold as well
def test_a_stop_token_that_stands_in_the_chat_template_alone(tiny, ending, found):
    """Base models with a template: the end of a turn is in no list of stop ids."""
    model, tokenizer = tiny
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "<end>"]})
    tokenizer.chat_template = "{% for m in messages %}<turn>{{ m['content'] }}" + ending + "{% endfor %}"
    assert aspo.stop_tokens(model, tokenizer) == sorted([1, *tokenizer.convert_tokens_to_ids(found)])


def test_special_tokens_stay_in_the_text_but_for_the_stop_token_and_padding(tiny):
    """What reward, log and eval read is what the model wrote."""
    model, tokenizer = tiny
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    policy = policy_of(model, tokenizer)
    text = "<think>1+3</think>4"
    assert policy.decode(ids(tokenizer, text) + [tokenizer.eos_token_id]) == text
    assert policy.decode(ids(tokenizer, text)) == text  # cut off
    assert policy.decode([tokenizer.eos_token_id]) == ""
