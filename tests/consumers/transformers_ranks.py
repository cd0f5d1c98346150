"""transformers: a model divided over two processes that speak gloo to each other."""

import datetime
import json
import os
import warnings
from pathlib import Path

from consumers import harness
from consumers.transformers_loading import forward, load_run_save

RANKS = 2


def tensor_parallel(folder):
    return divided_and_whole(folder / "llama", tp_size=RANKS)


def tensor_parallel_sharded(folder):
    return divided_and_whole(folder / "llama-sharded", tp_size=RANKS)


def tensor_parallel_experts(folder):
    return divided_and_whole(folder / "mixtral", tp_size=RANKS)


def expert_parallel(folder):
    return divided_and_whole(folder / "mixtral", tp_size=RANKS, ep_size=RANKS)


def divided_and_whole(path, **sizes):
    whole = load_run_save("AutoModelForCausalLM", path)
    return [in_ranks(lambda: divided(path, sizes)), whole]


def divided(path, sizes):
    """What one rank has of a model, and what all compute together."""
    import transformers
    from transformers.distributed import DistributedConfig

    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, distributed_config=DistributedConfig(**sizes)
    ).eval()
    local = {}
    for name, parameter in model.named_parameters():
        local[name] = getattr(parameter.detach(), "_local_tensor", parameter)
    shapes = [parameter.shape for parameter in model.parameters()]
    assert [part.shape for part in local.values()] != shapes
    return {"tensors": harness.describe(local), "forward": forward(model)}


def in_ranks(function):
    """What `function` returns in each rank: forks of this process, patched as it is."""
    import stx_patch

    children = []
    for rank in range(RANKS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads that linger
            child = os.fork()
        if child == 0:
            harness.leave_with(lambda rank=rank: run_rank(rank, function))
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    assert codes == [0] * RANKS, f"ranks ended with {codes}"
    found = [json.loads(Path(f"rank-{rank}.json").read_text()) for rank in range(RANKS)]
    is_native = stx_patch.is_patched()
    for rank in found:
        served = rank.pop("served")
        assert (served["opens"] > 0) is is_native and not served["fallbacks"], served
        assert served["tensors_stock"] == 0, served
    return found


def run_rank(rank, function):
    import torch.distributed

    import stx_patch

    torch.set_num_threads(1)  # those of the parent are not here
    torch._C._get_accelerator = lambda *arguments: torch.device(
        "cpu"
    )  # whatever torch was built for
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    store = f"file://{os.getcwd()}/rendezvous"
    torch.distributed.init_process_group(
        "gloo", store, rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=60)
    )
    stx_patch.reset_stats()
    shown = function()
    stats = stx_patch.stats()
    shown["served"] = {
        name: getattr(stats, name) for name in ("opens", "tensors_stock", "fallbacks")
    }
    Path(f"rank-{rank}.json").write_text(json.dumps(shown))
    torch.distributed.destroy_process_group()


SCENARIOS = {
    function.__name__: function
    for function in (
        tensor_parallel,
        tensor_parallel_sharded,
        tensor_parallel_experts,
        expert_parallel,
    )
}
