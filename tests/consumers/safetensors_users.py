"""safetensors' own load_model, and who else calls its functions: torch.load, torch's distributed
checkpoint reader, huggingface_hub."""

import sys
import warnings

from consumers import harness


def import_library():
    import huggingface_hub  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch.distributed.checkpoint  # noqa: F401


def make_model(seed=0):
    import torch

    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Embedding(11, 8),
        torch.nn.Linear(8, 8),
        torch.nn.LayerNorm(8),
        torch.nn.Linear(8, 11, bias=False),
    )
    model[3].weight = model[0].weight  # tied
    model.register_buffer("count", torch.tensor(3))
    return model


def prepare(folder):
    import torch
    from safetensors.torch import save_file, save_model

    save_model(make_model(), folder / "model.safetensors", metadata={"format": "pt"})
    tensors = {
        "half": torch.arange(6, dtype=torch.float16).reshape(2, 3),
        "brain": torch.linspace(-1, 1, 7).to(torch.bfloat16),
        "truth": torch.tensor([True, False]),
        "long": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "eight": torch.arange(4).to(torch.float8_e4m3fn),
    }
    save_file(tensors, folder / "mixed.safetensors", metadata={"format": "pt"})
    (folder / "dcp").mkdir()
    save_file({"w": torch.ones(3, 5), "b": torch.zeros(5)}, folder / "dcp" / "all.safetensors")


def forward(model):
    import torch

    with torch.no_grad():
        return harness.digest_tensor(model(torch.arange(11)))


def load_model(folder):
    from safetensors.torch import load_model as theirs

    model = make_model(seed=1)
    missing, unexpected = theirs(model, folder / "model.safetensors")
    return {
        **harness.describe_model(model),
        "missing": sorted(missing),
        "unexpected": sorted(unexpected),
        "forward": forward(model),
    }


def load_model_not_strict(folder):
    from safetensors.torch import load_model as theirs

    model = make_model(seed=1)
    missing, unexpected = theirs(model, folder / "mixed.safetensors", strict=False, device="cpu")
    try:
        theirs(model, folder / "mixed.safetensors")
    except RuntimeError as error:
        text = str(error)
    return {"missing": sorted(missing), "unexpected": sorted(unexpected), "error": text}


def save_what_was_loaded(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "mixed.safetensors")
    described = harness.describe(tensors)
    save_file(tensors, "again.safetensors", metadata={"format": "pt"})
    return {"tensors": described, "order": list(tensors), "files": harness.digest_folder(".")}


def assign_and_save_model(folder):
    import torch
    from safetensors.torch import load_file, save_model

    with torch.device("meta"):
        model = make_model()
    state = load_file(folder / "model.safetensors")
    for one, other in (("0.weight", "3.weight"), ("3.weight", "0.weight")):
        state.setdefault(one, state.get(other))
    model.load_state_dict(state, assign=True)
    model[3].weight = model[0].weight
    save_model(model, "assigned.safetensors", metadata={"format": "pt"})
    torch.save(model.state_dict(), "assigned.bin")
    loaded = torch.load("assigned.bin")
    return {
        **harness.describe_model(model),
        "forward": forward(model),
        "loaded": {name: harness.digest_tensor(tensor) for name, tensor in loaded.items()},
        "files": harness.digest_folder("."),
    }


def train_a_step(folder):
    """What was loaded can be trained, and the file does not change."""
    import torch
    from safetensors.torch import load_model as theirs

    model = make_model(seed=1)
    theirs(model, folder / "model.safetensors")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.arange(11)).square().mean().backward()
    optimizer.step()
    file_again = make_model(seed=2)
    theirs(file_again, folder / "model.safetensors")
    return {"trained": harness.describe_model(model), "file": harness.describe_model(file_again)}


def torch_load(folder):
    import torch

    loaded = torch.load(folder / "mixed.safetensors")
    mapped = torch.load(str(folder / "mixed.safetensors"), map_location="cpu")
    return {"loaded": harness.describe(loaded), "mapped": harness.describe(mapped)}


def distributed_checkpoint(folder):
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    state = {"w": torch.zeros(3, 5), "b": torch.ones(5)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.distributed is not initialised
        reader = HuggingFaceStorageReader(path=str(folder / "dcp"))
        dcp.load(state, storage_reader=reader, no_dist=True)
    return {name: tensor.tolist() for name, tensor in state.items()}


def hub_state_dict(folder):
    import huggingface_hub

    tensors = huggingface_hub.load_state_dict_from_file(folder / "mixed.safetensors")
    model = make_model(seed=1)
    result = huggingface_hub.load_torch_model(
        model, folder / "model.safetensors", strict=False, safe=True
    )
    return {
        "tensors": harness.describe(tensors),
        **harness.describe_model(model),
        "missing": sorted(result.missing_keys),
        "unexpected": sorted(result.unexpected_keys),
    }


def load_bytes(folder):
    from safetensors.torch import load

    tensors = load((folder / "mixed.safetensors").read_bytes())
    return dict(sorted(harness.describe(tensors).items()))


SCENARIOS = {
    function.__name__: function
    for function in (
        load_model,
        load_model_not_strict,
        save_what_was_loaded,
        assign_and_save_model,
        train_a_step,
        torch_load,
        distributed_checkpoint,
        hub_state_dict,
        load_bytes,
    )
}
EXPECTED_FALLBACKS: dict[str, dict[str, int]] = {}

if __name__ == "__main__":
    harness.main(sys.modules[__name__])
