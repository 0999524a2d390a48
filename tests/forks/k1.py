"""The KL in the reward, by k1 = log pi - log pi_initial, and not in the loss. Type --kl_coef 0.01."""
import aspo

roll_out, policy_loss = aspo.roll_out, aspo.policy_loss

def with_k1(policy, problems, n, cfg, reward):
    samples = roll_out(policy, problems, n, cfg, reward)
    for micro in aspo.micro_batches(samples, policy.micro_tokens):
        initial, _, mask = aspo.token_logp(policy, policy.reference, micro)
        for s, row, where in zip(micro, initial, mask):
            s.reward -= cfg.kl_coef * (s.sampler_logp - row[where].cpu()).sum().item()
    return samples

aspo.roll_out = with_k1
aspo.policy_loss = lambda logp, *rest, ref_logp, **more: policy_loss(
    logp, *rest, ref_logp=logp.detach(), **more)  # whose k3 has no gradient
raise SystemExit(aspo.main())
