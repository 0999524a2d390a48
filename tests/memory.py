"""How much memory a training needs, by a formula; `test_memory.py` checks it against measured peaks.

    python tests/memory.py            # the README's tables
"""
import dataclasses

from conftest import aspo

GIB = 2**30


@dataclasses.dataclass
class Shape:
    """What the formula needs to know of a decoder with gated MLPs and grouped key/value heads (Qwen, Llama, Mistral)."""

    layers: int
    hidden: int
    mlp: int
    kv_width: int  # key/value heads x head size
    vocabulary: int
    tied: bool = True

    def parameters(self) -> int:
        layer = 2 * self.hidden * (self.hidden + self.kv_width) + 3 * self.hidden * self.mlp
        return self.layers * layer + self.vocabulary * self.hidden * (1 if self.tied else 2)


# Public configs.
SHAPES = {
    "0.5B (Qwen2.5)": Shape(24, 896, 4864, 128, 151936),
    "0.6B (Qwen3)": Shape(28, 1024, 3072, 1024, 151936),
    "1.5B (Qwen2.5)": Shape(28, 1536, 8960, 256, 151936),
    "1.8B (R1-Distill-Qwen)": Shape(28, 1536, 8960, 256, 151936, tied=False),
    "3B (Qwen2.5)": Shape(36, 2048, 11008, 256, 151936),
    "7B (Qwen2.5)": Shape(28, 3584, 18944, 512, 152064, tied=False),
}


def needed(shape: Shape, cfg: aspo.Config, prompt_tokens: int, half: bool = True, processes: int = 1) -> dict[str, float]:
    """Bytes by purpose. half: mixed precision, as on CUDA; else fp32 throughout, and no second copy of the weights."""
    element, tokens = 2 if half else 4, cfg.micro_tokens
    context = prompt_tokens + cfg.max_new_tokens
    # a group's prompt is computed once, but attention gives each of its responses the prompt's keys and values
    keys = (prompt_tokens + cfg.group_size * context) / (prompt_tokens + cfg.group_size * cfg.max_new_tokens)
    # what autograd keeps of a layer per token: inputs, normalised inputs and outputs of two norms (3 each), queries, attention's
    # output twice, keys and values; in the MLP the gate before and after its activation, the other half, the product
    inside = 9 * shape.hidden + 2 * keys * shape.kv_width + 4 * shape.mlp
    kept = shape.hidden * 4 * shape.layers + inside * element if cfg.gradient_checkpointing else inside * element * shape.layers
    mask = context * shape.hidden / shape.kv_width * element  # a line for each of the query heads that share a key head
    return {
        "weights, gradients, moments": 16 * shape.parameters() / processes,
        "half-precision copies": (2 if cfg.gradient_checkpointing else 4) * shape.parameters() * half,
        "key/value cache": 2 * shape.layers * shape.kv_width * element * cfg.sample_rows * context * half,
        "activations": (kept + mask) * tokens,
        "logits": 4 * 4 * aspo.CHUNK_LOGITS,
    }


GPUS = (16, 24, 40, 80, 141)  # GB
SPARE = 2 * GIB  # CUDA itself, sampling's softmax, and what the allocator cannot use
ECONOMICAL = dict(gradient_checkpointing=True, sample_rows=64, micro_tokens=2048)


def presets_table() -> str:
    """GiB of every alias with its default flags and prompts of up to 200 tokens, on one GPU."""
    shapes = {"qwen-0.5b": "0.5B (Qwen2.5)", "qwen3-0.6b": "0.6B (Qwen3)", "qwen-1.5b": "1.5B (Qwen2.5)",
              "qwen-math-1.5b": "1.5B (Qwen2.5)", "r1-1.5b": "1.8B (R1-Distill-Qwen)"}
    rows = []
    for alias, shape in shapes.items():
        parts = needed(SHAPES[shape], aspo.parse(["--model", alias]), 200)
        total = sum(parts.values()) + SPARE
        gpu = next(gpu for gpu in GPUS if total < gpu * 1e9)
        cells = [f"`{alias}`", *(f"{size / GIB:.1f}" for size in parts.values()), f"{total / GIB:.0f}", f"{gpu} GB"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([f"| model | {' | '.join(parts)} | sum + 2 | GPU |", "|---" * (len(parts) + 3) + "|", *rows])


def largest_table() -> str:
    """The largest model that fits one GPU with 512 new tokens and the economical flags."""
    cfg = aspo.Config(**ECONOMICAL)
    sums = {name: sum(needed(shape, cfg, 200).values()) + SPARE for name, shape in SHAPES.items()}
    fitting = {gpu: [name for name, size in sums.items() if size < gpu * 1e9] for gpu in GPUS}
    return "\n".join(["| GPU | largest model | needs |", "|---|---|---|",
                      *(f"| {gpu} GB | {names[-1]} | {sums[names[-1]] / 1e9:.0f} GB |" for gpu, names in fitting.items())])


if __name__ == "__main__":
    print(presets_table(), largest_table(), sep="\n\n")
