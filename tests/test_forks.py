"""Every file of tests/forks runs as its reader would run it, on a copy of aspo.py, for a few steps, and does what it says."""
import importlib.util
import json
import math
import runpy
import shutil
import sys
import types

import pytest
import torch
import transformers
from conftest import ROOT, make_model
from transformers.integrations.peft import MIN_PEFT_VERSION, check_peft_version

import aspo

FORKS = ROOT / "tests" / "forks"
SHORT = ["--data", "arithmetic", "--steps", "2", "--prompts", "4", "--minibatch", "2", "--group_size", "4",
         "--max_new_tokens", "8", "--eval_problems", "2", "--lr", "1e-3", "--lr_warmup", "0"]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Its chat template names roles."""
    folder = tmp_path_factory.mktemp("forks")
    # Not above 0, so that what is cut off, as most of it is, keeps its reward.
    (folder / "digits.py").write_text("def digits(response, row):\n    return -sum(map(str.isdigit, response))\n")
    return make_model(folder / "model", "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
                                        "{% if add_generation_prompt %}assistant: {% endif %}")


@pytest.fixture
def fork(model, tmp_path, monkeypatch):
    def run(name, *flags, reward=f"{model.parent}/digits.py:digits", status=0):
        """A module aspo as the fork leaves it. Its .run is the Run, its .updated what each update got and gave."""
        spec = importlib.util.spec_from_file_location("aspo", ROOT / "aspo.py")
        copy = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "aspo", copy)
        spec.loader.exec_module(copy)
        copy.updated, update, finish = [], copy.update, copy.Run.finish

        def noted_update(policy, samples, cfg):
            temperature, (stats, norms) = policy.temperature, update(policy, samples, cfg)
            copy.updated.append(types.SimpleNamespace(samples=samples, stats=stats, temperature=temperature))
            return stats, norms

        def noted_finish(self, *args):
            copy.run = self
            finish(self, *args)

        copy.update, copy.Run.finish = noted_update, noted_finish
        own = ["--reward", reward] if reward else []
        monkeypatch.setattr(sys, "argv", [name, "--model", str(model), "--out", str(tmp_path / "run"), *SHORT, *own, *flags])
        try:
            runpy.run_path(str(FORKS / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            assert end.code == status
        assert copy.updated  # else the fork did not run
        return copy

    return run


def lines(aspo, name="metrics.jsonl"):
    return [json.loads(line) for line in (aspo.run.out / name).read_text().splitlines()]


def full_logp(model, s):
    """Log-probabilities of a sample's response by a plain forward."""
    with torch.no_grad():
        logp = model(torch.tensor([s.prompt + s.response])).logits[0, :-1].log_softmax(-1)
    return logp[len(s.prompt) - 1:].gather(-1, torch.tensor(s.response)[:, None])[:, 0]


@pytest.mark.parametrize("name, wanted", [
    ("ranks", [1.0, 0.0, 0.0, -1.0]),  # two share the middle
    ("leave_one_out", [3 - 2 / 3, 1 - 4 / 3, 1 - 4 / 3, 0 - 5 / 3]),
])
def test_another_advantage(fork, name, wanted):
    forked = fork(name)
    got = forked.group_advantages(torch.tensor([[3.0, 1, 1, 0], [2, 2, 2, 2]]))
    torch.testing.assert_close(got, torch.tensor([wanted, [0.0] * 4]))
    for group in forked.chunks(lines(forked, "samples.jsonl"), 4):
        rewards, advantages = ([s[column] for s in group] for column in ("reward", "advantage"))
        torch.testing.assert_close(forked.group_advantages(torch.tensor([rewards]))[0], torch.tensor(advantages))


def gradient(policy_loss, log_ratio, advantage, cfg, norm=1.0):
    """Of one response behind a prompt of two tokens, by its log-probabilities."""
    old = torch.tensor([[0.0, 0.0] + [-1.0] * len(log_ratio)])
    logp = (old + torch.tensor([[0.0, 0.0, *log_ratio]])).requires_grad_()
    loss, _ = policy_loss(logp, old, torch.tensor([[advantage]]), old < 0, cfg, norm=norm)
    loss.backward()
    return logp.grad[0, 2:]


def test_advantages_per_token(fork):
    forked, cfg = fork("first_tokens"), aspo.Config(loss="grpo")
    args = [0.0, 0.1, 0.0, 0.0, 0.1, 0.0], -1.5, cfg
    ratio = gradient(forked.policy_loss, *args) / gradient(aspo.policy_loss, *args)
    torch.testing.assert_close(ratio, torch.tensor([2.0, 2, 2, 2, 1, 1]))


def test_an_own_weight(fork):
    forked = fork("weight", "--loss", "sqrt")
    w = forked.WEIGHTS["sqrt"](torch.tensor([[1.0, 0.25, 1.3]]), torch.ones(1, 1), (0.2, 0.2), 3.0)
    torch.testing.assert_close(w, torch.tensor([[1.0, 0.5, 0.0]]))
    stats = forked.updated[0].stats[-1]  # of the rollout's last step
    used = stats["weight"] != 0
    torch.testing.assert_close(stats["weight"][used] ** 2, stats["log_ratio"][used].exp())


def test_a_loss_that_is_no_weight(fork):
    forked, cfg = fork("sequence_clip", "--loss_agg", "sequence"), aspo.Config(loss_agg="sequence")
    for log_ratio, advantage, wanted in [
        ([0.05, 0.05], 2.0, -2 * math.exp(0.1) / 4),  # each token moves all of the sequence's ratio
        ([0.3, -0.05], 2.0, 0.0),  # exp(.25) is above 1.2
        ([0.3, -0.05], -2.0, 2 * math.exp(0.25) / 4),  # a bad sequence is pushed back
        ([-0.2, -0.2], -2.0, 0.0),
    ]:
        got = gradient(forked.policy_loss, log_ratio, advantage, cfg, norm=4.0)
        torch.testing.assert_close(got, torch.full((2,), wanted))


def test_lora(fork, model):
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as missing:
        pytest.skip(str(missing))
    forked = fork("lora")
    trained, base = forked.run.policy.model, transformers.AutoModelForCausalLM.from_pretrained(model)
    parameters = {name.replace(".base_layer", ""): p for name, p in trained.named_parameters()}
    adapters = {name: p for name, p in parameters.items() if "lora_" in name}
    assert len(adapters) == 2 * 7 * 2 and all(p.abs().sum() > 0 for p in adapters.values())  # B began as 0
    for name, p in base.named_parameters():
        assert torch.equal(parameters[name], p)
    folder = forked.run.out / "checkpoint-2"
    assert not (folder / "model.safetensors").exists()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded(ids).logits, trained(ids).logits)
    resumed = fork("lora", "--resume", str(forked.run.out), "--steps", "3")
    assert resumed.run.step == 3 and not torch.equal(
        next(iter(adapters.values())), dict(resumed.run.policy.model.named_parameters())[next(iter(adapters))])


def test_min_p(fork):
    forked = fork("min_p")
    probs = torch.tensor([[0.04, 0.6, 0.05, 0.3, 0.01]]).expand(2000, -1)
    assert set(forked.draw(probs).tolist()) == {1, 3}
    for update in forked.updated:
        assert not update.stats[0]["log_ratio"].any()  # r = 1 in the first step
        assert update.stats[0]["mismatch"].max() < 1e-4  # log-probabilities are of the whole distribution


def test_k1_in_the_reward(fork, model):
    forked = fork("k1", "--kl_coef", "0.1")
    initial = transformers.AutoModelForCausalLM.from_pretrained(model)
    first, second = ([s.reward - s.correct for s in update.samples] for update in forked.updated)
    assert max(map(abs, first)) < 1e-5 < max(map(abs, second))  # it is the initial model at first
    for s in forked.updated[1].samples:
        assert s.reward - s.correct == pytest.approx(-0.1 * (s.sampler_logp - full_logp(initial, s)).sum().item(), abs=1e-5)
    assert lines(forked)[1]["kl_ref"] == 0  # none in the loss


def test_sgd_and_cosine_resume_bit_for_bit(fork, tmp_path):
    whole = fork("sgd", "--steps", "4", "--save_every", "2")
    for line in lines(whole):  # of the last of a rollout's 4 steps, of 16 in all
        assert line["lr"] == pytest.approx(1e-3 * (0.5 + 0.5 * math.cos(math.pi * (4 * line["step"] - 1) / 16)))
    shutil.copytree(whole.run.out, tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoint-4")
    resumed = fork("sgd", "--resume", str(tmp_path / "killed"), "--steps", "4")
    assert len(resumed.updated) == 2
    for policy in (whole.run.policy, resumed.run.policy):
        assert len(policy.optimizer.state) == len(list(policy.model.parameters()))
        assert all(list(state) == ["momentum_buffer"] for state in policy.optimizer.state.values())
    for p, again in zip(whole.run.policy.model.parameters(), resumed.run.policy.model.parameters()):
        assert torch.equal(p, again)


@pytest.mark.parametrize("response, wanted", [
    ("So:\n```python\ndef f(x): return 2 * x\n```\nThat is it.", 1),
    ("```python\ndef f(x): return 3 * x\n```", 0),
    ("```python\nraise SystemExit(0)\n```", 0),
    ("```python\nwhile True: pass\n```", 0),
    ("```python\ndef f(x): return 2 * x\nlarge = bytearray(2**29)\n```", 0),
    ("```python\ndef f(x): return 2 * x\nopen('FILE', 'w').write('x' * 2**20)\n```", 0),
    ("no code", 0),
])
def test_a_reward_that_runs_code(response, wanted, tmp_path):
    passes = runpy.run_path(str(FORKS / "run_code.py"))["passes"]
    response = response.replace("FILE", str(tmp_path / "file"))
    assert passes(response, {"answer": "assert f(2) == 4\nassert f(0) == 0"}) == wanted


def test_an_own_reward(fork):
    forked = fork("brief", reward=None)
    right = forked.open_reward(forked.Config(reward=f"{FORKS}/brief.py:brief"), None)
    problem = forked.make_problem({"problem": "1+1", "answer": 2})
    assert math.isclose(right("#### 2", problem), 0.94) and math.isclose(right("#### 3", problem), -0.06)


def test_an_order_of_ones_own():
    in_order = runpy.run_path(str(FORKS / "in_order.py"))["in_order"]
    row = {"problem": "Sort 3, 1, 2.", "answer": [1, 2, 3]}
    assert in_order("It is \\boxed{[1, 2, 3]}.", row) and in_order("#### 1, 2, 3", row)
    assert not in_order("\\boxed{3, 1, 2}", row) and not in_order("I cannot.", row)
    assert aspo.math_reward("\\boxed{3, 1, 2}", "1, 2, 3") == 1  # which is why


def test_several_rewards(fork):
    forked = fork("rewards", reward=None)
    for line, update in zip(lines(forked), forked.updated, strict=True):
        lengths = [len(s.text) for s in update.samples]
        assert line["reward_short"] == pytest.approx(1 - sum(lengths) / len(lengths) / 100)
        assert line["reward_right"] == 0
        for s, length in zip(update.samples, lengths):
            assert s.reward == (0 if s.truncated else pytest.approx(0.2 - 0.002 * length))


def test_two_data_sets(fork):
    forked = fork("mixture", "--instruction", "")
    texts = [problem["problem"] for problem in forked.run.problems]
    ending = "\nFinish with 'The answer is' and the number."
    assert sum(text.startswith("What is ") and text.endswith(ending) for text in texts) == 500
    assert sum(text.count("+") == 3 and "\n" not in text for text in texts) == 1500
    assert len(texts) == 2000 and len({s.problem for update in forked.updated for s in update.samples}) == 8


def test_a_system_prompt(fork):
    forked = fork("system_prompt", "--instruction", "Think.")
    text = forked.run.policy.decode(forked.updated[0].samples[0].prompt)
    problem = forked.updated[0].samples[0].problem
    assert text == f"system: You are careful with numbers.\nuser: {problem}\nThink.\nassistant: "


def test_few_shot_prompts_and_a_stop(fork, model, tmp_path):
    base = shutil.copytree(model, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    forked = fork("few_shot", "--model", str(base))
    policy, sample = forked.run.policy, forked.updated[0].samples[0]
    prompt = f"Question: What is 2+2?\nAnswer: 4\n\nQuestion: {sample.problem}\nAnswer:"
    assert policy.decode(sample.prompt) == prompt and sample.truncated
    policy.max_new_tokens, policy.stop_ids = 20, []
    script = iter(policy.tokenizer(" 4\nQuestion: 5+5").input_ids)
    forked.draw = lambda probs: torch.full((len(probs),), next(script))
    (tokens, *_), _ = forked.generate(policy, [sample.prompt] * 2)
    assert policy.tokenizer.decode(tokens) == " 4\nQuestion:"


def test_logging_elsewhere(fork, monkeypatch):
    wandb, received = types.ModuleType("wandb"), []
    wandb.run, wandb.init = None, lambda **about: types.SimpleNamespace(
        log=lambda metrics, step: received.append(metrics | {"config": about["config"]["lr"], "step": step}))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    forked = fork("to_wandb")
    assert received == [line | {"config": 1e-3} for line in lines(forked)]


def test_the_best_checkpoint(fork):
    forked = fork("best", "--steps", "4", "--eval_every", "1", "--save_every", "1", "--eval_samples", "16")
    accuracy = [line["heldout_accuracy"] for line in lines(forked)]
    kept = torch.load(forked.run.out / "best" / "trainer.pt", weights_only=True)["step"]
    assert kept == accuracy.index(max(accuracy)) + 1 and len(set(accuracy)) > 1


def test_an_early_stop(fork, tmp_path):
    (tmp_path / "zero.py").write_text("def zero(response, row):\n    return 0\n")
    forked = fork("early_stop", "--steps", "9", "--eval_every", "1", reward=f"{tmp_path}/zero.py:zero", status=128 + 15)
    assert len(lines(forked)) == 4 and (forked.run.out / "checkpoint-4").exists()


def test_an_adaptive_temperature(fork):
    forked = fork("temperature")
    assert [update.temperature for update in forked.updated] == [1.0, 0.98]  # an untrained model has much entropy
    for update in forked.updated:
        assert not update.stats[0]["log_ratio"].any() and update.stats[0]["mismatch"].max() < 1e-4


def test_a_curriculum(fork):
    forked = fork("curriculum")
    run, rates = forked.run, forked.roll_out.__globals__["rates"]
    assert run.position == 2 * 2 * 4 and len(rates) == 2 * 4 + 2  # twice as many as in use; held-out ones as well
    run.problems, run.position = [{"problem": str(i)} for i in range(4)], 0
    rates |= {"0": 1.0, "1": 0.6, "2": 0.0}
    assert [problem["problem"] for problem in run.take(2)] == ["3", "1"]
