"""The first hour on a GPU in one command: what a CPU cannot prove of aspo.py, as a table for the README.

    python tests/gpu.py            # all, at most eight minutes; exit status 1 names what failed, 2 is no GPU
    python tests/gpu.py a d        # these checks alone

(a) CUDA graphs and both engines give the same tokens  (b) bf16 and fp16  (c) a real step and its memory  (d) out of
memory, and a failed capture  (e) speed, beside the plain engine and the limits of the hardware  (f) a kill and a resume
(g) two processes, on two GPUs. Nothing is downloaded: the model has the shape of Qwen2.5-0.5B and random weights.
"""
import argparse
import contextlib
import copy
import dataclasses
import gc
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

import bench
import torch
import transformers
from conftest import ROOT, aspo
from memory import SHAPES, needed

GIB, MINUTES = 2**30, 8


class Lab:
    """A random model in a folder, with problems, at the sizes of the machine."""

    def __init__(self, folder: Path, device: str = "cuda", tiny: bool = False):
        self.folder, self.device, self.tiny, self.cuda = folder, device, tiny, device == "cuda"
        self.prompts, self.group, self.prompt_tokens, self.new_tokens = (4, 4, 12, 16) if tiny else (32, 8, 256, 256)
        self.model, self.data = str(folder / "model"), str(folder / "problems.jsonl")
        model, tokenizer = bench.load("tiny" if tiny else "random-0.5b")
        if not tiny:
            model.get_input_embeddings().weight.data *= 4  # likely and unlikely tokens, as a trained model has
        # Random stop tokens: responses of geometric lengths.
        model.generation_config.eos_token_id = bench.stop_ids(model.config.vocab_size, self.new_tokens)
        for part in (model, tokenizer):
            part.save_pretrained(self.model)
        rng = random.Random(0)
        least, most = 3 * self.prompt_tokens // 4, 5 * self.prompt_tokens // 4
        lengths = [rng.randint(least, most) for _ in range(5 * self.prompts // 4)]
        rows = [{"problem": "".join(rng.choices("0123456789", k=n)), "answer": "1"} for n in lengths]
        Path(self.data).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def cfg(self, **knobs) -> aspo.Config:
        small = dict(prompts=4, minibatch=2, group_size=4, max_new_tokens=self.new_tokens) if self.tiny else {}
        return aspo.Config(**dict(model=self.model, data=self.data, instruction="", device=self.device,
                                  out=str(self.folder / "run")) | small | knobs)

    def policy(self, dtype: torch.dtype | None = None, **knobs) -> aspo.Policy:
        """In the precision of the device, or another one by force."""
        cfg = self.cfg(**knobs)
        problems, _ = aspo.load_problems(cfg)
        policy = aspo.Policy(*aspo.load_model(cfg), cfg, problems)
        policy.problems = problems[:self.prompts]
        policy.rows = [policy.encode(p) for p in policy.problems for _ in range(self.group)]
        if dtype:
            policy.dtype, policy.sampler = dtype, policy.model
            if dtype != torch.float32:
                policy.sampler = aspo.weights_in(dtype, copy.deepcopy(policy.model))
            policy.scaler = torch.amp.GradScaler(policy.device.type, enabled=dtype == torch.float16)
        return policy

    def draw(self, policy, graphs: bool | None = None) -> list[tuple]:
        """Responses to the prompts from one seed; graphs: with a new decoder, that has them or not."""
        torch.manual_seed(0)
        if graphs is not None:
            policy.decoder = aspo.Decoder(policy.sampler, bucketed=True)
            policy.decoder.graphs_on = graphs
        return policy.generate(policy.rows)

    def rollout(self, policy) -> list:
        samples = aspo.roll_out(policy, policy.problems, self.group, policy.cfg, lambda response, row: 1.0)
        for k, s in enumerate(samples):
            s.advantage = (-1.0) ** k
        return samples

    def seconds(self, work) -> float:
        started = time.perf_counter()
        work()
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started


def equal(drawn: list[tuple], others: list[tuple]) -> float:
    """Share of responses with the same tokens."""
    return sum(a[0] == b[0] for a, b in zip(drawn, others, strict=True)) / len(drawn)


# Each check yields rows of the table: what, measured, wanted, and whether that is so, None where nothing can fail.


def same_tokens(lab: Lab):
    policy = lab.policy()
    for what, policy.temperature in (("greedy", 0.0), ("one seed", 1.0)):
        plain, recorded = lab.draw(policy, graphs=False), lab.draw(policy, graphs=True)
        replayed = lab.draw(policy)  # by now every size has its graph
        n_graphs = len(policy.decoder.graphs)
        shares = [equal(plain, recorded), equal(plain, replayed)]
        yield (f"CUDA graphs, {what}: responses equal to plain steps, while recording and replayed, {n_graphs} graphs",
               f"{shares[0]:.3f}, {shares[1]:.3f}", "1, 1", shares == [1, 1] and n_graphs > 0)
    policy = lab.policy(torch.float32)
    policy.temperature = 0.0
    fast = lab.draw(policy)
    policy.engine = aspo.PLAIN
    policy.model.set_attn_implementation(policy.own_attention)
    share = equal(fast, lab.draw(policy))
    yield "fast and plain engine, greedy, fp32: equal responses", f"{share:.3f}", "0.95 or more", share >= 0.95


def precision(lab: Lab):
    # Mean gap of log-probabilities on a CPU: 0.004 to 0.009, and 0.001 nats.
    for name, dtype, limit in (("bf16", torch.bfloat16, 0.03), ("fp16", torch.float16, 0.01)):
        policy = lab.policy(dtype, max_new_tokens=min(128, lab.new_tokens), lr=1e-6)
        samples = lab.rollout(policy)
        aspo.remember_old_logp(policy, samples)
        gap = torch.cat([(s.old_logp.cpu() - s.sampler_logp.cpu()).abs() for s in samples]).mean().item()
        yield f"{name}: mean gap of sampler and trainer, nats", f"{gap:.4f}", f"under {limit}", gap < limit
        norm = sum(len(s.response) for s in samples)
        for tries in range(8):  # the scaler begins high, and overflows first
            aspo.accumulate(policy, samples, norm, policy.cfg)
            if (grad_norm := policy.optimizer_step()) < float("inf"):
                break
        finite = 0 < grad_norm < float("inf")
        yield f"{name}: gradient norm after {tries} skipped steps", f"{grad_norm:.3g}", "finite", finite
        before = policy.scaler.get_scale()
        aspo.accumulate(policy, samples, norm, policy.cfg)
        next(policy.model.parameters()).grad.view(-1)[0] = float("inf")
        policy.optimizer_step()
        after = policy.scaler.get_scale()
        wanted = before / 2 if dtype == torch.float16 else before
        yield f"{name}: scale of the loss around a skipped step", f"{before:g}, {after:g}", f"{before:g}, {wanted:g}", (
            policy.skipped == 1 and after == wanted)


def real_step(lab: Lab):
    small = vars(lab.cfg()) if lab.tiny else {}
    cfg = dataclasses.replace(
        aspo.parse(["--model", "qwen-0.5b"]), **small | dict(
            model=lab.model, data=lab.data, instruction="", device=lab.device, out=str(lab.folder / "step"), steps=2,
            eval_problems=lab.prompts // 4, eval_every=0, save_every=0))
    rng, metrics = random.Random(0), {}
    peak = bench.peak(lambda: metrics.update(aspo.train(cfg, lambda response, row: float(rng.random() < 0.5))),
                      torch.device(lab.device))
    formula = sum(needed(SHAPES["qwen-0.5b"], cfg, 5 * lab.prompt_tokens // 4).values()) / GIB
    yield ("two steps at the defaults of qwen-0.5b, peak GiB", f"{peak:.1f}", f"at most 1.1 x formula, {formula:.1f}",
           peak < 1.1 * formula)
    if lab.cuda:
        yield "GiB that the allocator held at most", f"{torch.cuda.max_memory_reserved() / GIB:.1f}", "", None
    yield (f"its second step: seconds of sampling and of update, {metrics['tokens']:,} tokens",
           f"{metrics['sample_seconds']:.1f}, {metrics['update_seconds']:.1f}", "", None)
    yield ("its second step: mismatch of sampler and trainer, skipped steps",
           f"{metrics['sampler_mismatch']:.4f}, {metrics['skipped_steps']}", "under 0.03, 0",
           metrics["sampler_mismatch"] < 0.03 and not metrics["skipped_steps"])


@contextlib.contextmanager
def little_memory(lab: Lab, policy, gib: float, size: int):
    """On a GPU gib more than now; on a CPU as if batches of more than `size` rows or tokens did not fit."""
    gc.collect()
    if lab.cuda:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + gib * GIB) / total))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    whole = policy.engine

    def refuse(n: int):
        if n > size:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    def generate(policy, prompts):
        refuse(len(prompts))
        return whole.generate(policy, prompts)

    def token_logp(policy, model, samples):
        refuse(sum(len(s.prompt) + len(s.response) for s in samples))
        return whole.token_logp(policy, model, samples)

    policy.engine = whole._replace(generate=generate, token_logp=token_logp)
    yield
    policy.engine = whole


def out_of_memory(lab: Lab):
    policy = lab.policy(epochs=1)
    n, rows = len(policy.rows), min(256, len(policy.rows))
    policy.sample_rows = rows
    with little_memory(lab, policy, 1.5, rows // 2):
        done = len(lab.draw(policy))
    yield (f"out of memory in sampling: responses, rows instead of {rows}", f"{done}, {policy.sample_rows}",
           f"{n}, fewer", done == n and policy.sample_rows < rows)

    record, failures = aspo.Decoder.record, [torch.OutOfMemoryError("CUDA out of memory. (provoked in a capture)")]
    policy.sample_rows = rows
    policy.decoder = aspo.Decoder(policy.sampler)
    policy.decoder.graphs_on = True
    with mock.patch.object(aspo.Decoder, "record", lambda self, size: (
            throw(failures.pop()) if failures else record(self, size) if lab.cuda else None)):
        done = len(lab.draw(policy))
    yield (f"out of memory in a capture: responses, rows instead of {rows}", f"{done}, {policy.sample_rows}",
           f"{n}, fewer", done == n and policy.sample_rows < rows)

    # A capture that the driver breaks off: the step reads the host, as models with rope type dynamic do.
    policy.sample_rows, plain_step = rows, aspo.Decoder.step
    plain = lab.draw(policy, graphs=False)

    def step(self):
        plain_step(self)
        if lab.cuda and torch.cuda.is_current_stream_capturing():
            self.row.sum().item()

    with mock.patch.object(aspo.Decoder, "step", step), contextlib.ExitStack() as stack:
        if not lab.cuda:
            stack.enter_context(mock.patch.object(aspo.Decoder, "record", lambda self, size: throw(RuntimeError(
                "CUDA error: operation not permitted when stream is capturing"))))
        share = equal(plain, lab.draw(policy, graphs=True))
    yield ("a capture that fails: responses equal to plain steps, graphs still on",
           f"{share:.3f}, {policy.decoder.graphs_on}", "1, False", share == 1 and not policy.decoder.graphs_on)

    policy.decoder = None
    samples, micro_tokens = lab.rollout(policy), min(8192, sum(len(ids) for ids in policy.rows))
    policy.micro_tokens = micro_tokens
    with little_memory(lab, policy, 12, micro_tokens // 2):
        _, norms = aspo.update(policy, samples, policy.cfg)
    yield (f"out of memory in the update: steps, tokens instead of {micro_tokens}",
           f"{len(norms)}, {policy.micro_tokens}", "some, fewer", len(norms) > 0 and policy.micro_tokens < micro_tokens)
    message = ""
    with little_memory(lab, policy, 0.05, 0):
        try:
            aspo.update(policy, samples, policy.cfg)
        except aspo.UserError as error:
            message = str(error)
    yield "no memory at all", message, "it says what to lower", "--micro_tokens" in message


def throw(error: Exception):
    raise error


def speed(lab: Lab):
    sizes = dict(prompts=lab.prompts, group=lab.group, prompt_tokens=lab.prompt_tokens, new_tokens=2 * lab.new_tokens)
    side = bench.Bench(bench.parse(["--model", lab.model, *(f"--{k}={v}" for k, v in sizes.items())]))
    policy, params = side.policy, sum(p.numel() for p in side.policy.model.base_model.parameters())
    side.micro_tokens = dict.fromkeys(side.micro_tokens, 8192)
    config, n = policy.model.config, 2**28 if lab.cuda else 2**18
    x, y = torch.ones(n, device=lab.device), torch.empty(n, device=lab.device)
    m = torch.ones(2 * (8192 if lab.cuda else 128,), device=lab.device, dtype=torch.bfloat16)
    for work in (lambda: y.copy_(x), lambda: m @ m):  # warm
        lab.seconds(work)
    bandwidth = 10 * 2 * 4 * n / lab.seconds(lambda: [y.copy_(x) for _ in range(10)])
    rate = 10 * 2 * len(m) ** 3 / lab.seconds(lambda: [m @ m for _ in range(10)])
    del x, y, m
    yield "copy bandwidth, TB/s, and bf16 matrix rate, TFLOP/s", f"{bandwidth / 1e12:.2f}, {rate / 1e12:.0f}", "", None

    def sample():
        with side.side("fast"):
            lengths[:] = [len(tokens) for tokens, _, _ in policy.generate(rows)]

    rows, lengths = [p for p in side.prompts for _ in range(lab.group)], []
    sample()  # graphs are recorded
    seconds, plain = lab.seconds(sample), lab.seconds(lambda: side.sampling("plain"))
    weights = sum(p.numel() * p.element_size() for p in policy.sampler.parameters())
    kv = (2 * config.num_hidden_layers * config.num_key_value_heads * config.hidden_size // config.num_attention_heads *
          next(policy.sampler.parameters()).element_size())
    moved = (max(lengths) - 1) * weights + kv * sum(
        (length - 1) * len(p) + length * (length - 1) // 2 for p, length in zip(rows, lengths))
    yield (f"sampling, tokens/s, {len(rows)} rows, prompts of {lab.prompt_tokens}, up to {sizes['new_tokens']} new",
           f"{sum(lengths) / seconds:,.0f}", "", None)
    yield "the plain engine's seconds / the fast one's", f"{plain / seconds:.1f}", "goal 8", None
    share = moved / bandwidth / seconds
    yield "share of decoding's limit, weights and live cache once a step", f"{share:.2f}", "goal 0.5", None

    side.update("fast"), side.update("plain")
    seconds, plain = (lab.seconds(lambda: side.update(name)) for name in ("fast", "plain"))
    embedding = config.vocab_size * config.hidden_size
    packs = [aspo.pack(micro, torch.device("cpu")) for micro in aspo.FAST.micro_batches(side.samples, 8192)]
    tokens, targets = (sum(getattr(pack, name).numel() for pack in packs) for name in ("tokens", "targets"))
    flops = 6 * ((params - embedding) * tokens + embedding * targets)
    yield "update, trained tokens/s, one epoch", f"{side.norm / seconds:,.0f}", "", None
    yield "the plain engine's seconds / the fast one's, update", f"{plain / seconds:.1f}", "", None
    yield "share of the matrix rate, update", f"{flops / rate / seconds:.2f}", "goal 0.35", None


FLAGS = ("--sft_steps 20 --prompts 4 --group_size 4 --minibatch 2 --max_new_tokens 16 --overlong_buffer 15 "
         "--eval_problems 8 --eval_every 0").split()


def program(lab: Lab, *command) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *map(str, command), "--device", lab.device], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def kill_and_resume(lab: Lab):
    out = lab.folder / "killed"
    process = program(lab, ROOT / "aspo.py", *FLAGS, "--steps", 6, "--save_every", 1, "--out", out)
    while not (out / "checkpoint-1").exists() and process.poll() is None:  # two are saved
        time.sleep(0.01)
    process.kill()
    process.communicate()
    killed = (out / "metrics.jsonl").read_text().count("\n")
    process = program(lab, ROOT / "aspo.py", "--resume", out)
    error = process.communicate()[1]
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    yield (f"killed after {killed} steps and resumed: exit status, steps",
           f"{process.returncode}, {steps} {error[-200:]}", "0, 1 to 6 once each",
           process.returncode == 0 and steps == [1, 2, 3, 4, 5, 6])


def two_processes(lab: Lab):
    if lab.cuda and torch.cuda.device_count() < 2:
        yield "two processes", "not run: one GPU", "", None
        return
    out = lab.folder / "two"
    process = program(lab, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
                      ROOT / "aspo.py", *FLAGS, "--steps", 3, "--out", out)
    error = process.communicate()[1]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] if out.exists() else []
    good = process.returncode == 0 and len(rows) == 3 and all(row["skipped_steps"] == 0 for row in rows)
    yield ("two processes: exit status, steps, mismatch of sampler and trainer",
           f"{process.returncode}, {len(rows)}, {[row['sampler_mismatch'] for row in rows]} "
           f"{'' if good else error[-300:]}", "0, 3", good)


CHECKS = {"a": same_tokens, "b": precision, "c": real_step, "d": out_of_memory, "e": speed, "f": kill_and_resume,
          "g": two_processes}


def run(lab: Lab, letters, seconds: float = 60 * MINUTES - 30) -> list[str]:
    """Print the table; returns what failed."""
    out, failed, deadline = sys.stdout, [], time.monotonic() + seconds
    late = f"not done after {seconds:.0f} seconds"
    signal.signal(signal.SIGALRM, lambda *_: throw(TimeoutError(late)))
    print("| | measured | wanted | |\n|---|---|---|---|", flush=True)
    for letter in letters:
        signal.alarm(max(1, int(deadline - time.monotonic())))
        try:
            with contextlib.redirect_stdout(sys.stderr):  # what aspo.py says
                for what, measured, wanted, good in CHECKS[letter](lab):
                    result = {None: "", True: "ok", False: "FAILED"}[good]
                    text = " ".join(measured.split()).replace("|", "/")
                    print(f"| ({letter}) {what} | {text} | {wanted} | {result} |", file=out, flush=True)
                    failed += [f"({letter}) {what}"] * (good is False)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            reason = " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")[:200]
            print(f"| ({letter}) {CHECKS[letter].__name__} | {reason} | | FAILED |", file=out, flush=True)
            failed.append(f"({letter}) {CHECKS[letter].__name__}")
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a run has its own
            gc.collect()
            if lab.cuda:
                torch.cuda.empty_cache()
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checks", nargs="*", help=f"of {' '.join(CHECKS)}; all")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: to test this script
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := set(args.checks) - set(CHECKS):
        print(f"no check {', '.join(unknown)}; choose from {', '.join(CHECKS)}", file=sys.stderr)
        return 2
    if args.device == "cuda" and not torch.cuda.is_available():
        print("this needs an NVIDIA GPU, and torch finds none: is a CUDA build of torch installed, and does nvidia-smi "
              "show the GPU?", file=sys.stderr)
        return 2
    name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if args.device == "cuda" else args.device
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}\n")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        failed = run(Lab(Path(folder), args.device, args.tiny), args.checks or CHECKS)
    print(f"\n{time.monotonic() - started:.0f} seconds")
    if failed:
        print("failed:\n" + "\n".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
