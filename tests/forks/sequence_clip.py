"""A loss that is no weight: PPO's own, of whole sequences. Type --loss_agg sequence."""
import torch
import aspo

policy_loss = aspo.policy_loss

def sequence_clip(logp, old_logp, advantages, mask, cfg, *, norm, **more):
    _, stats = policy_loss(logp.detach(), old_logp, advantages, mask, cfg, norm=norm, **more)
    r = ((logp - old_logp) * mask).sum(-1, keepdim=True).clamp(-20, 20).exp()  # (B, 1)
    clipped = r.clamp(1 - cfg.eps_low, 1 + cfg.eps_high)
    return -torch.minimum(r * advantages, clipped * advantages).sum() / norm, stats

aspo.policy_loss = sequence_clip
raise SystemExit(aspo.main())
