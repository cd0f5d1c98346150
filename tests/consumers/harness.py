"""Runs the scenarios of one consumer of safetensors without us and with us, in one process's forks.

A consumer is a module with `import_library()`, `prepare(folder)`, `SCENARIOS` (name -> function of
the folder that returns something JSON can hold) and optionally `FILTERED` (name -> (filter,
function)). `python -m consumers.NAME FOLDER` runs it and writes FOLDER/results/MODE.json;
with a number of rounds behind it, it only takes times, of `TIMED` where it has that, for
FOLDER/results/seconds.json.

Modes:
    stock             nothing is patched
    after             the library is imported, then patch() is called
    before            patch() is called, then the library is imported
    inside            the library is imported, then each scenario has a block of patched()
    poisoned-after    as after, and whatever stock would open or map raises
    poisoned-before   as before, the same
    poisoned-inside   as inside, the same
    filtered          the scenarios of FILTERED, each in a block with its filter

Scenarios that have to go to stock name the reasons, in `EXPECTED_FALLBACKS` (name -> {reason: n}),
and are left out of the poisoned modes.
"""

import contextlib
import hashlib
import json
import logging
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

MODES = [
    *("after", "before", "inside"),
    *("poisoned-after", "poisoned-before", "poisoned-inside"),
]
LOGGERS = ("transformers", "diffusers", "accelerate", "peft", "timm", "sentence_transformers")


def main(consumer):
    """Run all modes of a consumer module. Called by it when it is the program."""
    import torch  # noqa: F401 - once, for all forks

    folder = Path(sys.argv[1]).resolve()
    (folder / "results").mkdir(parents=True)

    def only_times():
        consumer.import_library()
        in_fork(lambda: consumer.prepare(folder))
        take_times(consumer, folder, int(sys.argv[2]))

    if len(sys.argv) > 2:
        in_fork(only_times)
        return

    def without_us_first():
        consumer.import_library()
        in_fork(lambda: consumer.prepare(folder))  # what warns once has to do so in every mode
        for mode in ("stock", "after", "inside", "poisoned-after", "poisoned-inside"):
            in_fork(lambda mode=mode: run(consumer, folder, mode))
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
        leave_with(function)
    if os.waitpid(child, 0)[1] != 0:
        sys.exit("a fork failed")


def leave_with(function):
    """A child's whole life: call `function`, then leave without what its parent does at exit."""
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


def run(consumer, folder, mode):
    import stx_patch

    if mode not in ("stock", "inside", "poisoned-inside"):
        stx_patch.patch()
    block = stx_patch.patched if mode.endswith("inside") else contextlib.nullcontext
    outside = mode in MODES and not mode.endswith("inside")
    poison = poisoned(folder) if mode.startswith("poisoned") else contextlib.nullcontext
    expected = getattr(consumer, "EXPECTED_FALLBACKS", {})
    results = {}
    for name, scenario in consumer.SCENARIOS.items():
        if mode.startswith("poisoned") and name in expected:
            continue
        assert stx_patch.is_patched() is outside
        with block(), poison():  # in this order: what is put in place is stock's
            results[name] = record(name, scenario, folder, mode)
    write(folder, mode, results)


def run_filtered(consumer, folder):
    import stx_patch

    results = {}
    for name, (tensor_filter, scenario) in consumer.FILTERED.items():
        with stx_patch.patched(tensor_filter):
            results[name] = record(name, scenario, folder, "filtered")
    write(folder, "filtered", results)


def take_times(consumer, folder, rounds):
    """Seconds of each scenario, round by round: by stock, by stock again, and patched."""
    import stx_patch

    sides = {
        "stock": contextlib.nullcontext,
        "stock again": contextlib.nullcontext,
        "ours": stx_patch.patched,
    }
    scenarios = getattr(consumer, "TIMED", consumer.SCENARIOS)
    seconds = {name: {side: [] for side in sides} for name in scenarios}
    for name, scenario in scenarios.items():
        for number in range(-1, rounds):  # the first is not counted
            order = list(sides)
            for side in order[number % 3 :] + order[: number % 3]:
                with sides[side]():
                    begin = time.perf_counter()
                    outcome = record(name, scenario, folder, f"{side} {number}")
                    taken = time.perf_counter() - begin
                if "error" in outcome:
                    raise RuntimeError(f"{name}, {side}: {outcome['error']}")
                if bool(outcome["opens"] + outcome["tensors_native"]) != (side == "ours"):
                    raise RuntimeError(f"{name}, {side}: served by the wrong one")
                if number >= 0:
                    seconds[name][side].append(taken)
    write(folder, "seconds", seconds)


def record(name, scenario, folder, mode):
    """What one scenario returned or raised, and what we counted meanwhile."""
    import stx_patch

    work = folder / "work" / mode / name
    work.mkdir(parents=True)
    os.chdir(work)  # what a scenario saves, it saves here
    stx_patch.reset_stats()
    with said() as lines:
        try:
            found = {"result": scenario(folder)}
        except Exception:
            found = {"error": traceback.format_exc()}
    places = ((str(work), "WORK"), (str(folder), "FOLDER"))
    found["said"] = [shorten(line, places) for line in lines]
    stats = stx_patch.stats()
    counters = ("opens", "tensors_native", "tensors_stock", "keys_skipped", "fallbacks")
    return {**found, **{name: getattr(stats, name) for name in counters}}


@contextlib.contextmanager
def said():
    """What the libraries warn of and log at that level meanwhile: a list, in order."""
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(f"{record.name}: {record.getMessage()}")
    loggers = [logging.getLogger(name) for name in LOGGERS]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ResourceWarning)  # comes when garbage is collected
        warnings.showwarning = lambda message, category, *place: lines.append(
            f"{category.__name__}: {message}"
        )
        for logger in loggers:
            logger.addHandler(handler)
        try:
            yield lines
        finally:
            for logger in loggers:
                logger.removeHandler(handler)


def shorten(text, places):
    for path, name in places:
        text = text.replace(path, name)
    return text


def raised(function, folder):
    """The exception that a call raises: its type and text, without the names of folders."""
    try:
        function()
    except Exception as error:
        places = ((os.getcwd(), "WORK"), (str(folder), "FOLDER"))
        return [type(error).__module__, type(error).__name__, shorten(str(error), places)]
    raise AssertionError("nothing was raised")


def write(folder, mode, results):
    (folder / "results" / f"{mode}.json").write_text(json.dumps(results))


def poisoned(folder):
    """A block, as a function: inside, stock can open no file and torch can map none. Outside stock
    is what our patch finds again, and its class stays unusable: Python does not undo that."""
    import safetensors._safetensors_rust
    import torch

    import stx_patch

    def refuse(*arguments, **keywords):
        raise AssertionError("stock was asked to open a file")

    class Poisoned:
        __new__ = refuse

    native = safetensors._safetensors_rust.safe_open
    some_file = next(folder.rglob("*.safetensors"))

    @contextlib.contextmanager
    def block():
        from_file = torch.UntypedStorage.from_file
        assert stx_patch._stock.safe_open is native
        native.__new__ = refuse  # also for whoever holds the class from somewhere else
        stx_patch._stock.safe_open = Poisoned
        torch.UntypedStorage.from_file = refuse
        try:
            for opener in (native, stx_patch._stock.safe_open, torch.UntypedStorage.from_file):
                try:
                    opener(str(some_file), "pt")
                except AssertionError:
                    continue
                raise RuntimeError("the poison does not work")
            yield
        finally:
            stx_patch._stock.safe_open = native
            torch.UntypedStorage.from_file = from_file

    return block


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
