"""timm: its own tiny models, loaded from files, folders and configurations as users do."""

import importlib.abc
import importlib.machinery
import shutil
import sys
import types

from consumers import harness


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """torchvision where there is none: timm binds names of it on import, and loads without it.
    (The one that PyPI has for this torch wants torch's CUDA build.)"""

    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass


class StandIn(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return AnyName(name, (), {})


class AnyName(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


def import_library():
    sys.meta_path.append(StandIns())  # asked last
    import timm
    import timm.models

    assert timm.create_model and timm.models.load_checkpoint


def prepare(folder):
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    for name in ("test_vit", "test_resnet"):
        model = timm.create_model(name, num_classes=7)
        timm.models.save_for_hf(model, folder / name, model_config={}, safe_serialization=True)
        assert (folder / name / "model.safetensors").exists()
    state = timm.create_model("test_resnet", num_classes=7).state_dict()
    save_file(
        {f"module.{name}": tensor for name, tensor in state.items()}, folder / "ddp.safetensors"
    )


def weights(folder, name):
    return str(folder / name / "model.safetensors")


def show(model):
    import torch

    model.eval()
    size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 160, 160))
    channels = 1 if getattr(model, "in_chans", 3) == 1 else size[0]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        output = model(torch.randn((1, channels, *size[1:]), generator=generator))
    outputs = output if isinstance(output, list) else [output]
    return {
        **harness.describe_model(model),
        "forward": [harness.digest_tensor(output) for output in outputs],
    }


def made(name, **options):
    import timm
    import torch

    torch.manual_seed(5)  # for what is not in the file
    return show(timm.create_model(name, **options))


def folder_by_name(folder):
    return made(f"local-dir:{folder / 'test_vit'}", pretrained=True)


def file_of_a_checkpoint(folder):
    return made("test_vit", num_classes=7, checkpoint_path=weights(folder, "test_vit"))


def file_in_the_configuration(folder):
    overlay = {"file": weights(folder, "test_resnet"), "num_classes": 7}
    return made("test_resnet", pretrained=True, pretrained_cfg_overlay=overlay)


def other_classes(folder):
    overlay = {"file": weights(folder, "test_vit"), "num_classes": 7}
    return made("test_vit", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)


def features(folder):
    overlay = {"file": weights(folder, "test_resnet"), "num_classes": 7}
    return made("test_resnet", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)


def loaded_into_a_model(folder):
    import timm

    model = timm.create_model("test_resnet", num_classes=7)
    timm.models.load_checkpoint(model, str(folder / "ddp.safetensors"))
    return show(model)


def state_dict_alone(folder):
    from timm.models import load_state_dict

    return harness.describe(load_state_dict(str(folder / "ddp.safetensors")))


def other_model(folder):
    import timm

    model = timm.create_model("test_vit", num_classes=7)
    path = weights(folder, "test_resnet")
    return harness.raised(lambda: timm.models.load_checkpoint(model, path), folder)


def saved_over_what_was_loaded(folder):
    import timm

    shutil.copytree(folder / "test_vit", "copy")
    model = timm.create_model("local-dir:copy", pretrained=True)
    model.head.weight.data.mul_(2)
    timm.models.save_for_hf(model, "copy", model_config={}, safe_serialization=True)
    again = timm.create_model("local-dir:copy", pretrained=True)
    return [show(model), show(again), harness.digest_folder("copy")]


SCENARIOS = {
    function.__name__: function
    for function in (
        folder_by_name,
        file_of_a_checkpoint,
        file_in_the_configuration,
        other_classes,
        features,
        loaded_into_a_model,
        state_dict_alone,
        other_model,
        saved_over_what_was_loaded,
    )
}

if __name__ == "__main__":
    harness.main(sys.modules[__name__])
