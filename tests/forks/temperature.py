"""The temperature rises while entropy is below 0.3, else falls; --resume begins again."""
import aspo

update = aspo.update

def update_and_adapt(policy, samples, cfg):
    result = update(policy, samples, cfg)  # before: r needs the temperature of the samples
    entropy = aspo.mean([s.entropy for s in aspo.all_gather(samples)])
    policy.temperature *= 1.02 if entropy < 0.3 else 0.98
    return result

aspo.update = update_and_adapt
raise SystemExit(aspo.main())
