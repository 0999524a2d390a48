"""More than one process, on a CPU with gloo: the same update, a part of the model each, other numbers of them."""
import os
import shutil
import signal

import pytest
import torch
from conftest import made_up_samples
from kill import FLAGS, has_lines, lines, newest, same
from processes import run_several, start_several
from safetensors.torch import load_file

import aspo

VARIANTS = {  # settings of two updates on a fixed rollout
    "token": {},
    "sequence, KL, layers recomputed": {"loss_agg": "sequence", "micro_tokens": 60, "kl_coef": 0.3,
                                        "gradient_checkpointing": True},
    "grpo, clipped": {"loss": "grpo", "minibatch": 2, "grad_clip": 0.05},
}
HALF = {"half, layers recomputed": {"gradient_checkpointing": True}}  # as on a GPU, in bf16


def updates(path):
    """What each process of the first tests does."""
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    found, place = {}, aspo.Policy.place

    def in_half(policy, learning):
        policy.dtype = torch.bfloat16
        place(policy, learning)

    for name, settings in (VARIANTS | HALF).items():
        aspo.Policy.place = in_half if name in HALF else place
        torch.manual_seed(1)
        model, tokenizer = aspo.tiny_model()
        cfg = aspo.Config(**dict(prompts=8, minibatch=4, group_size=4, epochs=2, max_new_tokens=30, lr=0.1,
                                 lr_warmup=0) | settings)
        policy = aspo.Policy(model, tokenizer, cfg, [aspo.make_problem({"problem": "1+2", "answer": "3"})])
        if cfg.kl_coef:
            torch.manual_seed(2)
            policy.reference = aspo.prepare(aspo.tiny_model()[0])
            aspo.shard_model(policy.reference, policy.device, policy.dtype)
        # Adam would blow rounding errors of tiny gradients up
        policy.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        samples = made_up_samples(tokenizer, groups=8)
        for s in samples[24:]:
            s.advantage = 0.0  # no signal: the shares of processes are unequal
        share = [s for group in aspo.chunks(samples, 4)[aspo.rank()::aspo.world()] for s in group]
        stats, norms = aspo.update(policy, share, cfg)
        weights = {key: aspo.unshard(p.detach()).clone() for key, p in model.named_parameters()}
        held = [(p.to_local() if aspo.world() > 1 else p).numel() for p in model.parameters()]
        found[name] = {
            "weights": weights, "norms": norms, "held": sum(held),
            "stats": {key: torch.cat(aspo.all_gather([s[key] for s in stats])).sort().values for key in stats[0]},
            "sampler": all(p.equal(weights[key].to(p)) for key, p in policy.sampler.named_parameters())}
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


@pytest.mark.parametrize("variant", HALF)
def test_half_precision_of_one_process_and_of_two(variant, found):
    exact = found[0]["token"]
    for each in found:
        assert each[variant]["norms"] == pytest.approx(exact["norms"], rel=0.1)  # bf16 has 8 bits
        gaps = each[variant]["stats"]["log_ratio"] - exact["stats"]["log_ratio"]
        assert gaps.isfinite().all() and gaps.any() and gaps.abs().mean() < 0.02 and each[variant]["sampler"]


def test_each_process_holds_a_part_of_the_model(found):
    for name in VARIANTS:
        one, two = (each[name]["held"] for each in found)
        assert one == sum(w.numel() for w in found[0][name]["weights"].values())
        assert two < 0.51 * one + 200  # of vectors that two do not divide, the first process has one more


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two processes, by a script of one's own."""
    folder = tmp_path_factory.mktemp("whole")
    script, flags = folder / "script.py", ["--steps", "3", "--out", str(folder / "run"), *FLAGS]
    script.write_text(f"""
import aspo
if __name__ == "__main__":
    aspo.train(aspo.parse({flags!r}))
""")
    out = run_several(2, script=script).out
    assert out.count("held-out accuracy before RL") == 1 and "2 x cpu" in out  # the first alone speaks
    return folder / "run"


def test_a_run_moves_between_numbers_of_processes(whole, tmp_path):
    """Saved by two, resumed by one, and the other way."""
    run = shutil.copytree(whole, tmp_path / "run")
    keys = load_file(newest(run) / "model.safetensors").keys()
    assert "lm_head.weight" not in keys  # it is tied
    run_several(1, "--resume", run, "--steps", 4, "--gradient_checkpointing")
    run_several(2, "--resume", run, "--steps", 5)
    metrics = lines(run)
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5]
    # 4 prompts x 4, over all processes
    assert all(m["tokens"] == pytest.approx(16 * m["response_length"]) for m in metrics)
    assert all(m["grad_norm"] > 0 and m["sampler_mismatch"] < 1e-4 for m in metrics)
    assert load_file(newest(run) / "model.safetensors").keys() == keys
    state = torch.load(newest(run) / "trainer.pt", weights_only=True)
    steps = {int(moments["step"]) for moments in state["moments"]["state"].values()}
    assert state["step"] == 5 and state["position"] == 20 and steps == {state["updates"]}


def test_two_processes_go_on_as_if_never_stopped(whole, tmp_path):
    """One that is asked is enough. The resumed run is bit for bit the other, as with one process."""
    parts = tmp_path / "parts"
    processes = start_several(2, "--steps", 3, "--out", parts, *FLAGS)
    assert processes[0].wait_for(lambda: has_lines(parts))
    processes[1].send_signal(signal.SIGTERM)
    assert [process.wait() for process in processes] in ([143, 143], [0, 0])
    if len(lines(parts)) < 3:
        run_several(2, "--resume", parts)
    same(whole, parts)


def test_a_mini_batch_that_processes_cannot_share(monkeypatch):
    monkeypatch.setattr(aspo, "world", lambda: 3)
    with pytest.raises(aspo.UserError, match="--minibatch 16 .*number of processes, 3"):
        aspo.check(aspo.Config())


if __name__ == "__main__":
    import sys
    updates(sys.argv[1])
