"""How much memory a training needs on one GPU, by a formula that test_memory.py holds to measured peaks.

    python tests/memory.py            # the README's table
"""
import dataclasses

from conftest import aspo, logits_at_once

GIB = 2**30


@dataclasses.dataclass
class Shape:
    """What the formula needs to know of a decoder with gated MLPs and grouped key/value heads (Qwen, Llama)."""

    layers: int
    hidden: int
    mlp: int
    q_width: int  # query heads x head size
    kv_width: int  # key/value heads x head size
    vocabulary: int
    tied: bool = True

    def parameters(self) -> int:
        layer = 2 * self.hidden * (self.q_width + self.kv_width) + 3 * self.hidden * self.mlp
        return self.layers * layer + self.vocabulary * self.hidden * (1 if self.tied else 2)


# Public configs.
SHAPES = {
    "qwen-0.5b": Shape(24, 896, 4864, 896, 128, 151936),
    "qwen3-0.6b": Shape(28, 1024, 3072, 2048, 1024, 151936),
    "qwen-1.5b": Shape(28, 1536, 8960, 1536, 256, 151936),
    "qwen-math-1.5b": Shape(28, 1536, 8960, 1536, 256, 151936),
    "r1-1.5b": Shape(28, 1536, 8960, 1536, 256, 151936, tied=False),
    "Qwen/Qwen2.5-3B-Instruct": Shape(36, 2048, 11008, 2048, 256, 151936),
    "Qwen/Qwen2.5-7B-Instruct": Shape(28, 3584, 18944, 3584, 512, 152064, tied=False),
}
ECONOMICAL = ["--gradient_checkpointing", "--sample_rows", "64", "--micro_tokens", "4096"]
SPARE = 2 * GIB  # CUDA itself, and what the allocator cannot use
GPUS = (16, 24, 40, 80, 141)  # GB


def update_peak(shape: Shape, cfg: aspo.Config, prompt_tokens: int, half: bool, processes: int = 1,
                logits: int = logits_at_once(cuda=True)) -> float:
    """Bytes beyond weights, gradients and moments, at the worst of three places in a micro-batch."""
    element, hidden = 2 if half else 4, shape.hidden
    # as many whole responses as fit, at least one
    tokens = prompt_tokens + max(1, (cfg.micro_tokens - prompt_tokens) // cfg.max_new_tokens) * cfg.max_new_tokens
    head = shape.vocabulary * hidden
    # A group's prompt is computed once, but attention keeps its keys and values for each response.
    keys = 1 + cfg.group_size * prompt_tokens / (prompt_tokens + cfg.group_size * cfg.max_new_tokens)
    # What autograd keeps of a layer, in bytes per token. Of two norms: input, what they normalise, output, the first
    # two always in fp32, the last cast anew by autocast for each of five matrices.
    # Of attention: queries, its output twice, keys and values. Of the MLP: the gate before and after its activation,
    # the other half, the product.
    norms = (2 * 4 + 2 * 4 + (5 * 2 if half else 2 * 4)) * hidden
    inside = norms + (3 * shape.q_width + 2 * keys * shape.kv_width + 4 * shape.mlp) * element
    kept = shape.layers * tokens * (4 * hidden if cfg.gradient_checkpointing else inside)
    # Autocast keeps a half-precision copy of all matrices until the forward pass ends; FSDP of what is in use.
    copies = 0 if not half else 2 * (shape.parameters() - head * (not shape.tied)) if processes == 1 else 4 * head
    forward = copies + 12 * logits + 12 * hidden * tokens  # logits, what their entropy takes; the last hidden states
    backward = 12 * logits + 16 * hidden * tokens + 4 * head  # the head's gradient before it is added
    layer = cfg.gradient_checkpointing * tokens * (inside + 3 * shape.mlp * element)  # again, and its gradients
    return kept + max(forward, backward, layer)


def needed(shape: Shape, cfg: aspo.Config, prompt_tokens: int, processes: int = 1) -> dict[str, float]:
    """Bytes by purpose on a GPU, in mixed precision."""
    columns = -(-(prompt_tokens + cfg.max_new_tokens) // aspo.COLUMN_STEP) * aspo.COLUMN_STEP
    cache = 2 * shape.layers * shape.kv_width * 2 * cfg.sample_rows * columns
    return {
        "weights, gradients, moments": 16 * shape.parameters() / processes,
        "sampler's copy": 2 * shape.parameters(),
        "its cache and logits": cache + 18 * cfg.sample_rows * shape.vocabulary,
        "activations, logits": update_peak(shape, cfg, prompt_tokens, True, processes),
    }


def total(model: str, *flags: str, processes: int = 1) -> tuple[dict[str, float], float]:
    """Parts and sum in bytes, for prompts of up to 200 tokens."""
    parts = needed(SHAPES[model], aspo.parse(["--model", model, *flags]), 200, processes)
    return parts, sum(parts.values()) + SPARE


def presets_table() -> str:
    """GiB on each GPU: every alias with its default flags, and larger models with economical ones."""
    rows = [(f"`{alias}`", *total(alias), 1) for alias in aspo.PRESETS if alias in SHAPES]
    for model, processes in (("Qwen/Qwen2.5-3B-Instruct", 1), ("Qwen/Qwen2.5-7B-Instruct", 4)):
        rows.append((f"`{model}` *", *total(model, *ECONOMICAL, processes=processes), processes))
    lines = []
    for name, parts, size, processes in rows:
        gpu = next(gpu for gpu in GPUS if size < gpu * 1e9)
        cells = [name, *(f"{x / GIB:.1f}" for x in parts.values()), f"{size / GIB:.0f}",
                 f"{f'{processes} x ' * (processes > 1)}{gpu} GB"]
        lines.append(f"| {' | '.join(cells)} |")
    head = [f"| model | {' | '.join(parts)} | sum + 2 | GPU |", "|---" * (len(parts) + 3) + "|"]
    return "\n".join([*head, *lines, "", f"\\* with `{' '.join(ECONOMICAL)}`"])


if __name__ == "__main__":
    print(presets_table())
