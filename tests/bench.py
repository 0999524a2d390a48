"""aspo.py beside transformers' `generate` and an update on full logits, or beside TRL: ratios of one run.

    python tests/bench.py                       # the tiny model
    python tests/bench.py --model DIR           # such as a pretrained one of 135 M parameters
    python tests/bench.py --model DIR --trl     # whole steps beside TRL's: pip install trl

The sides take turns, `--rounds` times each: absolute times of a shared machine mean little, its ratios more, and
those of CPU time most; with a GPU they mean nothing.
"""
import argparse
import importlib.util
import sys
import tempfile
import time
from statistics import median

import torch
from conftest import aspo
from torch.nn.utils.rnn import pad_sequence

QUESTIONS = [f"A shop sells {3 + i} red and {2 + 5 * i} blue balls a day. How many in {4 + i} days?" for i in range(64)]


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny", help="tiny, or a folder")
    parser.add_argument("--trl", action="store_true", help="whole steps beside TRL's instead")
    sizes = dict(prompts=4, group=8, prompt_tokens=96, new_tokens=128, micro_tokens=2048, rounds=5)
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args(argv)


def config_of(args, **knobs) -> aspo.Config:
    return aspo.Config(model=args.model, data="arithmetic", prompts=args.prompts, minibatch=args.prompts,
                       group_size=args.group, max_new_tokens=args.new_tokens, micro_tokens=args.micro_tokens, **knobs)


class Bench:
    def __init__(self, args):
        torch.manual_seed(0)
        model, tokenizer = aspo.load_model(args.model)
        vocabulary, generator = model.config.vocab_size, torch.Generator().manual_seed(1)
        self.args, self.cfg = args, config_of(args)
        self.policy = aspo.Policy(model, tokenizer, self.cfg, [aspo.make_problem(dict(problem="1+1", answer="2"))])

        def text(n):
            return torch.randint(3, vocabulary, (int(n),), generator=generator).tolist()

        # Random stop tokens: responses get geometric lengths, and some reach the limit, so that rounds are alike.
        self.policy.max_new_tokens = limit = min(args.new_tokens, 2 * vocabulary)
        self.policy.stop_ids = torch.randperm(vocabulary, generator=generator)[:2 * vocabulary // limit].tolist()
        self.prompts = [text(args.prompt_tokens * (0.75 + (i + 0.5) / args.prompts / 2)) for i in range(args.prompts)]
        self.samples = []  # a rollout for the update, the same for both sides
        lengths = torch.empty(args.prompts, args.group).exponential_(2 / args.new_tokens, generator=generator)
        for prompt, of_group in zip(self.prompts, lengths.clamp(1, args.new_tokens).tolist()):
            for k, length in enumerate(of_group):
                self.samples.append(aspo.Sample("", "", prompt, text(length), advantage=(-1.0) ** k,
                                                sampler_logp=torch.zeros(int(length))))
        self.norm = sum(len(s.response) for s in self.samples)

    def sampling_ours(self) -> int:
        rows = [prompt for prompt in self.prompts for _ in range(self.args.group)]
        return sum(len(tokens) for tokens, _, _ in self.policy.generate(rows))  # all four return how many tokens

    @torch.no_grad()
    def sampling_theirs(self) -> int:
        policy = self.policy
        tokens, mask = (x.repeat_interleave(self.args.group, 0) for x in policy.pad(self.prompts, "left"))
        out = policy.sampler.generate(
            tokens, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, eos_token_id=policy.stop_ids,
            pad_token_id=0, max_new_tokens=policy.max_new_tokens)[:, tokens.shape[1]:].cpu()
        stopped = torch.isin(out, torch.tensor(policy.stop_ids)).long()
        return int((stopped.cumsum(1) - stopped == 0).sum())  # up to and including the first stop token

    def update_ours(self) -> int:
        self.policy.model.zero_grad()
        aspo.accumulate(self.policy, self.samples, self.norm, self.cfg)
        return self.norm

    def update_theirs(self) -> int:
        """Padded rows in the order of sampling, as many as fit at full width; logits of every position."""
        policy = self.policy
        policy.model.zero_grad()
        longest = max(len(s.prompt + s.response) for s in self.samples)
        for micro in aspo.chunks(self.samples, max(1, self.args.micro_tokens // longest)):
            tokens, attention = policy.pad([s.prompt + s.response for s in micro])
            rows = [torch.tensor([0] * len(s.prompt) + [1] * len(s.response)) for s in micro]
            mask = pad_sequence(rows, True)[:, 1:].to(policy.device)
            with policy.half_precision():
                logits = policy.model(tokens, attention_mask=attention, use_cache=False).logits[:, :-1].float()
            logp = logits.log_softmax(-1)
            entropy = -(logp.exp() * logp).sum(-1).detach()
            chosen = logp.gather(-1, tokens[:, 1:, None])[..., 0]
            advantages = torch.tensor([[s.advantage] for s in micro], device=policy.device)
            loss, _ = aspo.policy_loss(chosen, chosen.detach(), advantages, mask, self.cfg, norm=self.norm,
                                       entropy=entropy)
            loss.backward()
        return self.norm


def now() -> tuple:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def timed(work) -> tuple:
    """Tokens, and seconds of wall and of CPU."""
    started, tokens = now(), work()
    return tokens, *(end - start for start, end in zip(started, now()))


def step_of_ours(args) -> tuple:
    """A rollout and two optimiser steps on all of it."""
    cfg = config_of(args, epochs=2, loss="grpo")
    problems = [aspo.make_problem(dict(problem=text, answer="0")) for text in QUESTIONS[:args.prompts]]
    policy = aspo.Policy(*aspo.load_model(args.model), cfg, problems)

    def work():
        samples = aspo.roll_out(policy, problems, args.group, cfg)
        for i, s in enumerate(samples):
            s.advantage = (-1.0) ** i
        aspo.update(policy, samples, cfg)
        return sum(len(s.response) for s in samples)

    return timed(work)


def step_of_trl(args) -> tuple:
    """The same by TRL's GRPOTrainer, in fp32 and without KL."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokens, stamps = [], []

    def reward(completion_ids, **columns):
        tokens.append(sum(map(len, completion_ids)))
        return [float(i % 2) for i in range(len(completion_ids))]  # a signal in every group

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            stamps.append(now())
        on_step_end = on_step_begin

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=args.prompts * args.group // 4, num_iterations=2,
            gradient_accumulation_steps=4, num_generations=args.group, max_completion_length=args.new_tokens,
            max_steps=2, beta=0.0, learning_rate=1e-6, report_to="none", save_strategy="no", logging_strategy="no",
            disable_tqdm=True, bf16=False, gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(),
            model_init_kwargs={"dtype": "float32"})
        data = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in QUESTIONS[:args.prompts]])
        GRPOTrainer(args.model, reward, args=config, train_dataset=data, callbacks=[Clock()]).train()
    assert len(tokens) == 1 and len(stamps) == 4  # one rollout, two optimiser steps
    return tokens[0], *(end - start for start, end in zip(stamps[0], stamps[-1]))


def compare(what: str, ours, theirs, rounds: int) -> float:
    """Print a row of the table. Returns the median of the rounds' ratios."""
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    a, b = (median(tokens / seconds for tokens, seconds, _ in side) for side in zip(*pairs))
    wall, cpu = ([a[0] / a[i] * b[i] / b[0] for a, b in pairs] for i in (1, 2))
    print(f"| {what} | {a:,.0f} | {b:,.0f} | {median(wall):.2f} | {min(wall):.2f} to {max(wall):.2f} | "
          f"{median(cpu):.2f} |", flush=True)
    return median(wall)


def main(argv=None) -> dict:
    args = parse(argv)
    if args.trl and not importlib.util.find_spec("trl"):
        sys.exit("TRL is not installed: pip install trl")
    bench = None if args.trl else Bench(args)
    print(f"{args.model}: {args.prompts} prompts x {args.group} samples of up to {args.new_tokens} tokens, "
          f"{torch.get_num_threads()} threads, {args.rounds} rounds")
    if args.trl:
        rows = {"step": ("TRL", lambda: step_of_ours(args), lambda: step_of_trl(args))}
    else:
        rows = {"sampling": ("generate", lambda: timed(bench.sampling_ours), lambda: timed(bench.sampling_theirs)),
                "update": ("full logits", lambda: timed(bench.update_ours), lambda: timed(bench.update_theirs))}
        ours, theirs = (torch.cat([p.grad.flatten() for p in bench.policy.model.parameters()])
                        for update in (bench.update_ours, bench.update_theirs) if update())
        print(f"gradients agree to {(ours - theirs).norm() / theirs.norm():.1e}")
    print("| tokens/s | ours | theirs | ratio | of the rounds | ratio of CPU time |\n" + "|---" * 6 + "|")
    return {what: compare(f"{what}, beside {other}", *sides, args.rounds) for what, (other, *sides) in rows.items()}


if __name__ == "__main__":
    main()
