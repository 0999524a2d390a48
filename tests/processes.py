"""The real script as processes of their own, forked from one that has imported torch already: 0.2 s each instead of 5.

    python tests/processes.py loop 100    # 100 runs of two processes: each must end with status 0
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


class Process:
    """As subprocess.Popen; what it writes is in the files `out` and `err`."""

    server, folder = None, None

    def __init__(self, *arguments, script=ROOT / "aspo.py", env=None, before=""):
        """before: Python that runs first, such as what ulimit would do."""
        cls = type(self)
        if cls.server is None or cls.server.poll() is not None:
            cls.folder = tempfile.TemporaryDirectory()
            cls.server = subprocess.Popen([sys.executable, __file__, "serve", cls.folder.name], text=True, env=ENV,
                                          stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            atexit.register(cls.server.communicate)  # ends it
        self.returncode = None
        self.pid = self.ask(script=str(script), arguments=list(map(str, arguments)), env=env or {}, before=before,
                            cwd=os.getcwd())

    def ask(self, **request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def poll(self):
        if self.returncode is None:
            self.returncode = self.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout=300):
        self.wait_for(lambda: False, timeout)
        return self.returncode

    def wait_for(self, condition, timeout=300):
        """Whether it came before the process ended."""
        end = time.monotonic() + timeout
        while not (came := condition()) and self.poll() is None:
            if time.monotonic() > end:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(self.err)
            time.sleep(0.005)
        return came

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def out(self):
        return Path(f"{self.folder.name}/{self.pid}.1").read_text(errors="replace")

    @property
    def err(self):
        return Path(f"{self.folder.name}/{self.pid}.2").read_text(errors="replace")


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
    processes = start_several(n, *arguments, **options) if n > 1 else [Process(*arguments, **options)]
    statuses = [process.wait() for process in processes]
    assert not any(statuses), f"{statuses}: {''.join(process.err[-3000:] for process in processes)}"
    return processes[0]


def serve(folder):
    """Fork for every line of stdin; the child leaves this function and ends as any Python program does."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import aspo
    import torch.distributed.fsdp  # noqa: F401
    with tempfile.TemporaryDirectory() as model:  # whose first call takes long in transformers
        aspo.transformers.logging.disable_progress_bar()
        for part in aspo.tiny_model():
            part.save_pretrained(model)
        aspo.load_model(model)
    gc.freeze()  # or the first collection of a child copies all that it shares
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            become(folder, **request)
            return
        for fd in (1, 2):  # there from the start, whoever is faster
            open(f"{folder}/{pid}.{fd}", "a").close()
        print(pid, flush=True)


def become(folder, script, arguments, env, before, cwd):
    os.environ |= env
    os.chdir(cwd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for fd, name, errors in ((1, "stdout", "strict"), (2, "stderr", "backslashreplace")):  # as Python's own
        os.dup2(os.open(f"{folder}/{os.getpid()}.{fd}", os.O_WRONLY | os.O_CREAT), fd)
        setattr(sys, name, open(fd, "w", 1, env.get("PYTHONIOENCODING"), errors, closefd=False))
    exec(before, {})
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(Path(script).parent))
    del sys.modules["aspo"]
    runpy.run_path(script, run_name="__main__")


def loop(n):
    flags = "--steps 1 --sft_steps 1 --prompts 4 --group_size 4 --minibatch 4 --max_new_tokens 16 --eval_problems 4"
    for i in range(n):
        with tempfile.TemporaryDirectory() as folder:
            run_several(2, *flags.split(), "--out", f"{folder}/run")
        print(f"{i + 1} runs of two processes have ended with status 0", flush=True)


if __name__ == "__main__":
    serve(sys.argv[2]) if sys.argv[1] == "serve" else loop(int(sys.argv[2]))
