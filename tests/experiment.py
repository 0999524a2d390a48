"""GRPO, ASPO and no-IS on the built-in task over seeds, and a table of what came out.

    python tests/experiment.py --seeds 8            # 24 runs, then their table; what is finished already is not run again
    python tests/experiment.py --grid               # learning rates for each loss, on two other seeds

The runs of one seed have the same warm-up, bit for bit, so methods are also compared pairwise by seed.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conftest import ROOT

from eval import half_width, last

LOSSES, GRID, GRID_SEEDS = ("grpo", "aspo", "no-is"), ("2e-4", "4e-4", "8e-4"), (100, 101)
METRICS = ("reward", "entropy", "ratio_pos", "ratio_neg", "weight_pos", "weight_pos_low", "weight_pos_high", "weight_neg", "weight_neg_low",
           "weight_neg_high", "clip_frac_pos", "clip_frac_neg", "approx_kl", "repetition")


def run(loss: str, seed: int, lr: str, out: Path) -> Path:
    """Train, or resume, or do nothing if it is finished; then sample 16 responses to every held-out problem."""
    call = lambda script, *flags: subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, flags)], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    new = ["--loss", loss, "--seed", seed, "--lr", lr, "--out", out]
    if not (out / "checkpoint").exists():
        call("aspo.py", *(["--resume", out] if (out / "config.json").exists() else new))
    call("eval.py", out, "--bench", "arithmetic", "--k", 16, "--temperature", 1, "--top_p", 1)
    return out


def smooth(rows: list[dict], key: str, width: int = 5) -> list[float]:
    return [statistics.mean(row[key] for row in rows[max(0, i - width + 1):i + 1]) for i in range(len(rows))]


def summary(out: Path, equal_reward: float = 0.6) -> dict[str, float | None]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    heldout = [row["heldout_accuracy"] for row in rows if "heldout_accuracy" in row]
    found = {"held-out, final": heldout[-1], "held-out, best": max(heldout)}
    found |= {f"{key}, last 10 steps": last(rows, key, 10) for key in METRICS}
    rewards, entropies = smooth(rows, "reward"), smooth(rows, "entropy")
    found[f"entropy when reward passes {equal_reward}"] = next((h for r, h in zip(rewards, entropies) if r >= equal_reward), None)
    benches = json.loads((out / "eval" / "results.json").read_text())["benchmarks"]["arithmetic"]
    found |= {name: benches[name]["value"] for name in ("avg@16", "pass@4", "pass@16", "maj@16")}
    samples = [json.loads(line) for line in (out / "eval" / "arithmetic.jsonl").read_text().splitlines()]
    groups = [samples[i:i + 16] for i in range(0, len(samples), 16)]
    found["distinct right responses of 16"] = statistics.mean(len({s["response"] for s in group if s["correct"]}) for group in groups)
    return found


def table(columns: dict[str, list[dict]]) -> None:
    """Mean over seeds and half of its 95 % interval, and the difference by seed between the first two columns."""
    names = list(columns)
    pair = f" {names[1]} minus {names[0]}, by seed |" if len(names) > 1 else ""
    print("| | " + " | ".join(f"{name} ({len(columns[name])})" for name in names) + f" |{pair}\n|" + "---|" * (len(names) + 1 + bool(pair)))
    show = lambda values: f"{statistics.mean(values):.3f} ± {half_width(values):.3f}" if values else ""
    for key in columns[names[0]][0]:
        cells = [show([found[key] for found in columns[name] if found[key] is not None]) for name in names]
        if pair:
            cells.append(show([b[key] - a[key] for a, b in zip(columns[names[0]], columns[names[1]]) if None not in (a[key], b[key])]))
        print(f"| {key} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--losses", nargs="+", default=list(LOSSES))
    parser.add_argument("--lr", default="4e-4")
    parser.add_argument("--grid", action="store_true", help="every learning rate of the grid instead")
    parser.add_argument("--out", default="runs/experiment")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, each on one thread")
    args = parser.parse_args()
    seeds, rates = (GRID_SEEDS, GRID) if args.grid else (range(args.seeds), (args.lr,))
    jobs = [(loss, seed, lr, Path(args.out) / f"{loss}-lr{lr}-s{seed}") for lr in rates for seed in seeds for loss in args.losses]
    with ThreadPoolExecutor(args.jobs) as pool:
        for out in pool.map(lambda job: run(*job), jobs):
            print("finished", out, file=sys.stderr, flush=True)
    found = {(loss, lr): [summary(out) for job_loss, _, job_lr, out in jobs if (job_loss, job_lr) == (loss, lr)] for loss in args.losses for lr in rates}
    table({f"{loss} lr {lr}" if args.grid else loss: rows for (loss, lr), rows in found.items()})


if __name__ == "__main__":
    main()
