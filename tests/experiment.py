"""When does the asymmetry matter? GRPO, ASPO and no-is on the tiny task, at 1 to 64 optimiser steps per rollout.

    python tests/experiment.py sweep                 # starts, rates, runs, tables, picture; what is finished is kept
    python tests/experiment.py table                 # of what is finished, here and at any time
    python tests/experiment.py read --points 8 64    # responses at the end of training: read them, then believe

Written down before the runs:
- A run is 24 rollouts of 32 prompts x 8 responses (python aspo.py has 55 of 64: hours more than there were). 4 to 64
  steps are mini-batches of 16 to 1 prompts at 2 epochs, so that an update costs the same; 1 is all prompts at 1 epoch.
- Runs of a seed start from one warmed-up model, see the same problems and draw with the same random numbers.
- Rates are powers of two times 1e-4. A number of steps has, for all losses, the largest at which GRPO's approx_kl, of
  pi_old and pi, has a mean under .01 over 12 rollouts of seed 100, which is not used after (found upwards or downwards
  from 3.2e-3 / steps). The first limit was .05, at which GRPO did not learn on that seed. With one step it is 0: that
  point has the rate of 4.
- With one step r is 1 and the losses are one: it is run with GRPO and shown for all.
- Collapsed: held-out accuracy ends below its start, or more than .2 below its best, or a number stopped being finite.
- Means are over seeds, with half of their 95 % interval by Student's t; so are the differences to GRPO, by seed.
"""
import argparse
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from conftest import aspo  # noqa: E402

from eval import half_width  # noqa: E402

LOSSES, K, READ = ("grpo", "aspo", "no-is"), 16, 64
POINTS = {1: (32, 1), 4: (16, 2), 8: (8, 2), 16: (4, 2), 32: (2, 2), 64: (1, 2)}  # steps: mini-batch, epochs
SETTINGS = aspo.PRESETS["tiny"][1] | dict(steps=24, prompts=32, eval_every=8, save_every=0,
                                          micro_tokens=1024, sample_rows=512)
RULE = dict(seed=100, rollouts=12, kl=0.01, unit=1e-4, start=3.2e-3)
EQUAL_REWARD, LAST = 0.4, 5  # "at equal reward": where the mean of LAST rollouts first reaches it
ACCURACY, ENTROPY = f"avg@{K}", f"entropy (nats), last {LAST} rollouts"
KINDS = ("right by steps", "right, decorated", "wrong", "cut off", "repeats the question")
SIGNS = [f"{key}_{sign}" for key in ("clip_frac", "ratio", "weight") for sign in ("pos", "neg")]
KEPT = ["step", "reward", "entropy", "response_length", "truncated", "tokens", "approx_kl", "heldout_accuracy",
        *SIGNS, *(f"{key}_{part}" for key in SIGNS[2:] for part in ("low", "high"))]
COLOURS = {"grpo": "#00798c", "aspo": "#d1495b", "no-is": "#8d8d8d"}


# ------------------------------------------------------------------------------------------------------------ one run

def ratios_by_probability(update_metrics):
    """aspo.update_metrics, and the mean ratio by sign and by pi_old, of which it has the weight alone."""
    def more(stats, grad_norms, cfg):
        found = update_metrics(stats, grad_norms, cfg)
        advantage, log_ratio, old_prob = (torch.cat([torch.zeros(0), *(s[name] for s in stats)])
                                          for name in ("advantage", "log_ratio", "old_prob"))
        r, low = aspo.ratio(log_ratio), old_prob < 0.5
        for sign, these in (("pos", advantage > 0), ("neg", advantage < 0)):
            found |= {f"ratio_{sign}_low": aspo.mean(r[these & low]), f"ratio_{sign}_high": aspo.mean(r[these & ~low])}
        return found
    return more


def follows(before: list[int], after: list[int]) -> bool:
    """Is `after` what stays of a sum when some of its neighbours are added? [3, 1, 5, 2] -> [4, 7]."""
    terms = iter(before)
    for total in after:
        found = 0
        while found < total:
            found += next(terms, total + 1)  # there are none left: too much
        if found != total:
            return False
    return next(terms, None) is None


def kind(problem: str, gold: str, text: str, right: bool, truncated: bool) -> str:
    """What a response does: see KINDS."""
    if truncated:
        return "cut off"
    if text.startswith(problem):
        return "repeats the question"
    if not right:
        return "wrong"
    steps = re.split(r"=|\n#### ?", text)
    if not all(re.fullmatch(r"\d+(\+\d+)*", step) for step in steps):
        return "right, decorated"
    numbers = [list(map(int, step.split("+"))) for step in (problem, *steps)]
    return "right by steps" if all(map(follows, numbers, numbers[1:])) else "right, decorated"


def start_of(out: Path, seed: int) -> Path:
    """A seed's warmed-up model, made once."""
    folder, new = out / f"start-s{seed}", out / f"unfinished-s{seed}"
    if not folder.exists():
        cfg = aspo.Config(**SETTINGS, model="tiny", seed=seed)
        for part in aspo.initial_model(cfg, aspo.load_problems(cfg)[0]):
            part.save_pretrained(new)
        new.rename(folder)
    return folder


def run(out: Path, point: int, loss: str, seed: int, rate: float, rollouts: int | None = None) -> dict:
    """Train, sample held-out problems, keep what the tables need; or read it, if it is there.

    rollouts: so many alone, without evaluation, to choose a rate.
    """
    path = out / f"{point}-{loss}-lr{rate:g}-s{seed}{f'-first{rollouts}' if rollouts else ''}.json"
    if path.exists():
        return json.loads(path.read_text())
    torch.set_num_threads(1)
    folder = path.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    minibatch, epochs = POINTS[point]
    short = dict(steps=rollouts, eval_every=0, eval_problems=1) if rollouts else {}
    cfg = aspo.Config(**SETTINGS | dict(model=str(start_of(out, seed)), loss=loss, seed=seed, lr=rate, epochs=epochs,
                                        minibatch=minibatch, out=str(folder)) | short)
    usual, result = aspo.update_metrics, dict(point=point, loss=loss, seed=seed, rate=rate, broken="")
    aspo.update_metrics = ratios_by_probability(usual)
    try:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            aspo.train(cfg)
    except aspo.UserError as error:
        if "broken the model" not in str(error):
            raise
        result["broken"] = str(error)
    finally:
        aspo.update_metrics = usual
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result["rows"] = [{key: round(row[key], 5) for key in KEPT if row.get(key) is not None} for row in rows]
    if not rollouts and not result["broken"]:
        result |= evaluate(aspo.checkpoints(folder)[-1], cfg)
    path.with_suffix(".tmp").write_text(json.dumps(result))
    path.with_suffix(".tmp").replace(path)
    shutil.rmtree(folder)
    return result


def evaluate(checkpoint: Path, cfg) -> dict:
    """Of K responses, sampled as in training, to each held-out problem."""
    heldout = aspo.load_problems(cfg)[1]
    policy = aspo.Policy(*aspo.load_model(str(checkpoint)), cfg, heldout, learning=False)
    aspo.seed_step(cfg, "evaluate")
    samples = aspo.roll_out(policy, heldout, K, cfg)
    right = [fmean(s.correct for s in group) for group in aspo.chunks(samples, K)]
    kinds = [kind(s.problem, s.gold, s.text, s.correct > 0, s.truncated) for s in samples]
    before = torch.load(checkpoint / "trainer.pt", "cpu", weights_only=True)["before"]
    return {"before": before, "avg": fmean(right), "pass": fmean(x > 0 for x in right), "kinds": Counter(kinds),
            "responses": [[s.problem, s.gold, s.text, k] for s, k in zip(samples[::K], kinds[::K])][:READ]}


def rate_of(out: Path, point: int) -> float:
    """By the rule of the docstring."""
    def moves_too_far(rate):
        found = run(out, point, "grpo", RULE["seed"], rate, RULE["rollouts"])
        # A rollout of equal rewards has no number: it has moved too far before.
        return bool(found["broken"]) or fmean(row.get("approx_kl", 1) for row in found["rows"]) >= RULE["kl"]

    power = round(torch.tensor(RULE["start"] / point / RULE["unit"]).log2().item())
    rate = RULE["unit"] * 2**power
    if moves_too_far(rate):
        while moves_too_far(rate := rate / 2):
            pass
        return rate
    while not moves_too_far(rate * 2):
        rate *= 2
    return rate


def jobs(out: Path, seeds, points, rates) -> list[tuple]:
    """Seed by seed: whatever is finished is a balanced set."""
    return [(out, point, loss, seed, rates[point]) for seed in seeds for point in points
            for loss in (LOSSES if point > 1 else LOSSES[:1])]


# ------------------------------------------------------------------------------------------------------------- tables

def read_rates(out: Path) -> dict[int, float]:
    path = out / "rates.json"
    return {int(point): rate for point, rate in json.loads(path.read_text()).items()} if path.exists() else {}


def load(out: Path) -> dict:
    """point -> loss -> seed -> result, at the chosen rates, of seeds that are finished for all losses."""
    found = {}
    for point, rate in sorted(read_rates(out).items()):
        by_loss = {}
        for loss in LOSSES:
            paths = out.glob(f"{point}-{loss if point > 1 else LOSSES[0]}-lr{rate:g}-s*.json")
            results = [json.loads(path.read_text()) for path in paths if "first" not in path.name]
            by_loss[loss] = {result["seed"]: result for result in results}
        if seeds := sorted(set.intersection(*map(set, by_loss.values()))):
            found[point] = {loss: {seed: by_loss[loss][seed] for seed in seeds} for loss in LOSSES}
    return found


def collapsed(result: dict) -> bool:
    if result["broken"]:
        return True
    heldout = [result["before"], *(row["heldout_accuracy"] for row in result["rows"] if "heldout_accuracy" in row)]
    return heldout[-1] < heldout[0] or max(heldout) - heldout[-1] > 0.2


def measures(result: dict) -> dict:
    """Of one run, in the order of the long table. None: it has no such number."""
    rows, kinds = result["rows"], result.get("kinds", {})

    def mean(key, some=rows):
        values = [row[key] for row in some if key in row]
        return fmean(values) if values else None

    def recent(key, i):
        return mean(key, rows[max(0, i - LAST):i])

    heldout = [row["heldout_accuracy"] for row in rows if "heldout_accuracy" in row] or [None]
    there = next((i for i in range(LAST, len(rows) + 1) if recent("reward", i) >= EQUAL_REWARD), None)
    right = kinds.get(KINDS[0], 0) + kinds.get(KINDS[1], 0)
    found = {"held-out accuracy, end": heldout[-1], "held-out accuracy, best": max(heldout),
             ACCURACY: result.get("avg"), f"pass@{K}": result.get("pass"),
             "of right responses, right by steps": kinds.get(KINDS[0], 0) / right if right else None,
             ENTROPY: recent("entropy", len(rows)),
             f"entropy when reward passes {EQUAL_REWARD}": there and recent("entropy", there),
             "KL of pi_old and pi": mean("approx_kl"), "tokens of a response": mean("response_length")}
    for key in ("clip_frac", "ratio", "weight"):
        for sign, name in {"pos": "A > 0", "neg": "A < 0"}.items():
            found[f"{key}, {name}"] = mean(f"{key}_{sign}")
            for part, of in {"low": "pi_old < .5", "high": "pi_old > .5"}.items() if key != "clip_frac" else ():
                found[f"{key}, {name}, {of}"] = mean(f"{key}_{sign}_{part}")
    return found


def column(by_loss: dict, loss: str, key: str, minus: str | None = None) -> list:
    """A measure of each seed, or its difference to another loss."""
    x, y = ([measures(result)[key] for result in by_loss[name].values()] for name in (loss, minus or loss))
    return [None if None in pair else pair[0] - pair[1] if minus else pair[0] for pair in zip(x, y)]


def cell(values: list, sign="") -> str:
    """Mean over seeds ± half of its interval; in brackets how many seeds have a value, if not all."""
    some = [x for x in values if x is not None]
    width = f" ± {half_width(some):.3f}" if len(some) > 1 else ""
    return f"{fmean(some):{sign}.3f}{width}{f' ({len(some)})' * (len(some) < len(values))}" if some else ""


def summary(found: dict, rates: dict) -> str:
    """The short table: a row for each number of steps."""
    heads = [f"{key}{name}" for key in ("avg@16: ", "entropy: ") for name in ("GRPO", "ASPO - GRPO", "no-is - GRPO")]
    lines = [f"| steps (rate; seeds) | {' | '.join(heads)} | collapsed |", "|---" * 8 + "|"]
    for point, by_loss in found.items():
        cells = [f"{point} ({rates[point]:g}; {len(by_loss['grpo'])})"]
        for key in (ACCURACY, ENTROPY):
            cells.append(cell(column(by_loss, "grpo", key)))
            cells += [cell(column(by_loss, loss, key, "grpo"), "+") if point > 1 else "0" for loss in LOSSES[1:]]
        cells.append(", ".join(str(sum(map(collapsed, by_loss[loss].values()))) for loss in LOSSES))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def details(by_loss: dict) -> str:
    """The long table of one number of steps: a row for each measure."""
    lines = [f"| | {' | '.join(LOSSES)} | aspo - grpo | no-is - grpo |", "|---" * 6 + "|"]
    for key in measures(next(iter(by_loss["grpo"].values()))):
        cells = [cell(column(by_loss, loss, key)) for loss in LOSSES]
        cells += [cell(column(by_loss, loss, key, "grpo"), "+") for loss in LOSSES[1:]]
        lines.append(f"| {key} | {' | '.join(cells)} |")
    rows = {"collapsed seeds": [[seed for seed, x in by_loss[loss].items() if collapsed(x)] for loss in LOSSES]}
    for name in KINDS:
        rows[f"responses: {name}"] = [sum(x.get("kinds", {}).get(name, 0) for x in by_loss[loss].values())
                                      for loss in LOSSES]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(map(str, cells))} | | |" for name, cells in rows.items())])


def picture(found: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, key in zip(fig.subplots(1, 2), (ACCURACY, ENTROPY)):
        for shift, (loss, colour) in zip((0.94, 1, 1.06), COLOURS.items()):  # so that bars stand side by side
            points = {n: [x for x in column(by_loss, loss, key) if x is not None] for n, by_loss in found.items()}
            points = {n: x for n, x in points.items() if x}
            axis.errorbar([n * shift for n in points], list(map(fmean, points.values())),
                          list(map(half_width, points.values())), color=colour, label=loss, capsize=3, marker=".")
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(found), map(str, found))
        axis.set(title=key, xlabel="optimiser steps per rollout")
        axis.grid(alpha=0.25)
    axis.legend()
    fig.savefig(path, dpi=110)


def report(out: Path) -> None:
    found, rates = load(out), read_rates(out)
    print(summary(found, rates))
    for point, by_loss in found.items():
        print(f"\n{point} optimiser steps per rollout, rate {rates[point]:g}\n\n{details(by_loss)}")
    picture(found, out / "sweep.png")


def read(out: Path, points) -> None:
    for point, by_loss in load(out).items():
        for loss, by_seed in by_loss.items():
            for seed, result in by_seed.items() if point in points else ():
                print(f"\n{point} steps, {loss}, seed {seed}")
                for problem, gold, text, name in result.get("responses", ()):
                    print(f"{name:<22}{problem} is {gold:>2}: {text!r}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("command", choices=("sweep", "table", "read"))
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--points", type=int, nargs="+", default=list(POINTS), choices=POINTS)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, each on one thread")
    args = parser.parse_args(argv)
    if args.command == "read":
        read(args.out, args.points)
        return
    if args.command == "sweep":
        args.out.mkdir(parents=True, exist_ok=True)
        # Processes of their own: a fork of one that has used torch may hang.
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            start_of(args.out, RULE["seed"])
            several = sorted({max(4, point) for point in args.points})
            rates = dict(zip(several, pool.map(rate_of, [args.out] * len(several), several)))
            known = read_rates(args.out) | {point: rates[max(4, point)] for point in args.points}
            (args.out / "rates.json").write_text(json.dumps(known))
            list(pool.map(start_of, [args.out] * args.seeds, range(args.seeds)))
            todo = jobs(args.out, range(args.seeds), args.points, known)
            for job, _ in zip(todo, pool.map(run, *zip(*todo))):
                print(*job[1:], file=sys.stderr, flush=True)
    report(args.out)


if __name__ == "__main__":
    main()
