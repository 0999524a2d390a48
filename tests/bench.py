"""Our engines beside `model.generate` and an update on full logits: speed and memory, in one run.

    python tests/bench.py                               # the tiny model
    python tests/bench.py --model DIR                   # a local model, such as a pretrained one of 135 M parameters
    python tests/bench.py --model DIR --prompt_tokens 700   # long prompts
    python tests/bench.py --model DIR --engine fast     # without the plain engine, as slow as the baseline
    python tests/bench.py --model DIR --trl             # a whole step beside TRL's: pip install trl accelerate
    python tests/bench.py --model random-0.5b --prompts 32 --group 16 --prompt_tokens 256 --new_tokens 1024   # on a GPU

The sides take turns, `--rounds` times each, and a ratio is that of the medians: absolute times of a shared machine
mean little. Memory is the peak above the loaded model, each in a process of its own.
"""
import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time

import torch
from conftest import aspo
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2Config, Qwen2ForCausalLM

# The public configs of Qwen2.5-0.5B and -1.5B. Speed needs no trained weights.
RANDOM = {
    "random-0.5b": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14),
    "random-1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12),
}
ENGINES = {"fast": aspo.FAST, "plain": aspo.PLAIN}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny", help=f"tiny, a folder, {', '.join(RANDOM)}")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt_tokens", type=int, default=96, help="on average; prompts have from 3/4 to 5/4 of it")
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--micro_tokens", type=int, default=2048, help="of the baseline's micro-batches")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", choices=[*ENGINES, "both"], default="both")
    parser.add_argument("--trl", action="store_true", help="a whole step beside TRL's instead")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one side once, in its own process, for its peak memory
    return parser.parse_args(argv)


def load(name: str):
    """A model and a tokenizer."""
    torch.manual_seed(0)
    model, tokenizer = aspo.tiny_model()
    if name in RANDOM:
        model = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=151936, num_key_value_heads=2, tie_word_embeddings=True, **RANDOM[name]))
    elif name != "tiny":
        return aspo.load_model(aspo.Config(model=name))
    return model, tokenizer


def stop_ids(vocabulary: int, new_tokens: int) -> list[int]:
    """Random stop tokens: an untrained model's responses get geometric lengths, new_tokens / 2 on average."""
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(1))
    return order[:max(1, 2 * vocabulary // new_tokens)].tolist()


def random_prompts(vocabulary: int, args) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    lengths = [int(args.prompt_tokens * (0.75 + (i + 0.5) / args.prompts / 2)) for i in range(args.prompts)]
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def random_samples(vocabulary: int, prompts: list[list[int]], args) -> list:
    """A rollout with geometric response lengths, the same for all sides."""
    generator = torch.Generator().manual_seed(3)
    samples = []
    for prompt in prompts:
        for k in range(args.group):
            length = int(torch.empty(()).exponential_(2 / args.new_tokens, generator=generator)) + 1
            response = torch.randint(3, vocabulary, (min(length, args.new_tokens),), generator=generator).tolist()
            nothing = torch.zeros(len(response))
            samples.append(aspo.Sample("", "", prompt, response, advantage=(-1.0) ** k, sampler_logp=nothing,
                                       old_logp=nothing))
    return samples


class Bench:
    """A side is an engine, or the baseline."""

    def __init__(self, args):
        self.args = args
        self.cfg = aspo.Config(prompts=args.prompts, minibatch=args.prompts, group_size=args.group, epochs=1,
                               max_new_tokens=args.new_tokens)
        self.policy = aspo.Policy(*load(args.model), self.cfg, [aspo.make_problem({"problem": "1+1", "answer": "2"})])
        self.device, vocabulary = self.policy.device, self.policy.model.config.vocab_size
        self.policy.stop_ids, self.policy.longest = stop_ids(vocabulary, args.new_tokens), 1
        self.prompts = random_prompts(vocabulary, args)
        self.samples = random_samples(vocabulary, self.prompts, args)
        self.norm = sum(len(s.response) for s in self.samples)
        self.micro_tokens = {side: self.as_many_micros(engine) for side, engine in ENGINES.items()}

    def padded_micros(self) -> list[list]:
        """The baseline's: in the order of sampling, of the rows that fit at full width."""
        rows = max(1, self.args.micro_tokens // max(len(s.prompt) + len(s.response) for s in self.samples))
        return aspo.chunks(self.samples, rows)

    def as_many_micros(self, engine) -> int:
        """All sides cut the rollout into as many micro-batches: ours have fewer tokens, since a prompt counts once."""
        passes = len(self.padded_micros())
        return next(n for n in itertools.count(64, 8) if len(engine.micro_batches(self.samples, n)) <= passes)

    @contextlib.contextmanager
    def side(self, name: str):
        """An engine with its attention; the baseline has transformers' own."""
        policy = self.policy
        policy.engine, policy.micro_tokens = ENGINES.get(name), self.micro_tokens.get(name)
        for model in {policy.model, policy.sampler}:
            model.set_attn_implementation("packed" if name == "fast" else policy.own_attention)
        yield policy

    def sampling(self, name: str) -> int:
        """Tokens sampled."""
        with self.side(name) as policy:
            if name == "baseline":
                return self.generate(policy)
            rows = [prompt for prompt in self.prompts for _ in range(self.args.group)]
            return sum(len(tokens) for tokens, _, _ in policy.generate(rows))

    @torch.no_grad()
    def generate(self, policy) -> int:
        tokens, mask = policy.pad(self.prompts, "left")
        out = policy.sampler.generate(
            tokens.repeat_interleave(self.args.group, 0), attention_mask=mask.repeat_interleave(self.args.group, 0),
            do_sample=True, top_k=0, top_p=1.0, eos_token_id=policy.stop_ids, pad_token_id=0,
            max_new_tokens=self.args.new_tokens)[:, tokens.shape[1]:].cpu()
        stopped = torch.isin(out, torch.tensor(policy.stop_ids)).long()
        return int((stopped.cumsum(1) - stopped == 0).sum())  # up to and including the first stop token

    def update(self, name: str) -> int:
        """Leaves the gradient in .grad. Tokens trained on."""
        with self.side(name) as policy:
            policy.model.zero_grad()
            if name == "baseline":
                self.full_logits(policy)
            else:
                aspo.accumulate(policy, self.samples, self.norm, self.cfg)
        return self.norm

    def full_logits(self, policy):
        """Right-padded rows, logits of every position."""
        for micro in self.padded_micros():
            tokens, attention = policy.pad([s.prompt + s.response for s in micro])
            mask = [torch.tensor([0] * len(s.prompt) + [1] * len(s.response)) for s in micro]
            mask = pad_sequence(mask, True)[:, 1:].to(self.device)
            with policy.half_precision():
                logits = policy.model(tokens, attention_mask=attention, use_cache=False).logits[:, :-1].float()
            logp = logits.log_softmax(-1)
            entropy = -(logp.exp() * logp).sum(-1).detach()
            chosen = logp.gather(-1, tokens[:, 1:, None])[..., 0]
            advantages = torch.tensor([[s.advantage] for s in micro], device=self.device)
            loss, _ = aspo.policy_loss(chosen, chosen.detach(), advantages, mask, self.cfg, norm=self.norm,
                                       entropy=entropy)
            loss.backward()

    def gradient(self, name: str) -> torch.Tensor:
        if name != "baseline":
            with self.side(name) as policy:
                aspo.remember_old_logp(policy, self.samples)
        self.update(name)
        found = torch.cat([p.grad.flatten() for p in self.policy.model.parameters()])
        self.policy.model.zero_grad()
        return found


QUESTIONS = [f"A shop sells {a} red and {b} blue balls a day. How many balls does it sell in {c} days?"
             for a, b, c in (
                 (3, 4, 5), (12, 7, 3), (20, 15, 2), (9, 9, 9), (31, 4, 6), (8, 2, 7), (14, 6, 10), (5, 5, 4))]


def steps_of_trl(args, rounds: int) -> list[float]:
    """Sampled tokens per second of whole steps of TRL's GRPOTrainer: one optimiser step per rollout, no KL."""
    import tempfile

    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    rows = args.prompts * args.group
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=rows // 4, gradient_accumulation_steps=4,
        num_generations=args.group, max_completion_length=args.new_tokens, max_steps=rounds, beta=0.0,
        learning_rate=1e-6, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, bf16=False,
        gradient_checkpointing=False, use_cpu=not torch.cuda.is_available())
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": QUESTIONS[i % 8]}]} for i in range(args.prompts)])
    tokens, speeds, started = [], [], 0.0

    def reward(completion_ids, **columns):
        tokens.append(sum(map(len, completion_ids)))
        return [float(i % 2) for i in range(len(completion_ids))]  # a signal in every group

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            nonlocal started
            started = time.perf_counter()

        def on_step_end(self, *_, **__):
            speeds.append(tokens[-1] / (time.perf_counter() - started))

    GRPOTrainer(args.model, reward, args=config, train_dataset=data, callbacks=[Clock()]).train()
    return speeds


def steps_of_ours(args, rounds: int) -> list[float]:
    """The same steps by aspo.py."""
    cfg = dataclasses.replace(
        aspo.parse(["--model", args.model, "--data", "arithmetic", "--loss", "grpo"]), prompts=args.prompts,
        minibatch=args.prompts, group_size=args.group, epochs=1, max_new_tokens=args.new_tokens,
        micro_tokens=args.micro_tokens)
    problems = [aspo.make_problem({"problem": QUESTIONS[i % 8], "answer": "0"}) for i in range(args.prompts)]
    policy, speeds = aspo.Policy(*aspo.load_model(cfg), cfg, problems), []
    for _ in range(rounds):
        started = time.perf_counter()
        samples = aspo.roll_out(policy, problems, args.group, cfg)
        for i, s in enumerate(samples):
            s.advantage = (-1.0) ** i
        aspo.update(policy, samples, cfg)
        speeds.append(sum(len(s.response) for s in samples) / (time.perf_counter() - started))
    return speeds


def timed(work, side: str, device) -> float:
    """Response tokens per second."""
    started = time.perf_counter()
    tokens = work(side)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return tokens / (time.perf_counter() - started)


def resident(what: str = "VmRSS:") -> int:
    """Bytes in memory now, or at most so far (VmHWM). Not ru_maxrss, which a child takes over from its parent."""
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))


def peak(work, device) -> float:
    """GiB that work() needs at most, above what is there before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak of loading
    before = resident()
    work()
    return (resident("VmHWM:") - before) / 2**30


def peak_of(what: str, side: str) -> float:
    command = [sys.executable, __file__, *sys.argv[1:], "--only", f"{what} {side}"]
    # Lest glibc's malloc hold back what it was given back, which then counts.
    unspent = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE,
                                     env=os.environ | unspent).stdout.decode().splitlines()[-1])


def main() -> None:
    args = parse()
    if args.trl:
        print(f"{args.model}: whole steps of {args.prompts} prompts x {args.group} samples of up to {args.new_tokens} "
              "tokens, sampled tokens/s\n| ours | TRL | ours / TRL |\n|---|---|---|")
        steps = 1 + torch.cuda.is_available()  # the first one captures graphs
        rounds = [(steps_of_ours(args, steps)[-1], steps_of_trl(args, steps)[-1]) for _ in range(args.rounds)]
        for a, b in rounds:
            print(f"| {a:.0f} | {b:.0f} | {a / b:.2f} |")
        return
    bench = Bench(args)
    if args.only:
        what, side = args.only.split()
        print(json.dumps(peak(lambda: getattr(bench, what)(side), bench.device)))
        return
    sides = [*(ENGINES if args.engine == "both" else [args.engine]), "baseline"]
    where = torch.cuda.get_device_name() if bench.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    parameters = sum(p.numel() for p in bench.policy.model.parameters()) / 1e6
    print(f"{args.model}: {parameters:.1f} M parameters, {where}; {args.prompts} prompts of about "
          f"{args.prompt_tokens} tokens x {args.group} samples of up to {args.new_tokens}; {args.rounds} rounds")
    theirs = bench.gradient("baseline")
    gaps = {side: ((bench.gradient(side) - theirs).norm() / theirs.norm()).item() for side in sides[:-1]}
    print("gradients agree to", ", ".join(f"{gap:.1e} ({side})" for side, gap in gaps.items()))
    del theirs
    print(f"| | {' | '.join(sides)} | {sides[0]} / baseline | smallest and largest ratio of a round |\n"
          f"|{'---|' * (len(sides) + 3)}")
    for what, unit in (("sampling", "generate"), ("update", "full logits")):
        speeds = [[timed(getattr(bench, what), side, bench.device) for side in sides] for _ in range(args.rounds)]
        medians, each = [statistics.median(column) for column in zip(*speeds)], [row[0] / row[-1] for row in speeds]
        print(f"| {what}, tokens/s (baseline: {unit}) | {' | '.join(f'{m:,.0f}' for m in medians)} | "
              f"{medians[0] / medians[-1]:.2f} | {min(each):.2f} {max(each):.2f} |", flush=True)
    for what in ("sampling", "update"):
        peaks = [peak_of(what, side) for side in sides]
        print(f"| {what}, peak GiB above the model | {' | '.join(f'{p:.2f}' for p in peaks)} | "
              f"{peaks[0] / peaks[-1]:.2f} | |", flush=True)


if __name__ == "__main__":
    main()
