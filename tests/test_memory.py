"""The formula of memory.py against the measured peak of live tensors: of whole updates in fp32, and of the
presets at full size in mixed precision, with tensors that have no data."""
import weakref

import pytest
import torch
import transformers
from conftest import aspo, logits_at_once, policy_of, set_logits_at_once
from memory import ECONOMICAL, GIB, SHAPES, Shape, presets_table, total, update_peak
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

SHAPE = Shape(layers=4, hidden=192, mlp=512, q_width=192, kv_width=96, vocabulary=5_000)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that exist. What a process takes from the system is more."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def add(self, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int):
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
    set_logits_at_once(monkeypatch, 2**20)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=SHAPE.vocabulary, hidden_size=SHAPE.hidden, intermediate_size=SHAPE.mlp,
        num_hidden_layers=SHAPE.layers, num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=True))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(SHAPE.parameters(), rel=0.01)
    part = micro_tokens // 4  # a prompt and three responses fill a micro-batch; the second finds the first's gradients
    policy = policy_of(model, aspo.tiny_model()[1], engine="fast", prompts=2, minibatch=1, group_size=6, epochs=1,
                       micro_tokens=micro_tokens, max_new_tokens=part, gradient_checkpointing=checkpointing)
    samples = [aspo.Sample("", "", [5] * part, [6] * part, advantage=(-1.0) ** k, sampler_logp=torch.zeros(part))
               for k in range(12)]
    assert len(policy.micro_batches(samples)) == 4
    with LiveBytes() as live:
        for p in model.parameters():
            live.add(p.data)
        aspo.update(policy, samples, policy.cfg)
    expected = 16 * SHAPE.parameters() + update_peak(SHAPE, policy.cfg, part, half=False, logits=2**20)
    assert live.peak == pytest.approx(expected, rel=0.15)


CONFIGS = {  # heads
    "qwen-0.5b": (transformers.Qwen2Config, 14, 2), "qwen3-0.6b": (transformers.Qwen3Config, 16, 8),
    "qwen-1.5b": (transformers.Qwen2Config, 12, 2), "r1-1.5b": (transformers.Qwen2Config, 12, 2)}


FAKE = FakeTensorMode()  # one for all: some constants are kept between models


def measured_peaks(alias: str, cfg: aspo.Config, layers: int) -> tuple[int, int]:
    """Forward and backward peak of a second micro-batch beyond weights and gradients, on so many layers."""
    shape, (kind, heads, kv_heads) = SHAPES[alias], CONFIGS[alias]
    group = [aspo.Sample("", "", [q] * 200, [6] * cfg.max_new_tokens) for q in range(4) for _ in range(cfg.group_size)]
    packed = aspo.pack(aspo.FAST.micro_batches(group, cfg.micro_tokens)[0], torch.device("cpu"))
    with FAKE, LiveBytes() as live:
        model = transformers.AutoModelForCausalLM.from_config(kind(
            vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.mlp,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
            head_dim=shape.kv_width // kv_heads, tie_word_embeddings=shape.tied)).eval()
        model.set_attn_implementation("packed")
        if cfg.gradient_checkpointing:
            aspo.recompute_layers(model)
        packed = aspo.Packed(**tree_map_only(torch.Tensor, FAKE.from_tensor, vars(packed)))
        for _ in range(2):
            live.peak = live.now
            with torch.autocast("cpu", torch.bfloat16):
                logp, entropy = aspo.packed_logp(model, packed, 1.0)
            forward, live.peak = live.peak, live.now
            logp.sum().backward()
            backward = live.peak
            del logp, entropy
        held = 8 * sum(p.numel() for p in model.parameters())
        return forward - held, backward - held


@pytest.mark.parametrize("alias, flags", [*((alias, ()) for alias in CONFIGS),
                                          ("qwen-0.5b", ("--gradient_checkpointing", "false"))])
def test_the_formula_tells_the_peak_of_the_presets(alias, flags, monkeypatch):
    """Full widths and micro-batches, as on CUDA; every further layer adds as much as the second."""
    set_logits_at_once(monkeypatch, logits_at_once(cuda=True))
    cfg = aspo.parse(["--model", alias, *flags])
    one, two = (measured_peaks(alias, cfg, layers) for layers in (1, 2))
    peak = max(a + (SHAPES[alias].layers - 1) * (b - a) for a, b in zip(one, two))
    found = update_peak(SHAPES[alias], cfg, 200, half=True)
    print(f"{alias} {flags}: measured {peak / GIB:.2f}, by the formula {found / GIB:.2f} GiB")
    assert found == pytest.approx(peak, rel=0.1)


def test_the_presets_fit_the_gpus_that_they_are_said_to_be_sized_for():
    """One of 24 GB, from 1.5B on one of 80 GB; the README's command for 7B four of these."""
    for alias in CONFIGS:
        assert total(alias)[1] < (80e9 if "1.5b" in alias else 24e9)
    assert total("Qwen/Qwen2.5-7B-Instruct", *ECONOMICAL, processes=4)[1] < 80e9
    lines = presets_table().splitlines()
    assert {line.count("|") for line in lines[:-2]} == {8} and "4 x 80 GB" in lines[-3]
