"""A reward that runs code. Type --reward tests/forks/run_code.py:passes; answers are asserts."""
import contextlib, resource, secrets, subprocess, sys, tempfile

def limit():  # seconds, bytes of memory and of a file, processes (not root's), open files
    for name, most in dict(CPU=2, AS=2**29, FSIZE=2**16, NPROC=0, NOFILE=16).items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))

def passes(response, row):
    end = secrets.token_hex()  # printed behind the asserts, so that exit() does not pass
    code = f"{response.split('```python')[-1].split('```')[0]}\n{row['answer']}\nprint('{end}')"
    with tempfile.TemporaryFile("w+") as out, contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-I", "-c", code], stdin=-3, stdout=out, stderr=-3,
                       cwd="/", env={}, preexec_fn=limit, timeout=5)
        out.seek(0)
        return out.read().endswith(end + "\n")
    return False
