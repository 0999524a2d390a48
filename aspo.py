"""ASPO and GRPO for language models, in one file that reads from top to bottom.

    python aspo.py                                  # tiny built-in model, arithmetic, CPU, offline, < 3 minutes
    python aspo.py --loss grpo                      # the same run with GRPO
    python aspo.py --model qwen-0.5b                # Qwen2.5-0.5B-Instruct on GSM8K, one GPU
    python aspo.py --model DIR --data FILE.jsonl    # a local model; a line is {"problem": ..., "answer": ...}
    python aspo.py --resume runs/NAME               # go on with a run that was stopped or killed
    torchrun --nproc-per-node 4 aspo.py ...         # four processes, data-parallel
    python aspo.py --help                           # every knob

One step: sample a group of responses per prompt, score them, compare each with its group, and raise or
lower the log-probability of its tokens. Every method here has the gradient

    - A * w(r, sign A) * grad log pi(token)         r = pi(token) / pi_old(token), the importance ratio

so a method *is* its weight w: find `WEIGHTS` below, which shows GRPO and ASPO next to each other. GRPO weighs
tokens of good responses by r, so tokens that already rose are pushed hardest; ASPO weighs them by 1/r.

Sources: the paper, arXiv 2510.06062, and its authors' code, github.com/wizard-III/Archer2.0 at b08d963.
Where we depart from them:
 1. Small models and short answers: other sizes, learning rates and lengths (`PRESETS`).
 2. No KL term by default (theirs 0.001), so no reference model in memory: `--kl_coef 0.001` restores it.
 3. The entropy-dependent clip range of their recipe is off by default: `--entropy_clip` turns it on.
 4. The soft overlong penalty (theirs: up to 1 over the last 16 tokens) is off: `--overlong_buffer 16`.
 5. The loss averages over all tokens of the mini-batch. Theirs says so too, but with micro-batches of one
    sequence it is a mean of sequence means: `--loss_agg sequence`.
 6. Groups with equal rewards stay in the batch with advantage 0; theirs are dropped: `--drop_uniform_groups`.
 7. No entropy bonus (theirs has coefficient 0).
"""

import contextlib
import copy
import dataclasses
import functools
import inspect
import itertools
import json
import logging
import math
import os
import random
import shutil
import signal
import sys
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import transformers.utils.logging
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer, Cache,
                          HfArgumentParser, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM,
                          get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup, set_seed)
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reward import extract_answer, math_reward

# ------------------------------------------------------------------------------------------------ configuration


class UserError(Exception):
    """Bad input. `main` prints the message as one line and exits with status 2."""


def knob(default, help: str, **argparse_options):
    """A field of Config with its line of --help; argparse_options are those of add_argument."""
    return field(default=default, metadata={"help": help, **argparse_options})


# What a method changes besides its weight. Anything given on the command line wins.
METHOD_DEFAULTS = {
    "dapo": dict(eps_high=0.28),
    "gspo": dict(eps_low=3e-4, eps_high=4e-4, loss_agg="sequence"),
    "dr-grpo": dict(divide_by_std=False, loss_agg="constant"),
}


@dataclass
class Config:
    """Every knob. `--help` and the README's table are made from this class."""

    # what
    model: str = knob("tiny", "tiny, an alias (see PRESETS), a hub id or a local folder")
    data: str | None = knob(None, "arithmetic, gsm8k, svamp, math, a hub id or a .jsonl file [what suits the model]")
    loss: str = knob("aspo", "the weight: aspo, grpo, no-is, dapo, cispo, gspo or dr-grpo (see WEIGHTS)")
    out: str | None = knob(None, "run folder, must be new [runs/<model>-<loss>-s<seed>]")
    resume: str | None = knob(None, "run folder to go on with, at its last checkpoint and with its flags")
    seed: int = knob(0, "fixes data order, initial weights and samples")
    device: str = knob("auto", "auto (cuda if there is one, else cpu), cpu, cuda, cuda:1, mps")
    # rollout
    steps: int = knob(200, "rollouts to train on")
    prompts: int = knob(32, "prompts per rollout")
    group_size: int = knob(8, "samples per prompt; the group is the baseline, so at least 2")
    max_new_tokens: int = knob(512, "response limit; what is cut off scores 0, so watch the truncated share")
    temperature: float = knob(1.0, "of sampling and of every log-probability in the loss")
    sample_rows: int = knob(256, "responses decoded at once; lower it when sampling runs out of memory")
    cuda_graphs: bool = knob(True, "on CUDA, replay decode steps as graphs; False if a model cannot be captured")
    instruction: str | None = knob(None, "appended to every problem [ask for \\boxed{} unless the data is arithmetic]")
    thinking: bool = knob(False, "let templates that can switch it (Qwen3) open a thinking block")
    # reward and advantage
    divide_by_std: bool | None = knob(None, "divide advantages by the group's std [yes; dr-grpo: no]")
    drop_uniform_groups: bool = knob(False, "leave groups with equal rewards out of the normaliser as well")
    max_refills: int = knob(0, "dynamic sampling (DAPO): rounds that replace uniform groups by new prompts")
    overlong_buffer: int = knob(0, "soft penalty, 0 to -1, over this many last allowed tokens; 0 is off")
    mask_truncated: bool = knob(False, "do not train on responses that were cut off")
    # weight
    eps_low: float | None = knob(None, "tokens of bad responses with r < 1 - eps_low get no gradient [0.2; gspo 3e-4]")
    eps_high: float | None = knob(None, "tokens of good responses with r > 1 + eps_high get none [0.2; dapo 0.28; gspo 4e-4]")
    dual_clip: float = knob(3.0, "aspo caps the weight here; grpo drops A < 0 tokens with a larger ratio")
    entropy_clip: bool = knob(False, "authors' recipe: eps 0.4 for a response's 20 %% most uncertain tokens, 0.2 elsewhere")
    loss_agg: str | None = knob(None, "mean over tokens, mean of sequence means, or sum / (sequences x max_new_tokens) "
                                      "[token; gspo: sequence; dr-grpo: constant]", choices=("token", "sequence", "constant"))
    kl_coef: float = knob(0.0, "weight of the k3 KL to the initial model; 0 keeps that model out of memory")
    tis_cap: float = knob(0.0, "weigh by exp(old_logp - sampler's logp), capped here (2 is usual), against rounding; 0 is off")
    # update
    minibatch: int = knob(8, "prompts per optimiser step; prompts / minibatch * epochs steps use one rollout")
    epochs: int = knob(2, "passes over a rollout; with a single update per rollout all ratios are 1")
    lr: float = knob(1e-6, "AdamW learning rate")
    weight_decay: float = knob(0.1, "AdamW weight decay")
    lr_warmup: int = knob(10, "optimiser steps of linear warm-up, then constant")
    grad_clip: float = knob(1.0, "gradient norm limit")
    micro_tokens: int = knob(8192, "tokens per forward and backward; changes memory, not the gradient")
    gradient_checkpointing: bool = knob(False, "recompute activations in the backward pass: less memory, about 30 %% slower")
    fsdp: bool = knob(False, "under torchrun: shard weights, gradients and optimiser state over the processes")
    rehearse: bool | None = knob(None, "first run the longest batches that can occur, to meet out-of-memory now [yes on CUDA]")
    # supervised warm-up of the tiny model
    sft_steps: int = knob(500, "warm-up steps on sloppy demonstrations (tiny only)")
    sft_slip: float = knob(0.25, "share of wrong steps in these demonstrations (tiny only)")
    # reports
    eval_every: int = knob(20, "steps between held-out evaluations; 0: only before and after")
    eval_problems: int = knob(128, "held-out problems")
    eval_samples: int = knob(2, "samples per held-out problem, at the training temperature")
    save_every: int = knob(50, "steps between checkpoints; 0: only at the end")
    keep: int = knob(1, "checkpoints to keep; older ones are named checkpoint-<step>")
    log_samples_every: int = knob(10, "steps between whole rollouts written to samples.jsonl")

    def __post_init__(self):
        chosen = dict(eps_low=0.2, eps_high=0.2, divide_by_std=True, loss_agg="token") | METHOD_DEFAULTS.get(self.loss, {})
        for name, value in chosen.items():
            if getattr(self, name) is None:
                setattr(self, name, value)


# What may differ when a run is resumed: it changes reports, memory or speed and not what is learned.
HARMLESS = ("out", "resume", "device", "steps", "sample_rows", "cuda_graphs", "micro_tokens", "gradient_checkpointing", "fsdp",
            "rehearse", "eval_every", "save_every", "keep", "log_samples_every")

# alias -> hub id and the defaults that suit it. The real ones are sized for one GPU of 16-24 GB up to 0.6B parameters
# (fp32 weights, gradients and two Adam moments are 16 bytes a parameter) and of 40 GB from 1.5B.
_SMALL = dict(gradient_checkpointing=True)
_LONG = dict(gradient_checkpointing=True, max_new_tokens=1024, sample_rows=128)
PRESETS = {
    "tiny": ("tiny", dict(data="arithmetic", steps=55, prompts=64, minibatch=16, max_new_tokens=40, lr=4e-4, eval_every=11)),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", dict(max_new_tokens=256, lr=3e-6)),
    "qwen-0.5b": ("Qwen/Qwen2.5-0.5B-Instruct", _SMALL),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", _SMALL | dict(sample_rows=64)),  # its cache is 112 KiB a token, Qwen2.5-0.5B's 12
    "qwen-1.5b": ("Qwen/Qwen2.5-1.5B-Instruct", _SMALL),
    "qwen-math-1.5b": ("Qwen/Qwen2.5-Math-1.5B", _LONG),
    "r1-1.5b": ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", _LONG | dict(max_new_tokens=4096, sample_rows=64)),
}


def check(cfg: Config) -> None:
    """Raise UserError for values that cannot work, before anything is loaded."""
    for name in ("steps", "prompts", "minibatch", "epochs", "max_new_tokens", "sample_rows", "micro_tokens", "eval_problems",
                 "eval_samples", "log_samples_every", "keep", "temperature", "lr", "grad_clip", "dual_clip"):
        if not 0 < getattr(cfg, name) < math.inf:
            raise UserError(f"--{name} must be positive, got {getattr(cfg, name)}")
    for name in ("seed", "max_refills", "overlong_buffer", "eps_low", "eps_high", "kl_coef", "tis_cap", "weight_decay",
                 "lr_warmup", "sft_steps", "sft_slip", "eval_every", "save_every"):
        if not 0 <= getattr(cfg, name) < math.inf:
            raise UserError(f"--{name} must not be negative, got {getattr(cfg, name)}")
    if cfg.sft_slip > 1:
        raise UserError(f"--sft_slip is a share and must be at most 1, got {cfg.sft_slip}")
    if cfg.loss not in WEIGHTS:
        raise UserError(f"unknown loss {cfg.loss!r}; choose from {', '.join(WEIGHTS)}")
    if cfg.group_size < 2:
        raise UserError(f"--group_size must be at least 2 (a response is compared with its group), got {cfg.group_size}")
    if cfg.prompts % cfg.minibatch:
        raise UserError(f"--minibatch {cfg.minibatch} must divide --prompts {cfg.prompts}")
    if cfg.minibatch % world():
        raise UserError(f"--minibatch {cfg.minibatch} must be divisible by the {world()} processes")
    if cfg.fsdp and not dist.is_initialized():
        raise UserError("--fsdp needs several processes: type torchrun --nproc-per-node N aspo.py ... --fsdp")
    if cfg.overlong_buffer >= cfg.max_new_tokens:
        raise UserError(f"--overlong_buffer {cfg.overlong_buffer} must be smaller than --max_new_tokens {cfg.max_new_tokens}")


# ---------------------------------------------------------------------------------------------------- processes
# torchrun starts one process a GPU. Prompts are split over them and groups are not; gradients, normalisers and metrics
# are summed over all. Without torchrun there is one process and all of this does nothing.


def rank() -> int:
    """This process's number, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value) -> list:
    """The value that each process gave, in the order of their ranks. A collective: every process must call it."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def first(work: Callable[[], None]) -> None:
    """Let the first process alone do it, and raise its UserError in all of them."""
    error = None
    if rank() == 0:
        try:
            work()
        except UserError as reason:
            error = reason
    if error := gather(error)[0]:
        raise error


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it is, or put together if FSDP has sharded it (a collective)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def say(text: str) -> None:
    """Print on the first process, without breaking a progress bar."""
    if rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()


def progress(total: int, what: str) -> tqdm:
    """A bar that leaves no line behind; only the first process shows it."""
    return tqdm(total=total, desc=what, leave=False, dynamic_ncols=True, disable=rank() > 0)


# -------------------------------------------------------------------------------------------------------- problems

DIGITS_AND_SIGNS = "0123456789+=\n# "


def all_arithmetic_problems() -> list[dict]:
    """The 625 sums of four numbers from 1 to 5, {"problem": "3+1+5+2", "answer": "11"}."""
    return [{"problem": "+".join(map(str, terms)), "answer": str(sum(terms))}
            for terms in itertools.product(range(1, 6), repeat=4)]


def sloppy_demonstration(problem: str, rng: random.Random, slip: float) -> str:
    """Work out a sum by merging a random neighbouring pair at a time, one or two too high in a share `slip` of them.

    "3+1+5+2" -> "3+6+2=9+2=11\n#### 11". Nothing is shown of answering at once, and a model of this size cannot,
    so working in steps is the only way to the reward; the free order of merging leaves several right ways.
    """
    terms, states = [int(term) for term in problem.split("+")], []
    while len(terms) > 1:
        i = rng.randrange(len(terms) - 1)
        error = rng.choice((1, 2)) if rng.random() < slip else 0
        terms[i:i + 2] = [terms[i] + terms[i + 1] + error]
        states.append("+".join(map(str, terms)))
    return "=".join(states) + f"\n#### {terms[0]}"


def _box(solution: str) -> str:
    return extract_answer(solution) or ""


# name -> hub id, config, row -> (problem, answer). All have the splits train and test.
HUB_DATA = {
    "gsm8k": ("openai/gsm8k", "main", lambda row: (row["question"], row["answer"].split("####")[-1])),
    "svamp": ("ChilleD/SVAMP", None, lambda row: (f"{row['Body']} {row['Question']}", row["Answer"])),
    "math": ("DigitalLearningGmbH/MATH-lighteval", None, lambda row: (row["problem"], _box(row["solution"]))),
}


def _any_columns(row: dict) -> tuple[str, str]:
    """Problem and answer of a row from an unknown hub set, by the usual column names."""
    problem = next(row[name] for name in ("problem", "question", "prompt") if name in row)
    if answer := next((row[name] for name in ("answer", "final_answer") if row.get(name)), None):
        return problem, answer[0] if isinstance(answer, list) else str(answer).split("####")[-1]
    return problem, _box(row["solution"])


def read_jsonl(path: Path) -> list[dict]:
    """Rows {"problem": str, "answer": str} of a JSON Lines file; raises UserError naming the first bad line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --data {path}: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            problem, answer = row["problem"], row["answer"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{path}, line {number}: expected {{"problem": "...", "answer": "..."}}, got {line[:80]}') from None
        if isinstance(answer, (int, float)) and not isinstance(answer, bool):
            answer = str(answer)
        if not (isinstance(problem, str) and problem.strip() and isinstance(answer, str) and answer.strip()):
            raise UserError(f"{path}, line {number}: problem and answer must be non-empty text, got {line[:80]}")
        rows.append({"problem": problem, "answer": answer.strip()})
    if not rows:
        raise UserError(f"{path} holds no problems; expected lines like {{\"problem\": \"2+2\", \"answer\": \"4\"}}")
    return rows


def load_problems(cfg: Config) -> tuple[list[dict], list[dict]]:
    """Training and held-out problems, disjoint. The held-out ones do not depend on the seed, so that runs compare."""
    if cfg.data == "arithmetic":
        train, heldout = all_arithmetic_problems(), []
    elif Path(cfg.data).suffix in (".jsonl", ".json") or Path(cfg.data).exists():
        train, heldout = read_jsonl(Path(cfg.data)), []
    else:
        train, heldout = load_hub_problems(cfg.data)
    random.Random(0).shuffle(heldout or train)
    if not heldout:  # cut them off the training problems
        heldout = train[:max(1, min(cfg.eval_problems, len(train) // 5))]
    heldout = heldout[:cfg.eval_problems]
    seen = {row["problem"] for row in heldout}
    train = [row for row in train if row["problem"] not in seen]
    if not train:
        raise UserError(f"--data {cfg.data} leaves nothing to train on besides {len(heldout)} held-out problems; add problems")
    return train, heldout


def load_hub_problems(name: str) -> tuple[list[dict], list[dict]]:
    """Problems of the train and test splits of a name in HUB_DATA or a hub id; raises UserError."""
    from datasets import load_dataset  # a second of import time that offline runs need not pay

    hub_id, config, read = HUB_DATA.get(name, (name, None, _any_columns))
    try:
        splits = load_dataset(hub_id, config)
        parts = []
        for split in ("train", "test"):
            pairs = (read(row) for row in (splits[split] if split in splits else ()))
            parts.append([{"problem": problem.strip(), "answer": str(answer).strip()} for problem, answer in pairs])
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot load --data {name} ({hub_id} on the hub): {reason}. Known names: arithmetic, "
                        f"{', '.join(HUB_DATA)}; or give a .jsonl file") from None
    train, heldout = ([row for row in part if row["problem"] and row["answer"]] for part in parts)
    if not train:
        raise UserError(f"--data {name} has no training problems with an answer")
    return train, heldout


class ProblemStream:
    """Endless problems, every pass in a new order that depends on the seed and the pass alone."""

    def __init__(self, problems: list[dict], seed: int):
        self.problems, self.seed, self.position = problems, seed, 0

    def take(self, n: int) -> list[dict]:
        """The next n problems."""
        taken = []
        for _ in range(n):
            epoch, i = divmod(self.position, len(self.problems))
            if i == 0 or not hasattr(self, "order"):
                self.order = random.Random(f"{self.seed}-{epoch}").sample(range(len(self.problems)), len(self.problems))
            taken.append(self.problems[self.order[i]])
            self.position += 1
        return taken


# ----------------------------------------------------------------------------------------------- model and prompts


def tiny_model() -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """An untrained Qwen2 of 0.3 M parameters with one token per character, so that a CPU can train it in a minute."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # Byte-level BPE without merges is one token per character. It must be byte-level: for any Qwen2 model AutoTokenizer
    # loads Qwen2Tokenizer, which reads the vocabulary that way whatever class was saved.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = [byte_level.pre_tokenize_str(character)[0][0] for character in DIGITS_AND_SIGNS]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *letters])}
    characters = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    characters.pre_tokenizer, characters.decoder = byte_level, decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}={% endif %}"
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(vocabulary), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.04,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None))
    model.set_attn_implementation("packed")  # see packed_attention
    return model, tokenizer


def load_model(cfg: Config):
    """(model in fp32 on the CPU, tokenizer) for a preset, a hub id or a local folder; raises UserError."""
    if cfg.model == "tiny":
        return tiny_model()
    name = PRESETS.get(cfg.model, (cfg.model, {}))[0]
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except Exception as error:  # missing, no network, not a model, unreadable: each its own type
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot load --model {cfg.model}: {reason} Type tiny, {', '.join(list(PRESETS)[1:])}, "
                        "a hub id or a folder with config.json and weights") from None
    for module in model.modules():  # dropout would make the ratio differ from 1 before the first update
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    try:
        gap = probe(model)
    except Exception as error:  # whatever an unusual architecture makes of our masks and cache
        gap = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    if not (isinstance(gap, float) and gap < 1e-3):
        raise UserError(f"--model {cfg.model}: sampler and trainer do not agree on a {type(model).__name__} ({gap}), for example "
                        "because it changes its logits after the output layer or does attention in a way of its own; choose a Qwen, Llama, "
                        "Mistral or similar model")
    return model, tokenizer


@torch.no_grad()
def probe(model) -> float:
    """Switch to packed attention; the largest difference that it makes to log-probabilities of a few greedy tokens."""
    prompts = [[5, 6, 7, 8], [9, 10]]
    drawn = sample(model.eval(), prompts, 1, stop_ids=[], pad_id=0, max_new_tokens=4, temperature=0)
    packed = pack([Sample("", "", prompt, response, "", 0.0, False, 0.0) for prompt, (response, _, _) in zip(prompts, drawn)],
                  model.device)
    model.set_attn_implementation("packed")
    logp = token_logp(model, packed, 1.0)[0][packed.mask]
    return (logp - torch.cat([sampled for _, sampled, _ in drawn])).abs().max().item()


def pad_token(tokenizer) -> int:
    """Any id will do where there is none: masks are made from lengths, never by looking for padding."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def stop_tokens(model, tokenizer) -> list[int]:
    """Every id that ends a response: chat models often have two, one of them only in generation_config."""
    ids = model.generation_config.eos_token_id
    return sorted({*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id} - {None})


def encode(tokenizer, problem: str, cfg: Config) -> list[int]:
    """Prompt token ids of one problem, through the tokenizer's chat template where it has one."""
    text = f"{problem}\n{cfg.instruction}" if cfg.instruction else problem
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True,
                                             enable_thinking=cfg.thinking)
        return tokenizer(text, add_special_tokens=False).input_ids  # the template has written them already
    return tokenizer(f"Question: {text}\nAnswer:").input_ids


def check_prompts(problems: list[dict], model, tokenizer, cfg: Config) -> list[int]:
    """The longest prompt's ids. Raises UserError if a prompt and its response do not fit the context, or the vocabulary
    lacks its characters."""
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    longest = []
    for row in problems:
        ids = encode(tokenizer, row["problem"], cfg)
        if len(ids) + cfg.max_new_tokens > context:
            raise UserError(f"a prompt of {len(ids)} tokens + --max_new_tokens {cfg.max_new_tokens} exceeds the model's context "
                            f"of {context}: shorten it or lower --max_new_tokens; it begins {row['problem'][:60]!r}")
        if cfg.model == "tiny" and tokenizer.unk_token_id in ids:
            raise UserError(f"the tiny model reads only the characters {DIGITS_AND_SIGNS!r}; choose another --model for "
                            f"{row['problem'][:60]!r}")
        longest = max(longest, ids, key=len)
    return longest


# -------------------------------------------------------------------------------------------------------- sampling
# Each prompt is read once (`prefill`); then every response grows by a token at a time (`decode_step`, `pick`). What a
# decode step reads and writes stays at fixed addresses in a `Decoder`, so that on CUDA a step is one replayed graph.

CHECK_EVERY = 8  # decode steps between looks at which rows have stopped; a look makes a GPU wait for the host
CONTEXT_STEP = 256  # a CUDA graph is captured for every so many columns of the key/value cache
CACHE = "cache" if "cache" in inspect.signature(Qwen2ForCausalLM.forward).parameters else "past_key_values"  # before 5.24


def prefill(model, prompts: list[list[int]], pad_id: int):
    """Read each prompt once: next-token logits (Q, V), the cache, and which of its columns are no padding, (Q, P) bool."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts], device=model.device)  # (Q, P), left-padded
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # padding must not shift a prompt's positions
    out = model(tokens, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1], out[CACHE], mask.bool()


def pick(logits: Tensor, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a token (N,) from logits (N, V); temperature 0 takes the most likely one.

    Returns it, its log-probability (N,) and the entropy (N,) in nats, both before top_p.
    """
    logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    probs = logp.exp()
    entropy = -(probs * logp.clamp(min=-1e4)).sum(-1)  # 0 * -inf would be NaN
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        if top_p < 1:
            ranked, order = probs.sort(-1, descending=True)
            ranked[ranked.cumsum(-1) - ranked >= top_p] = 0  # keeps the token that crosses top_p
            probs = torch.zeros_like(probs).scatter_(-1, order, ranked)
        # the token at which the running sum passes a uniform number: one a row, where multinomial draws one a token. In
        # double, so that rounding never lets a token of probability 0 through; 1 - [0, 1) is never 0
        cdf = probs.cumsum(-1, dtype=torch.double)
        token = torch.searchsorted(cdf, (1 - torch.rand_like(cdf[:, :1])) * cdf[:, -1:])[:, 0]
        token = token.clamp(max=logits.shape[-1] - 1)  # NaN is found beyond the end
    return token, logp.gather(-1, token[:, None])[:, 0], entropy


class RowCache(Cache):
    """Keys and values (R, heads, C, D) of every layer, of which the first `rows` and `columns` are in use. Unlike
    transformers' StaticCache it repeats a prompt for its group, lets rows go, and shows attention only what is in use."""

    def __init__(self, prompt_cache: Cache, rows: int, columns: int):
        super().__init__(layers=[])
        self.buffers = [[x.new_zeros(rows, x.shape[1], columns, x.shape[3]) for x in (layer.keys, layer.values)]
                        for layer in prompt_cache.layers]
        self.column = torch.zeros(1, dtype=torch.long, device=self.buffers[0][0].device)  # where the next token goes

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs):
        for buffer, new in zip(self.buffers[layer_idx], (keys, values)):
            buffer[:self.rows].index_copy_(2, self.column, new)
        return [buffer[:self.rows, :, :self.columns] for buffer in self.buffers[layer_idx]]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns - 1

    def get_max_length(self, layer_idx: int = 0) -> int:
        return self.buffers[0][0].shape[2]


class Decoder:
    """The responses that are being sampled. `bucketed` (as on CUDA) rounds rows and columns up to few sizes, for each of
    which `graphs` captures a CUDA graph; a decoder that is used again keeps them."""

    def __init__(self, model, graphs: bool = True, bucketed: bool | None = None):
        self.model, on_cuda = model, model.device.type == "cuda"
        self.capturing, self.bucketed = graphs and on_cuda, on_cuda if bucketed is None else bucketed
        self.clear()

    def clear(self) -> None:
        self.cache, self.graphs = None, {}
        self.pool = torch.cuda.graph_pool_handle() if self.capturing else None  # graphs use the same memory in turns

    def row_bucket(self, n: int) -> int:
        """n, or the next 2^k or 3 * 2^k."""
        power = 1 << (n - 1).bit_length()
        return n if not self.bucketed else power * 3 // 4 if n <= power * 3 // 4 and power > 3 else power

    def column_bucket(self, n: int) -> int:
        return -(-n // CONTEXT_STEP) * CONTEXT_STEP if self.bucketed else n

    def start(self, prompts: list[list[int]], group_size: int, pad_id: int, max_new_tokens: int) -> Tensor:
        """Prefill and lay every prompt's cache out for the rows of its group; returns the first logits (Q*G, V)."""
        logits, prompt_cache, visible = prefill(self.model, prompts, pad_id)
        (n, width), device = (len(prompts) * group_size, visible.shape[1]), logits.device
        rows, columns = self.row_bucket(n), self.column_bucket(width + max_new_tokens)
        if self.cache is None or not self.bucketed or rows > len(self.row) or columns > self.hidden.shape[1]:
            self.clear()
            self.cache = RowCache(prompt_cache, rows, columns)
            self.hidden = torch.empty(rows, columns, dtype=self.model.dtype, device=device)  # added to attention's scores
            self.row, self.token = torch.empty(2, rows, dtype=torch.long, device=device)  # response that a row writes
            self.position = torch.empty(rows, 1, dtype=torch.long, device=device)
            self.t = torch.empty(1, dtype=torch.long, device=device)
            self.tokens = torch.empty(rows, columns, dtype=torch.long, device=device)
            self.logps, self.entropies = torch.empty(2, rows, columns, device=device)
        for buffers, layer in zip(self.cache.buffers, prompt_cache.layers):
            for buffer, x in zip(buffers, (layer.keys, layer.values)):  # a sliding layer has kept only its last columns
                buffer[:n, :, width - x.shape[2]:width] = x.repeat_interleave(group_size, 0)
        self.hidden.fill_(torch.finfo(self.hidden.dtype).min)
        self.hidden[:n, :width].masked_fill_(visible.repeat_interleave(group_size, 0), 0.0)
        self.position.zero_()[:n] = visible.sum(1, keepdim=True).repeat_interleave(group_size, 0) - 1
        self.row.copy_(torch.arange(len(self.row), device=device))
        self.token.zero_()
        self.t.zero_()
        self.cache.column.fill_(width - 1)
        self.cache.rows, self.filled = n, width
        return logits.repeat_interleave(group_size, 0)

    def write(self, logits: Tensor, temperature: float, top_p: float) -> None:
        """Pick every row's next token and note it where its response stands."""
        token, logp, entropy = pick(logits, temperature, top_p)
        row = self.row[:len(token)]
        self.token[:len(token)] = token
        self.tokens[row, self.t], self.logps[row, self.t], self.entropies[row, self.t] = token, logp, entropy

    def decode_step(self, temperature: float, top_p: float) -> None:
        """Feed every row its last token and pick the next. It runs on the device alone, and can be captured."""
        rows, columns = self.cache.rows, self.cache.columns
        for counter in (self.t, self.cache.column, self.position):
            counter.add_(1)
        hidden = self.hidden[:rows, :columns].index_fill_(1, self.cache.column, 0.0)[:, None, None]  # (N, 1, 1, C)
        masks = {"full_attention": hidden}
        if window := getattr(self.model.config, "sliding_window", None):
            beyond = torch.arange(columns, device=hidden.device) <= self.cache.column - window
            masks["sliding_attention"] = hidden.masked_fill(beyond, torch.finfo(hidden.dtype).min)
        kinds = set(getattr(self.model.config, "layer_types", None) or [list(masks)[-1]])
        out = self.model(self.token[:rows, None], attention_mask=masks if len(kinds) > 1 else masks[kinds.pop()],
                         position_ids=self.position[:rows], use_cache=True, **{CACHE: self.cache})
        self.write(out.logits[:, -1], temperature, top_p)

    def advance(self, temperature: float, top_p: float) -> None:
        """One decode step: replayed if it was captured at this size, else run, and captured for the next time."""
        self.filled += 1
        self.cache.columns = self.column_bucket(self.filled)
        size = (self.cache.rows, self.cache.columns, temperature, top_p)
        if size in self.graphs:
            return self.graphs[size].replay()
        self.decode_step(temperature, top_p)
        if self.capturing:
            torch.cuda.synchronize()
            self.graphs[size] = graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # NCCL's threads go on
                self.decode_step(temperature, top_p)  # is only recorded here

    def keep(self, live: Tensor) -> None:
        """Let the rows go that are not live (rows,) bool, as far as the next smaller size allows."""
        rows = self.row_bucket(int(live.sum()))
        if rows >= self.cache.rows:
            return
        order = live.int().argsort(descending=True, stable=True)[:rows]
        for state in (self.token, self.position, self.row, self.hidden):
            state[:rows] = state[order]
        for buffer in itertools.chain.from_iterable(self.cache.buffers):
            buffer[:rows, :, :self.filled] = buffer[order, :, :self.filled]
        self.cache.rows = rows


@torch.no_grad()
def sample(model, prompts: list[list[int]], group_size: int, *, stop_ids: list[int], pad_id: int, max_new_tokens: int,
           temperature: float = 1.0, top_p: float = 1.0, bar=None,
           decoder: Decoder | None = None) -> list[tuple[list[int], Tensor, float]]:
    """Sample group_size responses to every prompt.

    Returns for each of Q*G responses, a group's side by side: its tokens up to and including the first stop token (absent
    if cut off), their log-probabilities (tokens,), and the policy's mean entropy over them in nats, at this temperature.
    """
    decoder = decoder or Decoder(model)
    try:
        logits = decoder.start(prompts, group_size, pad_id, max_new_tokens)
        decoder.write(logits, temperature, top_p)
        n, stops = len(logits), torch.tensor(stop_ids, dtype=torch.long, device=logits.device)
        done = decoder.row >= n
        decoder.cache.rows = decoder.row_bucket(n)
        for t in range(1, max_new_tokens):
            if t % CHECK_EVERY == 0:  # a row that has stopped is computed on until then, and ignored
                before = int(done.sum())
                done |= torch.isin(decoder.tokens[:, t - CHECK_EVERY:t], stops).any(1)
                if bar is not None:
                    bar.update(int(done.sum()) - before)
                if done.all():
                    break
                decoder.keep(~done[decoder.row[:decoder.cache.rows]])
            decoder.advance(temperature, top_p)
    except torch.OutOfMemoryError:
        decoder.clear()
        raise
    if bar is not None:
        bar.update(int((~done).sum()))
    tokens = decoder.tokens[:n, :max_new_tokens]
    stopped = torch.isin(tokens, stops)
    length = torch.where(stopped.any(1), stopped.int().argmax(1) + 1, max_new_tokens)
    beyond = torch.arange(max_new_tokens, device=length.device) >= length[:, None]
    entropy = decoder.entropies[:n, :max_new_tokens].masked_fill(beyond, 0.0).sum(1) / length
    return [(ids[:k], logp[:k], h) for ids, logp, k, h in
            zip(tokens.tolist(), decoder.logps[:n].cpu(), length.tolist(), entropy.tolist())]


# ---------------------------------------------------------------------------------------------- rollout and rewards


@dataclass
class Sample:
    """One response to one prompt. A rollout is a list of them, each group's side by side."""

    problem: str
    gold: str
    prompt: list[int]  # token ids
    response: list[int]  # token ids up to and including the stop token
    text: str  # the response decoded
    correct: float  # 1.0 right, 0.0 wrong
    truncated: bool  # no stop token within max_new_tokens
    entropy: float  # mean over the response's tokens, nats
    reward: float = 0.0  # correct minus the overlong penalty
    advantage: float = 0.0
    old_logp: Tensor | None = None  # (response tokens,) under the policy before the rollout's first update
    sampler_logp: Tensor | None = None  # (response tokens,) as the sampler saw it: the same but for rounding


def overlong_penalty(length: int, cfg: Config) -> float:
    """0 up to max_new_tokens - overlong_buffer tokens, then falling linearly to -1 (DAPO, arXiv 2503.14476, eq. 13)."""
    over = length - (cfg.max_new_tokens - cfg.overlong_buffer)
    return -over / cfg.overlong_buffer if cfg.overlong_buffer and over > 0 else 0.0


def with_memory(cfg: Config, name: str, least: int, work: Callable):
    """work(), and again with cfg.<name> halved each time the GPU runs out of memory: results do not depend on that knob."""
    while True:
        try:
            return work()
        except torch.OutOfMemoryError:
            if getattr(cfg, name) <= least or cfg.fsdp:  # FSDP's processes must keep in step
                raise UserError(f"out of GPU memory with --{name} {getattr(cfg, name)}; try a smaller model or --max_new_tokens, "
                                "--gradient_checkpointing True, or more GPUs with --fsdp True") from None
        setattr(cfg, name, max(least, getattr(cfg, name) // 2))  # out of the except clause, whose traceback holds tensors
        tqdm.write(f"out of GPU memory: --{name} is {getattr(cfg, name)} from here on")
        torch.cuda.empty_cache()


def roll_out(model, tokenizer, problems: list[dict], group_size: int, cfg: Config, bar=None, top_p: float = 1.0,
             decoder: Decoder | None = None) -> list[Sample]:
    """Sample and score group_size responses to every problem, `sample_rows` of them at a time; training needs top_p = 1."""
    stop_ids = stop_tokens(model, tokenizer)
    prompts = [encode(tokenizer, row["problem"], cfg) for row in problems]
    samples = []
    while len(samples) < len(prompts) * group_size:

        def chunk() -> list[tuple[list[int], Tensor, float]]:
            first, share = len(samples) // group_size, min(group_size, cfg.sample_rows)  # a share of a group if need be
            some = prompts[first:first + max(1, cfg.sample_rows // group_size)]
            return [response for k in range(0, group_size, share) for response in
                    sample(model, some, min(share, group_size - k), stop_ids=stop_ids, pad_id=pad_token(tokenizer),
                           max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, top_p=top_p, bar=bar, decoder=decoder)]

        responses = with_memory(cfg, "sample_rows", 1, chunk)
        texts = tokenizer.batch_decode([response for response, _, _ in responses], skip_special_tokens=True)
        for text, (response, logp, entropy) in zip(texts, responses):
            i = len(samples) // group_size
            correct = math_reward(text, problems[i]["answer"])
            samples.append(Sample(problems[i]["problem"], problems[i]["answer"], prompts[i], response, text, correct,
                                  response[-1] not in stop_ids, entropy, correct + overlong_penalty(len(response), cfg),
                                  sampler_logp=logp))
    return samples


def is_uniform(group: list[Sample]) -> bool:
    """Whether all rewards are equal, so that nothing can be learned from the group."""
    return len({s.reward for s in group}) == 1


def groups_of(samples: list[Sample], size: int) -> list[list[Sample]]:
    """Cut a rollout into parts of size samples: its groups, or its mini-batches."""
    return [samples[i:i + size] for i in range(0, len(samples), size)]


def collect(model, tokenizer, stream: ProblemStream, cfg: Config, bar=None, decoder: Decoder | None = None) -> list[Sample]:
    """This process's share of a rollout of `prompts` groups; dynamic sampling replaces uniform groups, `max_refills` times."""
    groups = []
    for _ in range(1 + cfg.max_refills):
        groups = [group for group in groups if not is_uniform(group)]
        missing = cfg.prompts // world() - len(groups)
        problems = stream.take(max(gather(missing)) * world())  # by all in step, so that the streams stay equal
        groups += groups_of(roll_out(model, tokenizer, problems[rank()::world()][:missing], cfg.group_size, cfg, bar,
                                     decoder=decoder), cfg.group_size)
        if not any(gather(any(map(is_uniform, groups)))):
            break
    return sum(groups, [])


# ------------------------------------------------------------------------------------------------------ advantages


def group_advantages(rewards: Tensor, divide_by_std: bool = True) -> Tensor:
    """(R - mean) / (unbiased std + 1e-6) within each group; exactly 0 where all rewards of a group are equal.

    rewards (Q, G) float, G >= 2 -> (Q, G). Without the division: Dr. GRPO, arXiv 2503.20783. Raises ValueError for G < 2.
    """
    if rewards.shape[-1] < 2:
        raise ValueError(f"a group needs at least 2 responses, got rewards of shape {tuple(rewards.shape)}")
    advantages = rewards - rewards.mean(-1, keepdim=True)
    if divide_by_std:
        advantages = advantages / (rewards.std(-1, keepdim=True) + 1e-6)
    # the float mean of equal rewards need not equal them, and the std would blow the rounding error up
    return advantages.masked_fill((rewards == rewards[..., :1]).all(-1, keepdim=True), 0.0)


# --------------------------------------------------------------------------------------------------------- weights
# f(log_ratio (B, T), advantages (B, 1) or (B, T), mask (B, T), cfg) -> w (B, T), the weight in -A * w * grad log pi.
# cfg.eps_low and cfg.eps_high are numbers, or (B, T) tensors under --entropy_clip.


def ratio(log_ratio: Tensor) -> Tensor:
    """r = exp(log pi - log pi_old), kept within float range."""
    return log_ratio.clamp(-20, 20).exp()


def unclipped(r: Tensor, advantages: Tensor, cfg: Config) -> Tensor:
    """True where PPO lets a gradient through: a token that already moved far enough in the wanted direction gets none."""
    return torch.where(advantages >= 0, r <= 1 + cfg.eps_high, r >= 1 - cfg.eps_low)


def grpo(log_ratio, advantages, mask, cfg):
    """PPO's clipped ratio; the hard dual clip drops tokens of bad responses with r > dual_clip."""
    r = ratio(log_ratio)
    return r * unclipped(r, advantages, cfg) * ((advantages >= 0) | (r <= cfg.dual_clip))


def aspo(log_ratio, advantages, mask, cfg):
    """The ratio of good responses turned upside down; the soft dual clip caps the weight and keeps the gradient."""
    r = ratio(log_ratio)
    flipped = torch.where(advantages >= 0, 1 / r, r)
    return flipped.clamp(max=cfg.dual_clip) * unclipped(r, advantages, cfg)


def no_is(log_ratio, advantages, mask, cfg):
    """No importance weight, only the clip: the paper's diagnostic."""
    return unclipped(ratio(log_ratio), advantages, cfg).to(log_ratio.dtype)


def cispo(log_ratio, advantages, mask, cfg):
    """The ratio capped and no token dropped (MiniMax-M1, arXiv 2506.13585)."""
    return ratio(log_ratio).clamp(max=1 + cfg.eps_high)


def gspo(log_ratio, advantages, mask, cfg):
    """One clipped ratio per sequence, exp of the mean log-ratio (Qwen, arXiv 2507.18071)."""
    mean = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    s = ratio(mean).expand_as(log_ratio)
    return s * unclipped(s, advantages, cfg)


WEIGHTS: dict[str, Callable[[Tensor, Tensor, Tensor, Config], Tensor]] = {
    "grpo": grpo, "aspo": aspo, "no-is": no_is, "cispo": cispo, "gspo": gspo,
    "dapo": grpo, "dr-grpo": grpo,  # the same weight; METHOD_DEFAULTS holds what differs
}

# ------------------------------------------------------------------------------------------------------------ loss


def entropy_dependent_eps(entropy: Tensor, mask: Tensor) -> Tensor:
    """0.4 above each response's 0.8 quantile of the current policy's entropy, else 0.2 (B, T) (Archer, arXiv 2507.15778)."""
    split = torch.nanquantile(entropy.float().masked_fill(~mask, math.nan), 0.8, -1, keepdim=True)
    return torch.where(entropy > split, 0.4, 0.2)


def policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, cfg: Config, *, norm: float | None = None,
                entropy: Tensor | None = None, ref_logp: Tensor | None = None,
                sampler_logp: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """-A * w * log pi, whose gradient is the method's; the value itself means nothing.

    logp, old_logp, mask (B, T); advantages (B, 1) or (B, T). norm is the number of tokens (loss_agg token) or of
    sequences (others) to average over, by default this mask's own: pass the whole mini-batch's when this is a part of it,
    or the gradient depends on how it was cut. entropy (B, T) is needed by entropy_clip, ref_logp (B, T) by kl_coef > 0,
    sampler_logp (B, T) by tis_cap > 0. Returns a scalar and what happened at each token of the mask: (tokens,) tensors
    advantage, log_ratio, weight, old_prob, mismatch, kl_ref.
    """
    mask = mask.bool()
    logp, old_logp = logp.float().masked_fill(~mask, 0.0), old_logp.float().masked_fill(~mask, 0.0)
    with torch.no_grad():
        log_ratio = logp - old_logp
        if cfg.entropy_clip:
            eps = entropy_dependent_eps(entropy, mask)
            cfg = dataclasses.replace(cfg, eps_low=eps, eps_high=eps)
        weight = WEIGHTS[cfg.loss](log_ratio, advantages, mask, cfg)
        gap = torch.zeros_like(logp) if sampler_logp is None else (old_logp - sampler_logp.float()).masked_fill(~mask, 0.0)
        correction = gap.exp().clamp(max=cfg.tis_cap) if cfg.tis_cap else 1.0  # truncated importance sampling
    per_token = -advantages * weight * correction * logp
    stats = {"advantage": advantages.expand_as(logp)[mask], "log_ratio": log_ratio[mask], "weight": weight[mask],
             "old_prob": old_logp.exp()[mask], "mismatch": gap.abs()[mask]}
    if cfg.kl_coef:
        d = (ref_logp.float() - logp).masked_fill(~mask, 0.0)
        kl = d.exp() - d - 1  # k3, http://joschu.net/blog/kl-approx.html
        per_token = per_token + cfg.kl_coef * kl
        stats["kl_ref"] = kl.detach()[mask]
    lengths = mask.sum(-1, keepdim=True)  # (B, 1)
    if norm is None:
        norm = lengths.sum() if cfg.loss_agg == "token" else (lengths > 0).sum()
    share = {"token": 1, "sequence": 1 / lengths.clamp(min=1), "constant": 1 / cfg.max_new_tokens}[cfg.loss_agg]
    return (per_token * mask * share).sum() / max(float(norm), 1.0), stats


# -------------------------------------------------------------------------------------- log-probabilities and update
# The responses of a group begin with the same prompt, and their lengths differ. So samples are packed into one row, each
# prompt once and nothing padded; only attention has to know which tokens belong together.

CHUNK_LOGITS = 2**25  # logits that exist at a time: 128 MiB in fp32
SPREAD = 1.25  # attention takes rows side by side whose lengths differ by less than this factor, padded to the longest


@dataclass
class Block:
    """A part of attention: rows of similar length, each a prompt, or a response that also looks at its prompt."""

    visible: Tensor  # (rows, 1, q, k) bool
    query_positions: Tensor  # (rows, 1, q, 1) in their sequence
    key_positions: Tensor  # (rows, 1, 1, k)
    biases: dict = field(default_factory=dict)

    def bias(self, heads: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of `heads` query heads at a time, (rows, 1, heads * q, k): 0 or -inf. Made once for
        all layers, since autograd keeps it."""
        if (heads, window, dtype) not in self.biases:
            visible = self.visible & (self.query_positions - self.key_positions < window) if window else self.visible
            rows, _, q, k = visible.shape
            bias = visible.new_full((rows, 1, heads * q, -(-k // 16) * 16), -math.inf, dtype=dtype)[..., :k]  # as GPUs want it
            self.biases[heads, window, dtype] = bias.masked_fill_(visible.repeat(1, 1, heads, 1), 0.0)
        return self.biases[heads, window, dtype]


@dataclass
class Packed:
    """Samples in one row of N tokens: each different prompt once, however many responses it has, then the responses without
    their last tokens, which are predicted but predict nothing. Prompt ab with responses xyz and uv is the row a b x y u."""

    blocks: list[Block]
    tokens: Tensor  # (1, N)
    positions: Tensor  # (1, N)
    source: Tensor  # (M,) the place whose hidden state predicts each of the M response tokens
    targets: Tensor  # (M,) these tokens
    mask: Tensor  # (B, T) bool: where they stand in the padded responses
    queries: Tensor  # places of the blocks' queries, one block after the other; padding stands for token 0
    keys: Tensor  # places of the blocks' keys
    back: Tensor  # (N,) where among the queries each token is


def pack(samples: list[Sample], device) -> Packed:
    """Lay samples out for `token_logp`. What is trained comes from lengths, not from `token == pad`: where pad is eos that
    would leave out the stop token."""
    prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(tuple(s.prompt) for s in samples))}
    owner = torch.tensor([prompts[tuple(s.prompt)] for s in samples])  # (B,)
    rows = [*prompts, *(s.response[:-1] for s in samples)]  # Q prompts, B responses
    lengths, n_prompts = torch.tensor(list(map(len, rows))), len(prompts)
    column = torch.arange(int(lengths.max()))
    real = column < lengths[:, None]  # (Q + B, W)
    place = torch.zeros(real.shape, dtype=torch.long)  # in the packed row
    place[real] = torch.arange(int(real.sum()))
    begin = torch.cat([torch.zeros(n_prompts, dtype=torch.long), lengths[owner]])  # a response goes on after its prompt
    position = (begin[:, None] + column).masked_fill(~real, 0)

    size = (lengths.log() / math.log(SPREAD)).floor()  # -inf where nothing is left of a response
    size[n_prompts:] += 1000  # keeps prompts and responses apart
    blocks, places, tables = [], [], (place, position, real)
    for which in ((size == each).nonzero()[:, 0] for each in size[lengths > 0].unique()):
        own = looked_at = [table[which, :int(lengths[which].max())] for table in tables]
        if which[0] >= n_prompts:
            before = owner[which - n_prompts]
            looked_at = [torch.cat([table[before, :int(lengths[before].max())], part], 1) for table, part in zip(tables, own)]
        now, at, there = own[1][:, None, :, None], looked_at[1][:, None, None], looked_at[2][:, None, None]
        blocks.append(Block(*(part.to(device) for part in (there & (at <= now), now, at))))
        places.append([table.flatten() for table in (own[0], own[2], looked_at[0])])
    queries, is_real, keys = map(torch.cat, zip(*places))
    back = torch.empty(int(real.sum()), dtype=torch.long)
    back[queries[is_real]] = is_real.nonzero()[:, 0]

    ends = place[owner, lengths[owner] - 1]  # each sample's last prompt token predicts its first response token
    mask = torch.arange(len(column) + 1) < torch.tensor([[len(s.response)] for s in samples])
    mask = mask[:, :max(1, int(mask.sum(1).max()))]
    source = torch.cat([ends[:, None], place[n_prompts:]], 1)[:, :mask.shape[1]][mask]
    tokens, targets = (torch.tensor(list(itertools.chain(*lists)), dtype=torch.long)
                       for lists in (rows, (s.response for s in samples)))
    return Packed(blocks, *(part.to(device) for part in (tokens[None], position[real][None], source, targets, mask,
                                                         queries, keys, back)))


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """Attention with queries (B, heads, q, D) and keys (B, key heads, k, D) -> (B, q, heads, D).

    Query heads that share a key head become its rows, so bias is (B, 1, query heads of each * q, k) or broadcasts to it:
    transformers would copy keys and values for each of them.
    """
    rows = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    result = scaled_dot_product_attention(rows, k, v, attn_mask=bias, scale=scale)
    return result.reshape(q.shape).transpose(1, 2)  # no view: a GPU's kernels lay it out by tokens


def packed_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, scaling=None,
                     sliding_window=None, packed: Packed | None = None, **kwargs) -> tuple[Tensor, None]:
    """What transformers calls in every layer: queries (1, heads, N, D) of a packed row -> (1, N, heads, D).

    Without `packed` it decodes, (B, heads, 1, D) -> (B, 1, heads, D), or reads prompts, for which it is transformers' own.
    """
    if packed is None and query.shape[2] == 1:
        return grouped_attention(query, key, value, attention_mask, scaling), None
    if packed is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling,
                                               sliding_window=sliding_window, **kwargs)
    shapes = [block.visible.shape for block in packed.blocks]
    q_parts, k_parts, v_parts = (
        x[0].transpose(0, 1).index_select(0, places).split([shape[0] * shape[i] for shape in shapes])  # (rows * q or k, heads, D)
        for x, places, i in ((query, packed.queries, 2), (key, packed.keys, 3), (value, packed.keys, 3)))
    results = []
    for block, *parts in zip(packed.blocks, q_parts, k_parts, v_parts):
        q, k, v = (x.unflatten(0, (len(block.visible), -1)).transpose(1, 2) for x in parts)  # (rows, heads, q or k, D)
        bias = block.bias(q.shape[1] // k.shape[1], sliding_window, v.dtype)  # autocast has left q and k in fp32
        results.append(grouped_attention(q, k, v, bias, scaling).flatten(0, 1))
    return torch.cat(results).index_select(0, packed.back)[None], None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)


def token_logp(model, packed: Packed, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy (nats) at this temperature of every response token, (B, T) fp32, 0 outside the mask.

    The entropy has no gradient. Logits exist only for response tokens and a chunk at a time, and are recomputed in the
    backward pass: at a vocabulary of 150,000 they, and not the weights, are what runs out of memory.
    """
    unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=packed.tokens.device)  # else transformers makes an (N, N) mask
    hidden = model.base_model(packed.tokens, attention_mask=unused, position_ids=packed.positions, use_cache=False,
                              packed=packed).last_hidden_state[0].index_select(0, packed.source)  # (M, D)

    def of_chunk(h: Tensor, target: Tensor):
        logits = model.get_output_embeddings()(h).float()
        if temperature != 1:
            logits = logits / temperature
        logp = -cross_entropy(logits, target, reduction="none")
        with torch.no_grad():  # last, since the recomputation ends with what the backward pass needs
            log_z = logits.gather(-1, target[:, None])[:, 0] - logp
            entropy = log_z - torch.linalg.vecdot((logits - log_z[:, None]).exp_(), logits)
        return logp, entropy

    chunk = max(1, CHUNK_LOGITS // model.config.vocab_size)
    parts = [checkpoint(of_chunk, h, y, use_reentrant=False) for h, y in zip(hidden.split(chunk), packed.targets.split(chunk))]
    mask = packed.mask
    logp, entropy = (torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, torch.cat(part)) for part in zip(*parts))
    return logp, entropy


def micro_batches(samples: list[Sample], max_tokens: int) -> list[list[Sample]]:
    """Cut samples into batches of at most max_tokens when packed; a longer one goes alone.

    A prompt is computed once a batch, so the samples of a group should come side by side.
    """
    batches, room = [], 0
    for s in samples:
        need = len(s.response) + (0 if batches and s.prompt == batches[-1][-1].prompt else len(s.prompt))
        if need > room:
            batches.append([])
            need, room = len(s.prompt) + len(s.response), max_tokens
        batches[-1].append(s)
        room -= need
    return batches


def batch_logp(model, samples: list[Sample], cfg: Config, autocast) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and mask, each (B, T), of one micro-batch of samples."""
    packed = pack(samples, model.device)
    with autocast():
        forward = getattr(model, "token_logp", None) or functools.partial(token_logp, model)  # `shard` makes it a method
        return *forward(packed, cfg.temperature), packed.mask


def micro_batches_of(samples: list[Sample], cfg: Config) -> list[list[Sample]]:
    """micro_batches; under FSDP as many on every process, the missing ones with nothing to learn from."""
    micros = micro_batches(samples, cfg.micro_tokens)
    idle = Sample("", "", [0, 0], [], "", 0.0, False, 0.0, old_logp=torch.zeros(0), sampler_logp=torch.zeros(0))
    return micros + [[idle]] * (max(gather(len(micros))) - len(micros) if cfg.fsdp else 0)


def remember(micro: list[Sample], logp: Tensor, mask: Tensor) -> None:
    """Give every sample its part of logp (B, T) as old_logp."""
    for s, values in zip(micro, logp.detach()[mask].split([len(s.response) for s in micro])):
        s.old_logp = values


def concat(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of equal name one after the other."""
    parts = [part for part in parts if part]  # a process that made no step has none
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def accumulate(model, reference, scaler, samples: list[Sample], norm: float, cfg: Config, autocast,
               bar=None) -> list[dict[str, Tensor]]:
    """Leave this process's part of one optimiser step's gradient in .grad; returns policy_loss's stats per micro-batch."""
    model.zero_grad(set_to_none=True)  # a pass that ran out of memory has left a part behind
    stats = []
    for micro in micro_batches_of(samples, cfg):
        logp, entropy, mask = batch_logp(model, micro, cfg, autocast)
        if any(s.old_logp is None for s in micro):  # the policy has not changed yet
            remember(micro, logp, mask)
        old_logp = torch.zeros_like(logp).masked_scatter(mask, torch.cat([s.old_logp for s in micro]).to(logp.device))
        advantages = torch.tensor([[s.advantage] for s in micro], device=logp.device)  # (B, 1)
        sampler_logp = ref_logp = None
        if all(s.sampler_logp is not None for s in micro):
            sampler_logp = torch.cat([s.sampler_logp for s in micro]).to(logp.device)
            sampler_logp = torch.zeros_like(logp).masked_scatter(mask, sampler_logp)
        if reference is not None:
            with torch.no_grad():
                ref_logp = batch_logp(reference, micro, cfg, autocast)[0]
        loss, stat = policy_loss(logp, old_logp, advantages, mask, cfg, norm=norm, entropy=entropy, ref_logp=ref_logp,
                                 sampler_logp=sampler_logp)
        scaler.scale(loss * (world() if cfg.fsdp else 1)).backward()  # FSDP averages where a sum is wanted
        stats.append(stat)
        if bar is not None:
            bar.update(len(micro))
    return stats


def update(model, reference, optimizer, scheduler, scaler, samples: list[Sample], cfg: Config, autocast,
           bar=None) -> tuple[dict[str, Tensor], list[float]]:
    """Train on one rollout: mini-batches x epochs optimiser steps, old_logp fixed.

    Returns policy_loss's per-token stats over all steps, concatenated, and the gradient norm of each step; a step whose
    norm is not finite was left out. Samples without signal (advantage 0 and no KL) count in the normaliser but are not
    computed; a mini-batch of them makes no step.
    """
    model.train()
    minibatches = groups_of(samples, cfg.minibatch // world() * cfg.group_size)
    if cfg.drop_uniform_groups:
        minibatches = [[s for group in groups_of(batch, cfg.group_size) if not is_uniform(group) for s in group]
                       for batch in minibatches]
    if cfg.mask_truncated:
        minibatches = [[s for s in batch if not s.truncated] for batch in minibatches]
    active = [[s for s in batch if s.advantage or cfg.kl_coef] for batch in minibatches]
    longest = max(len(s.prompt) + len(s.response) for s in samples)

    @torch.no_grad()
    def remember_all():  # but the first mini-batch, which meets the unchanged policy in its own first pass
        for micro in micro_batches_of(sum(active[1:], []), cfg):
            logp, _, mask = batch_logp(model, micro, cfg, autocast)
            remember(micro, logp, mask)

    with_memory(cfg, "micro_tokens", longest, remember_all)
    stats, grad_norms = [], []
    for batch, part in list(zip(minibatches, active)) * cfg.epochs:
        if not any(gather(len(part))):
            continue
        norm = sum(gather(sum(len(s.response) for s in batch) if cfg.loss_agg == "token" else len(batch)))
        stats += with_memory(cfg, "micro_tokens", longest,
                             lambda: accumulate(model, reference, scaler, part, norm, cfg, autocast, bar))
        if world() > 1 and not cfg.fsdp:
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)
        scaler.unscale_(optimizer)
        grad_norms.append(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)).item())
        if math.isfinite(grad_norms[-1]):
            scaler.step(optimizer)
            scheduler.step()
        scaler.update()  # fp16: lowers the scale after an overflow
    model.zero_grad(set_to_none=True)
    return concat(stats), grad_norms


# --------------------------------------------------------------------------------------------------------- metrics

# key in metrics.jsonl -> (formula, what a healthy value looks like). + and - are tokens with A > 0 and A < 0; ratio,
# weight, clip and KL metrics are means over the tokens of all optimiser steps of the rollout, null where there is none.
METRICS = {
    "step": ("rollouts so far", "counts up"),
    "reward": ("mean reward of the rollout", "climbs; flat at 0 means that nothing is learned"),
    "reward_std": ("mean over groups of the unbiased std of rewards", "above 0: it is the signal; falls as all get right"),
    "accuracy": ("share of right responses", "the reward without penalties"),
    "entropy": ("mean over response tokens of -sum p log p at sampling, nats", "falls slowly; near 0 exploration is over"),
    "ratio_pos": ("mean of r over + tokens", "near 1; above 1 when updates do what they should"),
    "ratio_neg": ("mean of r over - tokens", "near 1; below 1 when updates do what they should"),
    "weight_pos": ("mean of w over + tokens", "grpo: follows ratio_pos; aspo: its mirror image"),
    "weight_neg": ("mean of w over - tokens", "grpo, aspo: near ratio_neg, less what was clipped"),
    "weight_pos_low": ("weight_pos over tokens with pi_old < 0.5", "set beside the next: the gap that the paper argues about"),
    "weight_pos_high": ("weight_pos over tokens with pi_old >= 0.5", "near 1"),
    "weight_neg_low": ("weight_neg over tokens with pi_old < 0.5", "below 1: these ratios move furthest"),
    "weight_neg_high": ("weight_neg over tokens with pi_old >= 0.5", "near 1"),
    "clip_frac_pos": ("share of + tokens with w = 0 by the hard clip", "under 0.1; more: lower lr, epochs or mini-batches"),
    "clip_frac_neg": ("share of - tokens with w = 0 by the hard clip", "under 0.1"),
    "dual_clip_frac_pos": ("share of + tokens with w capped at dual_clip", "near 0; aspo only"),
    "dual_clip_frac_neg": ("share of - tokens with r > dual_clip", "near 0"),
    "approx_kl": ("mean of r - 1 - log r, an estimate of KL(old, new)", "under 0.05"),
    "sampler_mismatch": ("mean absolute difference of log pi_old and the sampler's log-probability", "1e-6 in fp32; more in half precision"),
    "kl_ref": ("mean of exp(d) - d - 1, d = log pi_ref - log pi; only with kl_coef > 0", "grows slowly"),
    "grad_norm": ("mean gradient norm before clipping, 0 if no step was made", "steady; spikes foretell trouble"),
    "skipped_steps": ("optimiser steps left out because the gradient was not finite", "0; with fp16 a few"),
    "lr": ("learning rate after the step", "follows the schedule"),
    "response_length": ("mean response tokens, stop token included", "no jump to 0 or to the limit"),
    "truncated": ("share of responses without a stop token", "under 0.1; they score 0 whatever they were about to say"),
    "repetition": ("mean share of a response's 20-word n-grams already seen in it", "under 0.1"),
    "uniform_groups": ("groups whose rewards are all equal", "well under `prompts`: they carry no signal"),
    "tokens": ("response tokens sampled in this step", "-"),
    "sample_seconds": ("seconds of sampling and scoring", "-"),
    "update_seconds": ("seconds of training", "-"),
    "heldout_accuracy": ("share of right samples on held-out problems; evaluation steps only", "the number that counts"),
}


def repetition(text: str, n: int = 20) -> float:
    """Share of the text's n-word n-grams that occurred before in it; 0.0 for fewer than n words."""
    words = text.split()
    grams = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def token_metrics(stats: dict[str, Tensor], cfg: Config) -> dict[str, float | None]:
    """The metrics of METRICS that come from policy_loss's per-token stats."""
    mean = lambda values: values.float().mean().item() if values.numel() else None
    if not stats:
        stats = {name: torch.zeros(0) for name in ("advantage", "log_ratio", "weight", "old_prob", "mismatch")}
    r, w, unlikely = ratio(stats["log_ratio"]), stats["weight"], stats["old_prob"] < 0.5
    result = {}
    for sign, where in (("pos", stats["advantage"] > 0), ("neg", stats["advantage"] < 0)):
        dual = (w >= cfg.dual_clip) if sign == "pos" else (r > cfg.dual_clip)
        result |= {f"ratio_{sign}": mean(r[where]), f"weight_{sign}": mean(w[where]),
                   f"weight_{sign}_low": mean(w[where & unlikely]), f"weight_{sign}_high": mean(w[where & ~unlikely]),
                   f"clip_frac_{sign}": mean(((w == 0) & ~dual)[where]), f"dual_clip_frac_{sign}": mean(dual[where])}
    result["approx_kl"] = mean(r - 1 - stats["log_ratio"].clamp(-20, 20))
    result["sampler_mismatch"] = mean(stats["mismatch"])
    if "kl_ref" in stats:
        result["kl_ref"] = mean(stats["kl_ref"])
    return result


def rollout_metrics(samples: list[Sample], cfg: Config) -> dict[str, float]:
    """The metrics of METRICS that come from the sampled responses."""
    rewards = torch.tensor([s.reward for s in samples]).view(-1, cfg.group_size)
    tokens = sum(len(s.response) for s in samples)
    mean = lambda values: sum(values) / len(samples)
    return {
        "reward": rewards.mean().item(), "reward_std": rewards.std(-1).mean().item(),
        "accuracy": mean(s.correct for s in samples),
        "entropy": sum(s.entropy * len(s.response) for s in samples) / tokens,
        "response_length": tokens / len(samples), "truncated": mean(s.truncated for s in samples),
        "repetition": mean(repetition(s.text) for s in samples),
        "uniform_groups": sum(map(is_uniform, groups_of(samples, cfg.group_size))), "tokens": tokens,
    }


def warnings_for(metrics: dict, updates: int) -> dict[str, str]:
    """What a user should know about this step, in plain words, by a short key so that each is said once."""
    found = {}
    if metrics["truncated"] > 0.5:
        found["truncated"] = (f"{metrics['truncated']:.0%} of the responses were cut off at the token limit and score 0; "
                              "raise --max_new_tokens")
    if metrics["accuracy"] == 0:
        found["zero"] = ("every response was wrong, so there is nothing to learn from; look at samples.jsonl for the answer "
                         "format, or start from easier problems or a better model")
    if updates == 1:
        found["on-policy"] = ("one optimiser step per rollout: all ratios are 1, so aspo, grpo and no-is are the same method; "
                              "raise --epochs or lower --minibatch")
    return found


# ------------------------------------------------------------------------------- warm-up, held-out accuracy, devices


def sft_warmup(model, tokenizer, problems: list[dict], cfg: Config) -> None:
    """Teach the tiny model the format, and some arithmetic, from sloppy demonstrations: 32 a step."""
    rng = random.Random(cfg.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, cfg.sft_steps // 10, cfg.sft_steps)
    model.train()
    bar = progress(cfg.sft_steps, "warm-up")
    for _ in range(cfg.sft_steps):
        batch = []
        for row in rng.choices(problems, k=32):
            text = sloppy_demonstration(row["problem"], rng, cfg.sft_slip)
            batch.append(Sample(row["problem"], row["answer"], encode(tokenizer, row["problem"], cfg),
                                tokenizer(text).input_ids + [tokenizer.eos_token_id], text, 0.0, False, 0.0))
        logp, _, mask = batch_logp(model, batch, cfg, contextlib.nullcontext)
        (-logp[mask].mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        bar.update()
    bar.close()


def seed_step(cfg: Config, step: int) -> None:
    """Seed torch for one step. No step depends on the random numbers that another one drew, so there is no random state
    to save, and an evaluation changes nothing."""
    torch.manual_seed(random.Random(f"{cfg.seed} {step}").getrandbits(63) + rank())


def heldout_accuracy(model, tokenizer, problems: list[dict], cfg: Config, decoder: Decoder | None = None) -> float:
    """Share of right samples, eval_samples a problem, at the training temperature, with the same seed every time."""
    seed_step(cfg, 0)
    model.eval()
    with progress(len(problems) * cfg.eval_samples, "held-out") as bar:
        samples = sum(gather(roll_out(model, tokenizer, problems[rank()::world()], cfg.eval_samples, cfg, bar,
                                      decoder=decoder)), [])
    return sum(s.correct for s in samples) / len(samples)


def use_device(cfg: Config) -> torch.device:
    """The device of this process; raises UserError if it cannot be used."""
    try:
        name = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
        device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and dist.is_initialized() else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {cfg.device} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def choose_precision(device: torch.device) -> torch.dtype | None:
    """autocast's dtype: bf16, or fp16 on a GPU that only emulates bf16 (T4, V100); None is plain fp32."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def with_weights_in(precision: torch.dtype | None, model):
    """The model with parameters of this type. Not model.to(): it rounds buffers too, and a rotary frequency in bf16 points
    somewhere else after a few hundred tokens."""
    for p in model.parameters():
        p.data = p.data.to(precision or p.dtype)
    return model


def shard(model) -> None:
    """FSDP2: every process keeps 1/N of the weights, gradients and optimiser state, and gathers a layer when it is needed."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for module in list(model.modules()):
        if type(module).__name__ in (model._no_split_modules or ()):
            fully_shard(module)
    fully_shard(model)
    model.token_logp = types.MethodType(token_logp, model)
    register_fsdp_forward_method(model, "token_logp")  # weights are gathered for this as they are for forward()


# ------------------------------------------------------------------------------------------------------ checkpoints
# A checkpoint is what from_pretrained loads and trainer.pt, written to checkpoint.tmp, flushed, then renamed: at every
# instant `checkpoint` or the newest `checkpoint-<step>` is complete. Random states are not in it: see seed_step.

MAX_SKIPPED = 10  # optimiser steps in a row with a gradient that is not finite
LOGS = ("metrics.jsonl", "samples.jsonl")


def flush(path: Path) -> None:
    """To the disk, so that not even a power cut leaves a renamed folder with empty files."""
    if path.is_file() or os.name == "posix":  # Windows cannot open folders
        handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def kept(out: Path) -> list[Path]:
    """Older checkpoints, the newest first."""
    return sorted((f for f in out.glob("checkpoint-*") if f.name[11:].isdigit()), key=lambda f: -int(f.name[11:]))


def save(model, tokenizer, optimizer, state: dict, cfg: Config, previous: int) -> None:
    """Write a checkpoint, by all processes together; the one of step `previous` stays if `keep` > 1. Raises UserError."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    out = Path(cfg.out)
    new, current, before = out / "checkpoint.tmp", out / "checkpoint", out / f"checkpoint-{previous}"
    weights, moments = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def write():
        try:
            shutil.rmtree(new, ignore_errors=True)
            model.save_pretrained(new, state_dict=weights)
            tokenizer.save_pretrained(new)
            sizes = {name: (out / name).stat().st_size for name in LOGS}
            torch.save(state | {"optimizer": moments, "config": asdict(cfg), "sizes": sizes}, new / "trainer.pt")
            for path in [*(out / name for name in LOGS), *new.iterdir(), new]:
                flush(path)
            if before.exists():  # the run was resumed from it, because `current` is damaged
                shutil.rmtree(current, ignore_errors=True)
            if current.exists():
                current.rename(before)
            new.rename(current)
            flush(out)
            for old in kept(out)[cfg.keep - 1:]:
                shutil.rmtree(old)
        except Exception as error:  # OSError, but also what safetensors and torch.save make of a full disk
            shutil.rmtree(new, ignore_errors=True)
            raise UserError(f"cannot save step {state['step']} in {out}: {' '.join(str(error).split())[:200]}; the last good "
                            f"checkpoint is of step {previous}. Make room, then type python aspo.py --resume {out}") from None

    first(write)


def load_checkpoint(cfg: Config):
    """(model, tokenizer, trainer state) of the newest checkpoint that can be read; None if none was written yet."""
    out, problems = Path(cfg.out), []
    for folder in (out / "checkpoint", *kept(out)):
        if not folder.exists():
            continue
        try:
            state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
            config, sizes = state["config"], state["sizes"]
            model, tokenizer = load_model(dataclasses.replace(cfg, model=str(folder)))
        except Exception as error:
            problems.append(f"cannot read {folder}: {' '.join(str(error).split())[:200]}")
            continue
        if changed := differences(config, cfg):
            raise UserError(f"{folder} belongs to another run: its --{changed[0]} is {config.get(changed[0])}")
        if any(not (out / name).exists() or (out / name).stat().st_size < size for name, size in sizes.items()):
            raise UserError(f"{out}: {' or '.join(LOGS)} is shorter than at step {state['step']}, when {folder} was written; "
                            "put the files back, or start a new run from it with --model")
        if problems:
            say(f"warning: {'; '.join(problems)}; going on from step {state['step']}")
        return model, tokenizer, state
    if problems:
        raise UserError("; ".join(problems) + ". Start again, or --model another folder")
    return None


def differences(saved: dict, cfg: Config) -> list[str]:
    """Names of the flags that differ and would alter the meaning of a resumed run."""
    return [name for name, value in asdict(cfg).items() if name not in HARMLESS and saved.get(name) != value]


def restore(model, optimizer, scheduler, scaler, stream: ProblemStream, state: dict) -> None:
    """Put a checkpoint's state back, whatever the number of processes was; the model has its weights already."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=StateDictOptions(full_state_dict=True))
    scheduler.load_state_dict(state["scheduler"])
    scaler.load_state_dict(state["scaler"])
    stream.position = state["position"]


# --------------------------------------------------------------------------------------------------- training loop


class Stop:
    """The first SIGINT or SIGTERM lets the current step finish; a second one ends the process at once."""

    signal = 0

    def __init__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number: int, frame) -> None:
        self.signal = number
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, signal.SIG_DFL)
        os.write(2, b"\nstopping after this step; once more to leave at once\n")


def append(path: Path, rows: list[dict]) -> None:
    """Add lines to a JSON Lines file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def log(metrics: dict, samples: list[Sample], tokenizer, cfg: Config) -> None:
    """A step's line of metrics.jsonl, and now and then some whole groups for samples.jsonl."""
    step = metrics["step"]
    if rank() == 0:
        append(Path(cfg.out) / "metrics.jsonl", [metrics])
        if step == 1 or step % cfg.log_samples_every == 0:
            append(Path(cfg.out) / "samples.jsonl", [
                {"step": step, "problem": s.problem, "prompt": tokenizer.decode(s.prompt), "response": s.text,
                 "gold": s.gold, "reward": s.reward, "advantage": s.advantage} for s in samples[:4 * cfg.group_size]])


def announce(model, precision: torch.dtype | None, problems: list[dict], heldout: list[dict], cfg: Config) -> None:
    """What is about to happen."""
    device, minibatches = model.device, cfg.prompts // cfg.minibatch
    say(f"model    {cfg.model}: {type(model).__name__}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
        f"on {f'{world()} x ' * (world() > 1)}{torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}, "
        f"{str(precision or torch.float32).removeprefix('torch.')}\n"
        f"data     {cfg.data}: {len(problems):,} problems to train on, {len(heldout)} held out\n"
        f"rollout  {cfg.prompts} prompts x {cfg.group_size} samples of at most {cfg.max_new_tokens} tokens: up to "
        f"{cfg.prompts * cfg.group_size * cfg.max_new_tokens:,} tokens a step, {cfg.steps} steps\n"
        f"update   {cfg.loss}, {minibatches} mini-batches x {cfg.epochs} epochs = {minibatches * cfg.epochs} optimiser steps "
        f"per rollout; at the first every ratio is 1, as it should be\n"
        f"folder   {cfg.out}")


def summary(m: dict, steps: int) -> str:
    """The one line a step that the user reads."""
    number = lambda value: " n/a " if value is None else f"{value:.3f}"  # no such tokens: every group was uniform
    speed = m["tokens"] / (m["sample_seconds"] + m["update_seconds"])
    line = (f"step {m['step']:>{len(str(steps))}}/{steps}  reward {m['reward']:.3f}  entropy {m['entropy']:.3f}  "
            f"ratio A>0 {number(m['ratio_pos'])} A<0 {number(m['ratio_neg'])}  length {m['response_length']:.1f}  "
            f"cut off {m['truncated']:.0%}  {speed:,.0f} tokens/s")
    return line + (f"  held-out {m['heldout_accuracy']:.3f}" if "heldout_accuracy" in m else "")


def rehearse(model, decoder: Decoder, tokenizer, longest: list[int], cfg: Config, autocast) -> None:
    """Run the longest sampling and update batches that can occur, so that too small a GPU shows it now, not after hours."""
    pad_id, full = pad_token(tokenizer), len(longest) + cfg.max_new_tokens

    def sampling():
        share = min(cfg.group_size, cfg.sample_rows)
        queries = min(max(1, cfg.sample_rows // cfg.group_size), cfg.prompts // world())
        sample(decoder.model, [[*longest, *[pad_id] * (cfg.max_new_tokens - 2)]] * queries, share, stop_ids=[], pad_id=pad_id,
               max_new_tokens=2, temperature=cfg.temperature, decoder=decoder)

    def updating():
        moments = [torch.empty_like(p) for p in model.parameters() for _ in range(2)]  # AdamW's, before it has made them
        rows = [Sample("", "", longest, [pad_id] * cfg.max_new_tokens, "", 0.0, False, 0.0, advantage=1.0)
                for _ in range(max(1, (cfg.micro_tokens - len(longest)) // cfg.max_new_tokens))]
        accumulate(model, None, torch.amp.GradScaler(enabled=False), rows, 1.0, dataclasses.replace(cfg, kl_coef=0.0), autocast)
        model.zero_grad(set_to_none=True)
        del moments

    decoder.model.eval()
    with_memory(cfg, "sample_rows", 1, sampling)
    model.train()
    with_memory(cfg, "micro_tokens", full, updating)


def open_run(cfg: Config) -> None:
    """Make the run folder and its config.json, or check that a run can be resumed there. Raises UserError."""
    out = Path(cfg.out)
    if not cfg.resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not overwritten; type --resume {out} to go on with it, or --out with a new name")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not cfg.resume:
            (out / "config.json").write_text(json.dumps(asdict(cfg), indent=2))
        for name in LOGS:
            (out / name).touch()
    except OSError as error:
        raise UserError(f"cannot write in --out {out}: {error.strerror}; choose another folder") from None


def train(cfg: Config, stop: Stop | None = None) -> dict:
    """Run or resume a training and return the last step's metrics. Raises UserError before any work on bad input."""
    check(cfg)
    out, device = Path(cfg.out), use_device(cfg)
    set_seed(cfg.seed)
    checkpoint = load_checkpoint(cfg) if cfg.resume else None
    state = checkpoint[2] if checkpoint else {"step": 0}
    if state["step"] >= cfg.steps:
        raise UserError(f"{out} is complete after {state['step']} steps; type --steps with a larger number to go on")
    model, tokenizer = load_model(cfg) if checkpoint is None or cfg.kl_coef else checkpoint[:2]
    train_problems, heldout = load_problems(cfg)
    longest = check_prompts(train_problems + heldout, model, tokenizer, cfg)
    transformers.utils.logging.disable_progress_bar()  # of saving; downloads are over
    first(lambda: open_run(cfg))

    precision = choose_precision(device)
    autocast = lambda: torch.autocast(device.type, dtype=precision, enabled=precision is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)
    model.to(device)  # fp32 master weights; AdamW must see them and not a half-precision copy
    announce(model, precision, train_problems, heldout, cfg)

    if cfg.model == "tiny" and (checkpoint is None or cfg.kl_coef):
        sft_warmup(model, tokenizer, train_problems, cfg)
        for p in model.parameters() if world() > 1 else ():
            dist.broadcast(p.data, 0)  # a GPU's warm-up need not be the same to the last bit everywhere
    reference = copy.deepcopy(model).eval() if cfg.kl_coef else None
    if checkpoint:
        model = checkpoint[0].to(device)
    # a half-precision copy samples: half the bytes to read per token, and nothing to cast
    sampler = model if precision is None and not cfg.fsdp else with_weights_in(precision, copy.deepcopy(model))
    decoder = Decoder(sampler, cfg.cuda_graphs)
    if cfg.gradient_checkpointing:  # only in train mode: while sampling it would turn the key/value cache off
        # its new name, activation_checkpointing_enable, is missing from older releases
        warnings.filterwarnings("ignore", ".*gradient_checkpointing_enable.*")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if cfg.fsdp:
        shard(model)
    if cfg.rehearse or (cfg.rehearse is None and device.type == "cuda"):
        rehearse(model, decoder, tokenizer, longest, cfg, autocast)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    scheduler = get_constant_schedule_with_warmup(optimizer, cfg.lr_warmup)
    stream, said, skipped = ProblemStream(train_problems, cfg.seed), set(), 0
    if checkpoint:
        restore(model, optimizer, scheduler, scaler, stream, state)
        before = after = state["before"]
        say(f"resumed after step {state['step']}")
    else:
        before = after = heldout_accuracy(sampler, tokenizer, heldout, cfg, decoder)
        say(f"held-out accuracy before RL {before:.3f}")
    if rank() == 0:
        for name in LOGS:  # what was written after the checkpoint comes again
            os.truncate(out / name, state.get("sizes", {}).get(name, 0))

    saved, metrics = state["step"], {}
    for step in range(saved + 1, cfg.steps + 1):
        started = time.perf_counter()
        seed_step(cfg, step)
        sampler.eval()
        with progress(cfg.prompts // world() * cfg.group_size, f"step {step} sampling") as bar:
            samples = collect(sampler, tokenizer, stream, cfg, bar, decoder)
        rewards = torch.tensor([s.reward for s in samples]).view(-1, cfg.group_size)  # (Q, G)
        for s, advantage in zip(samples, group_advantages(rewards, cfg.divide_by_std).flatten().tolist()):
            s.advantage = advantage
        everyone = sum(gather(samples), [])
        sampled = time.perf_counter()
        with progress(len(samples) * cfg.epochs, f"step {step} updating") as bar:
            stats, grad_norms = update(model, reference, optimizer, scheduler, scaler, samples, cfg, autocast, bar)
        if sampler is not model:
            with torch.no_grad():
                for copied, master in zip(sampler.parameters(), model.parameters()):
                    copied.copy_(whole(master))
        updated = time.perf_counter()

        finite = [norm for norm in grad_norms if math.isfinite(norm)]
        for norm in grad_norms:
            skipped = 0 if math.isfinite(norm) else skipped + 1
        stats = concat(gather({name: values.cpu() for name, values in stats.items()}))
        metrics = {"step": step} | rollout_metrics(everyone, cfg) | token_metrics(stats, cfg) | {
            "grad_norm": sum(finite) / max(1, len(finite)), "skipped_steps": len(grad_norms) - len(finite),
            "lr": scheduler.get_last_lr()[0], "sample_seconds": sampled - started, "update_seconds": updated - sampled}
        if step == cfg.steps or (cfg.eval_every and step % cfg.eval_every == 0):
            metrics["heldout_accuracy"] = after = heldout_accuracy(sampler, tokenizer, heldout, cfg, decoder)
        log(metrics, samples, tokenizer, cfg)
        say(summary(metrics, cfg.steps))
        for key, text in warnings_for(metrics, cfg.prompts // cfg.minibatch * cfg.epochs).items():
            if key not in said:
                said.add(key)
                say(f"warning: {text}")
        stopping = any(gather(stop is not None and stop.signal)) or skipped >= MAX_SKIPPED
        if stopping or step == cfg.steps or (cfg.save_every and step % cfg.save_every == 0):
            save(model, tokenizer, optimizer, {
                "step": step, "before": before, "position": stream.position, "scheduler": scheduler.state_dict(),
                "scaler": scaler.state_dict()}, cfg, saved)
            saved = step
        if skipped >= MAX_SKIPPED:
            raise UserError(f"stopped at step {step}: {skipped} optimiser steps in a row had a gradient that is not finite, and "
                            f"were left out; lower --lr or --temperature. The checkpoint in {out} is good")
        if stopping:
            say(f"stopped after step {step}; to go on type python aspo.py --resume {out}")
            return metrics

    rival = "grpo" if cfg.loss != "grpo" else "aspo"
    say(f"held-out accuracy {before:.3f} -> {after:.3f} ({len(heldout)} problems x {cfg.eval_samples} samples)\n"
        f"results in {out}: metrics.jsonl, samples.jsonl, checkpoint/\n"
        f"next: python aspo.py --model {cfg.model} --loss {rival}" +
        ("\n      python aspo.py --model qwen-0.5b    (a real model on GSM8K, on a GPU)" if cfg.model == "tiny" else ""))
    return metrics


# ----------------------------------------------------------------------------------------------------- command line


def parse(argv: list[str] | None = None) -> Config:
    """Command line -> Config: the model's preset replaces the defaults, what was typed replaces both."""
    parser = HfArgumentParser(Config, description=__doc__.split("\n")[0], allow_abbrev=False)

    def refuse(message: str):
        raise UserError(f"{message}; see python aspo.py --help")

    parser.error = refuse
    typed = parser.parse_known_args(argv)[0]
    if typed.resume:
        path = Path(typed.resume) / "config.json"
        try:
            run = asdict(Config(**json.loads(path.read_text())))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"--resume {typed.resume}: cannot read {path} ({error}); expected the folder of a run") from None
        parser.set_defaults(**run)
        cfg = Config(**vars(parser.parse_args(argv)))
        if changed := differences(run, cfg):
            raise UserError(f"--{changed[0]} {getattr(cfg, changed[0])} would alter the run in {typed.resume}, which has "
                            f"{run[changed[0]]}; leave it out, or start a new run")
        cfg.out = cfg.resume
        return cfg
    real = dict(data="gsm8k", instruction="Please reason step by step, and put your final answer within \\boxed{}.")
    parser.set_defaults(**(real | PRESETS.get(typed.model, (typed.model, {}))[1]))
    cfg = Config(**vars(parser.parse_args(argv)))
    if cfg.data == "arithmetic":
        cfg.instruction = ""
    if cfg.out is None:
        cfg.out = f"runs/{Path(cfg.model).name}-{cfg.loss}-s{cfg.seed}"
    return cfg


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 2 for bad input, 1 if another process is gone, 128 + a signal."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; what fails in the end is reported below
    try:
        cfg = parse(argv)
        if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        stop = Stop()
        train(cfg, stop)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        print(f"error: process {rank()} lost contact with another one, whose own message tells why; the last checkpoint in "
              f"{cfg.out} is good: type torchrun --nproc-per-node N aspo.py --resume {cfg.out}", file=sys.stderr)
        return 1
    if dist.is_initialized():
        dist.destroy_process_group()
    return stop.signal and 128 + stop.signal


if __name__ == "__main__":
    sys.exit(main())
