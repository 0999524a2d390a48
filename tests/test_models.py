"""Each kind of causal language model is trained right, or refused in one line.

Those that differ most stand here, tiny and with random weights. All 196 names of the mapping of causal language
models in transformers 5.24 were tried in the same way, by `check_steps` on a config made small: 143 are right, 46
refused (encoders, decoders of translation and speech models, heads that transform, caches of their own), none is wrong
without a word; 7 could not be made small, or need more than text. That takes minutes, so it is no test.
"""
import copy
import inspect
import json

import pytest
import torch
import transformers
from conftest import aspo

# Of every config, what it knows of these.
SIZES = dict(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, pad_token_id=0, bos_token_id=2, eos_token_id=1)
SLIDING = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=8)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
KINDS = {  # what is special: the class of its config, and what makes it show
    "plain": ("LlamaConfig", {}),
    "tied head": ("Qwen3Config", dict(tie_word_embeddings=True)),
    "sliding window, sinks": ("GptOssConfig", SLIDING | dict(num_local_experts=4, num_experts_per_tok=2)),
    "soft caps": ("Gemma2Config", SLIDING | dict(final_logit_softcapping=5.0, attn_logit_softcapping=5.0)),
    "scaled logits": ("GraniteConfig", dict(embedding_multiplier=3.0, logits_scaling=4.0, residual_multiplier=0.5)),
    # In train mode its router would jitter, and the loss of its router would be added.
    "experts": ("MixtralConfig", dict(num_local_experts=4, router_jitter_noise=0.3, output_router_logits=True)),
    "linear attention": ("Qwen3NextConfig", MOE | dict(
        layer_types=["linear_attention", "full_attention"], shared_expert_intermediate_size=24,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)),
    "state space": ("MambaConfig", dict(state_size=8)),
    "state space beside attention": ("FalconH1Config", dict(
        lm_head_multiplier=0.5, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1,
        mamba_chunk_size=16)),
    "latent attention": ("DeepseekV3Config", dict(
        num_key_value_heads=4, first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, moe_intermediate_size=24, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8)),
    # Learned positions; and dropout, which must stay off.
    "multi-query": ("GPTBigCodeConfig", dict(
        n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=256, multi_query=True, resid_pdrop=0.3)),
}
PROMPTS = [4, 4, 21, 21, 9, 9, 70, 70]  # lengths: groups of two, longer and shorter than every window above


def tiny_config(name, **settings):
    kind = getattr(transformers, name)
    known = {*inspect.signature(kind.__init__).parameters, *getattr(kind, "__dataclass_fields__", {})}
    return kind(**{k: v for k, v in SIZES.items() if k in known} | settings)


def random_model(config):
    """With large weights: at their initial 0.02 all is alike, and no mistake would show."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.25 if p.ndim > 1 else p + 0.1 * torch.randn_like(p))
    return model


def save(folder, model, tokenizer=None):
    for part in (model, tokenizer or aspo.tiny_model()[1]):
        part.save_pretrained(folder)
    return str(folder)


def problems(lengths):
    """Digits of one token each, behind which the template puts a "="."""
    texts = ["".join(str((i * i + n) % 10) for i in range(n - 1)) for n in lengths]
    return [aspo.make_problem({"problem": text, "answer": "1"}) for text in texts]


def alone(model, s):
    """Log-probabilities of a response by transformers' forward of this one sequence, nothing padded or cached."""
    logits = model(input_ids=torch.tensor([s.prompt + s.response]), use_cache=False).logits[0]
    predicted = torch.distributions.Categorical(logits=logits[len(s.prompt) - 1:-1] / 0.8)
    return predicted.log_prob(torch.tensor(s.response))


def check_steps(model, tokenizer, checkpointing=True):
    """A rollout and its gradient, also with checkpointing, are those of one sequence at a time. Returns the samples."""
    cfg = aspo.Config(model="made", instruction="", device="cpu", group_size=2, max_new_tokens=8, temperature=0.8,
                      micro_tokens=200)
    reference = copy.deepcopy(model).eval()
    policy = aspo.Policy(model.train(), tokenizer, cfg, problems(PROMPTS))
    policy.stop_ids = list(range(1, 40, 5))
    torch.manual_seed(1)
    samples = aspo.roll_out(policy, problems(PROMPTS[::2]), 2, cfg)
    for i, s in enumerate(samples):
        s.advantage = (-0.7, 1.0, 0.4)[i % 3]
    n_tokens = sum(len(s.response) for s in samples)
    expected = [alone(reference, s) for s in samples]
    (-sum(s.advantage * own.sum() for s, own in zip(samples, expected)) / n_tokens).backward()
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    for again in (False, True)[:1 + checkpointing]:
        if again:
            aspo.recompute_layers(model)
            model.zero_grad()
        aspo.remember_old_logp(policy, samples)
        stats = aspo.accumulate(policy, samples, n_tokens, cfg)
        assert all((x["log_ratio"].abs() < 1e-5).all() for x in stats)  # nothing in the policy is random
        for s, own in zip(samples, expected):
            torch.testing.assert_close(s.sampler_logp, own.detach(), atol=1e-4, rtol=0)
            torch.testing.assert_close(s.old_logp, own.detach(), atol=1e-4, rtol=0)
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == wanted.keys()
        gap, size = (torch.stack([x.norm() for x in xs]).norm() for xs in (
            [found[name] - wanted[name] for name in wanted], list(wanted.values())))
        assert gap < 1e-3 * size and size > 0.01, (gap, size)
    return samples


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_one_sequence_at_a_time(kind, tmp_path):
    name, settings = KINDS[kind]
    folder = save(tmp_path, random_model(tiny_config(name, **settings)))
    samples = check_steps(*aspo.load_model(folder))
    assert len({len(s.response) for s in samples}) > 2  # rows have left the batch at different steps


def run(folder, tmp_path, *flags, lengths=(3, 4, 5, 6, 7, 60)):
    """main on this model: exit status, and the run's folder. Half the responses are rewarded."""
    (tmp_path / "half.py").write_text("import itertools\nn = itertools.cycle([-1, 0])\n\n\n"
                                      "def half(response, row):\n    return next(n)\n")
    (tmp_path / "data.jsonl").write_text(
        "\n".join(json.dumps({"problem": p["problem"], "answer": "1"}) for p in problems(lengths)))
    return aspo.main([*map(str, (
        "--model", folder, "--data", tmp_path / "data.jsonl", "--reward", f"{tmp_path}/half.py:half", "--out",
        tmp_path / "run", "--steps", 1, "--prompts", 2, "--minibatch", 2, "--group_size", 2, "--epochs", 1,
        "--max_new_tokens", 6, "--lr", 0.01, "--eval_every", 0, "--eval_problems", 1, "--eval_samples", 1,
        "--device", "cpu", "--instruction", "", *flags))]), tmp_path / "run"


def test_a_language_model_inside_another(tmp_path, capsys):
    """Gemma 3 from 4B on has eyes. Its weights come in bf16, and without a pad token."""
    text = tiny_config("Gemma3TextConfig", **SLIDING).to_dict() | dict(pad_token_id=None)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16,
                  patch_size=8)
    model = random_model(transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=30, boi_token_index=31,
        eoi_token_index=32))
    tokenizer = aspo.tiny_model()[1]
    tokenizer.pad_token = None
    folder = save(tmp_path / "model", model.to(torch.bfloat16), tokenizer)
    status, out = run(folder, tmp_path, "--gradient_checkpointing")
    assert status == 0, capsys.readouterr().err
    metrics = json.loads((out / "metrics.jsonl").read_text())
    assert metrics["ratio_pos"] == metrics["ratio_neg"] == 1 and metrics["sampler_mismatch"] < 1e-4
    old, new = (transformers.AutoModelForCausalLM.from_pretrained(x).state_dict() for x in (
        folder, out / "checkpoint-1"))
    assert old.keys() == new.keys() and any((old[name] != new[name]).any() for name in old)
    assert {x.dtype for x in new.values() if x.is_floating_point()} == {torch.float32}


ROPE = dict(rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0), max_position_embeddings=64)


@pytest.mark.parametrize("name, settings, flags, words", [
    ("RwkvConfig", dict(attention_hidden_size=32), (), "sampler and trainer differ"),
    ("OpenAIGPTConfig", dict(n_embd=32, n_layer=2, n_head=4), (), "--model"),  # it has no cache
    ("GPTNeoXJapaneseConfig", {}, ["--gradient_checkpointing"], "--gradient_checkpointing"),  # its class has none
    ("LlamaConfig", ROPE, (), "context 64"),  # beyond it, a position is encoded by what else is in the batch
])
def test_what_does_not_work_is_refused_in_one_line(name, settings, flags, words, tmp_path, capsys):
    folder = save(tmp_path / "model", random_model(tiny_config(name, **settings)))
    status, out = run(folder, tmp_path, *flags)
    errors = capsys.readouterr().err.splitlines()
    assert status == 2 and len(errors) == 1 and errors[0].startswith("error: ") and words in errors[0], errors
    assert not (out / "config.json").exists()
