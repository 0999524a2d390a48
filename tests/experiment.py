"""When does the asymmetry matter? GRPO, ASPO and no-is at 1 to 64 optimiser steps per rollout.

    python tests/experiment.py sweep                 # rates, runs, tables, picture; what is finished is kept
    python tests/experiment.py table                 # of what is finished
    python tests/experiment.py read --points 8 64    # responses at the end of training: read them, then believe
    python tests/experiment.py sweep --model DIR --points 8 --seeds 3 --out runs/sums    # pretrained

Written down before the runs:
- A run is 55 rollouts of 32 prompts x 8 responses (python aspo.py has 64 prompts: an hour more than there was). 4 to 64
  steps are mini-batches of 16 to 1 prompts at 2 epochs, so that an update costs the same; 1 is all prompts at 1 epoch.
- Runs of a seed start from one warmed-up model, see the same problems and draw with the same random numbers.
- Rates are powers of two times 1e-4. A number of steps has, for all losses, the largest at which GRPO's approx_kl, of
  pi_old and pi, has a mean under .02 over 12 rollouts of seed 100, which is not used after. (The first limit was .05;
  but from .03 on GRPO did not learn on that seed.) With one step the KL is 0: that point has the rate of 4.
- With one step r is 1 and the losses are one: it is run with GRPO and shown for all.
- Collapsed: held-out accuracy ends below its start, or more than .2 below its best.
- A pretrained model has 20 rollouts of 8 prompts x 8, mini-batches of 1 at 1 epoch (8 steps) or 4 (32), a rate of 1e-5.
- Means are over seeds, with half of their 95 % interval by Student's t; so are the differences to GRPO, by seed.

Added when the runs were known: the line of all points above 1 together.
"""
import argparse
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import shutil
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean
from unittest import mock

import torch
from conftest import aspo

from eval import half_width

POINTS = {1: (32, 1), 4: (16, 2), 8: (8, 2), 16: (4, 2), 32: (2, 2), 64: (1, 2)}  # steps: mini-batch, epochs
SETTINGS = aspo.PRESETS["tiny"][1] | dict(prompts=32, save_every=0, micro_tokens=1024, sample_rows=512)
PRETRAINED = dict(data="sums", prompts=8, max_new_tokens=24, temperature=0.8, steps=20, eval_every=5, eval_problems=60,
                  save_every=0)
LOSSES = {"grpo": "#00798c", "aspo": "#d1495b", "no-is": "#8d8d8d"}  # and colours
K, LAST, EQUAL = 16, 5, 0.4  # "at equal reward": when the mean of LAST rollouts first reaches EQUAL
ACCURACY, ENTROPY = f"avg@{K}", f"entropy (nats), last {LAST} rollouts"
KINDS = ("right by steps", "right, decorated", "wrong", "cut off", "repeats the question")


def use(model: str | None) -> None:
    """Of this process: not the tiny model but this one, and PRETRAINED. kind() cannot judge its steps."""
    if model:
        SETTINGS.clear()
        SETTINGS.update(PRETRAINED, model=model)
        POINTS.clear()
        POINTS.update({8: (1, 1), 32: (1, 4)})


def update_metrics(stats, *args, usual=aspo.update_metrics):
    """aspo.py's, and the mean ratio by sign and by pi_old, for which it has the weight alone."""
    advantage, log_ratio, old_prob = (torch.cat([torch.zeros(0), *(s[name] for s in stats)])
                                      for name in ("advantage", "log_ratio", "old_prob"))

    def mean(good, unlikely):
        return aspo.mean(aspo.ratio(log_ratio[((advantage > 0) == good) & ((old_prob < 0.5) == unlikely)]))

    return usual(stats, *args) | {"ratio_pos_low": mean(True, True), "ratio_pos_high": mean(True, False),
                                  "ratio_neg_low": mean(False, True), "ratio_neg_high": mean(False, False)}


def kind(s) -> str:
    """What a sample does. A step is right if it adds up neighbours of the one before: 3+1+5+2, 4+5+2, 4+7, 11."""
    if s.truncated:
        return "cut off"
    if s.text.startswith(s.problem):
        return "repeats the question"
    if not s.correct:
        return "wrong"
    steps = [s.problem, *re.split(r"=|\n#### ?", s.text)]
    if not all(re.fullmatch(r"\d+(\+\d+)*", step) for step in steps):
        return "right, decorated"
    sums = [list(itertools.accumulate(map(int, step.split("+")))) for step in steps]
    right = all(set(after) <= set(before) and after[-1] == before[-1] for before, after in itertools.pairwise(sums))
    return "right by steps" if right else "right, decorated"


def start_of(out: Path, seed: int) -> Path:
    """A seed's warmed-up model, made once."""
    if "model" in SETTINGS:
        return Path(SETTINGS["model"])
    folder, new = out / f"start-s{seed}", out / f"unfinished-s{seed}"
    if not folder.exists():
        cfg = aspo.Config(**SETTINGS, model="tiny", seed=seed)
        for part in aspo.initial_model(cfg, aspo.load_problems(cfg)[0]):
            part.save_pretrained(new)
        new.rename(folder)
    return folder


def path_of(out: Path, point: int, loss: str, seed: int, rate: float, rollouts: int | None = None) -> Path:
    return out / f"{point}-{loss}-lr{rate:g}-s{seed}{f'-first{rollouts}' if rollouts else ''}.json"


def run(out: Path, point: int, loss: str, seed: int, rate: float, rollouts: int | None = None) -> dict:
    """Train, sample held-out problems and keep what is needed, unless that is there.

    rollouts: so many alone, without evaluation, to choose a rate.
    """
    path = path_of(out, point, loss, seed, rate, rollouts)
    if not path.exists():
        torch.set_num_threads(1)
        folder, (minibatch, epochs) = path.with_suffix(""), POINTS[point]
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        cfg = aspo.Config(**SETTINGS | dict(model=str(start_of(out, seed)), loss=loss, seed=seed, lr=rate,
                                            epochs=epochs, minibatch=minibatch, out=str(folder)))
        if rollouts:
            cfg = dataclasses.replace(cfg, steps=rollouts, eval_every=0, eval_problems=1)
        with (open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing),
              mock.patch.object(aspo, "update_metrics", update_metrics)):
            aspo.train(cfg)
        result = {"rows": [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]}
        if not rollouts:
            result |= evaluate(aspo.checkpoints(folder)[-1], cfg)
        aspo.write_whole(path, json.dumps(result))
        shutil.rmtree(folder)
    return json.loads(path.read_text())


def evaluate(checkpoint: Path, cfg) -> dict:
    """Of K responses, sampled as in training, to each held-out problem."""
    heldout = aspo.load_problems(cfg)[1]
    policy = aspo.Policy(*aspo.load_model(str(checkpoint)), cfg, heldout, learning=False)
    aspo.seed_step(cfg, "evaluate")
    samples = aspo.roll_out(policy, heldout, K, cfg)
    right = [fmean(s.correct for s in group) for group in aspo.chunks(samples, K)]
    before = torch.load(checkpoint / "trainer.pt", "cpu", weights_only=True)["before"]
    return {"before": before, "avg": fmean(right), "pass": fmean(x > 0 for x in right),
            "kinds": Counter(map(kind, samples)),
            "responses": [[s.problem, s.gold, s.text, kind(s)] for s in samples[:64 * K:K]]}


def rate_of(out: Path, point: int) -> float:
    """By the rule of the docstring; the search starts at a guess."""
    if "model" in SETTINGS:
        return 1e-5

    def moves_too_far(rate):
        moved = [row["approx_kl"] for row in run(out, point, "grpo", 100, rate, 12)["rows"]]
        return None in moved or fmean(moved) >= 0.02  # None: every group of a rollout had equal rewards

    rate = 3.2e-3 / point
    while moves_too_far(rate):
        rate /= 2
    while not moves_too_far(2 * rate):
        rate *= 2
    return rate


def rates_of(out: Path) -> dict[int, float]:
    path = out / "rates.json"
    return {int(point): rate for point, rate in json.loads(path.read_text()).items()} if path.exists() else {}


def load(out: Path) -> dict:
    """point -> loss -> seed -> result, of seeds that are finished for all losses."""
    found = {}
    for point, rate in sorted(rates_of(out).items()):
        paths = {(loss, seed): path_of(out, point, loss if point > 1 else "grpo", seed, rate)
                 for loss in LOSSES for seed in range(100)}
        seeds = [seed for seed in range(100) if all(paths[loss, seed].exists() for loss in LOSSES)]
        if seeds:
            found[point] = {loss: {seed: json.loads(paths[loss, seed].read_text()) for seed in seeds}
                            for loss in LOSSES}
    return found


def values(rows: list[dict], key: str) -> list[float]:
    return [row[key] for row in rows if row.get(key) is not None]


def collapsed(result: dict) -> bool:
    heldout = values(result["rows"], "heldout_accuracy")
    return heldout[-1] < result["before"] or max(heldout) - heldout[-1] > 0.2


def measures(result: dict) -> dict:
    """Of one run, in the order of the long table. None: it has no such number."""
    def mean(key, first=0, end=None):
        some = values(result["rows"][first:end], key)
        return fmean(some) if some else None

    rows, kinds = result["rows"], Counter(result["kinds"])
    there = next((i for i in range(LAST, len(rows) + 1) if mean("reward", i - LAST, i) >= EQUAL), None)
    heldout, right = values(rows, "heldout_accuracy"), kinds[KINDS[0]] + kinds[KINDS[1]]
    found = {"held-out accuracy, end": heldout[-1], "held-out accuracy, best": max(heldout),
             ACCURACY: result["avg"], f"pass@{K}": result["pass"],
             **{f"responses: {name}": kinds[name] / kinds.total() for name in KINDS},
             "of the right ones, right by steps": kinds[KINDS[0]] / right if right else None,
             ENTROPY: mean("entropy", -LAST),
             f"entropy when reward passes {EQUAL}": there and mean("entropy", there - LAST, there)}
    keys = ["approx_kl", "response_length", *(f"{key}_{sign}{part}" for key in ("clip_frac", "ratio", "weight")
            for sign in ("pos", "neg") for part in ("", "_low", "_high") if key != "clip_frac" or not part)]
    return found | {key: mean(key) for key in keys}


def column(by_loss: dict, loss: str, key: str, minus: str | None = None) -> list:
    """A measure of each seed, or its difference to another loss."""
    x, y = ([measures(result)[key] for result in by_loss[name].values()] for name in (loss, minus or loss))
    return [None if None in (a, b) else a - b if minus else a for a, b in zip(x, y)]


def cell(column: list, sign: str = "") -> str:
    """Mean over seeds ± half of its interval; in brackets how many seeds have a value, if not all."""
    some = [x for x in column if x is not None]
    width = f" ± {half_width(some):.3f}" if len(some) > 1 else ""
    return f"{fmean(some):{sign}.3f}{width}{f' ({len(some)})' * (len(some) < len(column))}" if some else ""


def row(by_loss: dict, key: str, losses) -> list[str]:
    """The losses' means, then the differences of ASPO and no-is to GRPO."""
    return [*(cell(column(by_loss, loss, key)) for loss in losses),
            *(cell(column(by_loss, loss, key, "grpo"), "+") for loss in ("aspo", "no-is"))]


def together(found: dict, loss: str, key: str, minus: str | None = None) -> list:
    """As column(), of each seed the mean over all points above 1."""
    return list(map(fmean, zip(*(column(found[point], loss, key, minus) for point in found if point > 1))))


def markdown(head: list[str], rows: list[list]) -> str:
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (head, ["---"] * len(head), *rows))


def report(out: Path) -> None:
    """A short table of all, a long one of each number of steps, and the picture."""
    found, rates = load(out), rates_of(out)
    heads = [f"{key}: {name}" for key in ("avg@16", "entropy") for name in ("grpo", "aspo - grpo", "no-is - grpo")]
    rows = []
    for point, by_loss in found.items():
        fallen = [[seed for seed, x in by_seed.items() if collapsed(x)] for by_seed in by_loss.values()]
        rows.append([f"{point} ({rates[point]:g}; {len(by_loss['grpo'])})", *row(by_loss, ACCURACY, ["grpo"]),
                     *row(by_loss, ENTROPY, ["grpo"]), "; ".join(map(str, fallen))])
    rows.append(["above 1 together", *(
        cell(together(found, loss, key, minus), sign) for key in (ACCURACY, ENTROPY)
        for loss, minus, sign in (("grpo", None, ""), ("aspo", "grpo", "+"), ("no-is", "grpo", "+"))), ""])
    print(markdown(["steps (rate; seeds)", *heads, "collapsed seeds"], rows))
    for point, by_loss in found.items():
        rows = [[key, *row(by_loss, key, LOSSES)] for key in measures(next(iter(by_loss["grpo"].values())))]
        print(f"\n{point} optimiser steps per rollout\n")
        print(markdown(["", *LOSSES, "aspo - grpo", "no-is - grpo"], rows))
    picture(found, out / "sweep.png")


def picture(found: dict, path: Path) -> None:
    """Means with intervals; and what differs by seed, since a seed's start moves all three."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(10, 3.4), layout="constrained")
    for axis, (key, minus) in zip(fig.subplots(1, 3), ((ACCURACY, None), (ENTROPY, None), (ENTROPY, "grpo"))):
        for shift, (loss, colour) in zip((0.93, 1, 1.07), LOSSES.items()):  # so that bars stand side by side
            columns = [column(by_loss, loss, key, minus) for by_loss in found.values()]
            axis.errorbar([n * shift for n in found], list(map(fmean, columns)), list(map(half_width, columns)),
                          color=colour, label=loss, capsize=3, marker=".")
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(found), map(str, found))
        axis.set_title(f"{key.split(',')[0]}{' minus that of GRPO' if minus else ''}", fontsize=10)
        axis.grid(alpha=0.25)
    axis.legend()
    fig.supxlabel("optimiser steps per rollout", fontsize=10)
    fig.savefig(path, dpi=110)


def read(out: Path, points: list[int]) -> None:
    found = load(out)
    for point, loss in itertools.product(sorted(found.keys() & points), LOSSES):
        for seed, result in found[point][loss].items():
            print(f"\n{point} steps, {loss}, seed {seed}")
            for problem, gold, text, name in result["responses"]:
                print(f"{name:<22}{problem} is {gold:>2}: {text!r}")


def sweep(out: Path, seeds: int, points: list[int], model: str | None) -> None:
    """A run per core, seed by seed, so that whatever is finished is a balanced set."""
    out.mkdir(parents=True, exist_ok=True)
    # Processes of their own: a fork of one that has used torch may hang.
    with ProcessPoolExecutor(None, multiprocessing.get_context("spawn"), use, [model]) as pool:
        start_of(out, 100)
        several = sorted({max(4, point) for point in points})
        rates = dict(zip(several, pool.map(rate_of, [out] * len(several), several)))
        rates = rates_of(out) | {point: rates[max(4, point)] for point in points}
        aspo.write_whole(out / "rates.json", json.dumps(rates))
        list(pool.map(start_of, [out] * seeds, range(seeds)))
        jobs = [(out, point, loss, seed, rates[point]) for seed in range(seeds) for point in points
                for loss in LOSSES if point > 1 or loss == "grpo"]
        for job, _ in zip(jobs, pool.map(run, *zip(*jobs))):
            print(*job[1:], flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("command", choices=("sweep", "table", "read"))
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--model", help="a folder, trained on sums at 8 or 32 steps")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--points", type=int, nargs="+", default=list(POINTS), choices=POINTS)
    args = parser.parse_args(argv)
    if args.command == "sweep":
        use(args.model)
        sweep(args.out, args.seeds, sorted(POINTS.keys() & args.points), args.model)
    if args.command == "read":
        read(args.out, args.points)
    else:
        report(args.out)


if __name__ == "__main__":
    main()
