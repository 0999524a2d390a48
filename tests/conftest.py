import copy
import os
import random
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are slower on two threads, which wait for each other
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a script starts in the background

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import aspo  # noqa: E402

PROBLEM = {"problem": "1+2", "answer": "3", "messages": None, "row": {}}


@pytest.fixture
def tiny():
    """An untrained tiny model in eval mode and its tokenizer."""
    torch.manual_seed(0)
    model, tokenizer = aspo.tiny_model()
    return model.eval(), tokenizer


@pytest.fixture(scope="session")
def shared():
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared folder beside the checkout")
    return folder


def policy_of(model, tokenizer, /, **knobs) -> "aspo.Policy":
    """A policy with the knobs of a small run on sums; every construction probes the model."""
    cfg = aspo.Config(**(dict(model="tiny", data="arithmetic", max_new_tokens=40) | knobs))
    return aspo.Policy(model, tokenizer, cfg, [PROBLEM])


PROMPTS = ["1+2+3+4=", "5+5=", "1+1+1+1+1+1=", "2="]


def ids(tokenizer, text):
    return tokenizer(text).input_ids


def made_up_samples(tokenizer, groups=4, group_size=4):
    """Random responses of random lengths with random advantages, groups side by side."""
    rng, samples = random.Random(0), []
    for q in range(groups):
        for _ in range(group_size):
            response = [rng.randrange(3, 18) for _ in range(rng.randint(1, 12))] + [tokenizer.eos_token_id]
            samples.append(aspo.Sample("p", "1", ids(tokenizer, PROMPTS[q % 4]), response, reward=rng.random(),
                                       advantage=rng.gauss(0, 1), sampler_logp=torch.zeros(len(response))))
    return samples


def sgd_policy(tiny, lr=1.0, **knobs):
    """Plain gradient descent: for one step the change of the weights is minus lr times the gradient."""
    common = dict(prompts=4, group_size=4, minibatch=4, epochs=1, grad_clip=0, lr=lr, lr_warmup=0, weight_decay=0)
    policy = policy_of(copy.deepcopy(tiny[0]), tiny[1], **common | knobs)
    policy.optimizer = torch.optim.SGD(policy.model.parameters(), lr=lr)
    return policy


def make_model(folder, template):
    """An untrained chat model, one token per character of ASCII, and all that belongs into its folder."""
    tokens = ["<pad>", "<eos>", "<unk>", "Ċ", "Ġ", *map(chr, range(33, 127))]
    tokenizer = transformers.Qwen2Tokenizer({token: i for i, token in enumerate(tokens)}, [], pad_token="<pad>",
                                            eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = template
    torch.manual_seed(0)
    config = aspo.tiny_model()[0].config
    config.vocab_size = len(tokens)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def error_of(capsys, *arguments) -> str:
    """The one line that bad input gets, with exit status 2."""
    capsys.readouterr()
    assert aspo.main(list(map(str, arguments))) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error
