"""What a CPU can prove about the CUDA path, and that gpu.py, which needs a GPU, does what it says."""
import copy
import math
import re

import gpu
import pytest
import torch
from conftest import aspo
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

VOCABULARY = 151_936  # of Qwen
READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default", "allclose", "lift_fresh")


def tensors(*trees) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


class Operations(TorchDispatchMode):
    """Every operation that is done, with its arguments and its result."""

    def __init__(self):
        super().__init__()
        self.log = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        self.log.append((op, args, kwargs or {}, result))
        return result


class Graph:
    """Repeats recorded operations on the memory that they used, as a CUDA graph does."""

    def __init__(self, log: list):
        self.log = log

    def replay(self):
        for op, args, kwargs, result in self.log:
            if op.is_view or "prim" in str(op) or "detach" in str(op):
                continue
            new = op(*args, **kwargs)
            if not op._schema.is_mutable:
                for old, value in zip(tensors(result), tensors(new)):
                    old.copy_(value)


def state_of(decoder) -> list[torch.Tensor]:
    return tensors(vars(decoder), vars(decoder.cache))


def record(decoder, size: tuple):
    """Decoder.record without a GPU. A capture runs nothing, so what the step changed is put back, and the seed."""
    # PyTorch asserts it: see create_or_incref_pool of its CUDA allocator.
    assert decoder.graphs or decoder.pool is None, "a memory pool whose graphs are gone takes no others"
    decoder.pool = decoder.pool or object()
    changing = state_of(decoder)
    before, seed = [x.clone() for x in changing], torch.get_rng_state()
    for counter in (decoder.position, decoder.cache.column):
        counter.sub_(1)  # the step that has just been made, again: the next one may have no column
    with Operations() as operations:
        decoder.step()
    reads = [str(op) for op, *_ in operations.log if any(name in str(op) for name in READS)]
    assert not reads, f"a step that reads the host cannot be captured: {reads}"
    for x, value in zip(changing, before):
        x.copy_(value)
    torch.set_rng_state(seed)
    decoder.graphs[size] = Graph(operations.log)


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr(aspo.Decoder, "record", record)
    monkeypatch.setattr(aspo, "COLUMN_STEP", 8)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return gpu.Lab(tmp_path_factory.mktemp("lab"), "cpu", tiny=True)


# ------------------------------------------------------------------------------------------------------------ gpu.py


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1 and "GPU" in error
    assert gpu.main(["--device", "cpu", "x"]) == 2


@pytest.mark.parametrize("letter", "abcde")
def test_every_check_passes_on_a_cpu(letter, lab, graphs, capsys):
    assert gpu.run(lab, [letter]) == []
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| ({letter})")]
    assert rows and all(row.count("|") == 5 for row in rows)
    assert any(row.endswith("| ok |") for row in rows) or letter == "e"


@pytest.mark.parametrize("status, steps, good", [
    (0, [1, 2, 3, 4, 5, 6], True), (0, [1, 2, 2, 3, 4, 5, 6], False), (1, [1, 2, 3], False)])
def test_programs_are_judged_by_their_status_and_steps(lab, monkeypatch, capsys, status, steps, good):
    """Without starting them, which takes long, and is done by the tests of runs and of processes."""
    started = []

    class Program:
        returncode = status

        def __init__(self, lab, *command):
            started.append(command)
            self.out = lab.folder / ("two" if "torch.distributed.run" in command else "killed")
            self.out.mkdir(exist_ok=True)
            self.n = len(started)
            if self.n == 1:
                (self.out / "checkpoint-1").mkdir(exist_ok=True)
                self.write([1, 2])

        def write(self, steps):
            rows = [gpu.json.dumps({"step": n, "skipped_steps": 0, "sampler_mismatch": 1e-3}) + "\n" for n in steps]
            (self.out / "metrics.jsonl").write_text("".join(rows))

        def poll(self):
            return None

        def kill(self):
            self.killed = True

        def communicate(self):
            if self.n > 1:
                self.write(steps if self.n == 2 else steps[:3])
            return "", "error: no"

    monkeypatch.setattr(gpu, "program", Program)
    assert bool(gpu.run(lab, "f")) is not good and "--resume" in started[1]
    assert bool(gpu.run(lab, "g")) is (status != 0)
    assert "killed after 2 steps" in capsys.readouterr().out


def test_checks_fail_where_something_is_wrong(lab, monkeypatch, capsys):
    right = aspo.pick

    def wrong(logits, temperature, top_p=1.0):
        token, logp, entropy = right(logits, temperature, top_p)
        return token, logp - 0.1, entropy

    def idle(decoder, size):
        decoder.graphs[size] = Graph([])  # replays nothing

    monkeypatch.setattr(aspo.Decoder, "record", idle)
    failed = gpu.run(lab, ["a"])
    assert len(failed) == 2 and all("graphs" in what for what in failed)
    monkeypatch.setattr(aspo, "pick", wrong)
    assert any("gap" in what or "precision" in what for what in gpu.run(lab, ["b"]))
    monkeypatch.setitem(gpu.CHECKS, "a", lambda lab: gpu.time.sleep(9))
    assert gpu.run(lab, ["a"], seconds=0) and "TimeoutError" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- decoding


def policy_of(lab, **knobs):
    policy = lab.policy(**knobs)
    policy.decoder = aspo.Decoder(policy.sampler, bucketed=True)
    policy.decoder.graphs_on = True
    return policy


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (1.0, 1.0), (0.7, 0.8)])
def test_replays_equal_plain_steps_over_prompts_and_weights_that_change(lab, graphs, temperature, top_p):
    policy = policy_of(lab)
    policy.temperature, policy.top_p = temperature, top_p
    plain = copy.copy(policy)
    for turn in range(3):
        torch.manual_seed(turn)
        drawn = policy.generate(policy.rows)
        addresses = [x.data_ptr() for x in state_of(policy.decoder)]
        assert len(addresses) > 8
        torch.manual_seed(turn)
        plain.decoder = aspo.Decoder(plain.sampler, bucketed=True)
        others = plain.generate(plain.rows)
        for (ids, logp, entropy), (other_ids, other_logp, other_entropy) in zip(drawn, others, strict=True):
            assert ids == other_ids and entropy == pytest.approx(other_entropy, abs=1e-6)
            torch.testing.assert_close(logp, other_logp)
        assert turn == 0 or addresses == before
        before, n_graphs = addresses, len(policy.decoder.graphs)
        policy.rows = plain.rows = policy.rows[::-1][:12]
        with torch.no_grad():
            for p in policy.sampler.parameters():
                p.mul_(1.01)
    assert n_graphs > 1  # of several sizes: rows left the batch


def test_buffers_that_grow_take_new_graphs_and_do_not_shrink(lab, graphs):
    policy, shapes = policy_of(lab), []
    longer = [prompt * 3 for prompt in policy.rows[:2]]
    for rows in (policy.rows[:2], policy.rows, longer, policy.rows):
        assert len(policy.generate(rows)) == len(rows) and policy.decoder.graphs
        shapes.append(tuple(policy.decoder.bias.shape))
    assert shapes[0] < shapes[1] < shapes[2] == shapes[3]
    assert shapes[1][0] == shapes[2][0] and shapes[1][1] < shapes[2][1]


def test_a_capture_that_fails_is_said_once(lab, monkeypatch, capsys):
    def fail(decoder, size):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")

    monkeypatch.setattr(aspo.Decoder, "record", fail)
    policy = policy_of(lab)
    assert len(policy.generate(policy.rows)) == len(policy.rows)
    assert not policy.decoder.graphs_on
    policy.generate(policy.rows)
    said = [line for line in capsys.readouterr().out.splitlines() if "graphs" in line]
    assert len(said) == 1 and "not permitted" in said[0]


@pytest.mark.parametrize("error, expected", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously"), True),  # a graph's
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                  "to allocate 4000000 bytes. Error code 12 (Cannot allocate memory)"), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you"), True),
    (MemoryError(), True),
    (RuntimeError("CUDA error: operation failed due to a previous error during capture"), False),
    (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
])
def test_out_of_memory_is_told_from_other_errors(error, expected):
    assert aspo.out_of_memory(error) is expected


def test_cudnn_attention_is_off_on_a_gpu(monkeypatch):
    device, enabled = torch.device("cuda:0"), torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: type("OnGPU", (), {"device": device}))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        assert aspo.find_device("cuda") == device
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


# ------------------------------------------------------------------------------------------ drawing, in half precision


def counted_bytes(work, *shape) -> int:
    """Read and written by every operation, without doing it; what picks some elements reads as many as it writes."""
    with FakeTensorMode():
        logits = torch.empty(*shape, dtype=torch.bfloat16)
        with Operations() as operations:
            work(logits)
    return sum(t.numel() * t.element_size() for op, args, kwargs, result in operations.log
               if not op.is_view and "prim" not in str(op)
               for t in tensors(result, (args[1:], result) if re.search("gather|index", str(op)) else (args, kwargs)))


def test_drawing_a_token_moves_little_memory():
    moved = counted_bytes(lambda logits: aspo.pick(logits, 1.0), 256, VOCABULARY)
    print(f"pick moves {moved / 1e9:.2f} GB")
    assert moved < 1.7e9


def test_draws_follow_the_probabilities_of_a_large_vocabulary():
    torch.manual_seed(0)
    logits = 2 * torch.randn(VOCABULARY)  # the likeliest has less than a bucket's probability
    probs = logits.softmax(-1)
    rows, calls = 64, 120
    drawn = torch.cat([aspo.draw(probs.expand(rows, -1)) for _ in range(calls)])
    # Buckets of about equal probability, which cut across the blocks in order of likelihood.
    order = probs.argsort()
    bucket = torch.empty(VOCABULARY, dtype=torch.long)
    bucket[order] = (probs[order].double().cumsum(-1) * 100).long().clamp(max=99)
    for where in (bucket, torch.arange(VOCABULARY) * 100 // VOCABULARY):  # by likelihood, and by place
        expected = torch.zeros(100).double().index_add_(0, where, probs.double()) * rows * calls
        found = torch.bincount(where[drawn], minlength=100)
        chi2 = ((found - expected) ** 2 / expected).sum().item()
        assert chi2 < 99 + 4.5 * math.sqrt(2 * 99), chi2  # 4.5 sigma above 99 degrees of freedom


def test_no_token_of_probability_0_is_drawn_from_a_large_vocabulary():
    probs = torch.zeros(2, VOCABULARY)
    probs[0, VOCABULARY - 1] = 1e-30
    probs[1, [5, 70_000, VOCABULARY - 2]] = torch.tensor([1e-3, 0.5, 1e-8])
    for _ in range(50):
        last, some = aspo.draw(probs).tolist()
        assert last == VOCABULARY - 1 and some in (5, 70_000, VOCABULARY - 2)


@pytest.mark.parametrize("scale", [0.3, 3.0, 12.0])  # nearly uniform, as in training, nearly certain
def test_entropy_under_autocast_is_that_of_double_precision(scale):
    torch.manual_seed(1)
    logits = (scale * torch.randn(4, VOCABULARY)).bfloat16()
    exact = torch.distributions.Categorical(logits=logits.double()).entropy()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        token, logp, entropy = aspo.pick(logits, 1.0)
        learned_logp, learned = aspo.logp_and_entropy(logits, token, 1.0)
    assert (entropy - exact).abs().max() < 1e-3
    assert (learned - exact).abs().max() < 1e-3
    torch.testing.assert_close(logp, learned_logp, atol=1e-4, rtol=0)


@pytest.mark.parametrize("queries, keys", [(1, 5), (4, 4), (3, 9), (7, 8)])
def test_the_mask_that_cuda_does_not_need_is_the_one_that_it_stands_for(queries, keys):
    cpu, cuda = (aspo.lower_right(queries, keys, torch.device(name)) for name in ("cpu", "cuda"))
    assert cpu.dtype == torch.bool and not isinstance(cuda, torch.nn.Parameter) and type(cuda) is not torch.Tensor
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, 8) for heads, n in ((4, queries), (2, keys), (2, keys)))
    out, other = (scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True) for mask in (cpu, cuda))
    torch.testing.assert_close(out, other)
    for i in range(queries):  # a query sees all keys but those of the queries behind it
        seen = keys - queries + 1 + i
        own = scaled_dot_product_attention(q[:, :, i:i + 1], k[:, :, :seen], v[:, :, :seen], scale=0.3, enable_gqa=True)
        torch.testing.assert_close(out[:, :, i:i + 1], own)


def test_a_resume_holds_one_set_of_moments(lab, tmp_path, monkeypatch):
    cfg = lab.cfg(out=str(tmp_path / "run"), steps=1, eval_problems=1, max_new_tokens=4, eval_samples=1)
    aspo.train(cfg, lambda response, row: float(len(response) % 2))
    problems, heldout = aspo.load_problems(cfg)
    loaded, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: loaded.append(load(*args, **kwargs)) or loaded[-1])
    known = {f"--data {cfg.data}": aspo.digest(problems + heldout)}
    policy, state = aspo.load_policy(tmp_path / "run" / "checkpoint", cfg, problems + heldout, known)
    moments = [x for x in tensors(dict(policy.optimizer.state)) if x.ndim]
    saved = {x.data_ptr() for x in tensors(load(tmp_path / "run/checkpoint/trainer.pt", "cpu")["optimizer"]) if x.ndim}
    n = sum(p.numel() for p in policy.model.parameters())
    assert sum(x.numel() for x in moments) == 2 * n
    assert len({x.data_ptr() for x in moments}) == len(moments) == len(saved)
    assert not state["optimizer"]  # nothing stays behind on the CPU
