"""What a CPU cannot prove of aspo.py: some minutes on a GPU, exit status 1 where something is not as wanted.

    python tests/gpu.py            # a random model of the shape of Qwen2.5-0.5B; with --tiny on a CPU
    python tests/gpu.py --table    # the README's memory table, by `needed`
"""
import dataclasses
import json
import random
import sys
import tempfile
from pathlib import Path

import bench
import torch
import transformers
from conftest import aspo

GIB = 2**30
SHAPES = {  # layers, hidden size, of the MLP, of all query heads, of all key heads, tied head; by the public configs
    "qwen-0.5b": (24, 896, 4864, 896, 128, True),
    "qwen3-0.6b": (28, 1024, 3072, 2048, 1024, True),
    "qwen-1.5b": (28, 1536, 8960, 1536, 256, True),
    "qwen-math-1.5b": (28, 1536, 8960, 1536, 256, True),
    "r1-1.5b": (28, 1536, 8960, 1536, 256, False),
    "Qwen/Qwen2.5-3B-Instruct": (36, 2048, 11008, 2048, 256, True),
}
ECONOMICAL = "--gradient_checkpointing --sample_rows 64 --micro_tokens 4096".split()


def needed(shape: tuple, cfg, prompt_tokens: int, vocabulary: int = 151936) -> dict[str, float]:
    """Bytes by purpose, of a training with gradient checkpointing in mixed precision on one GPU."""
    layers, hidden, mlp, queries, keys, tied = shape
    matrices = layers * (2 * hidden * (queries + keys) + 3 * hidden * mlp) + vocabulary * hidden
    parameters = matrices + (not tied) * vocabulary * hidden
    tokens, logits = cfg.micro_tokens, min(aspo.LOGITS_AT_ONCE, cfg.micro_tokens * vocabulary)
    return {
        "weights, gradients, moments": 16 * parameters,
        "sampler's copy": 2 * parameters,
        "its cache, logits": cfg.sample_rows * (
            4 * layers * keys * (prompt_tokens + cfg.max_new_tokens) + 14 * vocabulary),
        # Most is needed at the end of the forward pass: autocast's copies of the matrices, each layer's input, the
        # last hidden states, and three copies of some logits.
        "activations, logits": 2 * matrices + (4 * layers + 12) * hidden * tokens + 12 * logits,
    }


def table() -> str:
    """GiB of every alias with its default flags, and of a larger model with economical ones; prompts of 200 tokens."""
    lines = []
    for name, shape in SHAPES.items():
        parts = needed(shape, aspo.parse(["--model", name, *(ECONOMICAL if "/" in name else [])]), 200)
        size = sum(parts.values()) / GIB + 2
        gpu = next(gpu for gpu in (16, 24, 40, 80) if size * GIB < gpu * 1e9)
        cells = " | ".join(f"{x / GIB:.1f}" for x in parts.values())
        lines.append(f"| `{name}`{' *' * ('/' in name)} | {cells} | {size:.0f} | {gpu} GB |")
    head = f"| model | {' | '.join(parts)} | sum + 2 | GPU |\n" + "|---" * 7 + "|"
    return "\n".join([head, *lines, "", f"\\* with `{' '.join(ECONOMICAL)}`"])


class Lab:  # a random model in a folder, with problems
    def __init__(self, folder: str, tiny: bool):
        self.tiny, self.device, self.size = (True, "cpu", 16) if tiny else (False, "cuda", 256)
        torch.manual_seed(0)
        model, tokenizer = aspo.tiny_model()
        if not tiny:
            model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(  # its vocabulary is Qwen's
                hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                num_key_value_heads=2, tie_word_embeddings=True))
            model.get_input_embeddings().weight.data *= 4  # likely and unlikely tokens, as a trained model has
        for part in (model, tokenizer):
            part.save_pretrained(folder)
        rng, data = random.Random(0), Path(folder, "data.jsonl")
        texts = ["".join(rng.choices("0123456789", k=rng.randint(self.size // 2, self.size - 1))) for _ in range(40)]
        data.write_text("".join(json.dumps({"problem": text, "answer": "1"}) + "\n" for text in texts))
        self.flags = [*f"--model {folder} --data {data} --out {folder}/run --device {self.device} "
                      f"--max_new_tokens {self.size} --instruction".split(), ""]

    def policy(self, dtype: torch.dtype):
        cfg = aspo.parse(self.flags)
        problems = aspo.load_problems(cfg)[0][:4]
        policy = aspo.Policy(*aspo.load_model(cfg.model), cfg, problems)
        policy.dtype, policy.sampler, policy.problems = dtype, policy.model, problems
        policy.place(learning=True)
        policy.scaler = torch.amp.GradScaler(self.device, init_scale=1024.0, enabled=dtype == torch.float16)
        return policy

    def gradient(self, policy, samples) -> torch.Tensor:
        policy.model.zero_grad()
        samples = [dataclasses.replace(s, advantage=(-1.0) ** k) for k, s in enumerate(samples)]
        aspo.accumulate(policy, samples, 1.0, policy.cfg)
        return torch.cat([p.grad.flatten() for p in policy.model.parameters()]) / policy.scaler.get_scale()


def precision(lab: Lab):  # like the others, it yields rows: what, measured, wanted, and whether that is so
    policy = lab.policy(torch.float32)
    common = aspo.roll_out(policy, policy.problems, 4, policy.cfg)
    exact = lab.gradient(policy, common)
    for name, dtype, limit in (("bf16", torch.bfloat16, 0.03), ("fp16", torch.float16, 0.01)):
        policy = lab.policy(dtype)
        cosine = torch.cosine_similarity(exact, plain := lab.gradient(policy, common), dim=0).item()
        yield f"{name}: cosine of its gradient and fp32's", f"{cosine:.4f}", "over 0.98", cosine > 0.98
        aspo.remember_old_logp(policy, samples := aspo.roll_out(policy, policy.problems, 4, policy.cfg))
        gap = torch.cat([(s.old_logp - s.sampler_logp).abs() for s in samples]).mean().item()
        yield f"{name}: mean gap of sampler and trainer, nats", f"{gap:.4f}", f"under {limit}", gap < limit
        aspo.recompute_layers(policy.model)
        gap = ((lab.gradient(policy, common) - plain).norm() / plain.norm()).item()
        yield f"{name}: gradient checkpointing changes the gradient by", f"{gap:.1e}", "under 1e-2", gap < 1e-2
        next(policy.model.parameters()).grad.view(-1)[0] = float("inf")
        before, norm = policy.scaler.get_scale(), policy.optimizer_step()
        kept = policy.scaler.get_scale() / before
        yield (f"{name}: steps along an infinite gradient, and the loss's scale", f"{policy.updates}, x {kept}",
               "0; fp16 halves", norm == float("inf") and policy.updates == 0 and kept == 1 - (name == "fp16") / 2)


def short_run(lab: Lab):
    few = "--prompts 2 --minibatch 2".split() if lab.tiny else []
    cfg = aspo.parse([*lab.flags, *"--steps 2 --eval_problems 4 --gradient_checkpointing".split(), *few])
    gap = aspo.train(cfg, lambda response, row: -float(len(response) % 2))["sampler_mismatch"]
    yield "a run: mean gap of sampler and trainer", f"{gap:.4f}", "under 0.03", gap < 0.03
    if not lab.tiny:
        peak, formula = torch.cuda.max_memory_allocated(), sum(needed(SHAPES["qwen-0.5b"], cfg, lab.size).values())
        yield "its peak, GiB", f"{peak / GIB:.1f}", f"by the formula {formula / GIB:.1f}", peak < 1.1 * formula


def speed(lab: Lab):
    rows = 2 if lab.tiny else 16
    for what, ratio in bench.main(f"--model {lab.flags[1]} --rounds 2 --prompts {rows} --group {rows} --prompt_tokens "
                                  f"{lab.size} --new_tokens {lab.size}".split()).items():
        yield f"speed of {what}, beside transformers'", f"{ratio:.2f} x", "", True


def main(*flags: str) -> int:
    tiny, failed = "--tiny" in flags, False
    if not tiny and not torch.cuda.is_available():
        print("torch sees no GPU")
        return 2
    print(f"torch {torch.__version__}, {'CPU' if tiny else torch.cuda.get_device_name()}\n"
          "| what | measured | wanted | |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(folder, tiny)
        for check in (short_run, precision, speed):  # the first one's peak memory is its own
            for what, measured, wanted, good in check(lab):
                failed |= not good
                print(f"| {what} | {measured} | {wanted} | {'' if good else 'FAILED'} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(print(table()) if "--table" in sys.argv else main(*sys.argv[1:]))
