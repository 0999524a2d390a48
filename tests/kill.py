"""Kill a run with SIGKILL again and again, also in the middle of saves, and compare it with one that was never stopped.

    python tests/kill.py 24       # 24 kills, about a minute
"""
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from processes import Process, run
from safetensors.torch import load_file

FLAGS = ("--sft_steps 20 --prompts 4 --group_size 4 --minibatch 2 --max_new_tokens 16 --lr 2e-5 --eval_problems 8 "
         "--overlong_buffer 15 --eval_every 7 --save_every 1 --device cpu").split()


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    """Every line must be JSON, which has no NaN: a torn one raises."""
    def refuse(word):
        raise ValueError(f"{word} is no JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.endswith("_seconds")} for row in rows]


def same(run: Path, other: Path) -> None:
    assert lines(run) == lines(other)
    assert lines(run, "samples.jsonl") == lines(other, "samples.jsonl")
    weights, others = (load_file(r / "checkpoint/model.safetensors") for r in (run, other))
    assert weights.keys() == others.keys() and all(weights[name].equal(others[name]) for name in weights)


def kill_and_compare(kills: int, folder: Path, steps: int, seed: int = 0) -> dict[str, int]:
    """Returns how often the kill hit a save, another moment after the first checkpoint, or one before it."""
    rng = random.Random(seed)
    whole, broken = folder / "whole", folder / "broken"
    run("--steps", steps, "--out", whole, *FLAGS)
    assert sum(row["grad_norm"] > 0 for row in lines(whole)) > steps / 2, "too little was learned to tell runs apart"
    hits = {"save": 0, "later": 0, "early": 0}
    while sum(hits.values()) < kills:
        shutil.rmtree(broken / "checkpoint.tmp", ignore_errors=True)  # of the last kill: not to be taken for this one's
        again = (broken / "config.json").exists()
        if not again:
            shutil.rmtree(broken, ignore_errors=True)  # killed before it began
        process = Process("--resume", broken) if again else Process("--steps", steps, "--out", broken, *FLAGS)
        if rng.random() < 0.5:  # as soon as a save begins, or a little after
            while not (broken / "checkpoint.tmp").exists() and process.poll() is None:
                time.sleep(0.0005)
            time.sleep(rng.random() * 0.03)
        else:
            while not (broken / "metrics.jsonl").exists() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.random())
        if process.poll() is not None:  # it was faster, or the last kill came after the last save
            assert process.returncode == 0 or "is complete" in process.err, process.err[-2000:]
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        saved = (broken / "checkpoint").exists()
        saving = (broken / "checkpoint.tmp").exists() or not saved and any(broken.glob("checkpoint-*"))
        hits["save" if saving else "later" if saved else "early"] += 1
    last = Process("--resume", broken)
    assert last.wait() == 0 or "is complete" in last.err, last.err
    same(broken, whole)
    return hits


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        hits = kill_and_compare(int(sys.argv[1]) if len(sys.argv) > 1 else 24, Path(folder), steps=240)
        print(f"{sum(hits.values())} kills ({hits['save']} in a save, {hits['later']} at other moments after the first "
              f"checkpoint, {hits['early']} before it): metrics.jsonl, samples.jsonl and the final weights are "
              "those of the run never stopped")
