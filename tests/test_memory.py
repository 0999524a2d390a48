"""The formula of memory.py against the measured peak of live tensors in whole updates."""
import contextlib
import weakref

import pytest
import torch
from memory import Shape, needed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import aspo

SHAPE = Shape(layers=4, hidden=192, mlp=512, kv_width=96, vocabulary=5_000)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that exist. What the process takes from the system is more, and depends on malloc."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro_tokens", [256, 1024])
def test_the_formula_tells_the_peak(checkpointing, micro_tokens, monkeypatch):
    monkeypatch.setattr(aspo, "CHUNK_LOGITS", 2**20)
    model = aspo.Qwen2ForCausalLM(aspo.Qwen2Config(
        vocab_size=SHAPE.vocabulary, hidden_size=SHAPE.hidden, intermediate_size=SHAPE.mlp, num_hidden_layers=SHAPE.layers,
        num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=True))
    model.set_attn_implementation("packed")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(SHAPE.parameters(), rel=0.01)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    part = micro_tokens // 4  # a prompt and three responses fill a micro-batch, and the second finds the gradients of the first
    cfg = aspo.Config(prompts=2, minibatch=1, group_size=6, epochs=1, micro_tokens=micro_tokens, max_new_tokens=part,
                      gradient_checkpointing=checkpointing)
    samples = [aspo.Sample("", "", [5] * part, [6] * part, "", 0.0, False, 0.0, reward=k % 2, advantage=(-1.0) ** k)
               for k in range(12)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    with LiveBytes() as live:
        for p in model.parameters():
            live.add(p.data)
        aspo.update(model, None, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
                    torch.amp.GradScaler("cpu", enabled=False), samples, cfg, contextlib.nullcontext)
    assert live.peak == pytest.approx(sum(needed(SHAPE, cfg, part, half=False).values()), rel=0.15)
