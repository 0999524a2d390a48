"""Two data sets, 3 : 1, each with its own instruction. Type --instruction ""."""
import aspo

SETS = (("sums", 1, "Finish with 'The answer is' and the number."), ("arithmetic", 3, ""))
load_problems = aspo.load_problems

def load_mixture(cfg):
    mixture = []
    for data, share, instruction in SETS:
        train, heldout = load_problems(aspo.dataclasses.replace(cfg, data=data))
        for problem in train + heldout:
            problem["problem"] = f"{problem['problem']}\n{instruction}".strip()
        mixture += (train * 1000)[:500 * share]
    return mixture, heldout  # of the last set

aspo.load_problems = load_mixture
raise SystemExit(aspo.main())
