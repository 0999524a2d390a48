"""How good is a model or a run, measured as in the ASPO paper, and what did a run look like?

    python eval.py runs/tiny-aspo-s0 --k 16                  # a run, on its own held-out problems
    python eval.py qwen-0.5b --bench gsm8k,math500 --k 16    # an alias, a hub id or a folder
    python eval.py runs/A --model runs/B --k 8               # B minus A on the same problems
    python eval.py compare runs/A runs/B ... --out a.png     # training curves by loss, over seeds
    python eval.py weights --out b.png                       # every method's weight by the ratio

Samples and rewards are aspo.py's, so that training and evaluation cannot disagree. Each sample is
a line of BENCH.jsonl: what was killed goes on when it is typed again, and ends the same.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import sys
from pathlib import Path
from statistics import fmean, stdev

import torch

import aspo
from aspo import Config, UserError, explain, say
from reward import extract_answer, is_equal

# ------------------------------------------------------------------------------------- benchmarks

BENCHES = {  # name: hub id, configuration, split
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "aime25": ("math-ai/aime25", None, "test"),
    "amc23": ("math-ai/amc23", None, "test"),
    "minerva": ("math-ai/minervamath", None, "test"),
    "olympiad": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"),
    "svamp": ("ChilleD/SVAMP", None, "test"),
}
KNOWN = ", ".join([*aspo.BUILT_IN, *BENCHES]) + " or a .jsonl file"


def load_bench(name: str) -> list[dict]:
    """The problems of a benchmark, the held-out ones of a built-in task, or a file's."""
    if name in aspo.BUILT_IN:
        return aspo.load_problems(Config(data=name))[1]
    if Path(name).is_file() or Path(name).suffix in aspo.FILES:
        return aspo.read_jsonl(name)
    if name not in BENCHES:
        raise UserError(f"no benchmark {name!r}; for --bench choose from {KNOWN}")
    hub_id, configuration, split = BENCHES[name]
    problems, failures = [], []
    with explain(f"cannot load --bench {name} ({hub_id} on the hub)"):
        from datasets import load_dataset

        rows = load_dataset(hub_id, configuration, split=split)
        for row in rows:
            try:
                problems.append(aspo.make_problem(row))
            except ValueError as error:
                failures.append(error)
        if failures:  # a part of a benchmark is another benchmark
            raise ValueError(f"{len(failures)} of {len(rows)} problems have no answer; the first: "
                             f"{failures[0]}")
    return problems


# --------------------------------------------------------------------------------------- measures

def pass_at(n: int, correct: int, k: int) -> float:
    """Probability that k of n samples, `correct` of them right, hold a right one.

    Unbiased, arXiv 2107.03374. Raises ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples and k >= 1, got {n}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def majority(answers: list[str | None], correct: list[bool]) -> float:
    """maj@k: is the most frequent answer right? Equal ones vote together, None does not vote.

    The share, as not all of one answer need be right: "2 + 3" is not for 5, nor what was cut off.
    """
    votes = []  # an answer, and whether each response that gave it is right
    for answer, right in zip(answers, correct):
        if answer is None:
            continue
        for other, rights in votes:
            if answer == other or is_equal(answer, other) or is_equal(other, answer):
                rights.append(right)
                break
        else:
            votes.append((answer, [right]))
    most = max((len(rights) for _, rights in votes), default=0)
    top = [right for _, rights in votes if len(rights) == most for right in rights]
    return fmean(top) if top else 0.0


def interval(values: list[float], resamples: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of a mean over problems (Efron's percentiles, a fixed seed).

    One value per problem: the samples of one problem are no independent evidence.
    """
    x = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    means = [x[torch.randint(len(x), (resamples // 100, len(x)), generator=generator)].mean(1)
             for _ in range(100)]  # at once they may take gigabytes
    return tuple(torch.cat(means).quantile(x.new_tensor([0.025, 0.975])).tolist())


def accuracies(rows: list[dict], k: int) -> list[float]:
    """avg@k of each problem, whose k samples stand side by side."""
    return [fmean(row["correct"] for row in group) for group in aspo.chunks(rows, k)]


def scores(rows: list[dict], k: int) -> dict:
    """What results.json says of one benchmark."""
    groups = aspo.chunks(rows, k)
    # One's own reward may be anything: above 0.5 is right.
    right = [[row["correct"] > 0.5 for row in group] for group in groups]
    values = {f"avg@{k}": accuracies(rows, k)}
    for j in sorted({k, *(2**i for i in range(k.bit_length()))}):
        values[f"pass@{j}"] = [pass_at(k, sum(group), j) for group in right]
    values[f"maj@{k}"] = [majority([row["extracted"] for row in group], correct)
                          for group, correct in zip(groups, right)]
    found = {"problems": len(groups), "samples": len(rows)}
    for name, x in values.items():
        found[name] = {"value": fmean(x), "interval": interval(x)}
    for name in ("truncated", "tokens", "repetition"):
        found[name] = fmean(row[name] for row in rows)
    found["response_length"] = found.pop("tokens")
    return found


# ------------------------------------------------------------------------------------- evaluation

KNOBS = ("max_new_tokens", "instruction", "thinking", "reward", "seed", "sample_rows", "engine",
         "device")


def config_of(name: str, args) -> Config:
    """Settings of a run or its checkpoint (`resume`), or of a model; `out` is for results."""
    path = Path(name).absolute()  # "." gets a name
    run = path.parent if (path / "trainer.pt").exists() else path
    if (run / "metrics.jsonl").exists():
        found = [path] if path != run else aspo.checkpoints(run)
        if not found:
            raise UserError(f"{name} has no checkpoint yet; let the run go on")
        out = run / ("eval" if path == run else f"eval-{path.name}")
        settings = aspo.read_config(run) | dict(model=str(found[0]), out=str(out), resume=name)
    else:
        settings = vars(aspo.parse(["--model", name])) | {"out": f"runs/eval-{path.name}"}
    typed = {knob: x for knob in KNOBS if (x := getattr(args, knob)) is not None}
    cfg = Config(**settings | typed)
    aspo.check(dataclasses.replace(cfg, resume=name, overlong_buffer=0))
    cfg.temperature = args.temperature  # also 0
    return cfg


def open_results(path: Path, settings: dict) -> dict:
    """What results.json holds, or new results. Refuses those of other settings."""
    results = {"settings": settings, "benchmarks": {}}
    if path.exists():
        with explain(f"{path} is damaged; choose another --out"):
            results = json.loads(path.read_text())
            for key, value in settings.items():
                before = results["settings"].get(key)
                if before != value:
                    raise UserError(
                        f"{path} is of {key} {before!r}, not {value!r}; choose another --out")
    return results


def finished(path: Path, problems: list[dict], k: int, chunk: int) -> list[dict]:
    """The samples of whole chunks in a file; what a kill has torn is cut off."""
    path.touch()
    lines, rows = path.read_bytes().split(b"\n")[:-1], []
    with contextlib.suppress(ValueError):  # a torn line
        for line in lines:
            rows.append(json.loads(line))
    expected = [(p["problem"], p["answer"]) for p in problems for _ in range(k)]
    if [(row.get("problem"), row.get("gold")) for row in rows] != expected[:len(rows)]:
        raise UserError(f"{path} holds other problems than the benchmark; choose another --out")
    if len(rows) < len(expected):
        del rows[len(rows) // (k * chunk) * k * chunk:]
    os.truncate(path, sum(len(line) + 1 for line in lines[:len(rows)]))
    return rows


def sample(policy: aspo.Policy, problems: list[dict], k: int, reward, path: Path) -> list[dict]:
    """The samples of one benchmark: those in its file, then new ones, a chunk at a time."""
    cfg = policy.cfg
    chunk = max(1, cfg.sample_rows // k)  # problems
    rows = finished(path, problems, k, chunk)
    for first in aspo.progress(range(len(rows) // k, len(problems), chunk), path.stem):
        # By its place alone: whoever goes on draws the same.
        aspo.seed_step(cfg, f"{path.stem} {first}")
        new = [{"problem": s.problem, "response": s.text, "extracted": extract_answer(s.text),
                "gold": s.gold, "correct": s.correct if cfg.reward else s.correct > 0,
                "truncated": s.truncated, "tokens": len(s.response),
                "repetition": aspo.repetition(s.text)}
               for s in aspo.roll_out(policy, problems[first:first + chunk], k, cfg, reward)]
        aspo.append(path, new)
        rows += new
    return rows


def evaluate(name: str, cfg: Config, benches: dict, args) -> dict:
    """Sample, score, write and print. Returns each benchmark's samples."""
    with explain(f"cannot evaluate {name}"):
        reward = aspo.open_reward(cfg, None)
        aspo.seed_step(cfg, -1)  # the tiny model is made here
        model, tokenizer = aspo.load_model(cfg)
        # Of what was loaded: the folder may have changed.
        parts = [p.flatten()[::p.numel() // 1000 + 1].tolist() for p in model.parameters()]
        policy = aspo.Policy(model, tokenizer, cfg, sum(benches.values(), []), learning=False)
        policy.top_p = args.top_p
    settings = {"model": name, "weights": aspo.digest(parts), "k": args.k, "limit": args.limit,
                "temperature": cfg.temperature, "top_p": args.top_p,
                **{knob: getattr(cfg, knob) for knob in KNOBS}, "engine": policy.engine.name,
                "device": policy.device.type}
    samples, out = {}, Path(cfg.out)
    with explain(f"cannot write results in {out}"), contextlib.ExitStack() as held:
        out.mkdir(parents=True, exist_ok=True)
        held.callback(os.close, aspo.lock(out))
        results = open_results(out / "results.json", settings)
        aspo.write_json(out / "results.json", results)
        for bench, problems in benches.items():
            samples[bench] = sample(policy, problems, args.k, reward, out / f"{bench}.jsonl")
            results["benchmarks"][bench] = scores(samples[bench], args.k)
            aspo.write_json(out / "results.json", results)

    say(", ".join(f"{key} {value}" for key, value in settings.items()))
    for bench in benches:
        found = results["benchmarks"][bench]
        say(bench)
        for key, value in found.items():
            if isinstance(value, dict):
                low, high = value["interval"]
                say(f"  {key:<16}{value['value']:.3f}   95 % interval {low:.3f} to {high:.3f}")
            else:
                say(f"  {key:<16}{value:.4g}")
    say(f"results in {out}")
    return samples


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; see python {self.prog} --help")


def evaluation_arguments(argv: list[str]) -> argparse.Namespace:
    """Raises UserError."""
    parser = Parser("eval.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("first", metavar="MODEL_OR_RUN", help="a run or its checkpoint; alias, hub id or folder")
    add("--model", help="a second one, on the same problems")
    add("--bench", help=f"{KNOWN}, or several with commas [a run's held-out problems; arithmetic]")
    add("--k", type=int, default=1, help="samples per problem")
    add("--limit", type=int, help="so many problems, with a fixed seed")
    add("--temperature", type=float, help="[0.8, as in the paper; 0 for k = 1]")
    add("--top_p", type=float, help="[0.95, as in the paper; 1 for k = 1]")
    add("--out", help="folder [RUN/eval or runs/eval-MODEL]; of two models, of both")
    for knob in dataclasses.fields(Config):
        if knob.name in KNOBS:
            kind = aspo.kind_of(knob)
            options = dict(nargs="?", const=True) if kind is bool else {}
            kind = aspo.boolean if kind is bool else kind
            add(f"--{knob.name}", type=kind, **options, help="[as in training]")
    args = parser.parse_args(argv)
    if args.temperature is None:
        args.temperature = 0.8 if args.k > 1 else 0.0
    if args.top_p is None:
        args.top_p = 0.95 if args.k > 1 else 1.0
    limits = {"k": (1, 10**6), "limit": (1, 10**9), "temperature": (0, 100), "top_p": (0.001, 1)}
    for name, (least, most) in limits.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise UserError(f"--{name} must be from {least} to {most}, got {value}")
    if args.temperature == 0 and args.k > 1:
        raise UserError(f"--temperature 0 gives the same response {args.k} times; type --k 1")
    return args


def main_evaluate(argv: list[str]):
    """eval.py MODEL_OR_RUN"""
    args = evaluation_arguments(argv)
    names = list(filter(None, (args.first, args.model)))
    cfgs = [config_of(name, args) for name in names]
    if len({cfg.reward for cfg in cfgs}) > 1:
        raise UserError(f"{' and '.join(names)} have different rewards; type one --reward")
    for i, name in enumerate(names if args.out else ()):
        cfgs[i].out = Path(args.out, f"{i + 1}-{Path(name).absolute().name}" if args.model else "")

    if args.bench is None and cfgs[0].resume:
        benches = {Path(cfgs[0].data).stem: aspo.load_problems(cfgs[0])[1]}
    else:
        typed = "arithmetic" if args.bench is None else args.bench
        typed = [bench.strip() for bench in typed.split(",")]
        benches = {Path(bench).stem: load_bench(bench) for bench in typed}
        if len(benches) < len(typed):
            raise UserError(f"--bench {args.bench} has two of one name")
    if args.limit:
        benches = {bench: random.Random(0).sample(problems, len(problems))[:args.limit]
                   for bench, problems in benches.items()}

    samples = [evaluate(name, cfg, benches, args) for name, cfg in zip(names, cfgs)]
    for bench in benches if args.model else ():
        first, second = (accuracies(found[bench], args.k) for found in samples)
        difference = [b - a for a, b in zip(first, second)]
        low, high = interval(difference)
        say(f"{bench}: {names[1]} minus {names[0]} on the same {len(difference)} problems: "
            f"{fmean(difference):+.3f}, 95 % interval {low:+.3f} to {high:+.3f}")


# --------------------------------------------------------------------------------------- pictures

CURVES = ("reward", "heldout_accuracy", "entropy", "ratio_pos", "ratio_neg", "response_length",
          "weight_pos", "weight_neg", "repetition")
COLOURS = {"grpo": "#00798c", "aspo": "#d1495b", "no-is": "#8d8d8d", "dapo": "#30638e",
           "cispo": "#edae49", "gspo": "#6a4c93", "dr-grpo": "#66a182"}
WIDTHS = {"grpo": 5, "aspo": 2}
DASHES = {"no-is": "--", "dapo": "-.", "cispo": ":", "gspo": (0, (1, 1))}


def figure(draw, path: str, rows: int, columns: int):
    """Save what draw paints."""
    with explain("pictures need matplotlib"):
        from matplotlib import style
        from matplotlib.figure import Figure
    style.use("seaborn-v0_8-whitegrid")
    fig = Figure(figsize=(11, 3 + 1.7 * rows), layout="constrained")
    draw(fig, fig.subplots(rows, columns).flat)
    with explain(f"cannot write --out {path}"):
        fig.savefig(path, dpi=130)
    say(f"picture in {path}")


def values_of(rows: list[dict], key: str) -> list[float]:
    """A metric at the steps that have it."""
    return [row[key] for row in rows if row.get(key) is not None]


def last(rows: list[dict], key: str, n: int) -> float | None:
    """Mean of a metric over the last n steps that have it, or None."""
    values = values_of(rows, key)[-n:]
    return fmean(values) if values else None


def half_width(values: list[float]) -> float:
    """Half of the 95 % interval of a mean over runs, by Student's t."""
    t = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179,
         2.160, 2.145, 2.131)  # by degrees of freedom, from 1; then the normal's
    n = len(values)
    if n < 2:
        return 0.0
    return (t[n - 2] if n - 2 < len(t) else 1.96) * stdev(values) / math.sqrt(n)


def series(runs: list[list[dict]], key: str) -> tuple:
    """Steps, a metric's means over the runs that have it, and half of their intervals."""
    by_step = {}
    for row in itertools.chain(*runs):
        for value in values_of([row], key):
            by_step.setdefault(row["step"], []).append(value)
    steps = sorted(by_step)
    return steps, *(torch.tensor([of(by_step[x]) for x in steps]) for of in (fmean, half_width))


def cell(values: list[float | None]) -> str:
    """Mean over the runs that have a value, and half of its interval."""
    values = [x for x in values if x is not None]
    width = f" ± {half_width(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{width}" if values else ""


def main_compare(argv: list[str]):
    """eval.py compare"""
    parser = Parser("eval.py compare", description="Training curves of runs, by loss, over seeds.")
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--out", help="picture, .png, .svg or .pdf")
    args = parser.parse_args(argv[1:])
    groups = {}
    for folder in map(Path, args.runs):
        with explain(f"{folder} is no run folder"):
            loss = json.loads((folder / "config.json").read_text())["loss"]
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            groups.setdefault(loss, []).append([json.loads(line) for line in lines])

    say("Mean over runs and half of its 95 % interval. final, best: held-out accuracy; the rest: "
        "the last ten steps.\n")
    keys = [key for key in CURVES if key != "heldout_accuracy"]
    say(f"| loss | runs | final | best | {' | '.join(keys)} |\n|{'---|' * (len(keys) + 4)}")
    for loss, runs in groups.items():
        heldout = [values_of(rows, "heldout_accuracy") for rows in runs]
        columns = [[x[-1] for x in heldout if x], [max(x) for x in heldout if x],
                   *([last(rows, key, 10) for rows in runs] for key in keys)]
        say(f"| {loss} | {len(runs)} | {' | '.join(map(cell, columns))} |")

    def draw(fig, axes):
        for axis, key in zip(axes, CURVES):
            for loss, runs in groups.items():
                steps, mean, width = series(runs, key)
                colour = COLOURS.get(loss)
                axis.plot(steps, mean, color=colour, label=f"{loss} ({len(runs)})")
                axis.fill_between(steps, mean - width, mean + width, color=colour, alpha=0.2)
            axis.set_title(key, loc="left")
        axes[0].legend(title="loss (runs)")
        fig.supxlabel("step")
        fig.suptitle("mean over runs and its 95 % interval")

    if args.out:
        figure(draw, args.out, 3, 3)


def weight_curves(advantage: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Ratios (N,), and names -> weights (N,), where methods of one curve stand together."""
    # (N, 1): sequences of one token, since gspo has a ratio for each.
    ratios = torch.linspace(math.log(0.1), math.log(10), 2001)[:, None].exp()
    curves = {}
    for loss in aspo.WEIGHTS:
        cfg = Config(loss=loss)
        weights = aspo.WEIGHTS[loss](ratios, torch.full_like(ratios, advantage),
                                     (cfg.eps_low, cfg.eps_high), cfg.dual_clip)
        curves.setdefault(tuple(weights[:, 0].tolist()), []).append(loss)
    return ratios[:, 0], {", ".join(names): torch.tensor(w) for w, names in curves.items()}


def main_weights(argv: list[str]):
    """eval.py weights"""
    parser = Parser("eval.py weights", description="Every method's weight by the ratio.")
    parser.add_argument("--out", default="weights.png", help="picture")
    args = parser.parse_args(argv[1:])

    def draw(fig, axes):
        titles = "A > 0: tokens of good responses", "A < 0: tokens of bad responses"
        for axis, advantage, title in zip(axes, (1.0, -1.0), titles):
            ratios, curves = weight_curves(advantage)
            for names, weights in curves.items():
                name = names.split(",")[0]
                axis.plot(ratios, weights, label=names, color=COLOURS.get(name),
                          linestyle=DASHES.get(name), linewidth=WIDTHS.get(name, 1.3))
            ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10]
            axis.set_xscale("log")
            axis.set_xticks(ticks, map(str, ticks))
            axis.set(title=title, ylim=(-0.1, 3.3), xlabel="importance ratio r = pi / pi_old",
                     ylabel="weight w of the gradient -A w grad log pi")
            axis.legend()

    figure(draw, args.out, 1, 2)


def main(argv: list[str]) -> int:
    """Run a command line. Exit status 2 is bad input, 128 + n signal n."""
    commands = {"compare": main_compare, "weights": main_weights}
    status = aspo.main(argv, commands.get(argv[0] if argv else "", main_evaluate))
    if status == 130:
        say("stopped; the same command goes on")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
