"""RUN/best is the checkpoint of best held-out accuracy. Type --save_every as --eval_every."""
import json, shutil
import aspo

save_checkpoint = aspo.save_checkpoint

def save_best(run, step):
    save_checkpoint(run, step)
    lines = map(json.loads, (run.out / "metrics.jsonl").open())
    accuracy = {line["step"]: line.get("heldout_accuracy", -1) for line in lines}
    if aspo.rank() == 0 and step == max(accuracy, key=accuracy.get):
        shutil.copytree(run.out / f"checkpoint-{step}", run.out / "best", dirs_exist_ok=True)

aspo.save_checkpoint = save_best
raise SystemExit(aspo.main())
