"""The real script as processes of their own, forked from one that has imported torch already: 0.2 s each instead of 5.

    python tests/processes.py loop 100             # 100 runs of two processes: each must end with status 0
    python tests/processes.py loop 100 torchrun    # the same, started by torchrun
"""
import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Sums of another number of parts differ in the last bit on some processors.
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


class Process:
    """As subprocess.Popen; what it writes is in the files `out` and `err`."""

    server, folder = None, None

    def __init__(self, *arguments, script=ROOT / "aspo.py", stdout=None, stderr=None, env=None, before=""):
        """stdout, stderr: a path, or "closed"; before: Python that runs first, such as what ulimit would do."""
        cls = type(self)
        if cls.server is None or cls.server.poll() is not None:
            cls.folder = tempfile.TemporaryDirectory()
            cls.server = subprocess.Popen([sys.executable, __file__, "serve"], text=True, env=ENV,
                                          stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            atexit.register(cls.server.communicate)  # ends it
        self.returncode = None
        self.pid = self.ask(script=str(script), arguments=list(map(str, arguments)), env=env or {}, before=before,
                            cwd=os.getcwd(), stdout=str(stdout or "new"), stderr=str(stderr or "new"),
                            folder=cls.folder.name)

    def ask(self, **request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def poll(self):
        if self.returncode is None:
            self.returncode = self.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout=120):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(f"{self.err}")
            time.sleep(0.005)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def out(self):
        return Path(f"{self.folder.name}/{self.pid}.out").read_text()

    @property
    def err(self):
        return Path(f"{self.folder.name}/{self.pid}.err").read_text()


def run(*arguments, status=0, **options):
    """A process that has ended, with this status."""
    process = Process(*arguments, **options)
    assert process.wait() == status, f"{process.returncode}: {process.err[-3000:]}"
    return process


def start_several(n, *arguments, **options):
    """As torchrun starts them."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = dict(WORLD_SIZE=n, LOCAL_WORLD_SIZE=n, MASTER_ADDR="localhost", MASTER_PORT=port, TORCHELASTIC_RUN_ID="test")
    return [Process(*arguments, env={k: str(v) for k, v in (env | dict(RANK=i, LOCAL_RANK=i)).items()}, **options)
            for i in range(n)]


def run_several(n, *arguments, **options):
    """The first of n processes that have all ended with status 0."""
    if n == 1:
        return run(*arguments, **options)
    processes = start_several(n, *arguments, **options)
    for process in processes:
        assert process.wait() == 0, f"{process.returncode}: {process.err[-3000:]}"
    return processes[0]


def serve():
    """Fork for every line of stdin; the child leaves this function and ends as any Python program does."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import aspo
    import torch.distributed.fsdp  # noqa: F401
    with tempfile.TemporaryDirectory() as folder:  # whose first call takes long in transformers
        aspo.transformers.logging.disable_progress_bar()
        for part in aspo.tiny_model():
            part.save_pretrained(folder)
        aspo.load_model(aspo.Config(model=folder))
    gc.freeze()  # or the first collection of a child copies all that it shares
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
            continue
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            become(**request)
            return
        for name in ("out", "err"):  # there from the start, whoever is faster
            open(f"{request['folder']}/{pid}.{name}", "a").close()
        print(pid, flush=True)


def become(script, arguments, env, before, cwd, stdout, stderr, folder):
    os.environ |= env
    os.chdir(cwd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for fd, name, path in ((1, "stdout", stdout), (2, "stderr", stderr)):
        if path == "closed":
            os.close(fd)
            setattr(sys, name, None)
            continue
        path = f"{folder}/{os.getpid()}.{name[3:]}" if path == "new" else path
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), fd)
        encoding, buffering = env.get("PYTHONIOENCODING"), 1 if fd == 2 else -1
        errors = "backslashreplace" if fd == 2 else "strict"  # as Python's own
        setattr(sys, name, open(fd, "w", buffering=buffering, closefd=False, encoding=encoding, errors=errors))
    exec(before, {})
    sys.argv = [str(script), *arguments]
    del sys.modules["aspo"]
    runpy.run_path(script, run_name="__main__")


def loop(n, launcher=""):
    """Runs of two processes; prints the status and the last words of those that do not end well."""
    flags = ("--steps 1 --sft_steps 1 --prompts 4 --group_size 4 --minibatch 4 --max_new_tokens 16 "
             "--eval_problems 4 --out").split()
    failed = 0
    for i in range(n):
        with tempfile.TemporaryDirectory() as folder:
            if launcher == "torchrun":
                result = subprocess.run([*TORCHRUN, "2", str(ROOT / "aspo.py"), *flags, f"{folder}/run"], env=ENV,
                                        capture_output=True, text=True)
                statuses, out, err = [result.returncode], result.stdout, result.stderr
            else:
                processes = start_several(2, *flags, f"{folder}/run")
                statuses = [process.wait(600) for process in processes]
                out, err = processes[0].out, "".join(process.err for process in processes)
        if any(statuses) or "held-out accuracy 0" not in out:
            failed += 1
            print(f"run {i + 1}: status {statuses}\n{err[-2000:]}", flush=True)
        print(f"{i + 1} runs, {failed} failed", flush=True)
    return failed > 0


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1] == "serve" else loop(int(sys.argv[2]), *sys.argv[3:]))
