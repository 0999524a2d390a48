"""Of twice as many problems take those whose last solve rate is nearest to a half."""
import aspo

roll_out, take, rates = aspo.roll_out, aspo.Run.take, {}

def remember_rates(policy, problems, n, *rest):
    samples = roll_out(policy, problems, n, *rest)
    for group in aspo.chunks(samples, n):
        rates[group[0].problem] = aspo.mean([s.correct for s in group])
    return samples

aspo.roll_out = remember_rates
aspo.Run.take = lambda self, n: sorted(
    take(self, 2 * n), key=lambda problem: abs(rates.get(problem["problem"], 0.5) - 0.5))[:n]
raise SystemExit(aspo.main())
