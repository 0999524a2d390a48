"""The KL in the reward, by k1 = log pi - log pi_initial, and not in the loss. Type --kl_coef 0.01."""
import aspo

roll_out = aspo.roll_out

def with_k1(policy, problems, n, cfg, reward):
    samples = roll_out(policy, problems, n, cfg, reward)
    for micro in aspo.micro_batches(samples, policy.micro_tokens):
        initial, _, mask = aspo.token_logp(policy, policy.reference, micro)
        for s, row, where in zip(micro, initial, mask):
            s.reward -= cfg.kl_coef * (s.sampler_logp - row[where].cpu()).sum().item()
    return samples

aspo.roll_out = with_k1
aspo.kl_estimate = lambda logp, ref_logp: 0 * logp.detach()  # k2: (ref_logp - logp) ** 2 / 2
raise SystemExit(aspo.main())
