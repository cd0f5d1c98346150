"""accelerate: checkpoints loaded into empty models, whole, by a device map, and off the disk."""

import sys

from consumers import harness


def import_library():
    import accelerate
    import accelerate.utils.modeling

    assert accelerate.load_checkpoint_and_dispatch


def make_model():
    import torch

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(16, 16)
            self.norm = torch.nn.LayerNorm(16)

        def forward(self, value):
            return self.norm(value + self.inner(value))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(11, 16)
            self.layers = torch.nn.ModuleList(Block() for _ in range(3))
            self.head = torch.nn.Linear(16, 11)

        def forward(self, tokens):
            value = self.embed(tokens)
            for layer in self.layers:
                value = layer(value)
            return self.head(value)

    return Model()


def prepare(folder):
    import torch
    from accelerate import Accelerator

    torch.manual_seed(0)
    model = make_model()
    Accelerator(cpu=True).save_model(model, str(folder / "one"))
    Accelerator(cpu=True).save_model(model, str(folder / "sharded"), max_shard_size="1KB")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 2


def empty_model():
    from accelerate import init_empty_weights

    with init_empty_weights():
        return make_model()


def forward(model):
    import torch

    with torch.no_grad():
        return harness.digest_tensor(model(torch.arange(11)))


def into_model(path, **options):
    from accelerate import load_checkpoint_in_model

    model = empty_model()
    load_checkpoint_in_model(model, str(path), **options)
    return {**harness.describe_model(model), "forward": forward(model)}


def one_file(folder):
    return into_model(folder / "one", device_map={"": "cpu"})


def sharded(folder):
    return into_model(folder / "sharded", device_map={"": "cpu"})


def map_of_modules(folder):
    return into_model(folder / "one", device_map={"embed": "cpu", "layers": "cpu", "head": "cpu"})


def cast(folder):
    import torch
    from accelerate import load_checkpoint_in_model

    model = empty_model()
    load_checkpoint_in_model(
        model, str(folder / "sharded"), device_map={"": "cpu"}, dtype=torch.float16
    )
    return harness.describe_model(model)


def into_real_model(folder):
    import torch
    from accelerate import load_checkpoint_in_model

    torch.manual_seed(1)
    model = make_model()
    load_checkpoint_in_model(model, str(folder / "one"))
    return {**harness.describe_model(model), "forward": forward(model)}


def dispatched_with_disk(folder):
    from accelerate import load_checkpoint_and_dispatch

    places = {"embed": "cpu", "layers.0": "cpu", "layers.1": "disk", "layers.2": "cpu"}
    model = load_checkpoint_and_dispatch(
        empty_model(),
        str(folder / "one"),
        device_map={**places, "head": "cpu"},
        offload_folder="offload",
    )
    return {**harness.describe_model(model), "forward": [forward(model), forward(model)]}


def saved_state(folder):
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(2)
    model = make_model()
    model.load_state_dict(accelerator_state(folder), strict=True)
    model = accelerator.prepare(model)
    accelerator.save_state("state")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state("state")
    return {**harness.describe_model(model), "forward": forward(model)}


def accelerator_state(folder):
    from accelerate.utils.modeling import load_state_dict

    return load_state_dict(str(folder / "one" / "model.safetensors"))


def by_state_dict(folder):
    from accelerate.utils.modeling import load_state_dict

    path = str(folder / "one" / "model.safetensors")
    return {
        "none": harness.describe(load_state_dict(path)),
        "one": harness.describe(load_state_dict(path, device_map={"": "cpu"})),
        "several": harness.describe(
            load_state_dict(path, device_map={"embed": "cpu", "layers": "cpu", "head": "disk"})
        ),
    }


SCENARIOS = {
    function.__name__: function
    for function in (
        one_file,
        sharded,
        map_of_modules,
        cast,
        into_real_model,
        dispatched_with_disk,
        saved_state,
        by_state_dict,
    )
}

if __name__ == "__main__":
    harness.main(sys.modules[__name__])
