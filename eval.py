"""How good is a model or a run, the way the ASPO paper reports it, and what did a run look like?

    python eval.py runs/tiny-aspo-s0 --bench arithmetic --k 16          # a run's last checkpoint
    python eval.py qwen-0.5b --bench gsm8k,math500 --k 16               # an alias, a hub id or a folder
    python eval.py runs/A --model runs/B --bench FILE.jsonl --k 8       # B minus A on the same problems, with its interval
    python eval.py compare runs/A runs/B ... --out figure.png           # training curves by loss, over seeds
    python eval.py weights --out figure.png                             # every method's weight against the ratio

Samples and scores come from aspo.py's sampler and reward.py, so that training and evaluation cannot disagree. Each sample
is a line of BENCH.jsonl, appended as it goes: started again, an evaluation goes on where it was killed and ends the same.
"""
import argparse
import dataclasses
import hashlib
import json
import math
import os
import random
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import aspo
from aspo import Config, UserError
from reward import extract_answer, is_equal

# ------------------------------------------------------------------------------------------------------- benchmarks


def _list(answer) -> str:
    """Several answers in a list are one list of solutions."""
    return ", ".join(map(str, answer)) if isinstance(answer, list) else str(answer)


# name -> hub id, config, split, row -> (problem, answer). The checker reads 025, $7$ and units; a problem's text is never
# searched for an answer (Minerva's contain boxed ones).
BENCHES = {
    "gsm8k": ("openai/gsm8k", "main", "test", lambda r: (r["question"], r["answer"].split("####")[-1])),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", lambda r: (r["problem"], r["answer"])),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train", lambda r: (r["problem"], str(r["answer"]))),
    "aime25": ("math-ai/aime25", None, "test", lambda r: (r["problem"], str(r["answer"]))),
    "amc23": ("math-ai/amc23", None, "test", lambda r: (r["question"], str(r["answer"]))),
    "minerva": ("math-ai/minervamath", None, "test", lambda r: (r["question"], str(r["answer"]))),
    "olympiad": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", lambda r: (r["question"], _list(r["final_answer"]))),
    "svamp": ("ChilleD/SVAMP", None, "test", lambda r: (f"{r['Body']} {r['Question']}", str(r["Answer"]))),
}


def load_bench(name: str) -> list[dict]:
    """Rows {"problem", "answer"} of a benchmark: a name of BENCHES, arithmetic, or a .jsonl file. Raises UserError."""
    if name == "arithmetic":
        return aspo.load_problems(Config(data="arithmetic"))[1]
    if name.endswith((".jsonl", ".json")) or Path(name).is_file():
        return aspo.read_jsonl(Path(name))
    if name not in BENCHES:
        raise UserError(f"no benchmark {name!r}; choose from arithmetic, {', '.join(BENCHES)}, or a .jsonl file")
    from datasets import load_dataset

    hub_id, config, split, read = BENCHES[name]
    try:
        pairs = [read(row) for row in load_dataset(hub_id, config, split=split)]
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise UserError(f"cannot load --bench {name} ({hub_id} on the hub): {' '.join(str(error).split())[:200]}") from None
    rows = [{"problem": problem.strip(), "answer": answer.strip()} for problem, answer in pairs]
    if missing := sum(not row["answer"] for row in rows):
        raise UserError(f"--bench {name}: {missing} of {len(rows)} problems have no answer; the set's columns may have changed")
    return rows


# --------------------------------------------------------------------------------------------------------- measures


def pass_at(n: int, correct: int, k: int) -> float:
    """Probability that k of n samples, `correct` of them right, hold a right one: 1 - C(n-c, k) / C(n, k).

    Unbiased, arXiv 2107.03374, section 2.1. Raises ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples and k >= 1, got {n}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def majority(answers: list[str | None], correct: list[bool]) -> float:
    """maj@k: is the most frequent answer right? Answers vote together if they are equal as mathematics, and no answer
    does not vote. A tie counts by the share of its answers that are right, which is what drawing one gives on average."""
    votes = []  # [a representative, is it right, votes]
    for answer, right in zip(answers, correct):
        if answer is None:
            continue
        for vote in votes:
            if answer == vote[0] or is_equal(answer, vote[0]):
                vote[2] += 1
                break
        else:
            votes.append([answer, bool(right), 1])
    top = [right for _, right, count in votes if count == max(v[2] for v in votes)]
    return sum(top) / len(top) if top else 0.0


def interval(values: list[float], resamples: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean: one value a problem, and it is problems that are drawn again, since the samples
    of one problem are no independent evidence (Efron's percentile method, with a fixed seed)."""
    x = torch.tensor(values, dtype=torch.float64)
    generator, means = torch.Generator().manual_seed(0), []
    for _ in range(0, resamples, block := max(1, 2**22 // len(x))):
        means.append(x[torch.randint(len(x), (min(block, resamples), len(x)), generator=generator)].mean(1))
    low, high = torch.cat(means)[:resamples].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def scores(rows: list[dict], k: int) -> dict:
    """What results.json says of one benchmark; rows are its samples, each problem's k side by side."""
    groups = aspo.groups_of(rows, k)
    right = [sum(row["correct"] for row in group) for group in groups]
    per_problem = {f"avg@{k}": [c / k for c in right]}
    for j in [2**i for i in range(k.bit_length()) if 2**i < k] + [k]:
        per_problem[f"pass@{j}"] = [pass_at(k, c, j) for c in right]
    per_problem[f"maj@{k}"] = [majority([r["extracted"] for r in g], [r["correct"] for r in g]) for g in groups]
    mean = lambda key: sum(row[key] for row in rows) / len(rows)
    found = {name: {"value": sum(v) / len(v), "interval": interval(v)} for name, v in per_problem.items()}
    return {"problems": len(groups), "samples": len(rows), **found, "truncated": mean("truncated"),
            "response_length": mean("tokens"), "repetition": mean("repetition")}


# ------------------------------------------------------------------------------------------------------- evaluation


def model_config(name: str, args) -> Config:
    """The training Config that belongs to a run folder, else an alias's or model's own, with what was typed in its place."""
    run = Path(name)
    if (run / "config.json").exists() and (run / "metrics.jsonl").exists():
        if not (run / "checkpoint").is_dir():
            raise UserError(f"{run} has no checkpoint yet; let the run go on, or name a model")
        cfg = dataclasses.replace(aspo.parse(["--resume", str(run)]), model=str(run / "checkpoint"))
    else:
        cfg = aspo.parse(["--model", name])
    typed = {key: value for key in ("max_new_tokens", "instruction", "thinking", "sample_rows", "device", "seed")
             if (value := getattr(args, key)) is not None}
    temperature = args.temperature if args.temperature is not None else 0.8 if args.k > 1 else 0.0
    return dataclasses.replace(cfg, temperature=temperature, **typed)


def fingerprint(model: str) -> str | None:
    """A hash of a local model's weights, by their size and first and last MiB, so that a resumed file is of one model."""
    digest = hashlib.sha256()
    for path in sorted(Path(model).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(file.read(2**20))
            file.seek(max(0, path.stat().st_size - 2**20))
            digest.update(file.read() + str(path.stat().st_size).encode())
    return digest.hexdigest()[:16] if any(Path(model).glob("*.safetensors")) else None


def write(path: Path, results: dict) -> None:
    """Whole or not at all."""
    path.with_suffix(".tmp").write_text(json.dumps(results, indent=2))
    os.replace(path.with_suffix(".tmp"), path)


def finished(path: Path, problems: list[dict], k: int, chunk: int) -> list[dict]:
    """The samples of all whole chunks in a file that a kill may have torn; what follows them is cut off."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    done = len(rows) // k if len(rows) >= len(problems) * k else len(rows) // (k * chunk) * chunk
    rows = rows[:done * k]
    for row, expected in zip(rows, (problem for problem in problems for _ in range(k))):
        if (row["problem"], row["gold"]) != (expected["problem"], expected["answer"]):
            raise UserError(f"{path} holds other problems than this benchmark does; choose another --out")
    path.with_suffix(".tmp").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)
    return rows


def evaluate(name: str, benches: dict[str, list[dict]], out: Path, args) -> dict[str, list[dict]]:
    """Sample, score and write one model's results; returns the samples of each benchmark. Raises UserError."""
    cfg = model_config(name, args)
    top_p = args.top_p if args.top_p is not None else 0.95 if args.k > 1 else 1.0
    settings = {"model": name, "weights": fingerprint(cfg.model), "k": args.k, "temperature": cfg.temperature, "top_p": top_p,
                **{key: getattr(cfg, key) for key in ("max_new_tokens", "instruction", "thinking", "seed", "sample_rows")},
                "limit": args.limit}
    results = {"settings": settings, "benchmarks": {}}
    if (out / "results.json").exists():
        results = json.loads((out / "results.json").read_text())
        for key, value in settings.items():
            if results["settings"].get(key) != value:
                raise UserError(f"{out} holds results with {key} {results['settings'].get(key)!r}, not {value!r}; choose "
                                "another --out")
    device = aspo.use_device(cfg)
    model, tokenizer = aspo.load_model(cfg)
    for problems in benches.values():
        aspo.check_prompts(problems, model, tokenizer, cfg)
    model = aspo.with_weights_in(aspo.choose_precision(device), model.to(device)).eval()
    decoder = aspo.Decoder(model)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write(out / "results.json", results)
    except OSError as error:
        raise UserError(f"cannot write in {out}: {error.strerror}; choose another --out") from None

    chunk, samples = max(1, cfg.sample_rows // args.k), {}
    for bench, problems in benches.items():
        path = out / f"{Path(bench).stem}.jsonl"
        rows = finished(path, problems, args.k, chunk)
        with tqdm(total=len(problems) * args.k, initial=len(rows), desc=f"{Path(name).name} {Path(bench).stem}", leave=False,
                  dynamic_ncols=True) as bar:
            for first in range(len(rows) // args.k, len(problems), chunk):
                # a chunk's samples depend on the seed and its place alone, so it does not matter who sampled before it
                torch.manual_seed(random.Random(f"{cfg.seed} {bench} {first}").getrandbits(63))
                new = [{"problem": s.problem, "response": s.text, "extracted": extract_answer(s.text), "gold": s.gold,
                        "correct": bool(s.correct), "truncated": s.truncated, "tokens": len(s.response),
                        "repetition": aspo.repetition(s.text)}
                       for s in aspo.roll_out(model, tokenizer, problems[first:first + chunk], args.k, cfg, top_p=top_p, decoder=decoder)]
                aspo.append(path, new)
                rows += new
                bar.update(len(new))
                bar.set_postfix(accuracy=f"{sum(row['correct'] for row in rows) / len(rows):.3f}")
        samples[bench] = rows
        results["benchmarks"][Path(bench).stem] = scores(rows, args.k)
        write(out / "results.json", results)
    return samples


def report(name: str, benches, out: Path, args) -> None:
    """Print results.json as a table."""
    results = json.loads((out / "results.json").read_text())
    print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in results["settings"].items() if key != "model"))
    for bench in benches:
        found = results["benchmarks"][Path(bench).stem]
        print(f"{Path(bench).stem}, {found['problems']} problems")
        for key, value in found.items():
            if isinstance(value, dict):
                low, high = value["interval"]
                print(f"  {key:<8} {value['value']:.3f}   95 % interval {low:.3f} to {high:.3f}")
        print(f"  cut off {found['truncated']:.1%}, mean length {found['response_length']:.1f} tokens, "
              f"repetition {found['repetition']:.3f}")
    print(f"results in {out}: results.json and one line a sample in {', '.join(Path(b).stem + '.jsonl' for b in benches)}")


def main_evaluate(argv: list[str]) -> None:
    """python eval.py MODEL_OR_RUN; raises UserError on bad input."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: (_ for _ in ()).throw(UserError(f"{message}; see python eval.py --help"))
    parser.add_argument("first", metavar="MODEL_OR_RUN", help="a run folder, an alias, a hub id or a model folder")
    parser.add_argument("--model", help="a second one, compared with the first on the same problems")
    parser.add_argument("--bench", default="arithmetic",
                        help=f"separated by commas: arithmetic, {', '.join(BENCHES)}, or a .jsonl file")
    parser.add_argument("--k", type=int, default=1, help="samples per problem")
    parser.add_argument("--limit", type=int, help="only so many problems, drawn with a fixed seed")
    parser.add_argument("--temperature", type=float, help="[0.8, as in the paper; greedy for k = 1]")
    parser.add_argument("--top_p", type=float, help="[0.95, as in the paper; 1 for k = 1]")
    parser.add_argument("--max_new_tokens", type=int, help="[as in training]")
    parser.add_argument("--instruction", help="[as in training]")
    parser.add_argument("--thinking", type=lambda text: text.lower() in ("1", "true", "yes"), help="[as in training]")
    parser.add_argument("--sample_rows", type=int, help="responses decoded at once [as in training]")
    parser.add_argument("--seed", type=int, help="[as in training]")
    parser.add_argument("--device", help="[cuda if there is one, else cpu]")
    parser.add_argument("--out", help="results folder [RUN/eval, or runs/eval-<model>]; of two models, the folder of both")
    args = parser.parse_args(argv)
    for name, least in (("k", 1), ("limit", 1), ("max_new_tokens", 1), ("sample_rows", 1), ("temperature", 0), ("seed", 0)):
        if (value := getattr(args, name)) is not None and not least <= value < math.inf:
            raise UserError(f"--{name} must be at least {least}, got {value}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"--top_p must be above 0 and at most 1, got {args.top_p}")
    if args.temperature == 0 and args.k > 1:
        raise UserError(f"--temperature 0 gives the same response every time; type --k 1, or another temperature for --k {args.k}")
    benches = {}
    for bench in filter(None, args.bench.split(",")):
        problems = load_bench(bench)
        if args.limit:
            problems = random.Random(0).sample(problems, min(args.limit, len(problems)))
        benches[bench] = problems
    if not benches or len({Path(bench).stem for bench in benches}) < len(benches):
        raise UserError(f"--bench {args.bench!r} names no benchmark, or two of one name")
    names = [args.first] + ([args.model] if args.model else [])
    outs, samples = [], []
    for i, name in enumerate(names):
        if args.out:
            outs.append(Path(args.out) / f"{i + 1}-{Path(name).name}" if len(names) > 1 else Path(args.out))
        else:
            is_run = (Path(name) / "metrics.jsonl").exists()
            outs.append(Path(name) / "eval" if is_run else Path("runs") / f"eval-{Path(name).name}")
        samples.append(evaluate(name, benches, outs[-1], args))
    for name, out in zip(names, outs):
        report(name, benches, out, args)
    if len(names) > 1:
        for bench in benches:
            accuracy = [[sum(r["correct"] for r in group) / args.k for group in aspo.groups_of(found[bench], args.k)]
                        for found in samples]
            difference = [b - a for a, b in zip(*accuracy)]
            low, high = interval(difference)
            print(f"{Path(bench).stem}: {names[1]} minus {names[0]} on the same {len(difference)} problems: "
                  f"{statistics.mean(difference):+.3f}, 95 % interval {low:+.3f} to {high:+.3f}")


# --------------------------------------------------------------------------------------------------------- pictures

CURVES = {"reward": "reward", "heldout_accuracy": "held-out accuracy", "entropy": "entropy (nats)", "ratio_pos": "mean ratio, A > 0",
          "ratio_neg": "mean ratio, A < 0", "response_length": "response length (tokens)", "weight_pos": "mean weight, A > 0",
          "weight_neg": "mean weight, A < 0", "repetition": "repetition"}
COLOURS = {"aspo": "#d1495b", "grpo": "#00798c", "no-is": "#8d8d8d", "dapo": "#30638e", "cispo": "#edae49", "gspo": "#6a4c93",
           "dr-grpo": "#66a182"}
DASHES = {"no-is": "--", "dapo": "-.", "cispo": ":", "gspo": (0, (1, 1))}


def read_run(folder: str) -> tuple[str, list[dict]]:
    """(label, metrics) of a run folder; raises UserError."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no run folder: {error}; expected config.json and metrics.jsonl") from None
    if not rows:
        raise UserError(f"{folder} has no metrics yet")
    return config["loss"], rows


def half_width(values: list[float]) -> float:
    """Half of the 95 % interval of a mean over runs, by Student's t (two-sided 97.5 % quantiles, then the normal's)."""
    t = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
    n = len(values)
    return 0.0 if n < 2 else (t[n - 2] if n - 2 < len(t) else 1.96) * statistics.stdev(values) / math.sqrt(n)


def series(runs: list[list[dict]], key: str) -> list[tuple[int, list[float]]]:
    """(step, the values of the runs that have one there), by step."""
    steps = sorted({row["step"] for rows in runs for row in rows if row.get(key) is not None})
    return [(step, [row[key] for rows in runs for row in rows if row["step"] == step and row.get(key) is not None])
            for step in steps]


def figure(draw, path: str, columns: int, rows: int, size: tuple[float, float]) -> None:
    """Save what draw(axes) paints on columns x rows panels, size in inches; raises UserError if that cannot be done."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib; type pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
                            "font.size": 9, "legend.frameon": False, "axes.titlesize": 10})
    fig, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    draw(fig, list(axes.flat))
    try:
        fig.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write --out {path}: {error}") from None
    print(f"picture in {path}")


def main_compare(argv: list[str]) -> None:
    """python eval.py compare RUN ...; raises UserError on bad input."""
    parser = argparse.ArgumentParser(prog="eval.py compare", description="Training curves of runs, by loss, over seeds.")
    parser.error = lambda message: (_ for _ in ()).throw(UserError(f"{message}; see python eval.py compare --help"))
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--out", help="picture, .png, .svg or .pdf")
    args = parser.parse_args(argv)
    groups = {}
    for folder in args.runs:
        label, rows = read_run(folder)
        groups.setdefault(label, []).append(rows)
    print("Mean over runs and half of its 95 % interval (Student's t). Accuracy: the last evaluation and the best; the rest: "
          "the last ten steps.\n")
    columns = {"final": lambda rows: last(rows, "heldout_accuracy", 1), "best": lambda rows: max(
        (row["heldout_accuracy"] for row in rows if row.get("heldout_accuracy") is not None), default=None)}
    columns |= {key: (lambda rows, key=key: last(rows, key, 10)) for key in CURVES if key != "heldout_accuracy"}
    print("| loss | runs | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 2))
    for label, runs in groups.items():
        cells = []
        for read in columns.values():
            values = [value for value in map(read, runs) if value is not None]
            cells.append(f"{statistics.mean(values):.3f}" + f" ± {half_width(values):.3f}" * (len(values) > 1) if values else "")
        print(f"| {label} | {len(runs)} | " + " | ".join(cells) + " |")

    def draw(fig, axes):
        for axis, (key, title) in zip(axes, CURVES.items()):
            for label, runs in groups.items():
                points = series(runs, key)
                steps, means = [step for step, _ in points], [statistics.mean(values) for _, values in points]
                widths = [half_width(values) for _, values in points]
                axis.plot(steps, means, color=COLOURS.get(label), label=f"{label} ({len(runs)})", linewidth=1.4)
                axis.fill_between(steps, [m - w for m, w in zip(means, widths)], [m + w for m, w in zip(means, widths)],
                                  color=COLOURS.get(label), alpha=0.18, linewidth=0)
            axis.set_title(title, loc="left")
        axes[0].legend(title="loss (runs)")
        for axis in axes[-3:]:
            axis.set_xlabel("step")
        fig.suptitle("mean over runs, band: 95 % interval of that mean", x=0.01, ha="left", fontsize=9, color="#666666")

    if args.out:
        figure(draw, args.out, 3, 3, (11, 8))


def last(rows: list[dict], key: str, n: int) -> float | None:
    """Mean of a metric over the last n steps that have it; None if none has."""
    values = [row[key] for row in rows if row.get(key) is not None][-n:]
    return statistics.mean(values) if values else None


def weight_curves(advantage: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Ratios (N,), and label -> weights (N,) with methods of the same curve under one label."""
    log_ratio = torch.linspace(math.log(0.1), math.log(10), 2001)[:, None]  # (N, 1): N sequences of one token
    curves = {}
    for name in ("aspo", "grpo", "no-is", "dapo", "cispo", "gspo", "dr-grpo"):
        advantages, mask = torch.full_like(log_ratio, advantage), torch.ones_like(log_ratio)
        w = aspo.WEIGHTS[name](log_ratio, advantages, mask, Config(loss=name))[:, 0]
        twin = next((names for names, curve in curves.items() if torch.equal(curve, w)), ())
        curves = {names + (name,) * (names == twin): curve for names, curve in curves.items()} | ({} if twin else {(name,): w})
    return log_ratio.exp()[:, 0], {", ".join(names): curve for names, curve in curves.items()}


def main_weights(argv: list[str]) -> None:
    """python eval.py weights; raises UserError on bad input."""
    parser = argparse.ArgumentParser(prog="eval.py weights", description="Every method's weight against the importance ratio.")
    parser.error = lambda message: (_ for _ in ()).throw(UserError(f"{message}; see python eval.py weights --help"))
    parser.add_argument("--out", default="weights.png", help="picture, .png, .svg or .pdf")
    args = parser.parse_args(argv)

    def draw(fig, axes):
        for axis, advantage, title in zip(axes, (1.0, -1.0), ("A > 0: tokens of good responses", "A < 0: tokens of bad responses")):
            ratios, curves = weight_curves(advantage)
            for label, weights in curves.items():
                name = label.split(",")[0]
                axis.plot(ratios, weights, label=label, color=COLOURS[name], linestyle=DASHES.get(name, "-"),
                          linewidth={"aspo": 2, "grpo": 5}.get(name, 1.3), zorder={"aspo": 4, "grpo": 2}.get(name, 3))
            axis.set_xscale("log")
            axis.set_xticks([0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1", "0.2", "0.5", "1", "2", "5", "10"])
            axis.minorticks_off()
            axis.axvline(1, color="#bbbbbb", linewidth=0.8)
            axis.set(title=title, xlabel="importance ratio r = pi / pi_old", ylabel="weight w of the gradient -A w grad log pi",
                     ylim=(-0.1, 3.3))
            axis.legend()

    figure(draw, args.out, 2, 1, (11, 4.6))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status, 2 after bad input."""
    argv = sys.argv[1:] if argv is None else argv
    command = {"compare": main_compare, "weights": main_weights}.get(argv[0] if argv else "")
    try:
        command(argv[1:]) if command else main_evaluate(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
