"""Our sampler and update beside `model.generate` and an update on full logits: speed and memory, in one run.

    python tests/bench.py                               # the tiny model
    python tests/bench.py --model DIR                   # a local model, such as a pretrained one of 135 M parameters
    python tests/bench.py --model DIR --prompt_tokens 700   # long prompts
    python tests/bench.py --model DIR --trl             # a whole step beside TRL's GRPOTrainer; needs pip install trl accelerate
    python tests/bench.py --model random-0.5b --prompts 32 --group 16 --prompt_tokens 256 --new_tokens 1024   # on a GPU

Both sides take turns, `--rounds` times each, and the ratio is that of the medians: absolute times of a shared machine
mean little. Memory is the peak above the loaded model, each in a process of its own.
"""
import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time

import torch
from conftest import aspo
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

# The public configs of Qwen2.5-0.5B and -1.5B. Speed needs no trained weights.
RANDOM = {
    "random-0.5b": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14),
    "random-1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny", help=f"tiny, a folder, {', '.join(RANDOM)}")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt_tokens", type=int, default=96, help="on average; prompts have from 3/4 to 5/4 of it")
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--micro_tokens", type=int, default=2048, help="of the baseline's micro-batches; ours are as many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trl", action="store_true", help="a whole step beside TRL's instead")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one side once, in its own process, for its peak memory
    return parser.parse_args()


def load(name: str, device: torch.device):
    torch.manual_seed(0)
    if name == "tiny":
        model = aspo.tiny_model()[0]
    elif name in RANDOM:
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=151936, num_key_value_heads=2, tie_word_embeddings=True, **RANDOM[name]))
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    model.set_attn_implementation("packed")  # transformers' sdpa wherever nothing is packed
    return model.to(device)


def stop_ids(model, new_tokens: int) -> list[int]:
    """Random stop tokens, as many as end an untrained model's responses after new_tokens / 2 on average: geometric lengths."""
    vocabulary = model.config.vocab_size
    return torch.randperm(vocabulary, generator=torch.Generator().manual_seed(1))[:max(1, 2 * vocabulary // new_tokens)].tolist()


def random_prompts(model, args) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    lengths = [int(args.prompt_tokens * (0.75 + (i + 0.5) / args.prompts / 2)) for i in range(args.prompts)]
    return [torch.randint(3, model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]


class Bench:
    def __init__(self, args):
        self.args, self.device = args, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load(args.model, self.device)
        self.precision = aspo.choose_precision(self.device)
        self.autocast = lambda: torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision is not None)
        self.prompts, self.stops = random_prompts(self.model, args), stop_ids(self.model, args.new_tokens)
        self.cfg = aspo.Config(prompts=args.prompts, minibatch=args.prompts, group_size=args.group, epochs=1,
                               max_new_tokens=args.new_tokens)
        # both sides cut the rollout into as many micro-batches: ours have fewer tokens, since a prompt counts once
        passes, samples = len(self.padded_micros()), self.samples()
        self.cfg.micro_tokens = next(n for n in itertools.count(64, 8) if len(aspo.micro_batches(samples, n)) <= passes)
        self.half = None

    def sampler(self):
        if self.half is None:
            self.half = self.model
            if self.precision is not None:
                self.half = aspo.with_weights_in(self.precision, load(self.args.model, self.device))
        return self.half.eval()

    def ours_sampling(self) -> int:
        drawn = aspo.sample(self.sampler(), self.prompts, self.args.group, stop_ids=self.stops, pad_id=0,
                            max_new_tokens=self.args.new_tokens)
        return sum(len(response) for response, _, _ in drawn)

    @torch.no_grad()
    def theirs_sampling(self) -> int:
        width = max(map(len, self.prompts))
        tokens = torch.tensor([[0] * (width - len(p)) + p for p in self.prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in self.prompts], device=self.device)
        out = self.sampler().generate(tokens.repeat_interleave(self.args.group, 0), do_sample=True, top_k=0, top_p=1.0,
                                      attention_mask=mask.repeat_interleave(self.args.group, 0), eos_token_id=self.stops,
                                      pad_token_id=0, max_new_tokens=self.args.new_tokens)[:, width:].cpu()
        stopped = torch.isin(out, torch.tensor(self.stops)).long()
        return int((stopped.cumsum(1) - stopped == 0).sum())  # up to and including the first stop token

    def samples(self) -> list:
        """A rollout with geometric response lengths, the same for both sides."""
        generator = torch.Generator().manual_seed(3)
        samples = []
        for prompt in self.prompts:
            for k in range(self.args.group):
                length = int(torch.empty(()).exponential_(2 / self.args.new_tokens, generator=generator)) + 1
                response = torch.randint(3, self.model.config.vocab_size, (min(length, self.args.new_tokens),), generator=generator)
                samples.append(aspo.Sample("", "", prompt, response.tolist(), "", 0.0, False, 0.0, advantage=(-1.0) ** k))
        return samples

    def ours_update(self) -> int:
        samples, scaler = self.samples(), torch.amp.GradScaler(enabled=False)
        self.model.train()
        norm = sum(len(s.response) for s in samples)
        aspo.accumulate(self.model, None, scaler, samples, norm, self.cfg, self.autocast)
        return norm

    def padded_micros(self) -> list[list]:
        """Micro-batches in the order of sampling, of the rows that fit at full width."""
        samples = self.samples()
        rows = max(1, self.args.micro_tokens // max(len(s.prompt) + len(s.response) for s in samples))
        return aspo.groups_of(samples, rows)

    def theirs_update(self) -> int:
        """Right-padded rows, logits of every position."""
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        micros = self.padded_micros()
        norm = sum(len(s.response) for micro in micros for s in micro)
        for micro in micros:
            right_pad = lambda rows: torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), batch_first=True).to(self.device)
            tokens = right_pad([s.prompt + s.response for s in micro])
            attention = right_pad([[1] * len(s.prompt + s.response) for s in micro])
            mask = right_pad([[0] * len(s.prompt) + [1] * len(s.response) for s in micro])[:, 1:].bool()
            with self.autocast():
                logits = self.model(tokens, attention_mask=attention, use_cache=False).logits[:, :-1].float()
            logp = logits.log_softmax(-1)
            entropy = -(logp.exp() * logp).sum(-1).detach()
            chosen = logp.gather(-1, tokens[:, 1:, None])[..., 0]
            advantages = torch.tensor([[s.advantage] for s in micro], device=self.device)
            loss, _ = aspo.policy_loss(chosen, chosen.detach(), advantages, mask, self.cfg, norm=norm, entropy=entropy)
            loss.backward()
        return norm

    def gradient(self) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in self.model.parameters()])

    def shares(self) -> tuple[float, float, float]:
        """Tokens that our update computes, as a share of those of all prompts and responses; padding as a share of
        attention's queries, and of all multiplications of a forward pass."""
        samples, config = self.samples(), self.model.config
        packs = [aspo.pack(micro, "cpu") for micro in aspo.micro_batches(samples, self.cfg.micro_tokens)]
        tokens, predicted = (sum(getattr(packed, name).numel() for packed in packs) for name in ("tokens", "targets"))
        queries = real_queries = scores = real_scores = 0
        for packed in packs:
            real = torch.zeros(len(packed.queries), dtype=torch.bool)
            real[packed.back] = True
            for block, part in zip(packed.blocks, real.split([len(b.visible) * b.visible.shape[2] for b in packed.blocks])):
                rows, columns = part.view(len(block.visible), -1).sum(1), block.visible.any(2).sum(-1)[:, 0]
                queries, real_queries = queries + len(part), real_queries + int(rows.sum())
                scores, real_scores = scores + block.visible.numel(), real_scores + int((rows * columns).sum())
        head = config.vocab_size * config.hidden_size
        each = 2 * config.hidden_size * config.num_hidden_layers  # of a score: q . k, and p v
        dense = tokens * (sum(p.numel() for p in self.model.base_model.parameters()) - head) + predicted * head
        return (tokens / sum(len(s.prompt) + len(s.response) for s in samples), 1 - real_queries / queries,
                each * (scores - real_scores) / (dense + each * scores))


QUESTIONS = [f"A shop sells {a} red and {b} blue balls a day. How many balls does it sell in {c} days?"
             for a, b, c in ((3, 4, 5), (12, 7, 3), (20, 15, 2), (9, 9, 9), (31, 4, 6), (8, 2, 7), (14, 6, 10), (5, 5, 4))]


def steps_of_trl(args, rounds: int) -> list[float]:
    """Sampled tokens per second of whole steps of TRL's GRPOTrainer: one optimiser step per rollout, no KL."""
    import tempfile

    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    rows = args.prompts * args.group
    config = GRPOConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=rows // 4, gradient_accumulation_steps=4,
                        num_generations=args.group, max_completion_length=args.new_tokens, max_steps=rounds, beta=0.0,
                        learning_rate=1e-6, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
                        bf16=False, gradient_checkpointing=False, use_cpu=not torch.cuda.is_available())
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
    cfg = aspo.parse(["--model", args.model, "--data", "arithmetic", "--loss", "grpo"])
    cfg = aspo.dataclasses.replace(cfg, prompts=args.prompts, minibatch=args.prompts, group_size=args.group, epochs=1,
                                   max_new_tokens=args.new_tokens, micro_tokens=args.micro_tokens)
    device = aspo.use_device(cfg)
    precision = aspo.choose_precision(device)
    autocast = lambda: torch.autocast(device.type, dtype=precision, enabled=precision is not None)
    model, tokenizer = aspo.load_model(cfg)
    model.to(device)
    sampler = model if precision is None else aspo.with_weights_in(precision, aspo.copy.deepcopy(model))
    decoder, optimizer = aspo.Decoder(sampler), torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    scheduler, speeds = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0), []
    problems = [{"problem": QUESTIONS[i % 8], "answer": "0"} for i in range(args.prompts)]
    for _ in range(rounds):
        started = time.perf_counter()
        sampler.eval()
        samples = aspo.roll_out(sampler, tokenizer, problems, args.group, cfg, decoder=decoder)
        for i, s in enumerate(samples):
            s.advantage = (-1.0) ** i
        aspo.update(model, None, optimizer, scheduler, torch.amp.GradScaler(enabled=False), samples, cfg, autocast)
        speeds.append(sum(len(s.response) for s in samples) / (time.perf_counter() - started))
    return speeds


def timed(work, device) -> float:
    """Response tokens per second."""
    started = time.perf_counter()
    tokens = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return tokens / (time.perf_counter() - started)


def resident(what: str = "VmRSS:") -> int:
    """Bytes in memory now, or at most so far (VmHWM). Not ru_maxrss, which a child process takes over from its parent."""
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))


def peak_of(side: str, args) -> float:
    """GiB above the loaded model."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", side]
    unspent = {"MALLOC_MMAP_THRESHOLD_": "1048576"}  # lest glibc's malloc hold back what it was given back, which then counts
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE,
                                     env=os.environ | unspent).stdout.decode().splitlines()[-1])


def main() -> None:
    args = parse()
    if args.trl:
        print(f"{args.model}: whole steps of {args.prompts} prompts x {args.group} samples of up to {args.new_tokens} tokens, "
              "sampled tokens/s\n| ours | TRL | ours / TRL |\n|---|---|---|")
        steps = 1 + torch.cuda.is_available()  # the first one captures graphs
        rounds = [(steps_of_ours(args, steps)[-1], steps_of_trl(args, steps)[-1]) for _ in range(args.rounds)]
        for a, b in rounds:
            print(f"| {a:.0f} | {b:.0f} | {a / b:.2f} |")
        return
    bench = Bench(args)
    if args.only:
        work = getattr(bench, args.only)
        if "sampling" in args.only:
            bench.sampler()
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            peak = torch.cuda.max_memory_allocated() - before
        else:
            before = resident()
            work()
            peak = resident("VmHWM:") - before
        print(json.dumps(peak / 2**30))
        return
    where = torch.cuda.get_device_name() if bench.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    parameters = sum(p.numel() for p in bench.model.parameters()) / 1e6
    print(f"{args.model}: {parameters:.1f} M parameters, {where}; {args.prompts} prompts of about "
          f"{args.prompt_tokens} tokens x {args.group} samples of up to {args.new_tokens}; {args.rounds} rounds")
    bench.ours_update()
    ours = bench.gradient()
    bench.theirs_update()
    theirs = bench.gradient()
    computed, padding, waste = bench.shares()
    print(f"gradients agree to {((ours - theirs).norm() / theirs.norm()).item():.1e}; our update computes {computed:.0%} of the tokens; "
          f"padding is {padding:.0%} of attention's queries, {waste:.1%} of all multiplications")
    del ours, theirs
    bench.model.zero_grad(set_to_none=True)
    print("| | ours | baseline | ours / baseline | smallest and largest ratio of a round |\n|---|---|---|---|---|")
    for what, unit in (("sampling", "generate"), ("update", "full logits")):
        speeds = [[timed(getattr(bench, f"{side}_{what}"), bench.device) for side in ("ours", "theirs")] for _ in range(args.rounds)]
        a, b = (statistics.median(column) for column in zip(*speeds))
        each = [x / y for x, y in speeds]
        print(f"| {what}, tokens/s (baseline: {unit}) | {a:,.0f} | {b:,.0f} | {a / b:.2f} | {min(each):.2f} {max(each):.2f} |", flush=True)
    for what in ("sampling", "update"):
        a, b = peak_of(f"ours_{what}", args), peak_of(f"theirs_{what}", args)
        print(f"| {what}, peak GiB above the model | {a:.2f} | {b:.2f} | {a / b:.2f} | |", flush=True)


if __name__ == "__main__":
    main()
