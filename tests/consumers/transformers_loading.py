"""What the scenarios of transformers do with a model: load it, run it, save it, show it."""

from consumers import harness
from consumers.tiny import VOCABULARY


def load(auto_class, path, **options):
    """The model, and all that loading it shows."""
    import torch
    import transformers

    torch.manual_seed(7)  # for what is not in the file
    model, loading = getattr(transformers, auto_class).from_pretrained(
        path, output_loading_info=True, **options
    )
    model.eval()
    return model, {
        **harness.describe_model(model),
        "loading": {name: sorted(map(str, found)) for name, found in loading.items() if found},
        "device_map": {str(k): str(v) for k, v in getattr(model, "hf_device_map", {}).items()},
    }


def forward(model):
    import torch

    with torch.no_grad():
        output = model(input_ids=torch.arange(10).reshape(2, 5) % VOCABULARY)
    return harness.digest_tensor(output[0].float())


def load_run_save(auto_class, path, **options):
    model, shown = load(auto_class, path, **options)
    shown["forward"] = forward(model)
    model.save_pretrained("saved")
    shown["files"] = harness.digest_folder("saved")
    return shown
