"""More than one process, on a CPU with gloo: the same update, a part of the model each, other numbers, a death."""
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from kill import FLAGS, lines
from processes import ENV, TORCHRUN, run_several, start_several
from safetensors.torch import load_file
from torch.distributed.utils import _to_kwargs
from torch.nn.attention.bias import causal_lower_right

import aspo

VARIANTS = {  # settings of two updates on a fixed rollout
    "token": {},
    "sequence": {"loss_agg": "sequence", "micro_tokens": 60},
    "plain": {"engine": "plain", "micro_tokens": 60},
    "plain, layers recomputed": {"engine": "plain", "gradient_checkpointing": True},
    "layers recomputed, KL": {"gradient_checkpointing": True, "kl_coef": 0.3},
    "grpo, truncated ones masked": {"loss": "grpo", "mask_truncated": True, "minibatch": 2},
    "clipped": {"grad_clip": 0.05},
    "frozen and unused": {},
}
AS_ON_CUDA = {"half": {}, "half, plain": {"engine": "plain"},
              "half, layers recomputed": {"gradient_checkpointing": True}}


def rollout(tokenizer):
    """Lengths and signs differ, some groups have no signal, so that the shares of processes are unequal."""
    torch.manual_seed(0)
    samples = []
    for group in range(8):
        for k in range(4):
            response = torch.randint(4, 18, (3 + 4 * k + group,)).tolist() + [tokenizer.eos_token_id]
            samples.append(aspo.Sample("", "", tokenizer(f"{group}+2=").input_ids, response, truncated=k == 3,
                                       reward=float(group < 6 and k == 1), advantage=(0.5 - k) * (group < 6),
                                       sampler_logp=torch.zeros(len(response))))
    return samples


def updates(path):
    """What each process of the first test does."""
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    found, place = {}, aspo.Policy.place
    for name, settings in (VARIANTS | AS_ON_CUDA).items():
        if name in AS_ON_CUDA:  # bf16, and the sign for the flash kernel instead of a mask
            def in_half(policy, learning):
                policy.dtype = torch.bfloat16
                place(policy, learning)

            aspo.Policy.place, aspo.lower_right = in_half, lambda queries, keys, _: causal_lower_right(queries, keys)
        torch.manual_seed(1)
        model, tokenizer = aspo.tiny_model()
        if name == "frozen and unused":
            model.model.layers[0].mlp.requires_grad_(False)
            model.model.layers[1].unused = torch.nn.Linear(3, 3)
        common = dict(prompts=8, minibatch=4, group_size=4, epochs=2, max_new_tokens=30, instruction="")
        cfg = aspo.Config(**common | settings)
        policy = aspo.Policy(model, tokenizer, cfg, [aspo.make_problem({"problem": "1+2", "answer": "3"})])
        if cfg.kl_coef:
            torch.manual_seed(2)
            policy.add_reference(aspo.tiny_model()[0])
        # Adam would blow rounding errors of tiny gradients up
        policy.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
        policy.schedule = torch.optim.lr_scheduler.ConstantLR(policy.optimizer, 1.0)
        share = [s for group in aspo.chunks(rollout(tokenizer), 4)[aspo.rank()::aspo.world()] for s in group]
        stats, norms = aspo.update(policy, share, cfg)
        weights = {key: aspo.whole(p.detach()).clone() for key, p in model.named_parameters()}
        held = [(p.to_local() if aspo.world() > 1 else p).numel() for p in model.parameters()]
        found[name] = {
            "weights": weights, "norms": norms, "held": sum(held), "engine": policy.engine.name,
            "stats": {key: torch.cat(aspo.all_gather([s[key] for s in stats])).sort().values for key in stats[0]},
            "sampler": all(p.equal(weights[key]) for key, p in policy.sampler.named_parameters())}
    if aspo.rank() == 0:
        torch.save(found, path)
    if aspo.world() > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of one process and of two."""
    folder = tmp_path_factory.mktemp("updates")
    for n in (1, 2):
        run_several(n, folder / f"{n}.pt", script=__file__)
    return [torch.load(folder / f"{n}.pt") for n in (1, 2)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_update_does_not_depend_on_the_number_of_processes(variant, found):
    one, two = (each[variant] for each in found)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-5) and len(one["norms"]) == 4 + 2 * ("grpo" in variant)
    torch.manual_seed(1)
    initial = {name: p.detach().clone() for name, p in aspo.tiny_model()[0].named_parameters()}
    moved, other = (torch.cat([(each["weights"][key] - weight).flatten() for key, weight in initial.items()])
                    for each in (one, two))
    assert moved.norm() > 1e-3 and (moved - other).norm() < 1e-5 * moved.norm()
    for key, values in one["stats"].items():
        torch.testing.assert_close(two["stats"][key], values, rtol=1e-4, atol=1e-5)
    assert one["sampler"] and two["sampler"]  # what is sampled from next is what has been learned
    assert one["engine"] == two["engine"] == ("plain" if "plain" in variant else "fast")


@pytest.mark.parametrize("variant", AS_ON_CUDA)
def test_half_precision_of_one_process_and_of_two(variant, found):
    exact = found[0]["token"]
    for each in found:
        assert each[variant]["norms"] == pytest.approx(exact["norms"], rel=0.1)  # bf16 has 8 bits
        gaps = each[variant]["stats"]["log_ratio"] - exact["stats"]["log_ratio"]
        assert gaps.isfinite().all() and gaps.any() and gaps.abs().mean() < 0.02


def test_fsdp_finds_no_tensors_in_a_packed_row():
    """It moves and casts what it finds in arguments, and causal_lower_right would lose its lengths."""
    packed = aspo.pack(rollout(aspo.tiny_model()[1])[:4], torch.device("cpu"))
    (moved,), = _to_kwargs((packed,), {}, torch.device("meta"), False)[0]
    assert moved is packed and torch.utils._pytree.tree_leaves(packed) == [packed]


def test_each_process_holds_a_part_of_the_model(found):
    for name in VARIANTS:
        one, two = (each[name]["held"] for each in found)
        assert one == sum(w.numel() for w in found[0][name]["weights"].values())
        assert two < 0.51 * one + 200  # of vectors that two do not divide, the first process has one more


def test_what_is_frozen_or_unused_is_left_alone(found):
    for each in found:
        torch.manual_seed(1)
        initial, after = aspo.tiny_model()[0].state_dict(), each["frozen and unused"]["weights"]
        same = {key for key, weight in after.items() if key in initial and weight.equal(initial[key])}
        assert same == {f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert all(found[0]["frozen and unused"]["weights"][key].equal(found[1]["frozen and unused"]["weights"][key])
               for key in ("model.layers.1.unused.weight", "model.layers.1.unused.bias"))


def test_a_run_moves_between_numbers_of_processes(tmp_path):
    run = tmp_path / "run"
    out = run_several(2, "--steps", 2, "--out", run, *FLAGS).out
    assert out.count("held-out accuracy before RL") == 1 and "2 x cpu" in out  # rank 0 alone speaks
    keys = load_file(run / "checkpoint" / "model.safetensors").keys()
    run_several(1, "--resume", run, "--steps", 4, "--gradient_checkpointing")
    assert load_file(run / "checkpoint" / "model.safetensors").keys() == keys
    assert "lm_head.weight" not in keys  # it is tied
    run_several(2, "--resume", run, "--steps", 6, "--engine", "plain")
    metrics = lines(run)
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    # 4 prompts x 4, over all processes
    assert all(m["tokens"] == pytest.approx(16 * m["response_length"]) for m in metrics)
    assert all(m["grad_norm"] > 0 and m["sampler_mismatch"] < 1e-4 for m in metrics)
    assert load_file(run / "checkpoint" / "model.safetensors").keys() == keys
    state = torch.load(run / "checkpoint" / "trainer.pt", weights_only=True)
    assert state["step"] == 6 and state["position"] == 24
    steps = {int(moments["step"]) for moments in state["optimizer"].values()}
    assert len(steps) == 1 and steps.pop() <= 6 * 4 and state["optimizer"].keys() == keys


def test_two_processes_go_on_as_if_never_stopped(tmp_path):
    """The first run is made of a resumed one's steps: bit for bit, as with one process."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_several(2, "--steps", 3, "--out", whole, *FLAGS)
    processes = start_several(2, "--steps", 3, "--out", parts, *FLAGS)
    while not (parts / "metrics.jsonl").exists() or not (parts / "metrics.jsonl").read_text():
        assert processes[0].poll() is None, processes[0].err
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)  # one that is asked is enough
    assert [process.wait() for process in processes] in ([143, 143], [0, 0])
    if len(lines(parts)) < 3:
        run_several(2, "--resume", parts)
    assert lines(whole) == lines(parts)
    weights, others = (load_file(run / "checkpoint" / "model.safetensors") for run in (whole, parts))
    assert all(weight.equal(others[key]) for key, weight in weights.items())


def test_a_disk_that_fails_is_said_by_every_process(tmp_path):
    before = "import os\ndef fsync(fd): raise OSError(5, 'Input/output error')\nos.fsync = fsync"
    processes = start_several(2, "--steps", 3, "--out", tmp_path / "run", *FLAGS, before=before)
    for process in processes:
        assert process.wait() == 2 and "cannot save step 1" in process.err and "Input/output error" in process.err
        assert "Traceback" not in process.err and "gloo" not in process.err


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process to kill in /proc")
def test_a_process_that_dies_ends_the_others_with_a_message(tmp_path):
    run = tmp_path / "run"
    flags = ["--steps", "5000", "--out", str(run), *FLAGS, "--save_every", "10"]
    process = subprocess.Popen([*TORCHRUN, "2", str(ROOT / "aspo.py"), *flags],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENV)
    while not run.exists():
        assert process.poll() is None
        time.sleep(0.05)
    workers = [p for p in Path("/proc").glob("[0-9]*") if str(run) in (p / "cmdline").read_text()]
    second = next(int(p.name) for p in workers if "\0RANK=1\0" in (p / "environ").read_text())
    while not (run / "checkpoint").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.1)  # the save is over, the next one far
    os.kill(second, signal.SIGKILL)
    error = process.communicate(timeout=120)[1]
    assert process.returncode != 0 and "process 0 lost contact" in error and "--resume" in error
    assert torch.load(run / "checkpoint" / "trainer.pt", weights_only=True)["step"] > 0
    assert json.loads((run / "config.json").read_text())["steps"] == 5000


def test_a_mini_batch_that_processes_cannot_share(monkeypatch):
    monkeypatch.setattr(aspo, "world", lambda: 3)
    with pytest.raises(aspo.UserError, match="--minibatch 8 .*divisible by the 3 processes"):
        aspo.check(aspo.Config())


if __name__ == "__main__":
    import sys
    updates(sys.argv[1])
