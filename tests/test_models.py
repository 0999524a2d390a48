"""Each kind of causal language model is trained right, or refused in one line that says why."""
import copy
import inspect
import json

import pytest
import torch
import transformers

import aspo
from aspo import Config, Sample

# Of every config, what it knows of these.
SIZES = dict(
    vocab_size=40, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, shared_expert_intermediate_size=24,
    ffn_dim=48, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=256, num_local_experts=4, num_experts=4, n_routed_experts=4, num_experts_per_tok=2,
    n_group=1, topk_group=1, n_shared_experts=1, moe_shared_expert_intermediate_size=24, q_lora_rank=16,
    kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, linear_num_key_heads=2,
    linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, state_size=8, ssm_state_size=8,
    n_groups=1, num_heads=4, chunk_size=16, expand=1, mamba_num_heads=4, mamba_head_dim=8, mamba_d_ssm=32,
    mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=16, mamba_expand=1,
    vocab_size_per_layer_input=40, hidden_size_per_layer_input=8, attention_hidden_size=32, pad_token_id=0,
    bos_token_id=2, eos_token_id=1)
SLIDING = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=8)
LINEAR = dict(layer_types=["linear_attention", "full_attention"])
KINDS = {  # config class: what makes the kind show what is special about it
    "Qwen3_5TextConfig": LINEAR,
    "Qwen3NextConfig": LINEAR,
    "Gemma2Config": SLIDING | dict(final_logit_softcapping=5.0, attn_logit_softcapping=5.0),
    "Gemma3nTextConfig": SLIDING | dict(
        num_hidden_layers=4, num_kv_shared_layers=2, layer_types=SLIDING["layer_types"] * 2, laurel_rank=8,
        altup_num_inputs=2, activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0], intermediate_size=[48] * 4),
    "GptOssConfig": SLIDING,
    "GraniteConfig": dict(embedding_multiplier=3.0, logits_scaling=4.0, residual_multiplier=0.5),
    "Cohere2Config": SLIDING | dict(logit_scale=0.5),
    "DeepseekV3Config": dict(num_key_value_heads=4, first_k_dense_replace=1),
    "Lfm2Config": dict(layer_types=["conv", "full_attention"]),
    "Mamba2Config": {},
    "FalconH1Config": dict(lm_head_multiplier=0.5, key_multiplier=0.6),
    # time_step_min: below it, transformers' cached step computes something else than its whole scan.
    "NemotronHConfig": dict(layers_block_type=["mamba", "attention", "moe"], num_hidden_layers=3, time_step_min=1e-9),
    "Llama4TextConfig": dict(attention_chunk_size=16, no_rope_layers=[1, 0],
                             layer_types=["chunked_attention", "full_attention"]),
    "StableLmConfig": dict(use_qkv_bias=True, partial_rotary_factor=0.5),
    # Random in train mode, even without dropout. The first layer that is left out may be any of them.
    "PhimoeConfig": dict(router_jitter_noise=0.3, input_jitter_noise=0.3),
    "MixtralConfig": dict(router_jitter_noise=0.3, output_router_logits=True),
    "OPTConfig": dict(layerdrop=0.5, dropout=0.3),
    "BioGptConfig": dict(layerdrop=0.5, activation_dropout=0.3),
    "Qwen3MoeConfig": dict(output_router_logits=True),
}
PROMPTS = [4, 4, 21, 21, 9, 9, 70, 70]  # their lengths: pairs, longer and shorter than every window above


def tiny_config(name, **settings):
    kind = getattr(transformers, name, None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
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
    model.save_pretrained(folder)
    (tokenizer or aspo.tiny_model()[1]).save_pretrained(folder)
    return folder


def problems(*lengths):
    """Digits with one token each, behind which the template puts a "="; those of one length are the same."""
    texts = ["".join(str((i * i + n) % 10) for i in range(n - 1)) for n in lengths]
    return [aspo.make_problem({"problem": text, "answer": "1"}) for text in texts]


def alone(model, s, temperature):
    """Log-probabilities of a response by transformers' forward of this one sequence, nothing padded or cached."""
    logits = model(input_ids=torch.tensor([s.prompt + s.response]), use_cache=False).logits[0]
    predicted = torch.distributions.Categorical(logits=logits[len(s.prompt) - 1:-1] / temperature)
    return predicted.log_prob(torch.tensor(s.response))


def one_step(model, tokenizer, **settings):
    """A rollout of the model and one gradient: (policy, samples, stats)."""
    cfg = Config(model="made", instruction="", device="cpu", group_size=2, max_new_tokens=8, temperature=0.8,
                 micro_tokens=200, lr=0.01, **settings)
    policy = aspo.Policy(model, tokenizer, cfg, problems(*PROMPTS))
    torch.manual_seed(1)
    samples = aspo.roll_out(policy, problems(*PROMPTS[::2]), 2, cfg)
    for i, s in enumerate(samples):
        s.advantage = (-0.7, 1.0, 0.4)[i % 3]
    aspo.remember_old_logp(policy, samples)
    stats = aspo.accumulate(policy, samples, sum(len(s.response) for s in samples), cfg)
    return policy, samples, stats


@pytest.mark.parametrize("name", KINDS)
def test_a_step_is_that_of_one_sequence_at_a_time(name, tmp_path):
    folder = save(tmp_path, random_model(tiny_config(name, **KINDS[name])))
    model, tokenizer = aspo.load_model(Config(model=str(folder)))
    reference, checkpointed = copy.deepcopy(model), copy.deepcopy(model)
    policy, samples, stats = one_step(model, tokenizer)
    expected, n_tokens = [alone(reference, s, 0.8) for s in samples], sum(len(s.response) for s in samples)
    for s, own in zip(samples, expected):
        torch.testing.assert_close(s.sampler_logp, own.detach(), atol=1e-4, rtol=0)
        torch.testing.assert_close(s.old_logp, own.detach(), atol=1e-4, rtol=0)
    (-sum(s.advantage * own.sum() for s, own in zip(samples, expected)) / n_tokens).backward()
    assert all((x["log_ratio"] == 0).all() for x in stats)  # the policy stands still, and nothing in it is random

    def check_gradients(trained):
        pairs = [(p.grad, q.grad) for p, q in zip(trained.parameters(), reference.parameters()) if q.grad is not None]
        gap, size = (torch.stack([x.norm() for x in xs]).norm() for xs in ([p - q for p, q in pairs],
                                                                          [q for _, q in pairs]))
        assert gap < 1e-3 * size and size > 0.01

    check_gradients(model)
    again, same_samples, stats = one_step(checkpointed, tokenizer, gradient_checkpointing=True)
    assert [s.response for s in same_samples] == [s.response for s in samples]
    assert all((x["log_ratio"] == 0).all() for x in stats)
    check_gradients(checkpointed)
    for trained in (policy, again):
        assert trained.optimizer_step() > 0
    old, new = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (reference, model))
    assert (old != new).float().mean() > 0.3


# ------------------------------------------------------------------------------- whole runs of one step, or one line


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of one step: (exit status of main, its folder). Of each group's rewards one is lower."""
    monkeypatch.setattr(aspo.Run, "listen", lambda self: None)  # the test runner keeps its own signal handlers
    (tmp_path / "reward.py").write_text(
        "import itertools\ncount = itertools.count()\n\n"
        "def alternate(response, row):\n    return next(count) % 2 - 1\n")

    def main(folder, *flags, lengths=(3, 4, 5, 6, 7, 60)):
        data, out = tmp_path / "data.jsonl", tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        data.write_text("\n".join(json.dumps({"problem": p["problem"], "answer": "1"}) for p in problems(*lengths)))
        return aspo.main([*map(str, (
            "--model", folder, "--data", data, "--reward", f"{tmp_path}/reward.py:alternate", "--out", out,
            "--steps", 1, "--prompts", 2, "--minibatch", 2, "--group_size", 2, "--epochs", 1, "--max_new_tokens", 6,
            "--lr", 0.01, "--eval_every", 0, "--eval_problems", 1, "--eval_samples", 1,
            "--device", "cpu", "--instruction", "")),
            *flags]), out
    return main


@pytest.fixture
def refused(run, capsys):
    """The run ends with status 2 and one line that holds these words, before it has made a folder."""
    def check(folder, *words, flags=(), **settings):
        status, out = run(folder, *flags, **settings)
        errors = capsys.readouterr().err.splitlines()
        assert status == 2 and len(errors) == 1 and errors[0].startswith("error: ") and not out.exists(), errors
        assert all(word in errors[0] for word in words), errors
    return check


def weights(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()


def check_trained(before, out):
    """The only step had ratios of 1 and moved the weights; the checkpoint has the same names."""
    metrics = json.loads((out / "metrics.jsonl").read_text())
    assert metrics["ratio_pos"] == metrics["ratio_neg"] == 1 and metrics["sampler_mismatch"] < 1e-4
    old, new = weights(before), weights(out / "checkpoint")
    assert old.keys() == new.keys() and any((old[name] != new[name]).any() for name in old)


@pytest.mark.parametrize("name", ["Gemma3Config", "Qwen3NextConfig", "FalconMambaConfig", "PhimoeConfig"])
def test_a_whole_run(name, run, tmp_path, capsys):
    """Gemma 3 with its eyes is what the sizes from 4B on are: the language model is inside another."""
    settings = KINDS.get(name, {})
    if name == "Gemma3Config":
        text = tiny_config("Gemma3TextConfig", **SLIDING).to_dict()
        vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16,
                      patch_size=8)
        settings = dict(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=30,
                        boi_token_index=31, eoi_token_index=32)
    folder = save(tmp_path / "model", random_model(tiny_config(name, **settings)))
    for flags in ([], ["--gradient_checkpointing"]):
        status, out = run(folder, *flags)
        assert status == 0, capsys.readouterr().err
        check_trained(folder, out)


LONGROPE = dict(rope_type="longrope", rope_theta=10000.0, short_factor=[1.0, 1.1, 1.2, 1.3],
                long_factor=[2.0, 3.0, 4.0, 5.0])
ROPES = {  # each with 64 positions before it is stretched
    "longrope": ("Phi3Config", dict(rope_parameters=LONGROPE, original_max_position_embeddings=64)),
    "longrope inside": ("LlamaConfig", dict(rope_parameters=LONGROPE | dict(original_max_position_embeddings=64))),
    "dynamic": ("LlamaConfig", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0),
                                    max_position_embeddings=64)),
}


@pytest.mark.parametrize("rope", ROPES)
def test_a_rope_that_depends_on_the_batch_is_right_within_its_length_and_refused_beyond(rope, run, refused, tmp_path):
    name, settings = ROPES[rope]
    folder = save(tmp_path / "model", random_model(tiny_config(name, **settings)))
    refused(folder, "a prompt of 59 tokens", "context of 64", lengths=(3, 4, 5, 6, 7, 59))
    status, out = run(folder, lengths=(3, 4, 5, 6, 7, 58))
    assert status == 0
    check_trained(folder, out)


@pytest.mark.parametrize("name, settings", [
    ("RwkvConfig", dict(attention_hidden_size=32)),
    ("RecurrentGemmaConfig", dict(lru_width=32, attention_window_size=16, block_types=["recurrent", "attention"])),
    # Right with up to index_topk tokens, which the probe of 70 tokens would not pass by itself.
    ("DeepseekV32Config", dict(num_key_value_heads=4, index_topk=90, index_n_heads=2, index_head_dim=8)),
])
def test_what_no_engine_gets_right_is_refused(name, settings, refused, tmp_path):
    folder = save(tmp_path / "model", random_model(tiny_config(name, **settings)))
    refused(folder, "sampler and trainer do not agree", "off by", lengths=(3, 4, 5, 6, 7, 120))


def test_gradient_checkpointing_where_a_class_has_none(refused, tmp_path):
    folder = save(tmp_path / "model", random_model(tiny_config("OpenAIGPTConfig", n_embd=32, n_layer=2, n_head=4)))
    refused(folder, "--gradient_checkpointing", "OpenAIGPT", flags=["--gradient_checkpointing"])


def with_template(template):
    tokenizer = aspo.tiny_model()[1]
    tokenizer.chat_template = template
    return tokenizer


def test_a_tokenizer_that_is_no_pair_with_its_model(refused, tmp_path):
    """"=" and what stands before it fit, the newline does not."""
    model, tokenizer = aspo.tiny_model()
    model.resize_token_embeddings(10)
    refused(save(tmp_path / "model", model, tokenizer), "they are not a pair", "10")


def test_no_token_that_ends_a_response(refused, tmp_path):
    model, tokenizer = aspo.tiny_model()
    tokenizer.eos_token = tokenizer.pad_token = None
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    refused(save(tmp_path / "model", model, tokenizer), "no token is known that ends a response")


@pytest.mark.parametrize("template", [
    "{{ raise_exception('roles must alternate') }}",
    "{{ messages[0]['content'] }}"
    "{% if add_generation_prompt %}{{ raise_exception('roles must alternate') }}{% endif %}",
])
def test_a_template_that_raises(template, refused, tmp_path):
    model = aspo.tiny_model()[0]
    refused(save(tmp_path / "model", model, with_template(template)), "the chat template", "roles must alternate")


def test_a_pad_token_is_not_needed(run, tmp_path):
    model, tokenizer = aspo.tiny_model()
    tokenizer.pad_token = model.config.pad_token_id = model.generation_config.pad_token_id = None
    folder = save(tmp_path / "model", model, tokenizer)
    status, out = run(folder)
    assert status == 0
    check_trained(folder, out)


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_the_end_of_a_turn_is_found_in_the_template(engine):
    """A base model that was given a template: neither its config nor its tokenizer counts <|im_end|> as an end."""
    model, tokenizer = aspo.tiny_model()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    model.resize_token_embeddings(len(tokenizer))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    cfg = Config(model="made", instruction="", device="cpu", engine=engine, max_new_tokens=60)
    torch.manual_seed(0)
    policy = aspo.Policy(model, tokenizer, cfg, problems(4))
    assert policy.stop_ids == sorted([tokenizer.eos_token_id, end])
    responses = [response for response, _, _ in policy.generate([policy.encode(problems(4)[0])] * 40)]
    assert sum(response[-1] == end for response in responses) > 10
    assert not any(set(response[:-1]) & set(policy.stop_ids) for response in responses)


def test_half_precision_weights_are_trained_and_saved_in_fp32(run, tmp_path):
    model, tokenizer = aspo.tiny_model()
    folder = save(tmp_path / "model", model.to(torch.bfloat16), tokenizer)
    status, out = run(folder)
    assert status == 0
    check_trained(folder, out)
    assert {x.dtype for x in weights(folder).values()} == {torch.bfloat16}
    assert {x.dtype for x in weights(out / "checkpoint").values()} == {torch.float32}
