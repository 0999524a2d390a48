"""Advantages by rank within the group: 1 for the best, -1 for the worst."""
import aspo

def rank_advantages(rewards, divide_by_std=True):  # (Q, G) -> (Q, G)
    beats = (rewards[:, :, None] - rewards[:, None, :]).sign()  # of each pair: 1, 0 or -1
    return beats.sum(-1) / (rewards.shape[-1] - 1)

aspo.group_advantages = rank_advantages
raise SystemExit(aspo.main())
