"""Advantages per token: the first four tokens of a response count twice."""
import aspo

policy_loss = aspo.policy_loss

def with_bonus(logp, old_logp, advantages, mask, *rest, **more):
    first = mask & (mask.cumsum(1) <= 4)  # (B, T), and so are the advantages now
    return policy_loss(logp, old_logp, advantages * (1 + first), mask, *rest, **more)

aspo.policy_loss = with_bonus
raise SystemExit(aspo.main())
