"""ASPO and GRPO for language models, in one file (reward.py beside it tells right answers).

    python aspo.py                                # a tiny built-in model learns sums on a CPU
    python aspo.py --loss grpo                    # the same run with GRPO
    python aspo.py --model qwen-0.5b              # Qwen2.5-0.5B-Instruct on GSM8K, one GPU
    python aspo.py --model DIR --data FILE.jsonl  # lines of {"problem": ..., "answer": ...}
    python aspo.py --resume runs/NAME             # go on with a run that was stopped or killed
    torchrun --nproc-per-node 4 aspo.py           # four GPUs that share weights and moments
    python aspo.py --help                         # every knob

One step: sample a group of responses to each prompt and score them. A response's advantage A says
how it compares with its group: above 0 it is good, below 0 it is bad, and so is each of its
tokens. Raise the log-probability of good tokens, lower that of bad ones: the loss has the gradient

    -A * w(r, sign A) * grad log pi(token)      r = pi(token) / pi_old(token), the importance ratio

so a method *is* its weight w. pi_old is the policy that drew the rollout. In the first optimiser
step pi = pi_old, so that every r and w is 1. From the second on GRPO and ASPO differ in two places:

            good tokens, A > 0                  bad tokens, A < 0
    GRPO    r                                   r, but 0 where r > dual_clip
    ASPO    1/r, at most dual_clip              r, at most dual_clip
    both    0 where r > 1 + eps_high            0 where r < 1 - eps_low           (PPO's clip)

So of the good tokens GRPO pushes hardest what has already risen, ASPO what lags behind.

PART ONE is the whole method, and all that --engine plain computes. `train`, its last function,
shows the order of things; read it first if you like. Who calls whom:
    train > roll_out > policy.generate > plain_generate > pick
    train > group_advantages
    train > update > remember_old_logp > policy.token_logp > plain_logp
    train > update > accumulate > policy_loss > WEIGHTS
    train > heldout_accuracy > roll_out
PART TWO is the engine room. Part one enters it by these doors:
    open_run      -> run: policy, reward, stream, heldout, step; log, save, asked_to_stop, finish
    policy        generate, token_logp, reference_logp, micro_batches; backward, optimizer_step,
                  refresh_sampler, learning_rate; half_precision; encode, decode, pad;
                  fit: a call, made again in smaller parts if memory runs out
    all_sum, all_gather, rank, world    the processes of torchrun; without it there is one
    rollout_metrics, update_metrics     what a step reports
    draw, nucleus, by_rows, seed_step, progress, say    a sentence each where they stand
    refill, overlong_penalty, entropy_dependent_eps    off by default

Paper: arXiv 2510.06062. Where we depart from it: see "Departures" in README.md.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LogitsProcessor

from reward import extract_answer, is_readable, math_reward

# ================================================================================ PART ONE: method
# ---------------------------------------------------------------------------------------- settings

@dataclass
class Config:
    """Every setting. The comment behind it, two spaces and a # away, is its --help.

    [Brackets]: what None stands for. The tiny model and the aliases replace some defaults, see
    PRESETS; what is typed wins.
    """

    # what to train
    model: str = "tiny"  # tiny, an alias of PRESETS, a hub id or a local folder
    data: str | None = None  # arithmetic, sums, gsm8k, svamp, math, hub id or file [gsm8k]
    instruction: str | None = None  # appended to every problem but chats [the answer's format]
    thinking: bool = False  # let chat templates that can (Qwen3) open a thinking block
    reward: str | None = None  # your own f(response, row) -> float, as FILE.py:NAME
    loss: str = "aspo"  # aspo, grpo, no-is, dapo, cispo, gspo or dr-grpo: see WEIGHTS
    seed: int = 0  # fixes data order, initial weights and samples
    # rollout
    steps: int = 200  # rollouts to train on
    prompts: int = 32  # prompts per rollout
    group_size: int = 8  # responses per prompt: a group is its own baseline, so at least 2
    max_new_tokens: int = 512  # limit; what is cut off scores 0, so watch the truncated share
    temperature: float = 1.0  # of sampling, and of all log-probabilities in the loss
    # reward and advantage
    divide_by_std: bool | None = None  # divide advantages by the group's std [dr-grpo: false]
    max_refills: int = 0  # dynamic sampling: rounds that replace uniform groups (DAPO)
    overlong_buffer: int = 0  # soft penalty over this many last allowed tokens (DAPO)
    mask_truncated: bool = False  # do not train on responses that were cut off
    # weight and loss
    eps_low: float | None = None  # bad tokens: no gradient below 1 - eps_low [.2, gspo: 3e-4]
    eps_high: float | None = None  # good: none above 1 + eps_high [.2, dapo: .28, gspo: 4e-4]
    entropy_clip: bool = False  # both eps .4 for the most uncertain tokens, else .2 (Archer)
    dual_clip: float = 3.0  # aspo: the largest weight; grpo: bad tokens with r above it weigh 0
    loss_agg: str | None = None  # mean over token, sequence or constant [see METHOD_DEFAULTS]
    kl_coef: float = 0.0  # weight of the KL to the initial model; 0: it is not kept in memory
    tis_cap: float = 0.0  # cap of pi_old / pi_sampler, which weighs out rounding (TIS); 0: off
    # update
    minibatch: int = 8  # prompts per optimiser step
    epochs: int = 2  # how often each rollout is trained on
    lr: float = 1e-6  # AdamW learning rate
    lr_warmup: int = 10  # optimiser steps of linear warm-up: step k has k / lr_warmup of lr
    weight_decay: float = 0.1  # of AdamW, on matrices
    grad_clip: float = 1.0  # gradient norm limit; 0: none
    sft_steps: int = 500  # supervised warm-up of the tiny model
    # reports
    eval_every: int = 20  # steps between held-out evaluations; 0: before and after
    eval_problems: int = 128  # held-out problems
    eval_samples: int = 2  # samples per held-out problem
    save_every: int = 50  # steps between checkpoints; 0: at the end
    # machine: speed and memory, nothing of the method
    out: str | None = None  # run folder [runs/<model>-<loss>-s<seed>]
    resume: str | None = None  # run folder to go on with
    device: str = "auto"  # cuda if there is one, else cpu
    engine: str = "auto"  # fast, plain, or fast for the models that it is right for
    sample_rows: int = 256  # responses sampled at once; with another number they are others
    micro_tokens: int = 8192  # tokens per forward and backward
    gradient_checkpointing: bool = False  # less memory, a third slower

    def __post_init__(self):
        tiny, name = self.model == "tiny", Path(self.model).name or Path.cwd().name
        data = self.data or ("arithmetic" if tiny else "gsm8k")
        resolved = {"data": data, "instruction": "" if tiny else INSTRUCTIONS.get(data, BOX),
                    "out": f"runs/{name}-{self.loss}-s{self.seed}"}
        for knob, value in (METHOD_DEFAULTS | METHOD_CHANGES.get(self.loss, {}) | resolved).items():
            if getattr(self, knob) is None:
                setattr(self, knob, value)


# ------------------------------------------------------------------------------ samples and rewards

@dataclass
class Sample:
    """One response to one problem. A rollout is a list of them, each group's side by side."""

    problem: str
    gold: str  # the right answer
    prompt: list[int]  # token ids
    response: list[int] = field(default_factory=list)  # token ids, with the stop token
    text: str = ""  # the response, decoded
    truncated: bool = False  # no stop token within max_new_tokens
    entropy: float = 0.0  # mean over the response's tokens, nats
    correct: float = 0.0  # 1 for a right answer; or what a reward of your own says
    reward: float = 0.0  # correct, less the overlong penalty
    advantage: float = 0.0  # the reward compared with the group
    sampler_logp: Tensor | None = None  # (tokens,) as the sampler saw it
    # (tokens,) of the same policy, but computed as in the update, so that r is exactly 1 at first
    old_logp: Tensor | None = None


def right_answer(response: str, problem: dict) -> float:
    """The reward: 1 if the response's final answer is the problem's, else 0."""
    return math_reward(response, problem["answer"])


def roll_out(policy: "Policy", problems: list[dict], n: int, cfg: Config,
             reward: Callable[[str, dict], float] = right_answer) -> list[Sample]:
    """n responses to every problem, scored."""
    rows = [problem for problem in problems for _ in range(n)]
    prompts = [policy.encode(row) for row in rows]
    samples = []
    for row, prompt, (response, logp, entropy) in zip(rows, prompts, policy.generate(prompts)):
        s = Sample(row["problem"], row["answer"], prompt, response, policy.decode(response),
                   entropy=entropy, sampler_logp=logp)
        s.correct = reward(s.text, row)
        s.truncated = response[-1] not in policy.stop_ids
        if s.truncated:  # it never came to its end, whatever it was about to say
            s.correct = min(s.correct, 0.0)
        s.reward = s.correct + overlong_penalty(len(response), cfg)
        samples.append(s)
    return samples


# ------------------------------------------------------------------------------- sampling, plainly

def pick(logits: Tensor, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a token (B,) from logits (B, V). Temperature 0 takes the most likely one.

    Also its log-probability and the entropy, (B,) in nats, both before top_p.
    """
    logits = logits.float()
    logp = (logits if temperature in (0, 1) else logits / temperature).log_softmax(-1)
    probs = logp.exp()
    entropy = torch.special.entr(probs).sum(-1)  # -sum p log p, 0 where p is 0
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        token = draw(probs if top_p == 1 else nucleus(probs, top_p))
    return token, logp.gather(-1, token[:, None])[:, 0], entropy


class Draw(LogitsProcessor):
    """Draws the tokens, and notes the very log-probabilities that they were drawn with.

    `generate` of transformers, greedy by default, shows it the logits of every next token. It puts
    all but those of the token drawn to -inf, so that the greedy choice is this token.
    """

    def __init__(self, temperature: float, top_p: float):
        self.temperature, self.top_p = temperature, top_p
        self.logp, self.entropy = [], []  # of each token so far, (B,)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Logits (B, V) -> logits (B, V)."""
        token, logp, entropy = pick(logits, self.temperature, self.top_p)
        self.logp.append(logp)
        self.entropy.append(entropy)
        return torch.full_like(logits, -math.inf).scatter_(-1, token[:, None], 0.0)


@torch.no_grad()
def plain_generate(policy: "Policy", prompts: list[list[int]]) -> list[tuple]:
    """A response to each prompt: its tokens, their log-probabilities (tokens,), mean entropy."""
    ids, attention_mask = policy.pad(prompts, "left")  # (B, P) each
    drawn, model = Draw(policy.temperature, policy.top_p), policy.sampler
    own_settings = model.generation_config
    # Assigned, not passed: what is passed is merged with the model's own settings, and its top_k
    # or repetition_penalty would make the sampler another policy than the one in the ratio.
    model.generation_config = GenerationConfig(
        max_new_tokens=policy.max_new_tokens, eos_token_id=policy.stop_ids or None,
        pad_token_id=policy.pad_id)
    try:
        with policy.half_precision():
            out = model.generate(ids, attention_mask=attention_mask, logits_processor=[drawn])
    finally:
        model.generation_config = own_settings
    logp = torch.stack(drawn.logp, 1).cpu()  # (B, T)
    entropy = torch.stack(drawn.entropy, 1).cpu()
    responses = []
    for i, tokens in enumerate(out[:, ids.shape[1]:].tolist()):
        stops = [t for t, token in enumerate(tokens) if token in policy.stop_ids]
        end = stops[0] + 1 if stops else len(tokens)  # the stop token is trained as well
        responses.append((tokens[:end], logp[i, :end], entropy[i, :end].mean().item()))
    return responses


# -------------------------------------------------------------------------------------- advantages

def group_advantages(rewards: Tensor, divide_by_std: bool = True) -> Tensor:
    """(R - mean) / (unbiased std + 1e-6) within each group: (Q, G) -> (Q, G), G >= 2 responses.

    Without the division: Dr. GRPO, arXiv 2503.20783. Raises ValueError for G < 2.
    """
    if rewards.shape[-1] < 2:
        raise ValueError(f"a group needs at least 2 responses, got {tuple(rewards.shape)}")
    advantages = rewards - rewards.mean(-1, keepdim=True)
    if divide_by_std:
        advantages = advantages / (rewards.std(-1, keepdim=True) + 1e-6)
    # The float mean of equal rewards need not equal them, and a std near 0 would blow that up.
    uniform = (rewards == rewards[..., :1]).all(-1, keepdim=True)
    return advantages.masked_fill(uniform, 0.0)


# ----------------------------------------------------------------------------------------- weights
# A weight function gets r (B, T), advantages (B, 1), eps = (low, high), numbers or (B, T), and the
# number dual_clip, and returns w (B, T). It runs without gradient.

def ratio(log_ratio: Tensor) -> Tensor:
    """r = exp(log pi - log pi_old), kept within float range."""
    return log_ratio.clamp(-20, 20).exp()


def unclipped(r: Tensor, advantages: Tensor, eps: tuple) -> Tensor:
    """PPO's clip: False for a token that has already moved far enough in the wanted direction."""
    low, high = eps
    return torch.where(advantages >= 0, r <= 1 + high, r >= 1 - low)


def grpo(r, advantages, eps, dual_clip):
    """The ratio. The hard dual clip drops bad tokens with r > dual_clip."""
    dropped = (advantages < 0) & (r > dual_clip)
    return r * unclipped(r, advantages, eps) * ~dropped


def aspo(r, advantages, eps, dual_clip):
    """The ratio, upside down for good tokens. The soft dual clip caps the weight.

    A is the whole response's, not the token's: r says nothing of how good a token was, and only
    scales its step. A good token with r = .5 weighs .5 under GRPO and 2 here, one with r = 1.2
    weighs 1.2 and .83. GRPO's weights feed on themselves: what rose is pushed on. These do not.
    """
    flipped = torch.where(advantages >= 0, 1 / r, r)
    return flipped.clamp(max=dual_clip) * unclipped(r, advantages, eps)


def no_is(r, advantages, eps, dual_clip):
    """1, and the clip: the paper's diagnostic."""
    return unclipped(r, advantages, eps).to(r.dtype)


def cispo(r, advantages, eps, dual_clip):
    """The ratio capped, no token dropped (MiniMax-M1, arXiv 2506.13585)."""
    return r.clamp(max=1 + eps[1])


def gspo(r, advantages, eps, dual_clip):
    """PPO's clip, but r is the sequence's: see `policy_loss` (Qwen, arXiv 2507.18071)."""
    return r * unclipped(r, advantages, eps)


WEIGHTS = {"grpo": grpo, "aspo": aspo, "no-is": no_is, "cispo": cispo, "gspo": gspo,
           "dapo": grpo, "dr-grpo": grpo}
METHOD_DEFAULTS = dict(eps_low=0.2, eps_high=0.2, divide_by_std=True, loss_agg="token")
# What a method changes besides its weight. DAPO's dynamic sampling and overlong penalty are knobs
# of their own: --max_refills, --overlong_buffer.
METHOD_CHANGES = {
    "dapo": dict(eps_high=0.28),
    "gspo": dict(eps_low=3e-4, eps_high=4e-4, loss_agg="sequence"),
    "dr-grpo": dict(divide_by_std=False, loss_agg="constant"),
}


# -------------------------------------------------------------------------------------------- loss

def policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, cfg: Config, *,
                norm: float | None = None, entropy: Tensor | None = None,
                ref_logp: Tensor | None = None,
                sampler_logp: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of -A * w * log pi, w held constant, and of kl_coef * KL, over norm. Only its
    gradient has a meaning.

    All are (B, T), advantages (B, 1). norm: the tokens (loss_agg token) or sequences of the whole
    mini-batch, not of this micro-batch, or the gradient would depend on the cut; None: those of
    the mask. entropy is needed by entropy_clip, ref_logp by kl_coef, sampler_logp by tis_cap.
    Returns the loss, and per token of the mask what the metrics need, (tokens,) each.
    """
    mask = mask.bool()
    # Padding may hold inf or NaN, and 0 times them is NaN: so it is zeroed, not multiplied away.
    logp = logp.float().masked_fill(~mask, 0.0)
    old_logp = old_logp.float().masked_fill(~mask, 0.0)
    lengths = mask.sum(-1, keepdim=True)  # (B, 1)
    with torch.no_grad():
        log_ratio = logp - old_logp
        if cfg.loss == "gspo":  # one ratio for a whole sequence
            log_ratio = (log_ratio.sum(-1, keepdim=True) / lengths.clamp(min=1)).expand_as(logp)
        r, eps = ratio(log_ratio), (cfg.eps_low, cfg.eps_high)
        if cfg.entropy_clip:
            each = entropy_dependent_eps(entropy, mask)
            eps = each, each
        weight = WEIGHTS[cfg.loss](r, advantages, eps, cfg.dual_clip)
    per_token = -advantages * weight * logp

    gap = torch.zeros_like(logp)
    if sampler_logp is not None:
        gap = (old_logp - sampler_logp.float()).masked_fill(~mask, 0.0)
    if cfg.tis_cap:  # weigh by pi_old / pi_sampler, which differ by rounding
        per_token = per_token * gap.exp().clamp(max=cfg.tis_cap)
    stats = {"advantage": advantages.expand_as(logp), "log_ratio": log_ratio, "weight": weight,
             "old_prob": old_logp.exp(), "mismatch": gap.abs()}
    if cfg.kl_coef:
        d = (ref_logp.float() - logp).masked_fill(~mask, 0.0)
        kl = d.clamp(max=20).exp() - d - 1  # k3, http://joschu.net/blog/kl-approx.html
        per_token = per_token + cfg.kl_coef * kl
        stats["kl_ref"] = kl.detach()

    if cfg.loss_agg == "sequence":  # a mean of sequence means
        per_token = per_token / lengths.clamp(min=1)
    elif cfg.loss_agg == "constant":  # as if all were of full length: Dr. GRPO
        per_token = per_token / cfg.max_new_tokens
    if norm is None:
        norm = lengths.sum() if cfg.loss_agg == "token" else (lengths > 0).sum()
    loss = (per_token * mask).sum() / max(float(norm), 1.0)
    return loss, {name: values[mask] for name, values in stats.items()}


# ---------------------------------------------------------------------- log-probabilities, plainly

def plain_logp(policy: "Policy", model, samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability and entropy of each response token, and the mask, (B, T) each.

    Their T columns are those of the ids from `first`, where the shortest prompt ends; mask: the R.

        P P R R R . .       P prompt, R response with its stop token, . padding: W columns
        P P P P R R R
            |-- T --|
    """
    ids, attention_mask = policy.pad([s.prompt + s.response for s in samples])  # (B, W) each
    prompt_lengths = torch.tensor([[len(s.prompt)] for s in samples], device=ids.device)  # (B, 1)
    first = min(int(prompt_lengths.min()), ids.shape[1] - 1)  # a column even if all are empty
    with policy.half_precision():
        logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits
    # (B, W, V) -> (B, T, V), and (B, W) -> (B, T): the logits at one place tell of the next token.
    logits, targets = logits[:, first - 1:-1], ids[:, first:]
    column = torch.arange(first, ids.shape[1], device=ids.device)
    # From lengths: looking for padding tokens would miss stop tokens where both are one.
    mask = attention_mask[:, first:].bool() & (column >= prompt_lengths)  # (B, T)

    # It calls logp_and_entropy with a few rows at a time: with a vocabulary of 150 k, the fp32
    # copies of all logits would take 30 GB.
    logp, entropy = by_rows(logp_and_entropy, logits, targets, policy.temperature)
    return logp.masked_fill(~mask, 0.0), entropy.masked_fill(~mask, 0.0), mask


def logp_and_entropy(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits (..., V) and targets (...) -> log-probability and, without gradient, entropy (...)."""
    # At another temperature than the sampler's, ratios would be wrong from the first step.
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    logp = -cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    logp = logp.view(targets.shape)
    with torch.no_grad():
        log_z = logits.gather(-1, targets[..., None]) - logp[..., None]
        # Not by a matrix product, which autocast would round to half precision.
        entropy = torch.special.entr((logits - log_z).exp_()).sum(-1)
    return logp, entropy


def plain_micro_batches(samples: list[Sample], max_tokens: int) -> list[list[Sample]]:
    """Batches of at most max_tokens, padding included; a longer sample goes alone."""
    batches, width = [], 0
    # The longest first: similar lengths share a batch, and what does not fit shows at once.
    for s in sorted(samples, key=lambda s: -len(s.prompt + s.response)):
        if not batches or (len(batches[-1]) + 1) * width > max_tokens:
            batches.append([])
            width = len(s.prompt + s.response)
        batches[-1].append(s)
    return batches


# ------------------------------------------------------------------------------------------ update

def chunks(samples: list[Sample], size: int) -> list[list[Sample]]:
    """A rollout's mini-batches, or its groups."""
    return [samples[i:i + size] for i in range(0, len(samples), size)]


@torch.no_grad()
def remember_old_logp(policy: "Policy", samples: list[Sample]):
    """Note log-probabilities before the rollout's first step: all its ratios are relative to them.

    In the very micro-batches of `accumulate`: in others, rounding would move r away from 1.
    """
    for micro in policy.micro_batches(samples):
        logp, _, mask = policy.token_logp(micro)
        for s, row, where in zip(micro, logp, mask):
            s.old_logp = row[where].cpu()


def accumulate(policy: "Policy", samples: list[Sample], norm: float, cfg: Config) -> list[dict]:
    """Leave the gradient of one mini-batch in .grad, a micro-batch at a time."""
    stats = []
    for micro in policy.micro_batches(samples):
        ref_logp = policy.reference_logp(micro) if cfg.kl_coef else None
        logp, entropy, mask = policy.token_logp(micro)
        advantages = torch.tensor([[s.advantage] for s in micro]).to(logp)  # (B, 1)
        old_logp, sampler_logp = torch.zeros_like(logp), torch.zeros_like(logp)
        old_logp[mask] = torch.cat([s.old_logp for s in micro]).to(logp)
        sampler_logp[mask] = torch.cat([s.sampler_logp for s in micro]).to(logp)
        loss, micro_stats = policy_loss(
            logp, old_logp, advantages, mask, cfg, norm=norm, entropy=entropy,
            ref_logp=ref_logp, sampler_logp=sampler_logp)
        policy.backward(loss)
        stats.append({name: values.cpu() for name, values in micro_stats.items()})
    return stats


def update(policy: "Policy", samples: list[Sample], cfg: Config) -> tuple[list, list[float]]:
    """Train on one rollout. Returns policy_loss's stats and the gradient norm of each step."""
    per_step = cfg.minibatch // world() * cfg.group_size  # of this process
    minibatches = chunks(samples, per_step)
    if cfg.mask_truncated:  # out of the sum and of the norm
        minibatches = [[s for s in batch if not s.truncated] for batch in minibatches]
    # Samples without advantage (and KL) need no computing. They still count in the norm: divided by
    # the active ones alone, a step would be the longer, the fewer groups have a signal.
    active = [[s for s in batch if s.advantage or cfg.kl_coef] for batch in minibatches]

    # fit(LIMIT, f, ...) is f(...); if memory runs out, policy.LIMIT is halved and f called again.
    for batch in active:
        policy.fit("micro_tokens", remember_old_logp, policy, batch)
    stats, grad_norms = [], []
    for epoch in range(cfg.epochs):
        for i in progress(range(len(minibatches)), f"update {epoch + 1}/{cfg.epochs}"):
            if all_sum(len(active[i])) == 0:
                continue
            sizes = [len(s.response) if cfg.loss_agg == "token" else 1 for s in minibatches[i]]
            norm = all_sum(sum(sizes))  # of the mini-batch: its tokens, or its sequences
            stats += policy.fit("micro_tokens", accumulate, policy, active[i], norm, cfg)
            grad_norms.append(policy.optimizer_step())
    policy.refresh_sampler()
    return stats, grad_norms


# ----------------------------------------------------------------------------------- training loop

def heldout_accuracy(policy: "Policy", problems: list[dict], cfg: Config,
                     reward: Callable[[str, dict], float] = right_answer) -> float:
    """Mean score on problems never trained on, with the same random numbers all through a run."""
    seed_step(cfg, 0)
    samples = roll_out(policy, problems[rank()::world()], cfg.eval_samples, cfg, reward)
    return all_sum(sum(s.correct for s in samples)) / all_sum(len(samples))


def train(cfg: Config, reward: Callable[[str, dict], float] | None = None) -> dict:
    """Run a training, or go on with it. Returns the last step's metrics.

    reward: f(response, row as it was read) -> a finite float, instead of the answer checker.
    Raises UserError on bad input, before any work.
    """
    run = open_run(cfg, reward)
    policy = run.policy
    if run.step == 0:
        run.before = heldout_accuracy(policy, run.heldout, cfg, run.reward)
        say(f"held-out accuracy before RL {run.before:.3f}")

    metrics = {}
    for step in range(run.step + 1, cfg.steps + 1):
        seed_step(cfg, step)  # no step depends on the random numbers of another
        started = time.perf_counter()

        # 1. Sample a group of responses to each of the next prompts, and score them.
        problems = run.stream.take(cfg.prompts // world())
        samples = roll_out(policy, problems, cfg.group_size, cfg, run.reward)
        if cfg.max_refills:
            samples = refill(policy, samples, run, cfg)

        # 2. Compare every response with its group.
        rewards = torch.tensor([s.reward for s in samples]).view(-1, cfg.group_size)  # (Q, G)
        advantages = group_advantages(rewards, cfg.divide_by_std)  # (Q, G)
        for s, advantage in zip(samples, advantages.flatten().tolist()):
            s.advantage = advantage
        rolled_out = time.perf_counter()

        # 3. Raise and lower log-probabilities, in several optimiser steps.
        stats, grad_norms = update(policy, samples, cfg)
        updated = time.perf_counter()

        # 4. Report.
        last = step == cfg.steps
        metrics = {
            "step": step,
            **rollout_metrics(all_gather(samples), cfg),
            **update_metrics(all_gather(stats), grad_norms, cfg),
            "lr": policy.learning_rate(),
            "sample_seconds": rolled_out - started,
            "update_seconds": updated - rolled_out,
        }
        if last or (cfg.eval_every and step % cfg.eval_every == 0):
            metrics["heldout_accuracy"] = heldout_accuracy(policy, run.heldout, cfg, run.reward)
        run.log(metrics, samples)  # raises Broken if the model no longer is one

        # 5. Save. A run that a signal stops here goes on with --resume as if it had not been.
        stop = run.asked_to_stop()
        if stop or last or (cfg.save_every and step % cfg.save_every == 0):
            run.save(step, samples)
        if stop:
            break
    run.finish(metrics)
    return metrics


# ====================================================================== PART TWO: the engine room
# You know the method now. Each room opens with what it does, what it promises, when to touch it.

import argparse
import contextlib
import copy
import csv
import dataclasses
import functools
import hashlib
import inspect
import io
import itertools
import json
import logging
import os
import random
import re
import runpy
import shutil
import signal
import sys
import types
import typing
import warnings
from typing import NamedTuple

import torch.distributed as dist
import transformers
from huggingface_hub.utils import http_backoff
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two runs out of one folder
    fcntl = None


class UserError(Exception):
    """Bad input. `main` prints the message as one line and exits with status 2."""


LESS_MEMORY = ("try --gradient_checkpointing true, a smaller --max_new_tokens or --model, or more "
               "GPUs")


class Broken(UserError):
    """There is no model left to train. Exit status 1."""


@contextlib.contextmanager
def explain(what: str):
    """Turn whatever goes wrong inside into one line: libraries raise a dozen types."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        missing = " is missing" if isinstance(error, KeyError) else ""
        raise UserError(f"{what}: {reason}{missing}") from error


# ------------------------------------------------------------------------------------------ extras
# Of the rollout, the reward and the loss. Each is off by default and has a knob.
# Touch it for a recipe of your own.

def is_uniform(group: list[Sample]) -> bool:
    """All rewards are equal: nothing can be learned from this group."""
    return len({s.reward for s in group}) == 1


def refill(policy: "Policy", samples: list[Sample], run: "Run", cfg: Config) -> list[Sample]:
    """Dynamic sampling (DAPO): other problems for those with a uniform group.

    Uniform groups of the last refill stay, with advantages of 0.
    """
    for _ in range(cfg.max_refills):
        groups = chunks(samples, cfg.group_size)
        kept = [group for group in groups if not is_uniform(group)]
        missing = len(groups) - len(kept)
        if all_sum(missing) == 0:
            break
        others = roll_out(policy, run.stream.take(missing), cfg.group_size, cfg, run.reward)
        samples = sum(kept, []) + others
    return samples


def overlong_penalty(length: int, cfg: Config) -> float:
    """0 until overlong_buffer tokens before the limit, then falling to -1 (DAPO, eq. 13)."""
    over = length - (cfg.max_new_tokens - cfg.overlong_buffer)
    return -over / cfg.overlong_buffer if cfg.overlong_buffer and over > 0 else 0.0


def entropy_dependent_eps(entropy: Tensor, mask: Tensor) -> Tensor:
    """0.4 for each response's 20 % most uncertain tokens, else 0.2 (Archer, arXiv 2507.15778)."""
    without_padding = entropy.float().masked_fill(~mask, math.nan)
    threshold = without_padding.nanquantile(0.8, -1, keepdim=True)
    return torch.where(entropy > threshold, 0.4, 0.2)


# ----------------------------------------------------------------------------------------- metrics
# Behind each one: what a healthy value looks like. Means are over the samples, or over the tokens
# of all optimiser steps, of all processes. What is returned here is in metrics.jsonl.

def mean(values) -> float | None:
    """None of nothing: no tokens of this sign."""
    values = torch.as_tensor(values, dtype=torch.float)
    return values.mean().item() if len(values) else None


def repetition(text: str, n: int = 20) -> float:
    """Share of the text's n-word n-grams that occurred before in it."""
    words = text.split()
    grams = list(zip(*(words[i:] for i in range(n))))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def rollout_metrics(samples: list[Sample], cfg: Config) -> dict:
    """Of the sampled responses."""
    rewards = torch.tensor([s.reward for s in samples]).view(-1, cfg.group_size)
    tokens = sum(len(s.response) for s in samples)
    return {
        "reward": rewards.mean().item(),  # climbs; flat at 0: nothing is learned
        "reward_std": rewards.std(-1).mean().item(),  # above 0: within groups, it is the signal
        "accuracy": mean([s.correct for s in samples]),  # the reward without penalties
        # falls slowly; near 0 exploration is over
        "entropy": sum(s.entropy * len(s.response) for s in samples) / tokens,
        "response_length": tokens / len(samples),  # no jump to 0 or to the limit
        "truncated": mean([s.truncated for s in samples]),  # under 0.1
        "repetition": mean([repetition(s.text) for s in samples]),  # under 0.1
        # well under `prompts`: they carry no signal
        "uniform_groups": sum(map(is_uniform, chunks(samples, cfg.group_size))),
        "tokens": tokens,
    }


def update_metrics(stats: list[dict], grad_norms: list[float], cfg: Config) -> dict:
    """Of the optimiser steps; pos and neg are good and bad tokens, None where there are none."""
    def of(name):
        return torch.cat([torch.zeros(0), *(s[name] for s in stats)])

    finite = [g for g in grad_norms if math.isfinite(g)]
    weight, unlikely, r = of("weight"), of("old_prob") < 0.5, ratio(of("log_ratio"))
    result = {
        "grad_norm": mean(finite) or 0.0,  # steady; 0 if there was no step
        "skipped_steps": len(grad_norms) - len(finite),  # not finite: 0; with fp16 a few
        "approx_kl": mean(r - 1 - r.log()),  # of pi_old and pi: under 0.05
        # |log pi_old - the sampler's|: 1e-6 in fp32, more in half precision
        "sampler_mismatch": mean(of("mismatch")),
    }
    if cfg.kl_coef:
        result["kl_ref"] = mean(of("kl_ref"))  # to the initial model: grows slowly
    advantage = of("advantage")
    for sign, these in (("pos", advantage > 0), ("neg", advantage < 0)):
        dual = weight >= cfg.dual_clip if sign == "pos" else r > cfg.dual_clip
        result |= {
            # near 1; above it for pos and below for neg, when updates do what they should
            f"ratio_{sign}": mean(r[these]),
            # grpo: as the ratio; aspo: its mirror image for pos, which is the paper's point
            f"weight_{sign}": mean(weight[these]),
            # of tokens with pi_old < 0.5: these move furthest from 1
            f"weight_{sign}_low": mean(weight[these & unlikely]),
            f"weight_{sign}_high": mean(weight[these & ~unlikely]),  # near 1
            # w = 0 by PPO's clip: under 0.1; more: lower lr
            f"clip_frac_{sign}": mean(((weight == 0) & ~dual)[these]),
            f"dual_clip_frac_{sign}": mean(dual[these]),  # capped or dropped: near 0
        }
    return result


# ---------------------------------------------------------------------------------------- problems
# Each is {"problem": text, "answer": gold, "messages": the chat of a row that had one, "row": as it
# was read}. Held-out ones are never trained on, and are the same for every seed, so that runs
# compare. Touch it to bring your own data; files and sets with the usual columns need no line here.

HUB_DATA = {  # name: hub id, configuration
    "gsm8k": ("openai/gsm8k", "main"),
    "svamp": ("ChilleD/SVAMP", "default"),
    "math": ("DigitalLearningGmbH/MATH-lighteval", "default"),
}
PROBLEM_COLUMNS = ("problem", "question", "prompt", "Problem", "Question", "query", "input")
# The last answer is worked out, and is taken from its \boxed{}.
ANSWER_COLUMNS = ("answer", "final_answer", "Answer", "ground_truth", "target", "solution")
FILES = (".jsonl", ".json", ".csv", ".parquet")
BOX = "Please reason step by step, and put your final answer within \\boxed{}."
INSTRUCTIONS = {"arithmetic": "", "sums": "Finish with 'The answer is' and the number."}


def arithmetic() -> list[dict]:
    """The 625 sums of four numbers from 1 to 5: "3+1+5+2"."""
    terms = itertools.product(range(1, 6), repeat=4)
    return [{"problem": "+".join(map(str, t)), "answer": sum(t)} for t in terms]


def sums() -> list[dict]:
    """361 sums in words, for a chat model that cannot add well: "What is 18 + 7?"."""
    pairs = itertools.product(range(2, 21), repeat=2)
    return [{"problem": f"What is {a} + {b}?", "answer": a + b} for a, b in pairs]


BUILT_IN = {"arithmetic": arithmetic, "sums": sums}


def make_problem(row: dict) -> dict:
    """A problem from a row with the usual columns. Raises ValueError."""
    inner = row.get("reward_model")  # of sets made for verl
    columns = row | inner if isinstance(inner, dict) else row

    def first(names: tuple):
        values = map(columns.get, names)
        return next((value for value in values if value not in (None, "", [])), None)

    question, answer = first(PROBLEM_COLUMNS), first(ANSWER_COLUMNS)
    if row.get("Body"):  # SVAMP tells its story in two columns
        question = f"{row['Body']} {row['Question']}"
    if question is None or answer is None:
        raise ValueError(f"found the columns {', '.join(map(str, row))}; looked for a problem in "
                         f"{', '.join(PROBLEM_COLUMNS)}, for its answer in "
                         f"{', '.join(ANSWER_COLUMNS)}")
    messages = question if isinstance(question, list) else None
    text = "\n".join(m["content"] for m in messages) if messages else str(question)
    gold = ", ".join(map(str, answer)) if isinstance(answer, list) else str(answer)
    # GSM8K's "... #### 7" and MATH's "... \boxed{7}"; a bare answer stays what it is.
    extracted = extract_answer(gold)
    if not extracted and ("####" in gold or first(ANSWER_COLUMNS[:-1]) is None):
        raise ValueError("the solution has no \\boxed{} answer, or none behind ####")
    text, gold = text.strip(), (extracted or gold).strip()
    if not text or not gold or re.search("(^|, )[-+]?(nan|inf|infinity)(,|$)", gold, re.I):
        raise ValueError(f"problem and answer must not be empty, and {gold!r} is no answer")
    f"{text}{gold}".encode()  # raises for half of a surrogate pair, which no tokenizer takes
    return {"problem": text, "answer": gold, "messages": messages, "row": row}


def make_problems(rows: list, where: str, strict: bool = True) -> list[dict]:
    """Each different problem once: a copy on the other side of the split would be no held-out one.

    Raises UserError for a row that is none; not strict: leaves it out.
    """
    found, n_rows, failure = {}, 0, None
    for number, row in enumerate(progress(rows, f"reading {where}"), 1):
        try:
            with explain(f'{where} {number}: expected {{"problem": "...", "answer": "..."}}'):
                if isinstance(row, str) and not row.strip():
                    continue
                problem = make_problem(json.loads(row) if isinstance(row, str) else row)
                found.setdefault(problem["problem"], problem)
                n_rows += 1
        except UserError as error:
            if strict:
                raise
            failure = failure or error
    if failure:
        say(f"warning: rows without a problem or an answer are left out; the first is {failure}")
    if n_rows > len(found):
        say(f"{where}: {n_rows} rows hold {len(found)} different problems; the first of each stays")
    return list(found.values())


def read_jsonl(path: str | Path) -> list[dict]:
    """Problems of a file: JSON Lines, a JSON array, .csv or .parquet. Raises UserError."""
    path, place = Path(path), "row"
    say(f"reading {path}")
    with explain(f"cannot read {path}"):
        if path.suffix == ".parquet":
            from pyarrow import parquet  # comes with datasets

            rows = parquet.read_table(path).to_pylist()
        else:
            text = path.read_bytes().decode("utf-8-sig")
            if path.suffix == ".csv":
                rows = list(csv.DictReader(io.StringIO(text, None)))
            elif text.lstrip().startswith("["):
                rows = json.loads(text)
            else:  # not splitlines(): U+2028 and its like may stand inside a string
                rows, place = text.split("\n"), "line"
    if problems := make_problems(rows, f"{path}, {place}"):
        return problems
    raise UserError(f'{path} holds no problems; expected {{"problem": "2+2", "answer": "4"}}')


def load_problems(cfg: Config) -> tuple[list[dict], list[dict]]:
    """Problems to train on, and held-out ones. Raises UserError."""
    heldout = []
    if cfg.data in BUILT_IN:
        train = make_problems(BUILT_IN[cfg.data](), cfg.data)
    elif Path(cfg.data).is_file() or Path(cfg.data).suffix in FILES:
        train = read_jsonl(cfg.data)
    else:
        where = HUB_DATA.get(cfg.data, (cfg.data,))
        with explain(f"cannot load --data {cfg.data} ({where[0]} on the hub)"):
            from datasets import load_dataset  # a second that offline runs need not spend

            splits = load_dataset(*where)
            train = make_problems(splits["train"], "train, row", strict=False)
            heldout = make_problems(splits.get("test", []), "test, row", strict=False)
            if not train:
                make_problem(splits["train"][0])  # raises, and says what is missing
    random.Random(0).shuffle(heldout or train)
    a_fifth = train[:max(1, len(train) // 5)]
    heldout = (heldout or a_fifth)[:cfg.eval_problems]
    seen = {problem["problem"] for problem in heldout}
    train = [problem for problem in train if problem["problem"] not in seen]
    if not train:
        raise UserError(f"--data {cfg.data} leaves nothing to train on besides {len(heldout)} "
                        "held-out problems; add problems")
    return train, heldout


def digest(*parts) -> str:
    """Of anything that prints: has it changed since the checkpoint?"""
    return hashlib.sha256(repr(parts).encode("utf-8", "replace")).hexdigest()[:16]


class Stream:
    """Endless problems; the order of each pass depends on the seed and the pass alone."""

    def __init__(self, problems: list[dict], seed: int):
        self.problems, self.seed, self.position = problems, seed, 0

    @functools.lru_cache(maxsize=2)
    def shuffled(self, epoch: int) -> list[dict]:
        return random.Random(f"{self.seed}-{epoch}").sample(self.problems, len(self.problems))

    def take(self, n: int) -> list[dict]:
        """This process's next n problems. They take turns, so all must call it together."""
        start, size = self.position, len(self.problems)
        self.position += max(all_gather([n])) * world()
        places = range(start + rank(), self.position, world())[:n]
        return [self.shuffled(place // size)[place % size] for place in places]


def open_reward(cfg: Config, reward: Callable | None) -> Callable:
    """The reward of (response, problem): the answer checker, or one's own with its faults named."""
    if reward is None:
        if cfg.reward is None:
            return right_answer
        with explain(f"--reward {cfg.reward}: expected FILE.py:NAME of f(response, row) -> float"):
            path, name = cfg.reward.rsplit(":", 1)
            reward = runpy.run_path(path)[name]

    def own_reward(response, problem):
        with explain(f"the reward {getattr(reward, '__name__', reward)} failed on the problem "
                     f"{problem['problem'][:80]!r} and the response {response[:80]!r}"):
            value = float(reward(response, problem["row"]))
            if not math.isfinite(value):
                raise ValueError(f"it is {value}, expected a finite number")
        return value

    own_reward.__name__ = getattr(reward, "__name__", repr(reward))  # a checkpoint knows it
    return own_reward


# ---------------------------------------------------------------------------------------- toy task
# A model of 0.3 M parameters, and the demonstrations that it learns the format from.
# A run on two CPU cores takes two minutes, and shows all that happens in a large one.
# Touch it for a toy of your own.

def tiny_model():
    """An untrained Qwen2 of 0.3 M parameters with one token per character, and its tokenizer."""
    # A character per token; Qwen2 reads bytes, and writes those of a line end and a space as Ċ, Ġ.
    tokens = ["<pad>", "<eos>", "<unk>", *"0123456789+=Ċ#Ġ"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = transformers.Qwen2Tokenizer(
        vocabulary, [], pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    # Else it would drop what it does not know.
    tokenizer.backend_tokenizer.model.unk_token = "<unk>"
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }}{% if add_generation_prompt %}={% endif %}")
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=len(tokens), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=True, initializer_range=0.04, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)), tokenizer


def sloppy_demonstration(problem: str, rng: random.Random) -> str:
    """A sum worked out by merging neighbours, a quarter of them one or two too high.

    "3+1+5+2" -> "3+6+2=9+2=11\n#### 11". The order is free, so there are several right ways. RL
    pays for the last number alone, and what it leaves of the steps is worth reading.
    """
    terms, states = [int(term) for term in problem.split("+")], []
    while len(terms) > 1:
        i = rng.randrange(len(terms) - 1)
        slip = rng.choice((1, 2)) if rng.random() < 0.25 else 0
        terms[i:i + 2] = [terms[i] + terms[i + 1] + slip]
        states.append("+".join(map(str, terms)))
    return "=".join(states) + f"\n#### {terms[0]}"


def warm_up(model, tokenizer, problems: list[dict], cfg: Config):
    """Teach the tiny model the format, and some arithmetic, from 32 demonstrations a step."""
    rng = random.Random(cfg.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1)
    schedule = transformers.get_cosine_schedule_with_warmup(
        optimizer, cfg.sft_steps // 10, cfg.sft_steps)
    pad = transformers.DataCollatorForSeq2Seq(tokenizer)  # labels with -100, where no loss is
    for _ in progress(range(cfg.sft_steps), "warm-up"):
        batch = []
        for row in rng.choices(problems, k=32):
            prompt = tokenizer(row["problem"] + "=").input_ids
            demonstration = sloppy_demonstration(row["problem"], rng)
            response = tokenizer(demonstration + tokenizer.eos_token).input_ids
            labels = [-100] * len(prompt) + response
            batch.append({"input_ids": prompt + response, "labels": labels})
        model(**pad(batch), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


# ------------------------------------------------------------------------------ models and prompts
# A model with fp32 weights, its tokenizer, and what ends a response.
# Works for any causal language model of transformers on which padding has no effect.
# Touch it for a model that loads in its own way, or for the settings of an alias.

SAVING = dict(gradient_checkpointing=True)
LARGE = SAVING | dict(sample_rows=64)
PRESETS = {  # alias: hub id, settings. Sized for one GPU of 24 GB, from 1.5B on of 40, r1 of 80
    "tiny": (None, dict(data="arithmetic", steps=55, prompts=64, minibatch=16, max_new_tokens=40,
                        lr=4e-4, eval_every=11)),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", dict(max_new_tokens=256, lr=3e-6)),
    "qwen-0.5b": ("Qwen/Qwen2.5-0.5B-Instruct", SAVING),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", LARGE),  # 9 times the cache of 0.5b
    "qwen-1.5b": ("Qwen/Qwen2.5-1.5B-Instruct", LARGE),
    "qwen-math-1.5b": ("Qwen/Qwen2.5-Math-1.5B", LARGE | dict(max_new_tokens=1024)),
    "r1-1.5b": ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
                LARGE | dict(max_new_tokens=4096)),
}


def what_lacks(folder: Path) -> str | None:
    """Why a folder is no model, in words that help; None if nothing is missing."""
    names = "\n".join(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        return "it is an adapter: merge it into its base model first (peft's merge_and_unload)"
    for what, pattern in (("config.json", r"^config\.json"), ("weights", r"\.safetensors|\.bin$"),
                          ("tokenizer", r"^(tokenizer\.json|vocab|spiece|tekken)|\.model$")):
        if not re.search(pattern, names, re.M):
            return f"it has no {what}"


def load_model(cfg: Config):
    """(model with fp32 weights on the CPU, tokenizer) of --model. Raises UserError."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if cfg.model == "tiny":
        return tiny_model()
    source = PRESETS.get(cfg.model, (cfg.model,))[0]
    if Path(source).is_dir() and (reason := what_lacks(Path(source))):
        raise UserError(f"cannot load --model {cfg.model}: {reason}")
    with explain(f"cannot load --model {cfg.model}; expected {', '.join(PRESETS)}, a hub id or a "
                 "folder"):
        # A model that brings code of its own would run it here.
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, trust_remote_code=False)
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            raise UserError(f"--model {cfg.model}: its weights are not finite, first in {name}")
        p.data = p.data.clone()  # aligned: else a CPU may round otherwise after a resume
    if getattr(model.config, "output_router_logits", False):
        model.config.output_router_logits = False  # a loss of its own, over padding as well
    return model, tokenizer


def context(model) -> float:
    """How many tokens a row may have. Beyond the original length, rope types longrope and dynamic
    encode a position by what else is in the batch; for dynamic that is the length in the config."""
    config = model.config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (rope, *rope.values()):  # some models have one for each kind of layer
        if isinstance(kind, dict) and kind.get("rope_type") == "longrope":
            limits.append(kind.get("original_max_position_embeddings"))
    return min((n for n in limits if n and n > 0), default=math.inf)  # XLNet's is -1


def stop_tokens(model, tokenizer) -> list[int]:
    """Every id that ends a response: chat models often have two, one in their template alone."""
    eos = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
        with explain("the chat template cannot write a question and its answer"):
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        _, found, behind = text.rpartition("ANSWER")
        if found and behind.strip():
            ending = tokenizer(behind.strip(), add_special_tokens=False).input_ids
            if ending[0] in tokenizer.added_tokens_decoder:
                ids.add(ending[0])
    ids = sorted(i for i in ids if isinstance(i, int) and i >= 0)
    if not ids:
        raise UserError("no token is known that ends a response: none in the model's config, its "
                        "tokenizer or its chat template; set eos_token in tokenizer_config.json")
    return ids


# -------------------------------------------------------------------------------- drawing and rows
# What both engines need: a token from probabilities, and a vocabulary's logits a part at a time.
# The distribution is exact; what is kept for the backward pass does not grow with the vocabulary.
# Touch it for another way to sample, such as min-p.

def draw(probs: Tensor) -> Tensor:
    """A token (B,) from probabilities (B, V): where the running sum passes a uniform number.

    First one of 64 blocks, then one inside it: a running sum over 150,000 tokens, in double as
    rounding must not let tokens of probability 0 through, would move more than a 0.5B model reads.
    """
    size = probs.shape[-1]
    if size % 64:
        probs = torch.nn.functional.pad(probs, (0, -size % 64))
    blocks = probs.unflatten(-1, (64, -1))
    ends = blocks.sum(-1).double().cumsum(-1)  # (B, 64)
    total = ends[:, -1:]
    at = total * (1 - torch.rand_like(total))  # (B, 1), never 0
    # NaN, of a policy that has diverged, is found beyond the end: hence the clamps.
    block = torch.searchsorted(ends, at).clamp(max=63)
    rows = torch.arange(len(probs), device=probs.device)
    inside = blocks[rows, block[:, 0]].double().cumsum(-1)
    at = inside[:, -1:] - (ends.gather(1, block) - at)  # counted from the block's own end
    place = torch.searchsorted(inside, at.clamp(min=1e-300))
    token = block * inside.shape[-1] + place
    return token[:, 0].clamp(max=size - 1)


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """The most likely tokens that reach top_p together keep their probabilities, others get 0."""
    ranked, order = probs.sort(-1, descending=True)
    # keeps the token that crosses top_p
    ranked.masked_fill_(ranked.cumsum(-1) - ranked >= top_p, 0)
    return torch.zeros_like(probs).scatter_(-1, order, ranked)


def by_rows(work, x: Tensor, targets: Tensor, *args, logits_per_row: int | None = None):
    """work(x, targets, *args), a few rows at a time, each done again for the backward pass."""
    at_once = 2**27 if x.is_cuda else 2**25  # logits in fp32: 512 and 128 MiB a copy
    rows = max(1, at_once // max(1, logits_per_row or x[0].numel()))
    parts = [checkpoint(work, *pair, *args, use_reentrant=False, preserve_rng_state=False)
             for pair in zip(x.split(rows), targets.split(rows))]
    return tuple(map(torch.cat, zip(*parts)))


# -------------------------------------------------------------------------------- fast: the decoder
# Reads each prompt once for all of its responses, which then grow by a token at a time; those that
# have ended leave the batch. Same distribution as plain_generate, same greedy tokens.
# Touch it for another cache. On CUDA a step is recorded once for each size and then replayed, so in
# `step` tensors keep their addresses, and no Python value may change.

LOOK_EVERY = 8  # steps between looks at which rows have stopped: a look makes a GPU wait
COLUMN_STEP = 256  # columns of the cache are rounded up to a multiple of this on CUDA
CACHE = "cache" if "cache" in inspect.signature(
    transformers.Qwen2ForCausalLM.forward).parameters else "past_key_values"  # before 5.24


class RowCache(transformers.Cache):
    """Keys and values of every layer, (rows, heads, columns, D), of which some are in use.

    transformers' StaticCache would read all columns in every step, and cannot repeat a prompt for
    its group or let rows go.
    """

    def __init__(self, prompt_cache: list[Tensor], rows: int, columns: int):
        super().__init__(layers=[])
        self.buffers = [x.new_zeros(rows, x.shape[1], columns, x.shape[3]) for x in prompt_cache]
        self.rows, self.columns = rows, columns  # in use
        self.column = self.buffers[0].new_zeros(1, dtype=torch.long)  # written last

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs):
        """Write one column; all of what is in use goes to attention."""
        both = self.buffers[2 * layer_idx:][:2]
        used = [buffer[:self.rows, :, :self.columns] for buffer in both]
        for buffer, new in zip(used, (keys, values)):
            buffer.index_copy_(2, self.column, new)
        return used

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns - 1


class Decoder:
    """The responses that are being sampled, a row each."""

    def __init__(self, model, bucketed: bool | None = None):
        self.model = model
        self.graphs_on = model.device.type == "cuda"
        self.bucketed = self.graphs_on if bucketed is None else bucketed
        self.cache, self.pool, self.bias = None, None, torch.empty(0, 0)

    def round_rows(self, n: int) -> int:
        """n, or on CUDA the next 2^k or 3 * 2^k: few sizes, few graphs."""
        if not self.bucketed:
            return n
        power = 1 << (n - 1).bit_length()
        return power * 3 // 4 if n <= power * 3 // 4 else power

    def round_columns(self, n: int) -> int:
        return -(-n // COLUMN_STEP) * COLUMN_STEP if self.bucketed else n

    def start(self, policy: "Policy", prompts: list[list[int]]):
        """Read every different prompt once, lay its cache out for its rows, pick first tokens."""
        self.temperature, self.top_p = policy.temperature, policy.top_p
        padded = torch.stack(policy.pad(prompts, "left"))
        (ids, mask), which = padded.unique(dim=1, return_inverse=True)  # (Q, P) each, (B,)
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # padding must not shift a prompt
        cache = transformers.DynamicCache()
        logits = self.model(
            ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1,
            **{CACHE: cache}).logits[:, -1]
        prompt_cache = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        n, width = len(prompts), ids.shape[1]
        rows, columns = self.round_rows(n), self.round_columns(width + policy.max_new_tokens)
        if rows > len(self.bias) or columns > self.bias.shape[1]:
            # Gone before the new one is made; a pool whose graphs are gone takes no others.
            self.graphs, self.cache, self.pool = {}, None, None
            most, columns = max(rows, len(self.bias)), max(columns, self.bias.shape[1])
            self.cache = RowCache(prompt_cache, most, columns)
            zeros = self.cache.column.new_zeros
            self.row = zeros(most)  # the response that each row writes
            self.position = zeros(most, 1)  # where its last token stands in its sequence
            self.bias = zeros(most, columns, dtype=self.model.dtype)  # of scores: 0 or -inf
            # What has been written, a row per response: tokens, log-probabilities, entropies.
            self.written = zeros(3, most, columns, dtype=torch.float)

        for buffer, x in zip(self.cache.buffers, prompt_cache):
            buffer[:n, :, :width] = x[which]
        self.bias.fill_(torch.finfo(self.bias.dtype).min)
        self.bias[:n, :width].masked_fill_(mask[which].bool(), 0.0)
        self.position.zero_()[:n] = positions[which, -1:]
        torch.arange(len(self.row), out=self.row)
        self.cache.column.fill_(width - 1)
        self.filled, self.cache.rows = width, rows
        self.write(logits[which])

    def write(self, logits: Tensor):
        """Pick every row's next token, and note it where its response stands."""
        picked = pick(logits, self.temperature, self.top_p)
        rows = self.row[:len(logits)]
        self.written[:, rows, self.cache.column] = torch.stack(picked)

    def step(self):
        """Feed every row its last token and pick the next."""
        rows, column = self.cache.rows, self.cache.column
        token = self.written[0, self.row[:rows], column].long()
        column.add_(1)
        self.position.add_(1)
        self.bias.index_fill_(1, column, 0.0)
        out = self.model(
            token[:, None], position_ids=self.position[:rows], use_cache=True,
            attention_mask=self.bias[:rows, None, None, :self.cache.columns],
            **{CACHE: self.cache})
        self.write(out.logits[:, -1])

    def advance(self):
        """A step: replayed if this size has been recorded, else run, and recorded for next time."""
        self.filled += 1
        self.cache.columns = self.round_columns(self.filled)
        size = (self.cache.rows, self.cache.columns, self.temperature, self.top_p)
        if size in self.graphs:
            self.graphs[size].replay()
            return
        self.step()
        if self.graphs_on:
            try:
                self.record(size)
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                self.graphs_on, self.graphs = False, {}
                say(f"sampling goes on without CUDA graphs: {' '.join(str(error).split())[:200]}")

    def record(self, size: tuple):
        torch.cuda.synchronize()
        self.pool = self.pool or torch.cuda.graph_pool_handle()  # graphs use it in turns
        graph = torch.cuda.CUDAGraph()
        # thread_local, so that NCCL's threads go on meanwhile. A capture that fails would leave all
        # later work on its own stream.
        with (torch.cuda.stream(torch.cuda.current_stream()),
              torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local")):
            self.step()  # recorded, not run
        self.graphs[size] = graph

    def drop(self, done: Tensor):
        """Let finished rows go, as far as the next smaller size allows; done is (responses,)."""
        live = ~done[self.row[:self.cache.rows]]
        rows = self.round_rows(int(live.sum()))
        if rows >= self.cache.rows:
            return
        order = live.int().argsort(descending=True, stable=True)[:rows]
        filled = (buffer[:, :, :self.filled] for buffer in self.cache.buffers)
        for state in (self.row, self.position, self.bias, *filled):
            state[:rows] = state[order]
        self.cache.rows = rows


@torch.no_grad()
def fast_generate(policy: "Policy", prompts: list[list[int]]):
    """As plain_generate."""
    decoder = policy.decoder = policy.decoder or Decoder(policy.sampler)
    decoder.start(policy, prompts)
    n, limit = len(prompts), policy.max_new_tokens
    written = decoder.written[:, :, decoder.filled - 1:]  # (3, rows, T), from the first token on
    stops = written.new_tensor(policy.stop_ids)
    done = decoder.row >= n  # rows without a response are done from the start
    for t in range(1, limit):
        if t % LOOK_EVERY == 0:
            latest = written[0, :, t - LOOK_EVERY:t]
            done |= torch.isin(latest, stops).any(1)
            if done.all():
                break
            decoder.drop(done)
        decoder.advance()

    responses = []
    for row in written[:, :n, :limit].transpose(0, 1).cpu():  # (3, T)
        tokens = row[0].long().tolist()
        end = next((t for t, token in enumerate(tokens, 1) if token in policy.stop_ids), limit)
        _, logp, entropy = row[:, :end]
        responses.append((tokens[:end], logp.clone(), entropy.mean().item()))
    return responses


# ----------------------------------------------------------------------------------- fast: packing
# The samples of a micro-batch in one row, a group's prompt once, nothing padded; attention alone
# knows what belongs together. Same log-probabilities and gradients as plain_logp.
# Touch it for another attention kernel.

@dataclass
class Packed:  # no tuple: FSDP would look inside, and make causal_lower_right an empty tensor
    """Prompt ab with responses xyz and uv is the row  a b x y u: a last token predicts nothing."""

    tokens: Tensor  # (1, N)
    positions: Tensor  # (1, N)
    parts: list  # (slice of the row that it sees besides itself, its own slice, mask)
    source: Tensor  # (M,) the place that predicts each of the M response tokens
    targets: Tensor  # (M,) these tokens
    mask: Tensor  # (B, T) bool: where they stand in the padded responses


def pack(samples: list[Sample], device: torch.device) -> Packed:
    """Lay samples out; those of one group stand side by side."""
    tokens, positions, parts, source, targets = [], [], [], [], []

    def lay(ids: list[int], seen: slice) -> slice:
        own = slice(len(tokens), len(tokens) + len(ids))
        before = seen.stop - seen.start
        tokens.extend(ids)
        positions.extend(range(before, before + len(ids)))
        if ids:
            mask = lower_right(len(ids), before + len(ids), device)
            parts.append((seen, own, mask))
        return own

    for ids, group in itertools.groupby(samples, lambda s: s.prompt):
        prompt = lay(ids, slice(0, 0))
        for s in group:
            own = lay(s.response[:-1], prompt)
            places = [prompt.stop - 1, *range(own.start, own.stop)]
            source += places[:len(s.response)]
            targets += s.response
    lengths = torch.tensor([[len(s.response)] for s in samples])
    mask = torch.arange(max(1, int(lengths.max()))) < lengths
    put = functools.partial(torch.tensor, dtype=torch.long, device=device)
    return Packed(put([tokens]), put([positions]), parts,
                  put(source), put(targets), mask.to(device))


def lower_right(queries: int, keys: int, device: torch.device):
    """The last query sees all keys. On CUDA a sign for the flash kernel, which needs no mask."""
    if device.type == "cuda":
        return causal_lower_right(queries, keys)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return mask.tril(keys - queries)


def packed_attention(module, query, key, value, attention_mask, *, scaling=None,
                     packed: Packed | None = None, **kwargs):
    """What transformers calls in every layer: (1, heads, N, D) -> (1, N, heads, D), None.

    Without `packed` it decodes, (B, heads, 1, D) -> (B, 1, heads, D), or reads prompts.
    """
    if kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise ValueError("its scores are capped, or have sinks")
    if packed is None and query.shape[2] == 1:
        # Query heads that share a key head become its rows: no copies of keys and values.
        rows = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
        out = scaled_dot_product_attention(rows, key, value, attention_mask, scale=scaling)
        return out.reshape(query.shape).transpose(1, 2), None
    if packed is None:
        return transformers.AttentionInterface()["sdpa"](
            module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    # Rotated ones are fp32 under autocast, and causal_lower_right compares types before it casts.
    query, key = query.to(value.dtype), key.to(value.dtype)
    attend = functools.partial(scaled_dot_product_attention, scale=scaling, enable_gqa=True)
    out = []
    for seen, own, mask in packed.parts:
        k, v = (torch.cat([x[:, :, seen], x[:, :, own]], 2) for x in (key, value))
        out.append(attend(query[:, :, own], k, v, mask))
    return torch.cat(out, 2).transpose(1, 2), None


transformers.AttentionInterface.register("packed", packed_attention)
transformers.AttentionMaskInterface.register("packed", sdpa_mask)


def packed_logp(model, packed: Packed, temperature: float):
    """Log-probability and entropy of every response token, (M,). Logits exist for these alone."""
    no_mask = packed.tokens.new_ones(1, 1, 1, 1)  # else transformers would make one of (N, N)
    hidden = model.base_model(
        packed.tokens, attention_mask=no_mask, position_ids=packed.positions, use_cache=False,
        packed=packed).last_hidden_state[0].index_select(0, packed.source)  # (M, D)
    head = model.get_output_embeddings()
    return by_rows(lambda h, targets: logp_and_entropy(head(h), targets, temperature),
                   hidden, packed.targets, logits_per_row=head.out_features)


def fast_logp(policy: "Policy", model, samples: list[Sample]):
    """As plain_logp, in tensors that begin where the responses do."""
    packed = pack(samples, model.device)
    # Of a model that `shard` has cut up, a method that gathers its weights first.
    work = getattr(model, "packed_logp", functools.partial(packed_logp, model))
    with policy.half_precision():
        values = work(packed, policy.temperature)
    zeros = torch.zeros(packed.mask.shape, device=model.device)
    return *(zeros.masked_scatter(packed.mask, x) for x in values), packed.mask


def fast_micro_batches(samples: list[Sample], max_tokens: int) -> list[list[Sample]]:
    """Batches of at most max_tokens in a packed row; a longer sample goes alone."""
    batches, room = [], 0
    for s in samples:
        met = batches and s.prompt == batches[-1][-1].prompt
        need = len(s.response) + (0 if met else len(s.prompt))
        if need > room:
            batches.append([])
            need, room = len(s.prompt) + len(s.response), max_tokens
        batches[-1].append(s)
        room -= need
    return batches


# --------------------------------------------------------------------------- which engine is right
# Both must give the numbers of the model's own forward, one sequence at a time, before anything is
# trained on them. Touch it when a kind of model is refused that you know to be right.

class Engine(NamedTuple):
    """What samples and computes log-probabilities."""

    name: str
    generate: Callable
    token_logp: Callable
    micro_batches: Callable


PLAIN = Engine("plain", plain_generate, plain_logp, plain_micro_batches)
FAST = Engine("fast", fast_generate, fast_logp, fast_micro_batches)
UNSEEN = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "index_topk")


def exceeded(policy: "Policy") -> dict[str, int]:
    """The windows that are shorter than the longest text."""
    config = policy.model.config.get_text_config()
    windows = {name: getattr(config, name, None) or 0 for name in WINDOWS}
    return {name: window for name, window in windows.items() if 0 < window < policy.longest}


def not_fast(policy: "Policy") -> str | None:
    """What FAST leaves out, though short texts of an untrained model need not show it."""
    config = policy.model.config.get_text_config()
    for name in UNSEEN:
        if getattr(config, name, None) not in (None, 1):
            return f"it has {name}"
    for name in exceeded(policy):
        return f"its {name} is shorter than the longest text of {policy.longest} tokens"


@torch.no_grad()
def probe(policy: "Policy", engine: Engine) -> str | None:
    """What an engine gets wrong on sequences of several lengths; None if it is right."""
    policy.engine, model = engine, policy.model
    # Beyond every window that texts exceed: some layers take padding for text there.
    longest = min(70 + max(exceeded(policy).values(), default=0),
                  policy.context - policy.max_new_tokens)
    vocabulary = model.config.get_text_config().vocab_size  # may be less than n_embeddings
    prompts = [[(3 + n + 7 * i) % vocabulary for i in range(n)]
               for n in (2, max(2, longest - 40), longest)]
    try:
        model.set_attn_implementation("packed" if engine is FAST else policy.own_attention)
        responses, sampled, _ = zip(*engine.generate(policy, prompts))
        samples = [Sample("", "", *pair) for pair in zip(prompts, responses)]
        trained, _, mask = engine.token_logp(policy, model, samples)
    except Exception as error:  # whatever an unusual architecture makes of our masks and cache
        return ("it wants another cache or attention "
                f"({type(error).__name__}: {' '.join(str(error).split())[:120]})")
    finally:
        model.set_attn_implementation(policy.own_attention)
        policy.decoder = None
    own = [plain_logp(policy, model, [s])[0][0] for s in samples]
    found = torch.stack([torch.cat(sampled), trained[mask]])
    gaps = (found - torch.cat(own)).abs().amax(-1)
    if not (gaps < 1e-3).all():  # NaN as well
        return (f"log-probabilities are off by {gaps[0]:.2g} in sampling and {gaps[1]:.2g} in "
                "training")


def choose_engine(policy: "Policy"):
    """FAST where it is right, else PLAIN; a model that neither gets right is refused."""
    wanted, kind = policy.cfg.engine, type(policy.model).__name__
    if wanted != "plain":
        reason = not_fast(policy) or probe(policy, FAST)
        if not reason:
            policy.model.set_attn_implementation("packed")
            return
        if wanted == "fast":
            raise UserError(f"--engine fast does not carry a {kind}: {reason}; leave it out")
        say(f"engine plain, since fast does not carry a {kind}: {reason}")
    if reason := probe(policy, PLAIN):
        raise UserError(f"--model {policy.cfg.model}: sampler and trainer do not agree on a {kind}"
                        f": {reason}; choose another model")


# ------------------------------------------------------------------------------------------ policy
# The model that learns, with its tokenizer, precision, memory and optimizer.
# Every gradient is finite and at most grad_clip long, or there is no step.
# Touch it for another optimizer or schedule, or another prompt.

class Policy:
    """What part one calls `policy`. Raises UserError where a model or a prompt cannot be used.

    learning: False for evaluation, which needs the sampler alone. Below, prompts are lists of
    token ids, and samples lists of Sample.
    """

    decoder = reference = None
    skipped = 0  # optimiser steps in a row
    top_p = 1.0
    # While an engine is chosen:
    dtype, temperature, max_new_tokens, stop_ids = torch.float32, 1.0, 12, ()

    def __init__(self, model, tokenizer, cfg: Config, problems: list[dict], learning=True):
        self.cfg, self.tokenizer, self.device = cfg, tokenizer, find_device(cfg.device)
        # Never train(): dropout, router jitter and their like would make ratios differ from 1
        # before the first update.
        self.model = self.sampler = model.eval()
        self.sample_rows, self.micro_tokens = cfg.sample_rows, cfg.micro_tokens
        self.own_attention = model.config._attn_implementation
        self.n_embeddings, self.context = len(model.get_input_embeddings().weight), context(model)
        self.eos_ids = stop_tokens(model, tokenizer)
        pad = tokenizer.pad_token_id
        self.pad_id = self.eos_ids[0] if pad is None or pad >= self.n_embeddings else pad
        prompts = self.check_prompts(problems)
        self.known = {"its tokenizer or chat template": digest(prompts)}
        self.longest = max(map(len, prompts)) + cfg.max_new_tokens

        choose_engine(self)
        self.temperature, self.stop_ids = cfg.temperature, self.eos_ids
        self.max_new_tokens = cfg.max_new_tokens
        if self.device.type == "cuda":
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            self.dtype = torch.bfloat16 if bf16 else torch.float16
        self.place(learning)

    def encode(self, problem: dict) -> list[int]:
        """A problem's prompt as token ids."""
        text = f"{problem['problem']}\n{self.cfg.instruction}".strip()
        if self.tokenizer.chat_template:
            with explain(f"the chat template fails on the problem {problem['problem'][:60]!r}"):
                return self.tokenizer.apply_chat_template(
                    problem["messages"] or [{"role": "user", "content": text}],
                    add_generation_prompt=True, return_dict=True,
                    enable_thinking=self.cfg.thinking).input_ids
        ids = self.tokenizer(f"Question: {text}\nAnswer:").input_ids
        while ids and ids[-1] in self.eos_ids:  # some tokenizers end every text
            ids.pop()
        return ids

    def check_prompts(self, problems: list[dict]):
        """All prompts; raises UserError where one is too long or cannot be read."""
        prompts, limit = [], self.cfg.max_new_tokens
        for problem in progress(problems, "prompts"):
            ids, begin = self.encode(problem), repr(problem["problem"][:60])
            if not ids:
                raise UserError(f"the prompt of {begin} is empty: see the chat template")
            if len(ids) + limit > self.context:
                raise UserError(f"a prompt of {len(ids)} tokens + --max_new_tokens {limit} exceeds "
                                f"the model's context of {self.context} (under longrope its "
                                f"original one): it begins {begin}")
            if max(ids + self.eos_ids) >= self.n_embeddings:
                raise UserError(f"the tokenizer knows token {max(ids + self.eos_ids)}, but the "
                                f"model embeds only {self.n_embeddings}: they are not a pair")
            if self.cfg.model == "tiny" and self.tokenizer.unk_token_id in ids:
                raise UserError(f"the tiny model reads only sums; choose a --model for {begin}")
            prompts.append(ids)
        return prompts

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def pad(self, rows, side="right"):
        """Lists of token ids -> ids (B, W), and the attention mask (B, W), 0 at padding."""
        rows = [torch.tensor(row, device=self.sampler.device) for row in rows]
        mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, side)
        return pad_sequence(rows, True, self.pad_id, side), mask

    def place(self, learning):
        """Weights to the device, a copy for sampling where that pays, and the optimizer."""
        if not learning:
            weights_in(self.dtype, self.model).to(self.device)
            return
        if self.dtype != torch.float32 or world() > 1:
            # Half precision: half the bytes to read per token. And FSDP would gather every layer
            # for every token.
            self.sampler = copy.deepcopy(self.model)
            weights_in(self.dtype, self.sampler).to(self.device)
        if self.cfg.gradient_checkpointing:
            recompute_layers(self.model)
        shard(self.model, self.device, self.dtype)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
            lr=self.cfg.lr, weight_decay=self.cfg.weight_decay, fused=True)
        warmup = max(1, self.cfg.lr_warmup)
        self.schedule = torch.optim.lr_scheduler.LinearLR(
            self.optimizer, 1 / warmup, total_iters=warmup - 1)
        self.scaler = torch.amp.GradScaler(enabled=self.dtype == torch.float16)

    def add_reference(self, model):
        """The initial model, for the KL to it."""
        self.reference = model.eval()
        model.set_attn_implementation(self.model.config._attn_implementation)
        shard(model, self.device, self.dtype)

    def half_precision(self):
        """On a GPU: bf16, or fp16 where there is no bf16. Several processes: see `shard`."""
        on = self.dtype != torch.float32 and world() == 1
        return torch.autocast(self.device.type, self.dtype, on)

    def fit(self, limit: str, work, *args):
        """work(*args), again with half of self.<limit> while memory runs out."""
        while True:
            try:
                return work(*args)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            # Out of that clause, whose traceback holds on to tensors.
            now = getattr(self, limit)
            least = 1 if limit == "sample_rows" else self.longest
            if now <= least or (world() > 1 and limit == "micro_tokens"):  # FSDP keeps in step
                raise UserError(f"out of memory with --{limit} {now}; {LESS_MEMORY}")
            setattr(self, limit, max(least, now // 2))
            self.model.zero_grad()  # what a part of a mini-batch has left behind
            self.decoder = None
            torch.cuda.empty_cache()
            tqdm.write(f"out of memory: --{limit} is {getattr(self, limit)} from here on")

    def generate(self, prompts):
        """A response to each prompt: its tokens, their log-probabilities, the mean entropy."""
        responses = []
        with progress(prompts, "sampling") as bar:
            while rest := prompts[len(responses):]:
                responses += self.fit("sample_rows", lambda: self.engine.generate(
                    self, rest[:self.sample_rows]))
                bar.update(len(responses) - bar.n)
        return responses

    @torch.no_grad()
    def refresh_sampler(self):
        """Copy what was learned into the sampler, in place: graphs know the addresses."""
        for copied, master in zip(self.sampler.parameters(), self.model.parameters()):
            copied.copy_(whole(master))

    def micro_batches(self, samples):
        """Lists of samples. FSDP wants as many on every process: some hold nothing."""
        batches = self.engine.micro_batches(samples, self.micro_tokens)
        missing = max(all_gather([len(batches)])) - len(batches)
        no_tokens = torch.zeros(0)
        nothing = Sample("", "", [0, 0], old_logp=no_tokens, sampler_logp=no_tokens)
        return batches + [[nothing]] * missing

    def token_logp(self, samples):
        """Log-probability, entropy and mask of the response tokens, (B, T); 0 outside the mask."""
        return self.engine.token_logp(self, self.model, samples)

    @torch.no_grad()
    def reference_logp(self, samples):
        """Log-probabilities (B, T) by the initial model."""
        return self.engine.token_logp(self, self.reference, samples)[0]

    def backward(self, loss: Tensor):
        self.scaler.scale(loss * world()).backward()  # FSDP averages where a sum is wanted

    def optimizer_step(self) -> float:
        """Step along the gradient. Returns its norm; no step is made if that is not finite."""
        self.scaler.unscale_(self.optimizer)
        limit = self.cfg.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        grad_norm = whole(norm).item()
        self.skipped = 0 if math.isfinite(grad_norm) else self.skipped + 1
        if not self.skipped:
            self.scaler.step(self.optimizer)
            self.schedule.step()
        self.scaler.update()  # fp16: lowers the scale after an overflow
        self.optimizer.zero_grad()
        return grad_norm

    def learning_rate(self) -> float:
        return self.schedule.get_last_lr()[0]

    @torch.no_grad()
    def has_forgotten(self, samples) -> bool:
        """Whether an update has left next to nothing of the policy that drew these samples."""
        micro = self.micro_batches(samples)[0]
        logp, _, mask = self.token_logp(micro)
        before = torch.cat([s.sampler_logp for s in micro]).to(logp)
        return bool(mask.any()) and not (before - logp[mask]).mean() < 1  # nats; NaN as well


def recompute_layers(model):
    """Gradient checkpointing in eval mode: transformers' own wants train mode, and its noise."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"no --gradient_checkpointing for a {type(model).__name__}; leave it out, "
                        "and lower --micro_tokens")
    for layer in layers:
        layer.forward = functools.partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def weights_in(dtype, model):
    """The model with parameters of this type. Not model.to(dtype): it rounds buffers too, and a
    rotary frequency in bf16 points somewhere else after a few hundred tokens."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def out_of_memory(error: Exception) -> bool:
    """CUDA's, cuBLAS's, the graphs' or the CPU's."""
    words = "out of memory|ALLOC_FAILED|can't allocate|not enough memory"
    return isinstance(error, MemoryError) or bool(re.search(words, str(error)))


# --------------------------------------------------------------------------- processes and devices
# torchrun starts a process per GPU: prompts are split over them, groups are not. FSDP2 gives each
# 1 / N of the weights, gradients and moments, and gathers a layer when it is needed.
# Any number of processes makes the same update. Touch it for another kind of parallelism.

def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather(values: list) -> list:
    """The lists of all processes, one behind the other. Every process must call it."""
    lists = [values] * world()
    if world() > 1:
        dist.all_gather_object(lists, values)
    return sum(lists, [])


def all_sum(x: float) -> float:
    return sum(all_gather([x]))


def on_first(work, *args):
    """Let the first process alone do it, and raise its error in all of them."""
    errors = []
    try:
        if rank() == 0:
            work(*args)
    except Exception as error:
        errors.append(error)
    for error in all_gather(errors):
        raise error


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it is, or put together if FSDP has sharded it: every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(model, device, dtype):
    """Move a model to the device: of several processes, each its part of one layer after another,
    so that none ever holds all of it."""
    if world() == 1:
        model.to(device)
        return
    from torch.distributed import fsdp

    dist.all_reduce(torch.zeros(1, device=device))  # NCCL takes its memory now, while there is some
    # Inputs are left alone, as in the sampler: some models have fp32 cosines.
    precision = fsdp.MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    options = dict(mesh=dist.init_device_mesh(device.type, (world(),)), mp_policy=precision,
                   reshard_after_forward=True)  # of the root as well, which may be saved next
    for module in list(model.modules()):
        if type(module).__name__ in (model._no_split_modules or ()):
            fsdp.fully_shard(module, **options)
    fsdp.fully_shard(model, **options)
    model.packed_logp = types.MethodType(packed_logp, model)
    fsdp.register_fsdp_forward_method(model, "packed_logp")  # gathers weights as for forward()


def find_device(name: str):
    """This process's device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with explain(f"--device {name} cannot be used"):
        device = torch.zeros(1, device=name).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # The first choice on an H100, with reports of NaN gradients: pytorch issue 196678.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def seed_step(cfg: Config, step: int):
    """Seed torch for one step, so that there is no random state to save."""
    torch.manual_seed(random.Random(f"{cfg.seed} {step}").getrandbits(60) + rank())


def say(text: str):
    """Print on the first process, without breaking a progress bar."""
    if rank() == 0:
        try:
            tqdm.write(text)
            sys.stdout.flush()
        except OSError:  # a closed pipe, a full disk, no terminal: output is not the run
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def progress(items, what: str) -> tqdm:
    """A bar on a terminal, nothing elsewhere."""
    return tqdm(items, what, leave=False, dynamic_ncols=True, disable=True if rank() else None)


# ------------------------------------------------------------------------------------- checkpoints
# A checkpoint is what from_pretrained loads, and trainer.pt. It is written to checkpoint.tmp,
# flushed, then renamed: at every instant `checkpoint` or the newest `checkpoint-<step>` is whole.
# Touch it to keep more than two.

FRESH = {"step": 0, "before": 0.0, "position": 0, "sizes": {}}  # the trainer's state at first


def checkpoints(out: Path) -> list[Path]:
    """The newest first."""
    older = [f for f in out.glob("checkpoint-*")
             if f.name[11:].isdecimal()]
    older.sort(key=lambda f: -int(f.name[11:]))
    return [f for f in (out / "checkpoint", *older) if f.exists()]


def remove(path: Path):
    """A folder, a file or a link, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path):
    """To the disk, so that not even a power cut leaves a renamed folder with empty files."""
    if path.is_file() or os.name == "posix":  # Windows cannot open folders
        handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def save_policy(policy: Policy, folder: Path, state: dict):
    """Write a checkpoint into a new folder, by all processes together. Raises UserError."""
    model, moments = policy.model, policy.optimizer.state
    # named_parameters() has one name of tied weights: gathered, they would no longer look tied.
    named = dict([*model.named_parameters(), *model.named_buffers()])

    def on_cpu(x: Tensor) -> Tensor | None:  # of the first process, which alone writes
        x = whole(x)
        return x.cpu() if rank() == 0 else None

    weights = {name: on_cpu(x) for name, x in model.state_dict().items() if name in named}
    state |= {"config": vars(policy.cfg), "known": policy.known}
    state |= {part: getattr(policy, part).state_dict() for part in ("schedule", "scaler")}
    state["optimizer"] = {
        name: {key: on_cpu(x) for key, x in moments[p].items()}
        for name, p in named.items() if p in moments}

    def write():
        remove(folder)
        model.save_pretrained(folder, state_dict=weights)
        policy.tokenizer.save_pretrained(folder)
        torch.save(state, folder / "trainer.pt")
        for path in folder.iterdir():
            shutil.copymode(folder / "trainer.pt", path)  # safetensors leaves out the group
            flush(path)

    on_first(write)


def load_policy(folder: Path, cfg: Config, problems, known: dict):
    """(policy, trainer's state) of a checkpoint; raises whatever is wrong with it."""
    state = torch.load(folder / "trainer.pt", "cpu", weights_only=True)
    if changed := difference(state["config"], cfg):
        raise ValueError(f"it belongs to another run: its {changed}")
    model, tokenizer = load_model(dataclasses.replace(cfg, model=str(folder)))
    policy = Policy(model, tokenizer, cfg, problems)
    for what, value in (known | policy.known).items():
        if state["known"][what] != value:
            raise ValueError(f"{what} has changed since")
    for name, p in policy.model.named_parameters():
        for key, x in state["optimizer"].pop(name, {}).items():
            if isinstance(p, DTensor) and x.ndim:
                x = distribute_tensor(x, p.device_mesh, p.placements)
            policy.optimizer.state[p][key] = x.to(p.device)
    policy.schedule.load_state_dict(state["schedule"])
    if state["scaler"]:  # empty where there was no fp16
        policy.scaler.load_state_dict(state["scaler"])
    for group in policy.optimizer.param_groups:  # the schedule sets it only after a step
        group["lr"] = policy.learning_rate()
    return policy, state


def open_policy(cfg: Config, problems, reward):
    """The policy and the trainer's state, of the newest checkpoint that is whole, or new ones.

    Raises UserError rather than begin anew over what may still be saved.
    """
    folders, failures = checkpoints(Path(cfg.out)), []
    known = {f"--data {cfg.data}": digest(problems), "the reward": reward.__name__}
    if cfg.kl_coef or not folders:
        model, tokenizer = load_model(cfg)
        if cfg.model == "tiny":
            Policy(*tiny_model(), cfg, problems, learning=False)  # refuses what will not do
            warm_up(model, tokenizer, problems, cfg)
        for p in model.parameters() if world() > 1 else ():
            dist.broadcast(p.data, 0)  # a warm-up need not be the same everywhere
    if cfg.kl_coef:
        reference = copy.deepcopy(model)
        starts = [p.flatten()[:1000] for p in model.parameters()]
        known[f"--model {cfg.model}"] = digest(*starts)
    for folder in folders:
        try:
            with explain("trainer.pt"):
                policy, state = load_policy(folder, cfg, problems, known)
            break
        except UserError as error:
            failures.append(f"cannot go on from {folder}: {error}")
    else:
        if failures:
            raise UserError("; ".join(failures))
        policy, state = Policy(model, tokenizer, cfg, problems), dict(FRESH)
    policy.known |= known
    if failures:
        say(f"warning: {'; '.join(failures)}; going on from step {state['step']}")
    if cfg.kl_coef:
        policy.add_reference(reference)
    return policy, state


# --------------------------------------------------------------------------------------------- run
# A run's folder: config.json, metrics.jsonl, samples.jsonl, checkpoint/ and the one before it.
# A run that is killed at any instant goes on from its last checkpoint, and repeats what was lost.
# Touch it to log elsewhere.

LOGS = ("metrics.jsonl", "samples.jsonl")
MAX_SKIPPED = 10  # optimiser steps in a row; no later one would be better


def lock(folder: Path) -> int:
    """Keep other programs from writing in a folder while this one lives. Raises UserError."""
    handle = os.open(folder if fcntl else os.devnull, os.O_RDONLY)  # Windows opens no folders
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder} is in use: a program that writes there is running") from None
    except OSError:  # a file system without locks
        pass
    return handle


def write_json(path: Path, value: dict):
    """Whole or not at all."""
    path.with_suffix(".tmp").write_text(json.dumps(value, indent=2))
    path.with_suffix(".tmp").replace(path)


def append(path: Path, rows: list[dict]):
    """Add lines to a JSON Lines file; a number that is not finite becomes null."""
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            row = json.loads(json.dumps(row), parse_constant=lambda name: None)
            file.write(json.dumps(row) + "\n")


@dataclass
class Run:
    """A training: what it trains, where it stands, and its folder."""

    cfg: Config
    out: Path
    policy: Policy
    reward: Callable
    stream: Stream
    heldout: list[dict]
    step: int  # of the last checkpoint
    before: float  # held-out accuracy before RL
    signal: int = 0  # that asked to stop
    said: set = field(default_factory=set)  # warnings
    handlers: dict = field(default_factory=dict)  # of signals, before the run

    def claim(self, sizes: dict):
        """Make the folder, or go on in it with logs as long as a checkpoint knows them."""
        with explain(f"cannot write in --out {self.out}"):
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.out)
            write_json(self.out / "config.json", vars(self.cfg) | {"resume": None})
            for path in (self.out / name for name in LOGS):
                path.touch()
                size, known = path.stat().st_size, sizes.get(path.name, 0)
                if size < known:
                    raise UserError(f"{path} is shorter than its checkpoint knows: put the file "
                                    "back, or start a new run from it with --model")
                if size and not sizes:  # of a run without a checkpoint
                    path.rename(f"{path}.{time.time_ns()}")
                    path.touch()
                os.truncate(path, known)

    def log(self, metrics: dict, samples):
        """A step's line of metrics.jsonl and of the screen, and four groups for samples.jsonl.

        Raises Broken where the policy that sampled them is no longer one.
        """
        h, step = metrics["entropy"], metrics["step"]
        one_answer_or_noise = not 1e-3 < h < 0.97 * math.log(self.policy.n_embeddings)
        all_wrong_now = metrics["accuracy"] == 0 and self.before > 0
        if not math.isfinite(h) or (all_wrong_now and one_answer_or_noise):
            self.give_up(f"an update has broken the model: an entropy of {h:.3g} nats")
        logged = [{
            "step": step, "problem": s.problem, "prompt": self.policy.decode(s.prompt),
            "response": s.text, "gold": s.gold, "reward": s.reward, "advantage": s.advantage,
        } for s in samples[:4 * self.cfg.group_size]]
        with self.explain(f"cannot write step {step} to {self.out}/{' and '.join(LOGS)}"):
            on_first(append, self.out / LOGS[0], [metrics])
            on_first(append, self.out / LOGS[1], logged)
        if step == 1:
            s = samples[0]
            say(f"a response {s.text[:300]!r}\n"
                f"with the answer {extract_answer(s.text)!r} for {s.gold!r}: reward {s.reward:g}")
        say(summary(metrics, self.cfg.steps))
        for text, holds in warnings_for(metrics, self.cfg).items():
            if holds and text not in self.said:
                self.said.add(text)
                say(f"warning: {text}")

    def explain(self, what: str):
        """Whatever goes wrong inside, also what is saved so far."""
        return explain(f"the last checkpoint is of step {self.step}, to go on from it type python "
                       f"aspo.py --resume {self.out}; {what}")

    def give_up(self, symptom: str):
        last = f"; the checkpoint of step {self.step} is good" if self.step else ""
        raise Broken(f"{symptom}{last}. Start again with a lower --lr or --temperature")

    def save(self, step: int, samples):
        """Write a checkpoint unless the model has just broken: Broken, or UserError, is raised."""
        if any(all_gather([self.policy.has_forgotten(samples)])):
            self.give_up("an update has broken the model: its own samples are unlikely now")
        state = {"step": step, "before": self.before, "position": self.stream.position,
                 "sizes": {name: (self.out / name).stat().st_size for name in LOGS}}
        new, free = self.out / "checkpoint.tmp", shutil.disk_usage(self.out).free >> 20
        try:
            with self.explain(f"with {free} MiB free: cannot save step {step} in {new}"):
                save_policy(self.policy, new, state)
                on_first(self.rename, new)
        finally:
            if rank() == 0:
                remove(new)
        self.step = step

    def rename(self, new: Path):
        now, before = self.out / "checkpoint", self.out / f"checkpoint-{self.step}"
        for path in (*(self.out / name for name in LOGS), new):
            flush(path)
        if now.exists() and not before.exists():
            now.rename(before)
        remove(now)  # if it is still there: the run was resumed from `before`, `now` is damaged
        new.rename(now)
        flush(self.out)
        for old in checkpoints(self.out)[2:]:
            remove(old)

    def listen(self):
        """From here on there is something to lose: a signal lets the step finish."""
        # SIGHUP, which Windows has not, SIGINT and SIGTERM.
        for number in {1, 2, 15} & signal.valid_signals():
            if signal.getsignal(number) != signal.SIG_IGN:  # as it is under nohup
                self.handlers[number] = signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step; once more to leave at once\n")

    def asked_to_stop(self) -> bool:
        """One process that was asked is enough."""
        self.signal = max(all_gather([self.signal]))
        return self.signal > 0 or self.policy.skipped >= MAX_SKIPPED

    def finish(self, metrics: dict):
        """The last words."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if rank() == 0:
            os.close(self.lock)
        if self.policy.skipped >= MAX_SKIPPED:
            self.give_up(f"{self.policy.skipped} optimiser steps in a row were left out, since "
                         "their gradient is not finite")
        if self.signal and self.step < self.cfg.steps:
            say(f"stopped after step {self.step}; to go on type python aspo.py --resume "
                f"{self.out}")
            raise SystemExit(128 + self.signal)
        say(f"held-out accuracy {self.before:.3f} -> {metrics['heldout_accuracy']:.3f} "
            f"({len(self.heldout)} problems x {self.cfg.eval_samples} samples)\n"
            f"results in {self.out}: {', '.join(LOGS)}, checkpoint/\n"
            f"next: the same with another --loss; python eval.py {self.out} --k 16")


def summary(m: dict, steps: int) -> str:
    """The one line a step that the user reads."""
    def number(value):
        return " n/a " if value is None else f"{value:.3f}"  # every group was uniform

    speed = m["tokens"] / (m["sample_seconds"] + m["update_seconds"])
    heldout = f"  held-out {m['heldout_accuracy']:.3f}" if "heldout_accuracy" in m else ""
    return (f"step {m['step']:>{len(str(steps))}}/{steps}  reward {m['reward']:.3f}  "
            f"entropy {m['entropy']:.3f}  ratio A>0 {number(m['ratio_pos'])} "
            f"A<0 {number(m['ratio_neg'])}  length {m['response_length']:.1f}  "
            f"cut off {m['truncated']:.0%}  {speed:,.0f} tokens/s{heldout}")


def warnings_for(metrics: dict, cfg: Config) -> dict[str, bool]:
    """What a user should know about a step, and whether it holds for this one."""
    return {
        "most responses are cut off at the token limit and score 0; raise --max_new_tokens":
            metrics["truncated"] > 0.5,
        "every response was wrong, so there is nothing to learn from; look at samples.jsonl, or "
        "start from easier problems or a better model":
            metrics["accuracy"] == 0,
        "one optimiser step per rollout: all ratios are 1, so aspo, grpo and no-is are the same "
        "method; raise --epochs or lower --minibatch":
            cfg.prompts // cfg.minibatch * cfg.epochs == 1,
    }


def announce(run: Run, problems):
    """What is about to happen, with one problem as the model sees it: most faults show there."""
    cfg, policy = run.cfg, run.policy
    cuda = policy.device.type == "cuda"
    where = torch.cuda.get_device_name(policy.device) if cuda else policy.device.type
    n_minibatches = cfg.prompts // cfg.minibatch
    n_tokens = cfg.prompts * cfg.group_size * cfg.max_new_tokens
    say(f"model    {cfg.model}: {type(policy.model).__name__}, "
        f"{policy.model.num_parameters() / 1e6:.1f} M parameters, on "
        f"{f'{world()} x ' * (world() > 1)}{where}, {str(policy.dtype)[6:]}, engine "
        f"{policy.engine.name}\n"
        f"data     {cfg.data}: {len(problems):,} problems to train on, {len(run.heldout)} held out"
        f"\nrollout  {cfg.prompts} prompts x {cfg.group_size} samples of at most "
        f"{cfg.max_new_tokens} tokens: up to {n_tokens:,} tokens a step, {cfg.steps} steps\n"
        f"update   {cfg.loss}, {n_minibatches} mini-batches x {cfg.epochs} epochs = "
        f"{n_minibatches * cfg.epochs} optimiser steps per rollout; at the first every ratio is 1, "
        f"as it should be\nfolder   {cfg.out}\n"
        f"a prompt {policy.tokenizer.decode(policy.encode(problems[0]))!r}\n"
        f"to which the answer is {problems[0]['answer']!r}")
    answers = [p["answer"] for p in problems[:1000]]
    unread = [answer for answer in answers if not is_readable(answer)]
    if run.reward is right_answer and len(unread) > len(answers) / 2:
        say(f"warning: the checker cannot read {len(unread)} of {len(answers)} answers, such as "
            f"{unread[0][:80]!r}: no response will be right")


def open_run(cfg: Config, reward: Callable | None = None) -> Run:
    """Load everything, or raise UserError before anything is written."""
    with explain(f"cannot open the run {cfg.out}"):
        check(cfg)
        seed_step(cfg, -1)
        reward = open_reward(cfg, reward)
        problems, heldout = load_problems(cfg)
        policy, state = open_policy(cfg, problems + heldout, reward)
        stream = Stream(problems, cfg.seed)
        stream.position = state["position"]
        run = Run(cfg, Path(cfg.out), policy, reward, stream, heldout,
                  step=state["step"], before=state["before"])
        if run.step >= cfg.steps:
            raise UserError(f"{run.out} is complete; type more --steps than {run.step} to go on")
        on_first(run.claim, state["sizes"])
        announce(run, problems)
        if cfg.resume:
            say(f"resumed after step {run.step}" if run.step else
                f"{run.out} has no checkpoint: it begins at step 1")
        run.listen()
    return run


# ------------------------------------------------------------------------------------ command line
# The fields of Config become flags: default < preset of the model < what was typed.
# Whatever is wrong with them is one line and exit status 2.
# Touch it hardly ever: a new knob needs no line here.

AT_LEAST_1 = ("steps", "prompts", "minibatch", "epochs", "max_new_tokens", "dual_clip",
              "sample_rows", "micro_tokens", "eval_problems", "eval_samples")
LEAST = dict.fromkeys(AT_LEAST_1, 1) | {"group_size": 2, "temperature": 0.01}  # of all others: 0
CHOICES = {"loss": WEIGHTS, "engine": ("auto", "fast", "plain"),
           "loss_agg": ("token", "sequence", "constant")}
MAY_CHANGE = {"out", "resume", "device", "steps", "eval_every", "save_every", "engine",
              "sample_rows", "micro_tokens", "gradient_checkpointing"}  # when a run is resumed


def kind_of(knob: dataclasses.Field) -> type:
    """int of int, and of int | None."""
    return (*typing.get_args(knob.type), knob.type)[0]


def check(cfg: Config):
    """Raise UserError for values that cannot work."""
    for knob in dataclasses.fields(cfg):
        name, value, kind = knob.name, getattr(cfg, knob.name), kind_of(knob)
        least = LEAST.get(name, 0)
        if value is None and knob.default is None:
            continue
        if not isinstance(value, (int, float) if kind is float else kind):
            raise UserError(f"--{name} must be of type {kind.__name__}, got {value!r}")
        if kind in (int, float) and not least <= value < math.inf:
            raise UserError(f"--{name} must be at least {least}, got {value}")
        if value not in CHOICES.get(name, (value,)):
            raise UserError(f"unknown --{name} {value!r}; choose from {', '.join(CHOICES[name])}")
    if cfg.prompts % cfg.minibatch or cfg.minibatch % world():
        raise UserError(f"--minibatch {cfg.minibatch} must divide --prompts {cfg.prompts}, and be "
                        f"divisible by the {world()} processes")
    if cfg.overlong_buffer >= cfg.max_new_tokens:
        raise UserError(f"--overlong_buffer {cfg.overlong_buffer} must be smaller than "
                        f"--max_new_tokens {cfg.max_new_tokens}")
    out = Path(cfg.out)
    taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if rank() == 0 and not cfg.resume and taken:
        raise UserError(f"{out} exists and is not overwritten; type --resume {out} to go on with "
                        "it, or --out with a new name")


def difference(saved: dict, cfg: Config) -> str | None:
    """A setting that would alter a run that is resumed."""
    for name, value in vars(cfg).items():
        if name not in MAY_CHANGE and saved.get(name) != value:
            return f"--{name} is {saved.get(name)}, not {value}"


def read_config(folder: str) -> dict:
    """The settings of a run. Raises UserError."""
    path = Path(folder) / "config.json"
    with explain(f"--resume {folder or repr(folder)} is no folder of a run: cannot read {path}"):
        if (Path(folder) / "trainer.pt").exists():
            raise UserError(f"{folder} is a checkpoint; type --resume {Path(folder).parent}")
        saved = json.loads(path.read_text())
        Config(**saved)  # raises TypeError for what is no setting
    return saved


def boolean(text: str) -> bool:
    return bool(["false", "true"].index(text.lower()))


def parse(argv: list[str] | None = None) -> Config:
    """Command line -> Config. Raises UserError."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)", inspect.getsource(Config), re.M))
    for knob in dataclasses.fields(Config):
        kind = kind_of(knob)
        options = dict(type=kind)
        if kind is bool:
            options = dict(type=boolean, nargs="?", const=True)
        text = f"{comments[knob.name]} ({knob.default})".replace("%", "%%")
        parser.add_argument(f"--{knob.name}", metavar=kind.__name__, help=text, **options)

    def refuse(message: str):
        raise UserError(f"{message}; see python aspo.py --help")

    parser.error = refuse
    typed = vars(parser.parse_args(argv))
    if "resume" not in typed:
        _, preset = PRESETS.get(typed.get("model", "tiny"), (None, {}))
        return Config(**preset | typed)
    saved = read_config(typed["resume"])
    cfg = Config(**saved | typed | {"out": typed["resume"]})
    if changed := difference(saved, cfg):
        raise UserError(f"this would alter the run in {cfg.out}: {changed}; leave it out")
    return cfg


def start(argv: list[str] | None):
    """Train as the command line says."""
    cfg = parse(argv)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun
        cuda = ",cuda:nccl" * torch.cuda.is_available()
        dist.init_process_group(f"cpu:gloo{cuda}")
    train(cfg)


def main(argv: list[str] | None = None, work=start) -> int:
    """Run a command line. Exit status 2 is bad input, 1 a broken model, 128 + n signal n."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries
    http_backoff.__kwdefaults__["max_retries"] = 2  # not 5: 23 s, and twice, without a network
    warnings.filterwarnings("ignore", category=FutureWarning)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None if it was closed from the start
    sys.stderr = sys.stderr or open(os.devnull, "w")
    with contextlib.suppress(AttributeError):  # of what a test puts there
        sys.stdout.reconfigure(errors="replace")  # what ASCII cannot show
    try:
        work(argv)
    except UserError as error:
        if "ASPO_TRACEBACK" in os.environ:  # where did it come from?
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, Broken) else 2
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):  # where smaller batches are no cure, as for AdamW's moments
            print(f"error: out of memory; {LESS_MEMORY}", file=sys.stderr)
            return 2
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        print(f"error: process {rank()} lost contact with another one, whose own message may tell "
              "why; go on from the last checkpoint with --resume "
              f"({' '.join(str(error).split())[:200]})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the first step: there is nothing to save
        return 128 + signal.SIGINT
    except SystemExit as stop:  # by a signal, after a save; or --help
        return stop.code or 0
    return 0


if __name__ == "__main__":
    status = main()
    if world() > 1:  # an interpreter that shuts down may be aborted by threads of gloo
        os._exit(status)
    sys.exit(status)
