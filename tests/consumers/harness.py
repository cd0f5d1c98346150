"""Runs the scenarios of one consumer of safetensors without us and with us, in one process's forks.

A consumer is a module with `import_library()`, `prepare(folder)`, `SCENARIOS` (name -> function of
the folder that returns something JSON can hold) and optionally `FILTERED` (name -> (filter,
function)). `python -m consumers.NAME FOLDER` runs it and writes FOLDER/results/MODE.json.

Modes:
    stock             nothing is patched
    after             the library is imported, then patch() is called
    before            patch() is called, then the library is imported
    poisoned-after    as after, and whatever stock would open or map raises
    poisoned-before   as before, the same
    filtered          the scenarios of FILTERED, each in a block with its filter

Scenarios that have to go to stock name the reasons, in `EXPECTED_FALLBACKS` (name -> {reason: n}),
and are left out of the poisoned modes.
"""

import hashlib
import json
import os
import sys
import traceback
from pathlib import Path

MODES = ["after", "before", "poisoned-after", "poisoned-before"]


def main(consumer):
    """Run all modes of a consumer module. Called by it when it is the program."""
    import torch  # noqa: F401 - once, for all forks

    folder = Path(sys.argv[1])
    (folder / "results").mkdir(parents=True)

    def without_us_first():
        consumer.import_library()
        consumer.prepare(folder)
        in_fork(lambda: run(consumer, folder, "stock"))
        in_fork(lambda: run(consumer, folder, "after"))
        in_fork(lambda: run(consumer, folder, "poisoned-after"))
        if hasattr(consumer, "FILTERED"):
            in_fork(lambda: run_filtered(consumer, folder))

    in_fork(without_us_first)

    import stx_patch

    for module in ("safetensors", "transformers", "sentence_transformers", "accelerate"):
        assert module not in sys.modules
    stx_patch.patch()
    consumer.import_library()
    in_fork(lambda: run(consumer, folder, "before"))
    in_fork(lambda: run(consumer, folder, "poisoned-before"))


def in_fork(function):
    """Call `function` in a child and wait for it; this process stays as it is."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if os.waitpid(child, 0)[1] != 0:
        sys.exit("a fork failed")


def run(consumer, folder, mode):
    import stx_patch

    if mode == "stock":
        assert not stx_patch.is_patched()
    else:
        stx_patch.patch()
    if mode.startswith("poisoned"):
        poison(folder)
    expected = getattr(consumer, "EXPECTED_FALLBACKS", {})
    results = {}
    for name, scenario in consumer.SCENARIOS.items():
        if not (mode.startswith("poisoned") and name in expected):
            results[name] = record(name, scenario, folder, mode)
    write(folder, mode, results)


def run_filtered(consumer, folder):
    import stx_patch

    results = {}
    for name, (tensor_filter, scenario) in consumer.FILTERED.items():
        with stx_patch.patched(tensor_filter):
            results[name] = record(name, scenario, folder, "filtered")
    write(folder, "filtered", results)


def record(name, scenario, folder, mode):
    """What one scenario returned or raised, and what we counted meanwhile."""
    import stx_patch

    work = folder / "work" / mode / name
    work.mkdir(parents=True)
    os.chdir(work)  # what a scenario saves, it saves here
    stx_patch.reset_stats()
    try:
        found = {"result": scenario(folder)}
    except Exception:
        found = {"error": traceback.format_exc()}
    stats = stx_patch.stats()
    counters = ("opens", "tensors_native", "tensors_stock", "keys_skipped", "fallbacks")
    return {**found, **{name: getattr(stats, name) for name in counters}}


def write(folder, mode, results):
    (folder / "results" / f"{mode}.json").write_text(json.dumps(results))


def poison(folder):
    """From here on stock can open no file and torch can map none."""
    import safetensors._safetensors_rust
    import torch

    import stx_patch

    def refuse(*arguments, **keywords):
        raise AssertionError("stock was asked to open a file")

    class Poisoned:
        __new__ = refuse

    native = safetensors._safetensors_rust.safe_open
    native.__new__ = refuse  # also for whoever holds the class from somewhere else
    assert stx_patch._stock.safe_open is native
    stx_patch._stock.safe_open = Poisoned
    torch.UntypedStorage.from_file = refuse
    some_file = next(folder.rglob("*.safetensors"))
    for opener in (native, stx_patch._stock.safe_open, torch.UntypedStorage.from_file):
        try:
            opener(str(some_file), "pt")
        except AssertionError:
            continue
        raise RuntimeError("the poison does not work")


# --- what scenarios return ---


def describe(tensors):
    """All there is to see of named tensors, so that two loads can be compared."""
    import torch

    first_with = {}
    described = {}
    for name, tensor in tensors.items():
        tensor_itself = tensor.detach()
        storage = tensor_itself.untyped_storage()
        place = (storage.data_ptr(), tensor_itself.storage_offset(), storage.nbytes())
        tied_to = first_with.setdefault(place, name) if tensor_itself.numel() else name
        described[name] = {
            "bytes": digest_tensor(tensor_itself),
            "dtype": str(tensor.dtype),
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "offset": tensor.storage_offset(),
            "storage_bytes": storage.nbytes(),
            "resizable": storage.resizable(),
            "device": str(tensor.device),
            "requires_grad": tensor.requires_grad,
            "is_leaf": tensor.is_leaf,
            "class": type(tensor).__name__,
            "tied_to": tied_to,
            "version": tensor_itself._version if not torch.is_inference(tensor) else None,
        }
    return described


def digest_tensor(tensor):
    """SHA-256 of a tensor's values, NaNs and all."""
    import torch

    if tensor.device.type == "meta":
        return "meta"
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(bytes(data.numpy())).hexdigest()


def describe_model(model):
    """Parameters and buffers; ties over both, and within modules that share."""
    named = dict(model.named_parameters(remove_duplicate=False))
    named |= dict(model.named_buffers(remove_duplicate=False))
    return {"tensors": describe(named), "training": model.training, "class": type(model).__name__}


def digest_folder(folder):
    """What is in each file below a folder, without the order of safetensors' metadata: it has none
    (its writer walks a hash map)."""
    folder = Path(folder)
    return {
        str(path.relative_to(folder)): digest_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def digest_file(path):
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return hashlib.sha256(data).hexdigest()
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    metadata = header.pop("__metadata__", None)
    return {
        "header_bytes": header_bytes,
        "entries": list(header.items()),
        "metadata": metadata,
        "data": hashlib.sha256(data[8 + header_bytes :]).hexdigest(),
    }
