"""LoRA: adapters learn, the weights stay. A checkpoint holds the adapters and the model's name."""
from peft import LoraConfig
import aspo

load_model = aspo.load_model

def with_adapters(name):
    model, tokenizer = load_model(name)
    if not hasattr(model, "peft_config"):  # a checkpoint brings its own
        model.add_adapter(LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    for parameter, p in model.named_parameters():
        p.requires_grad_("lora_" in parameter)
    return model, tokenizer

aspo.load_model = with_adapters
raise SystemExit(aspo.main())
