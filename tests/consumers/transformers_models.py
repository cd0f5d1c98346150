"""transformers: tiny models from configurations, loaded as users load them."""

import os
import sys

from consumers import harness, transformers_ranks, transformers_saving
from consumers.tiny import bert_config, gpt2_config, llama_config, mixtral_config
from consumers.transformers_loading import forward, load, load_run_save


def import_library():
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM  # noqa: F401

    transformers.utils.logging.disable_progress_bar()


def prepare(folder):
    import torch
    from transformers import (
        BertModel,
        GPT2LMHeadModel,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        MixtralForCausalLM,
    )

    torch.manual_seed(0)
    llama = LlamaForCausalLM(llama_config())
    llama.save_pretrained(folder / "llama")
    llama.save_pretrained(folder / "llama-sharded", max_shard_size="20KB")
    assert len(list((folder / "llama-sharded").glob("*.safetensors"))) > 3
    llama.to(torch.bfloat16).save_pretrained(folder / "llama-bf16")
    LlamaForCausalLM(llama_config(tie_word_embeddings=True)).save_pretrained(folder / "tied")
    labeled = llama_config(num_labels=3, pad_token_id=0)
    LlamaForSequenceClassification(labeled).save_pretrained(folder / "llama-labeled")
    BertModel(bert_config()).save_pretrained(folder / "bert")
    GPT2LMHeadModel(gpt2_config()).save_pretrained(folder / "gpt2")
    mixtral = MixtralForCausalLM(mixtral_config())
    mixtral.save_pretrained(folder / "mixtral", max_shard_size="30KB")


def llama_one_file(folder):
    return load_run_save("AutoModelForCausalLM", folder / "llama")


def llama_sharded(folder):
    return load_run_save("AutoModelForCausalLM", folder / "llama-sharded")


def llama_cast(folder):
    import torch

    return load_run_save("AutoModelForCausalLM", folder / "llama", dtype=torch.bfloat16)


def llama_auto_dtype(folder):
    return load_run_save("AutoModelForCausalLM", folder / "llama-bf16", dtype="auto")


def llama_by_an_old_keyword(folder):
    """It still works, and warns."""
    import torch

    return load_run_save("AutoModelForCausalLM", folder / "llama", torch_dtype=torch.float16)


def llama_device_map(folder):
    return load_run_save("AutoModelForCausalLM", folder / "llama-sharded", device_map="cpu")


def llama_device_map_of_modules(folder):
    places = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    return load_run_save("AutoModelForCausalLM", folder / "llama", device_map=places)


def llama_on_disk(folder):
    """A layer that stays in the file and is read whenever it runs."""
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.layers.2": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"lm_head": "cpu"}
    model, shown = load(
        "AutoModelForCausalLM", folder / "llama", device_map=places, offload_folder="offload"
    )
    return {**shown, "forward": [forward(model), forward(model)]}


def llama_one_after_another(folder):
    """Without transformers' loading threads."""
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        return load_run_save("AutoModelForCausalLM", folder / "llama-sharded")
    finally:
        del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]


def llama_generates(folder):
    import torch

    model, _ = load("AutoModelForCausalLM", folder / "llama")
    tokens = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=6, do_sample=False)
    return tokens.tolist()


def llama_without_head(folder):
    """A base model out of a checkpoint with a head: unexpected names."""
    return load_run_save("AutoModel", folder / "llama")


def llama_with_new_head(folder):
    """A head that is in no file: missing names, initialised anew."""
    options = {"num_labels": 3, "pad_token_id": 0}
    return load_run_save("AutoModelForSequenceClassification", folder / "llama", **options)


def llama_of_state_dict(folder):
    """The second way: a state dict of ours given to from_pretrained."""
    import transformers
    from safetensors.torch import load_file

    state = load_file(folder / "llama" / "model.safetensors")
    model = transformers.LlamaForCausalLM.from_pretrained(
        None, config=llama_config(), state_dict=state
    )
    return {**harness.describe_model(model), "forward": forward(model.eval())}


def llama_tied(folder):
    shown = load_run_save("AutoModelForCausalLM", folder / "tied")
    assert shown["tensors"]["lm_head.weight"]["tied_to"] == "model.embed_tokens.weight"
    return shown


def gpt2_tied(folder):
    return load_run_save("AutoModelForCausalLM", folder / "gpt2")


def bert(folder):
    return load_run_save("AutoModel", folder / "bert")


def bert_cast(folder):
    import torch

    return load_run_save("AutoModel", folder / "bert", dtype=torch.float16)


def mixtral_stacked(folder):
    """Experts of several tensors, stacked into one while loading."""
    return load_run_save("AutoModelForCausalLM", folder / "mixtral")


def llama_training(folder):
    import torch

    model, _ = load("AutoModelForCausalLM", folder / "llama")
    model.train()
    tokens = torch.arange(10).reshape(2, 5)
    model(input_ids=tokens, labels=tokens).loss.backward()
    torch.optim.AdamW(model.parameters()).step()
    again, _ = load("AutoModelForCausalLM", folder / "llama")
    return {"trained": harness.describe_model(model), "again": harness.describe_model(again)}


def llama_without_mmap(folder):
    return load_run_save("AutoModelForCausalLM", folder / "llama", disable_mmap=True)


ALONE = {
    function.__name__: function
    for function in (
        llama_one_file,
        llama_sharded,
        llama_cast,
        llama_auto_dtype,
        llama_by_an_old_keyword,
        llama_device_map,
        llama_device_map_of_modules,
        llama_on_disk,
        llama_one_after_another,
        llama_generates,
        llama_without_head,
        llama_with_new_head,
        llama_of_state_dict,
        llama_tied,
        gpt2_tied,
        bert,
        bert_cast,
        mixtral_stacked,
        llama_training,
        llama_without_mmap,
    )
}
TIMED = ALONE  # neither training nor processes
SCENARIOS = ALONE | transformers_saving.SCENARIOS | transformers_ranks.SCENARIOS
EXPECTED_FALLBACKS = transformers_saving.EXPECTED_FALLBACKS


# --- with a filter ---


def without_a_layer(folder):
    _, shown = load("AutoModelForCausalLM", folder / "llama")
    return shown


def without_a_layer_sharded(folder):
    _, shown = load("AutoModelForCausalLM", folder / "llama-sharded")
    return shown


def keep_without_layer_1(name):
    return not name.startswith("model.layers.1.")


FILTERED = {
    "without_a_layer": (keep_without_layer_1, without_a_layer),
    "without_a_layer_sharded": (keep_without_layer_1, without_a_layer_sharded),
}

if __name__ == "__main__":
    harness.main(sys.modules[__name__])
