"""GRPO, ASPO and no-is over seeds, and a table of what came out. Finished runs are reused, stopped ones go on.

    python tests/experiment.py --seeds 8                              # the built-in task: 24 runs, then a table
    python tests/experiment.py --seeds 2 --first_seed 100 --lr 2e-4 4e-4 8e-4    # learning rates, on two other seeds
    python tests/experiment.py --model DIR --data sums --seeds 5 --lr 1e-5 3e-5  # a real model, half an hour a run
    python tests/experiment.py --out DIR --table                      # of the runs that are finished; starts nothing
    python tests/experiment.py --out DIR --read 50                    # responses at the start, a third, the end

Runs are OUT/<loss>-lr<lr>-s<seed>, each on one thread; flags of aspo.py go to new ones, such as --epochs 4 (with
another --out). Every finished run in OUT is in the table. Read responses before you believe a number: a reward can be
earned by something else than what you wanted to teach. Runs of one seed begin alike and see the same problems, so
methods are also compared pairwise, by seed.

What 250 responses of each method and stage looked like on sums (SmolLM2-135M-Instruct, five seeds): at the start 6 % are
right, about half give no answer, the others say "The answer is 51." or work the sum out first; from a third on nearly all
are "The answer is 25." or "15 + 3 = 18, the answer is 18", right or wrong. One of 2,250 repeats the question, at the start.
Tiny task: the last number is learned, the steps before it become decoration (README).
"""
import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from conftest import ROOT, aspo

from eval import half_width, last

LOSSES, K = ("grpo", "aspo", "no-is"), 16
REAL = ("--prompts 8 --group_size 8 --minibatch 2 --epochs 2 --max_new_tokens 24 --temperature 0.8 --steps 40 "
        "--eval_every 10 --eval_problems 60 --eval_samples 2 --save_every 20").split()
METRICS = {"reward": "reward", "entropy": "entropy (nats)", "response_length": "length (tokens)",
           "repetition": "repetition",
           "weight_pos_high": "weight, A > 0, likely", "weight_pos_low": "weight, A > 0, unlikely",
           "weight_neg_high": "weight, A < 0, likely", "weight_neg_low": "weight, A < 0, unlikely",
           "ratio_pos": "ratio, A > 0", "ratio_neg": "ratio, A < 0", "approx_kl": "KL of a rollout's update"}
CURVES = {"reward": "reward", "heldout_accuracy": "held-out accuracy", "entropy": "entropy (nats)"}
COLOURS = {"aspo": "#d1495b", "grpo": "#00798c", "no-is": "#8d8d8d"}


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def finished(out: Path) -> bool:
    """A step is logged before it is saved, so that it is the checkpoint that knows."""
    if not (out / "config.json").exists() or not (out / "checkpoint" / "trainer.pt").exists():
        return False
    state = torch.load(out / "checkpoint" / "trainer.pt", "cpu", weights_only=True, mmap=True)
    return state["step"] >= json.loads((out / "config.json").read_text())["steps"]


def evaluated(out: Path) -> list[dict]:
    """Its samples of the held-out problems, each problem's K side by side; empty until all are there."""
    rows = read_lines(out / "eval" / "heldout.jsonl")
    config = json.loads((out / "config.json").read_text())
    problems = len(read_lines(out.parent / "heldout.jsonl")) or config["eval_problems"]
    return rows if len(rows) == K * problems else []


def write_heldout(out: Path, flags: list) -> Path:
    """A run's held-out problems, for eval.py: of a built-in set it would take more than were held out."""
    path, cfg = out / "heldout.jsonl", aspo.parse(list(map(str, flags)))
    if path.exists():  # samples have been drawn for it
        return path
    out.mkdir(parents=True, exist_ok=True)
    rows = [{"problem": p["problem"], "answer": p["answer"]} for p in aspo.load_problems(cfg)[1]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def call(script: str, *flags) -> str:
    """Run a program on one thread; what it says if it fails, else nothing."""
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)],
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True)
    return done.returncode and (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def run(out: Path, flags: list) -> str:
    """Train, or go on, or do nothing if it is finished; then sample K responses to every held-out problem."""
    if not finished(out):
        again = (out / "config.json").exists()
        if error := call("aspo.py", *(["--resume", out] if again else [*flags, "--out", out])):
            return error
    if not evaluated(out):
        temperature = json.loads((out / "config.json").read_text())["temperature"]
        if error := call("eval.py", out, "--bench", out.parent / "heldout.jsonl", "--k", K,
                         "--temperature", temperature, "--top_p", 1):
            return error
    for older in out.glob("checkpoint-*"):  # gigabytes, of a run that will not be resumed
        shutil.rmtree(older)
    return ""


def smooth(rows: list[dict], key: str, width: int = 5) -> list[float]:
    return [statistics.mean(row[key] for row in rows[max(0, i - width + 1):i + 1]) for i in range(len(rows))]


def common_reward(runs: list[list[dict]]) -> float:
    """The highest reward, in twentieths, that the mean over five steps reaches in every run."""
    return int(min(max(smooth(rows, "reward")) for rows in runs) * 20 + 1e-9) / 20


def summary(rows: list[dict], samples: list[dict], equal_reward: float) -> dict[str, float | None]:
    """Of one run: its metrics.jsonl and its samples of held-out problems."""
    heldout = [row["heldout_accuracy"] for row in rows if row.get("heldout_accuracy") is not None]
    rewards, entropies = smooth(rows, "reward"), smooth(rows, "entropy")
    half, n = len(rows) // 2, max(1, min(10, len(rows) // 4))
    found = {"held-out accuracy, last": heldout[-1], "held-out accuracy, best": max(heldout),
             f"entropy at step {half}": entropies[half - 1],
             f"entropy when reward passes {equal_reward:.2f}":
                 next((h for r, h in zip(rewards, entropies) if r >= equal_reward), None)}
    found |= {f"{name}, last {n} steps": last(rows, key, n) for key, name in METRICS.items()}
    groups = aspo.chunks(samples, K)
    right = [[s["response"] for s in group if s["correct"]] for group in groups]
    measures = {f"avg@{K}": [len(r) / K for r in right], f"pass@{K}": [float(bool(r)) for r in right],
                f"different right responses of {K}": [len(set(r)) for r in right]}
    return found | {name: statistics.mean(values) if values else None for name, values in measures.items()}


def show(values: list[float]) -> str:
    """Mean and half of its 95 % interval, of however many values there are."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    return f"{statistics.mean(values):.3f}" + f" ± {half_width(values):.3f}" * (len(values) > 1)


def table(columns: dict[str, dict[int, dict]], pair: tuple[str, str] = ("grpo", "aspo")) -> str:
    """Of loss -> seed -> summary: means over seeds, and the difference of a pair of losses by seed."""
    names = [loss for loss in LOSSES if loss in columns] + sorted(set(columns) - set(LOSSES))
    seeds = sorted(set(columns.get(pair[0], ())) & set(columns.get(pair[1], ())))
    title = [f"{pair[1]} minus {pair[0]}, by seed ({len(seeds)})"] * bool(seeds)
    lines = [f"| | {' | '.join([*(f'{name} ({len(columns[name])})' for name in names), *title])} |",
             "|---" * (len(names) + 1 + len(title)) + "|"]
    for key in next(iter(columns[names[0]].values())):
        cells = [show([found[key] for found in columns[name].values()]) for name in names]
        if seeds:
            a, b = ([columns[loss][seed][key] for seed in seeds] for loss in pair)
            cells.append(show([y - x for x, y in zip(a, b) if None not in (x, y)]))
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(lines)


def found_runs(out: Path) -> dict[str, dict[str, dict[int, Path]]]:
    """rate -> loss -> seed -> folder of every finished run."""
    found = {}
    for folder in sorted(out.glob("*-lr*-s*")):
        name = re.fullmatch(r"(.+)-lr(.+)-s(\d+)", folder.name)
        if name and finished(folder):
            loss, lr, seed = name.groups()
            found.setdefault(lr, {}).setdefault(loss, {})[int(seed)] = folder
    return dict(sorted(found.items(), key=lambda item: float(item[0])))


def report(out: Path) -> None:
    """A table for each learning rate, and the picture of all."""
    found = found_runs(out)
    if not found:
        print(f"no finished run in {out}")
        return
    metrics = {folder: read_lines(folder / "metrics.jsonl")
               for by_loss in found.values() for by_seed in by_loss.values() for folder in by_seed.values()}
    for lr, by_loss in found.items():
        equal_reward = common_reward([metrics[folder] for by_seed in by_loss.values() for folder in by_seed.values()])
        columns = {loss: {seed: summary(metrics[folder], evaluated(folder), equal_reward)
                          for seed, folder in by_seed.items()} for loss, by_seed in by_loss.items()}
        print(f"\nlearning rate {lr}: mean over seeds ± half of its 95 % interval; in brackets, the number of runs\n")
        print(table(columns), flush=True)
    picture({lr: {loss: [metrics[folder] for folder in by_seed.values()] for loss, by_seed in by_loss.items()}
             for lr, by_loss in found.items()}, out / "curves.png")


def picture(runs: dict[str, dict[str, list[list[dict]]]], path: Path) -> None:
    """Reward, held-out accuracy and entropy: a line of panels for each learning rate."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    fig, axes = pyplot.subplots(
        len(runs), len(CURVES), figsize=(11, 3.4 * len(runs)), layout="constrained", squeeze=False)
    for line, (lr, by_loss) in zip(axes, runs.items()):
        for axis, (key, title) in zip(line, CURVES.items()):
            for loss, seeds in by_loss.items():
                points = {}
                for row in (row for rows in seeds for row in rows if row.get(key) is not None):
                    points.setdefault(row["step"], []).append(row[key])
                steps = sorted(points)
                means, widths = ([of(points[step]) for step in steps] for of in (statistics.mean, half_width))
                axis.plot(steps, means, color=COLOURS.get(loss), label=f"{loss} ({len(seeds)})", linewidth=1.4)
                axis.fill_between(steps, [m - w for m, w in zip(means, widths)], [m + w for m, w in zip(means, widths)],
                                  color=COLOURS.get(loss), alpha=0.18, linewidth=0)
            axis.set(title=f"{title}, lr {lr}", xlabel="step")
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        line[0].legend(title="loss (runs)", frameon=False)
    fig.suptitle("mean over seeds, band: 95 % interval of that mean", x=0.01, ha="left", fontsize=9, color="#666666")
    fig.savefig(path, dpi=130)
    pyplot.close(fig)
    print(f"\npicture in {path}")


def read(out: Path, n: int) -> None:
    """Print n responses of a run at the start, from a third on, and at the end."""
    rows = read_lines(out / "samples.jsonl")
    steps = sorted({row["step"] for row in rows})
    if not rows:
        return
    third = next(i for i, row in enumerate(rows) if row["step"] >= steps[len(steps) // 3])
    for where, part in (("start", rows[:n]), ("a third", rows[third:third + n]), ("end", rows[-n:])):
        print(f"\n{out.name}, {where}: step {part[0]['step']} to {part[-1]['step']}, mean reward "
              f"{statistics.mean(row['reward'] for row in part):.2f}")
        for row in part:
            print(f"{row['reward']:5.2f}  {row['problem']!r} = {row['gold']!r}: {row['response']!r}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", help="[arithmetic; sums of a real model]")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--losses", nargs="+", default=list(LOSSES))
    parser.add_argument("--lr", nargs="+", help="[4e-4; 1e-5 of a real model]")
    parser.add_argument("--out", help="[runs/experiment-<model>-<data>]")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, each on one thread")
    parser.add_argument("--table", action="store_true", help="report what is finished, start nothing")
    parser.add_argument("--read", type=int, metavar="N", help="print N responses of every run in OUT at three stages")
    args, more = parser.parse_known_args(argv)
    tiny = args.model == "tiny"
    data, rates = args.data or ("arithmetic" if tiny else "sums"), args.lr or ["4e-4" if tiny else "1e-5"]
    out = Path(args.out or f"runs/experiment-{Path(args.model).name}-{data}")
    if args.read:
        for folder in sorted(out.glob("*-lr*-s*")):
            read(folder, args.read)
        return 0
    failed = []
    if not args.table:
        flags = ["--model", args.model, "--data", data, *([] if tiny else REAL), *more]
        write_heldout(out, flags)
        jobs = [(out / f"{loss}-lr{lr}-s{seed}", [*flags, "--loss", loss, "--lr", lr, "--seed", seed])
                for seed in range(args.first_seed, args.first_seed + args.seeds)
                for lr in rates for loss in args.losses]
        with ThreadPoolExecutor(args.jobs) as pool:
            for (folder, _), error in zip(jobs, pool.map(lambda job: run(*job), jobs)):
                print(f"{folder}: {error or 'finished'}", file=sys.stderr, flush=True)
                failed += [folder] * bool(error)
    report(out)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
