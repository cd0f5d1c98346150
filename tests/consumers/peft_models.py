"""peft: adapters put on tiny models, by peft itself and by transformers' integration of it."""

import sys

from consumers import harness
from consumers.tiny import llama_config


def import_library():
    import peft
    import transformers

    transformers.utils.logging.disable_progress_bar()
    assert peft.PeftModel


def prepare(folder):
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(llama_config(num_hidden_layers=2))
    model.save_pretrained(folder / "base")
    modules = ["q_proj", "v_proj"]
    kinds = {
        "lora": peft.LoraConfig(r=4, target_modules=modules, init_lora_weights=False),
        "dora": peft.LoraConfig(
            r=2, target_modules=modules, init_lora_weights=False, use_dora=True
        ),
        "ia3": peft.IA3Config(
            target_modules=[*modules, "down_proj"],
            feedforward_modules=["down_proj"],
            init_ia3_weights=False,
        ),
        "whole": peft.LoraConfig(
            r=2,
            target_modules=modules,
            init_lora_weights=False,
            modules_to_save=["lm_head"],
        ),
    }
    for name, kind in kinds.items():
        torch.manual_seed(len(name))
        peft.get_peft_model(base(folder), kind).save_pretrained(str(folder / name))


def base(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "base")


def forward(model):
    import torch

    with torch.no_grad():
        output = model(input_ids=torch.arange(10).reshape(2, 5))
    return harness.digest_tensor(output[0])


def with_adapter(folder, name, **options):
    import peft

    model = peft.PeftModel.from_pretrained(base(folder), str(folder / name), **options)
    model.eval()
    return model


def load_run_save(folder, name, **options):
    model = with_adapter(folder, name, **options)
    shown = {**harness.describe_model(model), "forward": forward(model)}
    model.save_pretrained("saved")
    return {**shown, "files": harness.digest_folder("saved")}


def lora(folder):
    return load_run_save(folder, "lora")


def dora(folder):
    return load_run_save(folder, "dora")


def ia3(folder):
    return load_run_save(folder, "ia3")


def with_a_saved_module(folder):
    return load_run_save(folder, "whole")


def trainable(folder):
    return load_run_save(folder, "lora", is_trainable=True)


def low_memory(folder):
    return load_run_save(folder, "lora", low_cpu_mem_usage=True)


def two_adapters(folder):
    model = with_adapter(folder, "lora", adapter_name="one")
    model.load_adapter(str(folder / "dora"), adapter_name="two")
    seen = []
    for name in ("one", "two"):
        model.set_adapter(name)
        seen.append(forward(model))
    return {**harness.describe_model(model), "forward": seen}


def merged(folder):
    model = with_adapter(folder, "lora").merge_and_unload()
    model.save_pretrained("merged")
    return {
        **harness.describe_model(model),
        "forward": forward(model),
        "files": harness.digest_folder("merged"),
    }


def weights_alone(folder):
    from peft.utils import load_peft_weights

    return {
        name: harness.describe(load_peft_weights(str(folder / name), device="cpu"))
        for name in ("lora", "dora", "ia3", "whole")
    }


def into_a_model_of_transformers(folder):
    model = base(folder)
    model.load_adapter(str(folder / "lora"))
    model.eval()
    return {**harness.describe_model(model), "forward": forward(model)}


SCENARIOS = {
    function.__name__: function
    for function in (
        lora,
        dora,
        ia3,
        with_a_saved_module,
        trainable,
        low_memory,
        two_adapters,
        merged,
        weights_alone,
        into_a_model_of_transformers,
    )
}

if __name__ == "__main__":
    harness.main(sys.modules[__name__])
