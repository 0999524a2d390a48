"""What test_processes.py starts: two updates on a fixed rollout, split over however many processes there are.

    torchrun --nproc-per-node 2 tests/processes.py OUT.pt [fsdp]
"""
import contextlib
import os
import sys

import torch
import torch.distributed as dist
from conftest import aspo

fsdp = "fsdp" in sys.argv
if "WORLD_SIZE" in os.environ:
    dist.init_process_group("gloo")
torch.manual_seed(0)
model, tokenizer = aspo.tiny_model()
samples = []
for group in range(8):  # lengths and signs differ, some groups have no signal, so the processes' shares are unequal
    for k in range(4):
        response = torch.randint(4, 18, (3 + 4 * k + group,)).tolist() + [tokenizer.eos_token_id]
        samples.append(aspo.Sample("", "", tokenizer(f"{group}+2=").input_ids, response, "", 0.0, False, 0.0,
                                   reward=float(group < 6 and k == 1), advantage=(0.5 - k) * (group < 6)))
if fsdp:
    aspo.shard(model)
share = [s for group in aspo.groups_of(samples, 4)[aspo.rank()::aspo.world()] for s in group]
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # Adam would blow rounding errors of tiny gradients up
scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
norms = []
for loss_agg in ("token", "sequence"):
    for s in share:
        s.old_logp = None
    cfg = aspo.Config(prompts=8, minibatch=4, group_size=4, epochs=2, micro_tokens=60, fsdp=fsdp, loss_agg=loss_agg,
                      drop_uniform_groups=loss_agg == "sequence")
    stats, more = aspo.update(model, None, optimizer, scheduler, torch.amp.GradScaler("cpu", enabled=False), share, cfg,
                              contextlib.nullcontext)
    norms += more
tokens = sum(aspo.gather(len(stats["weight"])))
weights = {name: aspo.whole(p.detach()).clone() for name, p in model.named_parameters()}
if aspo.rank() == 0:
    torch.save({"weights": weights, "norms": norms, "tokens": tokens}, sys.argv[1])
if dist.is_initialized():
    dist.destroy_process_group()
