"""Several rewards with weights; metrics.jsonl has each."""
import aspo

REWARDS = {"right": (1.0, aspo.math_reward),  # name: weight, f(response, answer)
           "short": (0.2, lambda response, answer: 1 - len(response) / 100)}
rollout_metrics = aspo.rollout_metrics

def with_each(samples, cfg):
    each = {f"reward_{name}": aspo.mean([f(s.text, s.gold) for s in samples])
            for name, (_, f) in REWARDS.items()}
    return rollout_metrics(samples, cfg) | each

aspo.rollout_metrics = with_each
aspo.right_answer = lambda response, problem: sum(
    weight * f(response, problem["answer"]) for weight, f in REWARDS.values())
raise SystemExit(aspo.main())
