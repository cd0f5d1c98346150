"""transformers: what is saved over what was loaded, training that goes on, and what goes wrong."""

import shutil
from pathlib import Path

from consumers import harness
from consumers.tiny import VOCABULARY
from consumers.transformers_loading import forward, load, load_run_save

CAUSAL = "AutoModelForCausalLM"
LABELED = "AutoModelForSequenceClassification"


def over_the_loaded_file(folder):
    """What was loaded stays what it was when its file is written anew under it."""
    shutil.copytree(folder / "llama", "copy")
    first, _ = load(CAUSAL, "copy")
    second, _ = load(CAUSAL, "copy")
    second.lm_head.weight.data.mul_(2)
    second.save_pretrained("copy")
    third, _ = load(CAUSAL, "copy")
    shown = [[harness.describe_model(model), forward(model)] for model in (first, second, third)]
    assert shown[0][1] != shown[1][1] == shown[2][1]
    return [*shown, harness.digest_folder("copy")]


def over_the_loaded_shards(folder):
    """Sharded anew: files of the old index vanish while their tensors are in use."""
    shutil.copytree(folder / "llama-sharded", "copy")
    first, _ = load(CAUSAL, "copy")
    before = forward(first)
    first.save_pretrained("copy", max_shard_size="40KB")
    second, shown = load(CAUSAL, "copy")
    assert forward(first) == forward(second) == before
    return [harness.describe_model(first), shown, harness.digest_folder("copy")]


def over_and_over(folder):
    shutil.copytree(folder / "llama", "copy")
    for _ in range(5):
        model, shown = load(CAUSAL, "copy")
        model.model.norm.weight.data.add_(1)
        model.save_pretrained("copy")
    return [shown, harness.digest_folder("copy")]


def part_of_a_folder(folder):
    (Path("whole") / "part").mkdir(parents=True)
    for file in (folder / "llama-bf16").iterdir():
        variant = file.name.replace("model.safetensors", "model.bf16.safetensors")
        shutil.copy(file, Path("whole", "part", variant))
    return load_run_save(CAUSAL, "whole", subfolder="part", variant="bf16")


def under_a_default_device(folder):
    """Loaded where all that is made without a device has the one of a block."""
    import torch

    with torch.device("cpu"):
        _, shown = load(CAUSAL, folder / "llama")
    with torch.device("meta"):
        return [shown, harness.raised(lambda: load(CAUSAL, folder / "llama"), folder)]


def mismatched_and_refused(folder):
    shutil.copytree(folder / "llama-labeled", "copy")
    return harness.raised(lambda: load(LABELED, "copy", num_labels=5), folder)


def mismatched_and_made_anew(folder):
    path = folder / "llama-labeled"
    return load_run_save(LABELED, path, num_labels=5, ignore_mismatched_sizes=True)


def a_shard_is_missing(folder):
    shutil.copytree(folder / "llama-sharded", "copy")
    sorted(Path("copy").glob("*.safetensors"))[1].unlink()
    return harness.raised(lambda: load(CAUSAL, "copy"), folder)


def a_file_is_cut(folder):
    shutil.copytree(folder / "llama", "copy")
    whole = Path("copy/model.safetensors").read_bytes()
    Path("copy/model.safetensors").write_bytes(whole[: len(whole) // 2])
    return harness.raised(lambda: load(CAUSAL, "copy"), folder)


def a_file_is_something_else(folder):
    shutil.copytree(folder / "llama", "copy")
    Path("copy/model.safetensors").write_bytes(b"<html>not found</html>" * 20)
    return harness.raised(lambda: load(CAUSAL, "copy"), folder)


def training_resumed(folder):
    """Two steps, a checkpoint, and two more in another Trainer that starts from it."""
    import transformers

    weights = []
    for steps, resume in ((2, None), (4, "trained/checkpoint-2")):
        transformers.set_seed(11)
        model, _ = load(CAUSAL, folder / "llama")
        arguments = transformers.TrainingArguments(
            "trained",
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=examples())
        taken = []
        trainer.add_callback(step_counter(taken))
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == steps and len(taken) == 2
        weights.append(harness.describe_model(model))
    assert weights[0] != weights[1]
    files = harness.digest_folder("trained")
    return [*weights, {name: file for name, file in files.items() if name.endswith(".safetensors")}]


def best_model_kept(folder):
    """Trainer loads the best of its checkpoints when it is done."""
    import transformers

    transformers.set_seed(12)
    model, _ = load(CAUSAL, folder / "llama-sharded")
    arguments = transformers.TrainingArguments(
        "trained",
        max_steps=3,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=1.0,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that the first is the best
        load_best_model_at_end=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    data = examples()
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data[:2])
    trainer.train()
    best = str(trainer.state.best_model_checkpoint)
    assert Path(best).name == "checkpoint-1" and trainer.state.global_step == 3
    return [Path(best).name, harness.describe_model(model), forward(model.eval())]


def step_counter(taken):
    """A callback of Trainer that notes each step."""
    import transformers

    class Counter(transformers.TrainerCallback):
        def on_step_end(self, arguments, state, control, **keywords):
            taken.append(state.global_step)

    return Counter()


def examples():
    import torch

    rows = torch.arange(64).reshape(8, 8) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in rows]


SCENARIOS = {
    function.__name__: function
    for function in (
        over_the_loaded_file,
        over_the_loaded_shards,
        over_and_over,
        part_of_a_folder,
        under_a_default_device,
        mismatched_and_refused,
        mismatched_and_made_anew,
        a_shard_is_missing,
        a_file_is_cut,
        a_file_is_something_else,
        training_resumed,
        best_model_kept,
    )
}
EXPECTED_FALLBACKS = {  # stock says what is wrong with a file
    "a_shard_is_missing": {"file refused (io)": 1},
    "a_file_is_cut": {"file refused (format)": 1},
    "a_file_is_something_else": {"file refused (format)": 1},
}
