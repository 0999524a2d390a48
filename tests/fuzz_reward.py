"""Throw random and mutated answers at the checker: no exception, and no answer that takes long.

    python tests/fuzz_reward.py 1000000 0      # strings and seed; prints exceptions, slow ones, the worst, the peak memory
"""
import faulthandler
import gc
import random
import resource
import sys
import time

from test_reward import DIFFERENT, EQUAL, HOSTILE, RESPONSES, texts

from reward import is_equal, math_reward

SLOW = 0.05  # seconds of CPU
PIECES = (
    r"\frac \sqrt \boxed{ \left( \right) \{ \} { } [ ] ( ) | ^ _ ^{ _{ , ; : = < > \le \ne \in \cup \pm + - * / ! % \% \text{ \pi e i x y n "
    r"\infty \sin \log \log_ \binom \begin{pmatrix} \end{pmatrix} \\ & ^\circ \overline{ ... \approx \setminus \mathbb{R} 0 1 2 3 7 10 99 0.5 "
    r"1,000 million cm and or where \lfloor \cdot \times $ \$ # #### 9999999999 10^{10} ! ² ½ √ ٣ − ∞ π \ud800 __import__('os')").split()
PIECES += [" ", "\n", "\0", "\u200b", "\nThe answer is ", "</think>"]


def mutate(rng: random.Random, seeds: list[str]) -> str:
    """Pieces put together, or a known answer with one to four changes."""
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


def fuzz(strings: int = 1_000_000, seed: int = 0) -> None:
    rng = random.Random(seed)
    seeds = [text[:3000] for text in texts(EQUAL) + texts(DIFFERENT) + HOSTILE + [row[0] for row in RESPONSES]]
    errors, slow, worst = [], [], (0.0, "", "")
    gc.collect()
    gc.freeze()  # else a slow string is now and then a look of the collector at everything that was imported
    for i in range(strings):
        if i % 1000 == 0:
            faulthandler.dump_traceback_later(120, exit=True)  # a string that hangs shows where
        a, b = mutate(rng, seeds), rng.choice(seeds)
        if rng.random() < 0.3:
            b = mutate(rng, seeds)
        started = time.process_time()
        try:
            assert (is_equal(a, b) if i % 3 else math_reward(rf"\boxed{{{a}}}", b)) in (False, True)
            if i % 10 == 0:
                assert math_reward(a, b) in (0.0, 1.0)
        except Exception as error:
            errors.append((repr(error), a, b))
        seconds = time.process_time() - started
        if seconds > SLOW:
            slow.append((round(seconds, 3), a, b))
        worst = max(worst, (seconds, a, b))
        if i % 100_000 == 99_999:
            print(f"{i + 1:,} strings: {len(errors)} exceptions, {len(slow)} over {SLOW * 1e3:.0f} ms, worst {worst[0] * 1e3:.1f} ms of CPU, "
                  f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB", flush=True)
    for problem in errors[:10] + slow[:10] + [worst]:
        print(str(problem)[:600])


if __name__ == "__main__":
    fuzz(*map(int, sys.argv[1:]))
