"""gpu.py runs on a CPU as far as that goes, and its formula tells the memory that an update needs."""
import weakref

import pytest
import torch
import transformers
from conftest import aspo, policy_of
from gpu import main, needed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that exist. What a process takes from the system is more."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())

    def drop(self, key, size):
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.add, result)
        return result


SHAPE, VOCABULARY = (6, 128, 192, 128, 64, True), 4000


@pytest.fixture
def policy():
    """A model of this shape, computed in bf16."""
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=192, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True))
    policy = policy_of(model, aspo.tiny_model()[1], gradient_checkpointing=True, micro_tokens=320, max_new_tokens=8)
    policy.dtype = torch.bfloat16
    return policy


def test_the_formula_tells_the_peak_of_an_update(policy, monkeypatch):
    monkeypatch.setattr(aspo, "LOGITS_AT_ONCE", 2**18)
    samples = [aspo.Sample("", "", [5] * 10, [6] * 30, advantage=1.0, sampler_logp=torch.zeros(30))] * 16
    with LiveBytes() as live:
        for p in policy.model.parameters():
            live.add(p.data)
        aspo.accumulate(policy, samples, 1.0, policy.cfg)  # two micro-batches: the second finds gradients
    formula = needed(SHAPE, policy.cfg, 10, VOCABULARY)
    held = formula["weights, gradients, moments"] / 2  # moments come with the first step
    assert live.peak == pytest.approx(held + formula["activations, logits"], rel=0.1)


def test_the_formula_tells_the_peak_of_sampling(policy):
    policy.place(learning=True)  # now that it is in bf16, with a copy for sampling
    policy.stop_ids = []
    with LiveBytes() as live:
        for p in policy.sampler.parameters():
            live.add(p.data)
        policy.generate([[5] * 100] * policy.sample_rows)
    formula = needed(SHAPE, policy.cfg, 100, VOCABULARY)
    assert live.peak == pytest.approx(formula["sampler's copy"] + formula["its cache, logits"], rel=0.1)


@pytest.mark.filterwarnings("ignore:.*GradScaler")
def test_all_checks_pass_at_tiny_size_on_a_cpu(capsys):
    assert main("--tiny") == 0, capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_all_checks_pass_on_a_gpu(capsys):
    assert main() == 0, capsys.readouterr().out
