"""Throw random and mutated answers at the checker; and score it beside math-verify, if that is installed.

    python tests/fuzz_reward.py 1000000 0      # cases and seed; prints exceptions, slow cases, the worst time, the peak memory
    python tests/fuzz_reward.py compare        # our own labelled cases, right and wrong, with times
"""
import faulthandler
import gc
import json
import random
import resource
import statistics
import sys
import time

from test_reward import ANSWERS, ANSWERS_TO, HOSTILE, RIGHT, ROOT, WRONG

from reward import is_equal, math_reward

PIECES = (r"\frac \sqrt \boxed{ \left( \right) \{ \} { } [ ] ( ) | ^ _ ^{ _{ , ; : = < > \le \ne \in \cup \pm + - * / ! % \% \text{ \pi e i x y n "
          r"\infty \sin \log \log_ \binom \begin{pmatrix} \end{pmatrix} \\ & ^\circ \overline{ ... 0 1 2 3 7 10 99 0.5 1,000 million cm and or "
          r"\lfloor \rfloor \cdot \times $ \$ # #### 9999999999 10^{10} ! ² ½ √ ٣ − ∞ π \ud800 __import__('os')").split() + [" ", "\n", "\0", "\u200b"]


def mutate(rng: random.Random, seeds: list[str]) -> str:
    if rng.random() < 0.3:
        return "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 40)))
    text = rng.choice(seeds)[:2000]
    for _ in range(rng.randrange(1, 5)):
        at, how = rng.randrange(len(text) + 1), rng.randrange(6)
        if how == 0:
            text = text[:at] + rng.choice(PIECES) + text[at:]
        elif how == 1:
            text = text[:at] + text[at + rng.randrange(1, 6):]
        elif how == 2:
            text = text[:at] + chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x250), rng.randrange(0x3000)))) + text[at + 1:]
        elif how == 3:
            text = text[:at] + text[rng.randrange(len(text) + 1):][:20] + text[at:]
        elif how == 4:
            text = text[:at] + text[at:at + 8] * rng.randrange(2, 30) + text[at:]
        else:
            text += rng.choice(seeds)[:200]
    return text


def fuzz(cases: int = 1_000_000, seed: int = 0) -> None:
    rng, seeds = random.Random(seed), [text[:3000] for text in ANSWERS + HOSTILE]
    errors, slow, worst = [], [], (0.0, "", "")
    gc.collect()
    gc.freeze()  # else a slow case is now and then a look of the collector at everything that was imported
    for i in range(cases):
        if i % 1000 == 0:
            faulthandler.dump_traceback_later(120, exit=True)  # a case that hangs shows where
        a, b = mutate(rng, seeds), rng.choice(seeds)
        if rng.random() < 0.3:
            b = mutate(rng, seeds)
        started = time.process_time()
        try:
            assert math_reward(a if i % 3 else rf"\boxed{{{a}}}", b) in (0.0, 1.0) and is_equal(a, b) in (True, False)
        except Exception as error:
            errors.append((repr(error), a, b))
        seconds = time.process_time() - started
        if seconds > 0.05:
            slow.append((round(seconds, 3), a, b))
        worst = max(worst, (seconds, a, b))
        if i % 100_000 == 99_999:
            print(f"{i + 1:,} cases: {len(errors)} exceptions, {len(slow)} over 50 ms, worst {worst[0] * 1e3:.1f} ms of CPU, "
                  f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB", flush=True)
    for problem in errors[:10] + slow[:10] + [worst]:
        print(str(problem)[:600])


def compare() -> None:
    rows = [(a, b, True) for pairs in RIGHT.values() for a, b in pairs] + [(a, b, False) for pairs in WRONG.values() for a, b in pairs]
    rows += [(text, gold, expected) for gold, answers in ANSWERS_TO.items() for expected, texts in zip((True, False), answers) for text in texts]
    rows = [(rf"The answer is $\boxed{{{given}}}$.", gold, expected) for given, gold, expected in rows]
    examples = ROOT.parent / "shared" / "grader" / "examples.jsonl"
    shared = []
    if examples.exists():
        shared = [json.loads(line) for line in examples.read_text().splitlines()]
        shared = [(r["response"], r["gold"], r["expected"]) for r in shared if not {"contested", "unboxed"} & set(r["flags"])
                  and r["category"] not in ("code-exec", "resource")]
    checkers = {"reward.py": math_reward}
    try:
        from math_verify import parse, verify
        checkers["math-verify"] = lambda response, gold: float(verify(parse(rf"\boxed{{{gold}}}"), parse(response)))
    except ImportError:
        print("math-verify is not installed; type pip install 'math-verify[antlr4_13_2]' in an environment of its own")
    print("| checker | cases | right | false accepts | false refusals | errors | median | p99 |\n|---|---|---|---|---|---|---|---|")
    for name, checker in checkers.items():
        for what, cases in (("our own", rows), ("shared examples", shared)):
            accepts = refusals = errors = 0
            times = []
            for response, gold, expected in cases:
                started = time.perf_counter()
                try:
                    found = checker(response, gold) > 0.5
                except Exception:
                    found, errors = False, errors + 1
                times.append((time.perf_counter() - started) * 1e6)
                accepts += found and not expected
                refusals += expected and not found
            if cases:
                print(f"| {name} | {what}, {len(cases)} | {1 - (accepts + refusals) / len(cases):.1%} | {accepts} | {refusals} | {errors} | "
                      f"{statistics.median(times):,.0f} us | {statistics.quantiles(times, n=100)[98]:,.0f} us |", flush=True)


if __name__ == "__main__":
    compare() if sys.argv[1:] == ["compare"] else fuzz(*map(int, sys.argv[1:]))
