"""The formulas against published values, textbook objectives and numbers worked out by hand."""
import copy
import math

import pytest
import torch
from conftest import policy_of

from aspo import (WEIGHTS, Config, Sample, group_advantages, overlong_penalty, policy_loss, repetition,
                  rollout_metrics, update_metrics)

# Weights of the authors' loss functions, differentiated, for eps 0.2 and dual clip 3.
RATIOS = [0.05, 0.3, 0.34, 0.5, 0.7, 0.81, 0.9, 1.0, 1.1, 1.19, 1.21, 1.39, 2.0, 2.9, 3.1, 8]
GOLDEN = {
    ("grpo", +1): [.05, .3, .34, .5, .7, .81, .9, 1, 1.1, 1.19, 0, 0, 0, 0, 0, 0],
    ("grpo", -1): [0, 0, 0, 0, 0, .81, .9, 1, 1.1, 1.19, 1.21, 1.39, 2, 2.9, 0, 0],
    ("aspo", +1): [3, 3, 2.941, 2, 1.429, 1.235, 1.111, 1, .909, .840, 0, 0, 0, 0, 0, 0],
    ("aspo", -1): [0, 0, 0, 0, 0, .81, .9, 1, 1.1, 1.19, 1.21, 1.39, 2, 2.9, 3, 3],
    ("no-is", +1): [1] * 10 + [0] * 6,
    ("no-is", -1): [0] * 5 + [1] * 11,
}


def weights(loss, ratios, sign, **knobs):
    cfg = Config(loss=loss, **knobs)
    eps = cfg.eps_low, cfg.eps_high
    return WEIGHTS[loss](torch.tensor([ratios]), torch.tensor([[float(sign)]]), eps, cfg.dual_clip)


def weights_in_loss(loss, ratios, sign):
    """The same as policy_loss computes them, which turns gspo's ratios into one of the sequence."""
    logp = torch.tensor([ratios]).log()
    advantages = torch.tensor([[float(sign)]])
    _, stats = policy_loss(logp, torch.zeros_like(logp), advantages, torch.ones_like(logp), Config(loss=loss))
    return stats["weight"].tolist()


@pytest.mark.parametrize("loss, sign", GOLDEN)
def test_golden_weights(loss, sign):
    assert weights(loss, RATIOS, sign)[0].tolist() == pytest.approx(GOLDEN[loss, sign], abs=1e-3)
    assert weights_in_loss(loss, RATIOS, sign) == pytest.approx(GOLDEN[loss, sign], abs=1e-3)


def test_neighbours():
    assert weights("dapo", [1.27, 1.29], 1)[0].tolist() == pytest.approx([1.27, 0])  # clip-higher: 0.28
    assert weights("dr-grpo", [1.19, 1.21], 1)[0].tolist() == pytest.approx([1.19, 0])
    for sign in (1, -1):
        assert weights("cispo", [0.1, 1.1, 9.0], sign)[0].tolist() == pytest.approx([0.1, 1.1, 1.2])
    # sequence ratio sqrt(1.2 * 1 / 1.2) = 1 although both tokens left the clip range
    assert weights_in_loss("gspo", [1.2, 1 / 1.2], 1) == pytest.approx([1, 1])
    assert weights_in_loss("gspo", [1.001, 1.001], 1) == [0, 0]
    assert weights_in_loss("gspo", [1.001, 1.001], -1) == pytest.approx([1.001, 1.001])


def random_batch(seed=0, shape=(6, 9), spread=1.0):
    torch.manual_seed(seed)
    old = -torch.rand(shape) * 3
    logp = (old + spread * torch.randn(shape)).requires_grad_()
    advantages = torch.randn(shape[0], 1)
    lengths = torch.randint(1, shape[1] + 1, (shape[0], 1))
    return logp, old, advantages, torch.arange(shape[1]) < lengths


def gradient(value, logp):
    return torch.autograd.grad(value, logp)[0]


@pytest.mark.parametrize("seed", range(2))
def test_grpo_has_the_gradient_of_the_textbook_objective(seed):
    """PPO's min of the ratio and the clipped ratio times A, bounded from below by 3 A where A < 0 (dual clip)."""
    logp, old, advantages, mask = random_batch(seed)
    r = (logp - old).exp()
    objective = torch.minimum(r * advantages, r.clip(0.8, 1.2) * advantages)
    objective = torch.where(advantages < 0, torch.maximum(objective, 3 * advantages), objective)
    expected = gradient(-objective[mask].mean(), logp)
    loss, _ = policy_loss(logp, old, advantages, mask, Config(loss="grpo"))
    torch.testing.assert_close(gradient(loss, logp), expected)
    assert (expected[mask] == 0).any() and (expected[mask] != 0).any()


def test_gspo_has_the_gradient_of_the_sequence_objective():
    logp, old, advantages, mask = random_batch(1, spread=0.1)
    s = torch.stack([(new - o)[m].mean().exp() for new, o, m in zip(logp, old, mask)])[:, None]
    objective = torch.minimum(s * advantages, s.clip(1 - 0.05, 1 + 0.07) * advantages)
    expected = gradient(-objective.mean(), logp)
    loss, _ = policy_loss(logp, old, advantages, mask, Config(loss="gspo", eps_low=0.05, eps_high=0.07))
    torch.testing.assert_close(gradient(loss, logp), expected)


@pytest.mark.parametrize("loss", WEIGHTS)
def test_extremes_stay_finite(loss):
    log_ratio = torch.tensor([[80.0, -80.0, 0.0, 1.0]])
    for advantage in (2.0, -2.0, 0.0):
        for mask in (torch.ones(1, 4), torch.zeros(1, 4), torch.tensor([[1.0, 0, 1, 0]])):
            logp = (log_ratio - 90).requires_grad_()
            args = logp, torch.full((1, 4), -90.0), torch.tensor([[advantage]]), mask
            value, _ = policy_loss(*args, Config(loss=loss))
            g = gradient(value, logp)
            assert value.isfinite() and g.isfinite().all()
            assert (g[mask == 0] == 0).all()
            if advantage == 0:
                assert (g == 0).all()


@pytest.mark.parametrize("loss", WEIGHTS)
def test_masked_positions_may_hold_anything(loss):
    logp, old, advantages, mask = random_batch(2)
    clean = gradient(policy_loss(logp, old, advantages, mask, Config(loss=loss))[0], logp)
    dirty = logp.detach().masked_fill(~mask, -math.inf).requires_grad_()
    loss, _ = policy_loss(dirty, old, advantages, mask, Config(loss=loss))
    torch.testing.assert_close(gradient(loss, dirty), clean)


def test_loss_aggregation_by_hand():
    """Two responses of 1 and 3 tokens, A = 1, r = 1: the gradient is minus each token's share in the loss."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]]).bool()
    logp = torch.zeros(2, 3, requires_grad=True)
    expected = {"token": [[1 / 4, 0, 0], [1 / 4] * 3], "sequence": [[1 / 2, 0, 0], [1 / 6] * 3],
                "constant": [[1 / 20, 0, 0], [1 / 20] * 3]}
    for agg, shares in expected.items():
        cfg = Config(loss_agg=agg, max_new_tokens=10)
        loss, _ = policy_loss(logp, logp.detach(), torch.ones(2, 1), mask, cfg)
        torch.testing.assert_close(gradient(loss, logp), -torch.tensor(shares))
        half, _ = policy_loss(logp[:1], logp[:1].detach(), torch.ones(1, 1), mask[:1], cfg,
                              norm=4 if agg == "token" else 2)
        torch.testing.assert_close(gradient(half, logp)[0], -torch.tensor(shares[0]))  # as a part of the whole


def test_entropy_dependent_clip_range():
    """Ten tokens, entropies 0..9: those above the 0.8 quantile (7.2) may move by 0.4, the others by 0.2."""
    logp = torch.full((1, 10), math.log(1.3), requires_grad=True)
    args = (logp, torch.zeros(1, 10), torch.ones(1, 1), torch.ones(1, 10).bool())
    loss, _ = policy_loss(*args, Config(loss="no-is", entropy_clip=True), entropy=torch.arange(10.0)[None])
    assert (gradient(loss, logp) != 0)[0].tolist() == [False] * 8 + [True] * 2


def test_k3_by_hand():
    """pi = 0.5, pi_ref = 0.25: d = -log 2, so k3 = 1/2 + log 2 - 1; its slope in log pi is 1 - pi_ref / pi = 1/2."""
    logp = torch.tensor([[math.log(0.5)]], requires_grad=True)
    loss, stats = policy_loss(logp, logp.detach(), torch.zeros(1, 1), torch.ones(1, 1), Config(kl_coef=0.1),
                              ref_logp=torch.tensor([[math.log(0.25)]]))
    assert stats["kl_ref"].item() == pytest.approx(0.5 + math.log(2) - 1)
    assert loss.item() == pytest.approx(0.1 * (math.log(2) - 0.5))
    assert gradient(loss, logp).item() == pytest.approx(0.1 * 0.5)


def test_group_advantages_by_hand():
    a = group_advantages(torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]]))  # unbiased std: 1/2 and 1/sqrt(3)
    expected = torch.tensor([[1.5, -0.5, -0.5, -0.5], [3 ** 0.5 / 2] * 2 + [-(3 ** 0.5) / 2] * 2])
    torch.testing.assert_close(a, expected, atol=1e-5, rtol=0)
    a = group_advantages(torch.tensor([[1.0, 0, 0, 0]]), divide_by_std=False)
    assert a.tolist() == [[0.75, -0.25, -0.25, -0.25]]


def test_equal_rewards_give_exactly_zero_advantage():
    rewards = torch.tensor([[0.1] * 7, [0.7] * 7, [0.0] * 7])
    assert (group_advantages(rewards) == 0).all()
    assert (rewards.sub(rewards.mean(-1, keepdim=True)) != 0).any()  # float means alone would not do
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.ones(3, 1))


def test_overlong_penalty():
    cfg = Config(max_new_tokens=20, overlong_buffer=4)
    assert [overlong_penalty(n, cfg) for n in (1, 16, 17, 18, 20)] == [0, 0, -0.25, -0.5, -1]
    assert overlong_penalty(20, Config(max_new_tokens=20)) == 0


def test_repetition():
    assert repetition("a b c a b c a b", n=3) == pytest.approx(0.5)  # abc bca cab abc bca cab: 3 of 6 were there
    assert repetition("one two", n=3) == 0.0
    assert repetition(" ".join(map(str, range(50)))) == 0.0


def test_truncated_importance_sampling_by_hand():
    """The sampler saw p = .5, .1, .4 where the trainer sees .25, .4, .4: corrections .5, 4 cut to 2, and 1."""
    old, sampler = torch.tensor([[0.25, 0.4, 0.4]]).log(), torch.tensor([[0.5, 0.1, 0.4]]).log()
    logp, mask = old.clone().requires_grad_(), torch.ones(1, 3)
    loss, stats = policy_loss(logp, old, torch.ones(1, 1), mask, Config(tis_cap=2.0), sampler_logp=sampler)
    torch.testing.assert_close(gradient(loss, logp), -torch.tensor([[0.5, 2.0, 1.0]]) / 3)
    assert update_metrics([stats], [], Config())["sampler_mismatch"] == pytest.approx((math.log(2) + math.log(4)) / 3)
    loss, _ = policy_loss(logp, old, torch.ones(1, 1), mask, Config(), sampler_logp=sampler)
    torch.testing.assert_close(gradient(loss, logp), -torch.ones(1, 3) / 3)


def test_metrics_by_sign():
    """Unlikely and likely tokens; the weights of three good and three bad ones are written beside them."""
    ratios, advantages = torch.tensor([0.25, 1.0, 1.5, 0.5, 1.0, 4.0]), torch.tensor([1.0, 1, 1, -1, -1, -1])
    old_logp, mask = torch.tensor([[0.1, 0.9, 0.9, 0.1, 0.1, 0.9]]).log(), torch.ones(1, 6)
    expected = {  # grpo: .25 1 0, 0 1 0; aspo: 3 1 0, 0 1 3
        "grpo": dict(weight_pos=1.25 / 3, weight_neg=1 / 3, weight_pos_low=.25, weight_neg_high=0, clip_frac_neg=2 / 3),
        "aspo": dict(weight_pos=4 / 3, weight_neg=4 / 3, weight_pos_low=3, weight_neg_high=3, clip_frac_neg=1 / 3)}
    for loss, values in expected.items():
        _, stats = policy_loss(old_logp + ratios.log(), old_logp, advantages[None], mask, Config(loss=loss))
        found = update_metrics([stats], [2.0, math.inf, 4.0], Config(loss=loss))
        values |= dict(ratio_pos=2.75 / 3, ratio_neg=5.5 / 3, clip_frac_pos=1 / 3, sampler_mismatch=0, grad_norm=3,
                       weight_pos_high=0.5, weight_neg_low=0.5, skipped_steps=1,
                       approx_kl=sum(r - 1 - math.log(r) for r in ratios.tolist()) / 6)
        assert {name: found[name] for name in values} == pytest.approx(values)
    nothing = update_metrics([], [], Config(kl_coef=0.1))
    assert set(nothing) == set(found) | {"kl_ref"} and nothing["ratio_pos"] is None and nothing["grad_norm"] == 0


def test_metrics_of_a_rollout_by_hand():
    """Two groups of two; entropies are weighed by length: (1 * .5 + 3 * 1 + 2 * 0 + 2 * 2) / 8."""
    made = [(1.0, 1, 0.5), (0.0, 3, 1.0), (0.0, 2, 0.0), (0.0, 2, 2.0)]  # reward, tokens, entropy
    samples = [Sample("", "", [3], [4] * n, "a b", truncated=n == 3, entropy=entropy, correct=reward, reward=reward)
               for reward, n, entropy in made]
    found = rollout_metrics(samples, Config(group_size=2))
    assert found == pytest.approx({
        "reward": 0.25, "reward_std": 2 ** -0.5 / 2, "accuracy": 0.25, "entropy": 7.5 / 8, "response_length": 2,
        "truncated": 0.25, "repetition": 0, "uniform_groups": 1, "tokens": 8})


def test_the_learning_rate_warms_up_and_weight_decay_is_of_matrices(tiny):
    """lr .4 over 4 steps: .1, .2, .3, .4, .4. With a gradient that stays 1, Adam steps by exactly the learning rate."""
    policy = policy_of(*tiny, lr=0.4, lr_warmup=4, weight_decay=0.5, grad_clip=1e9)
    vector, matrix = policy.model.model.norm.weight, policy.model.model.layers[0].mlp.up_proj.weight
    torch.nn.init.ones_(vector)
    torch.nn.init.ones_(matrix)
    expected_vector, expected_matrix = 1.0, 1.0
    for lr in (0.1, 0.2, 0.3, 0.4, 0.4):
        assert policy.learning_rate() == pytest.approx(lr)  # of the next step
        for p in policy.model.parameters():
            p.grad = torch.ones_like(p)
        policy.optimizer_step()
        expected_vector, expected_matrix = expected_vector - lr, expected_matrix * (1 - lr / 2) - lr
        torch.testing.assert_close(vector.data, torch.full_like(vector, expected_vector))
        torch.testing.assert_close(matrix.data, torch.full_like(matrix, expected_matrix))
    assert policy_of(*tiny, lr=0.3, lr_warmup=0).learning_rate() == pytest.approx(0.3)


@pytest.mark.parametrize("grad_clip", [0.5, 0.0])  # 0: not at all
def test_the_gradient_is_clipped_and_what_is_not_finite_is_no_step(tiny, grad_clip):
    model, tokenizer = tiny
    policy = policy_of(model, tokenizer, lr=0.1, lr_warmup=4, grad_clip=grad_clip)
    before, seen = copy.deepcopy(model.state_dict()), []
    policy.optimizer.register_step_pre_hook(lambda *_: seen.append(
        torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()))
    n = sum(p.numel() for p in model.parameters())
    for bad in (math.nan, math.inf):
        model.model.norm.weight.grad = torch.full_like(model.model.norm.weight, bad)
        assert not math.isfinite(policy.optimizer_step())
    assert policy.learning_rate() == pytest.approx(0.025) and not seen
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    assert policy.optimizer_step() == pytest.approx(2 * math.sqrt(n), rel=1e-4)  # before clipping
    assert seen == [pytest.approx(grad_clip or 2 * math.sqrt(n), rel=1e-3)]
    assert all(p.grad is None for p in model.parameters())


def test_an_fp16_overflow_skips_the_step_and_lowers_the_scale(tiny):
    """Loss scaling is only logic, and runs on a CPU: 2^127 overflows until it has been halved enough."""
    policy = policy_of(*tiny, lr=0.1, lr_warmup=0)
    policy.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6)
    weight = policy.model.model.norm.weight
    before, norms = weight.detach().clone(), []
    while len(norms) < 10:
        policy.scaler.scale((weight * 4).sum()).backward()
        norms.append(policy.optimizer_step())
    skipped = sum(not math.isfinite(norm) for norm in norms)
    assert 0 < skipped < 10 and policy.scaler.get_scale() == 2.0 ** (127 - skipped)
    assert norms[-1] == pytest.approx(4 * math.sqrt(len(weight)))  # unscaled
    assert weight.isfinite().all() and (weight != before).any()
