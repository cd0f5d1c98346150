"""diffusers: tiny models and pipelines, loaded as users load them."""

import os
import sys

from consumers import harness


def import_library():
    import diffusers

    diffusers.logging.disable_progress_bar()
    assert diffusers.UNet2DConditionModel and diffusers.AutoencoderKL


def make_unet():
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
    )


def make_autoencoder():
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def prepare(folder):
    import diffusers
    import torch

    torch.manual_seed(0)
    unet = make_unet()
    unet.save_pretrained(folder / "unet")
    unet.save_pretrained(folder / "unet-sharded", max_shard_size="40KB")
    assert len(list((folder / "unet-sharded").glob("*.safetensors"))) > 2
    make_autoencoder().save_pretrained(folder / "autoencoder")
    plain = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    pipeline = diffusers.DDPMPipeline(unet=plain, scheduler=diffusers.DDPMScheduler())
    pipeline.save_pretrained(folder / "pipeline")


def load(path, kind="UNet2DConditionModel", **options):
    import diffusers
    import torch

    torch.manual_seed(7)
    return getattr(diffusers, kind).from_pretrained(path, **options)


def forward(model):
    import torch

    generator = torch.Generator().manual_seed(3)
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        output = model(
            torch.randn((1, 4, 8, 8), generator=generator).to(dtype),
            5,
            encoder_hidden_states=torch.randn((1, 3, 8), generator=generator).to(dtype),
        )
    return harness.digest_tensor(output.sample.float())


def load_run_save(path, **options):
    model = load(path, **options)
    shown = {**harness.describe_model(model), "forward": forward(model)}
    model.save_pretrained("saved")
    return {**shown, "files": harness.digest_folder("saved")}


def one_file(folder):
    return load_run_save(folder / "unet")


def sharded(folder):
    return load_run_save(folder / "unet-sharded")


def into_real_memory(folder):
    return load_run_save(folder / "unet", low_cpu_mem_usage=False)


def cast(folder):
    import torch

    return load_run_save(folder / "unet", torch_dtype=torch.bfloat16)


def without_mmap(folder):
    return load_run_save(folder / "unet", disable_mmap=True)


def with_a_device_map(folder):
    return load_run_save(folder / "unet-sharded", device_map={"": "cpu"})


def loaded_in_parallel(folder):
    os.environ["HF_ENABLE_PARALLEL_LOADING"] = "1"
    try:
        return load_run_save(folder / "unet-sharded", device_map={"": "cpu"})
    finally:
        del os.environ["HF_ENABLE_PARALLEL_LOADING"]


def autoencoder(folder):
    import torch

    model = load(folder / "autoencoder", "AutoencoderKL")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        output = model(torch.randn((1, 3, 16, 16), generator=generator)).sample
    return {**harness.describe_model(model), "forward": harness.digest_tensor(output)}


def pipeline(folder):
    import diffusers
    import torch

    whole = diffusers.DDPMPipeline.from_pretrained(folder / "pipeline")
    whole.set_progress_bar_config(disable=True)
    images = whole(
        generator=torch.Generator().manual_seed(1), num_inference_steps=2, output_type="np"
    ).images
    whole.save_pretrained("saved")
    return {
        **harness.describe_model(whole.unet),
        "images": harness.digest_tensor(torch.from_numpy(images)),
        "files": harness.digest_folder("saved"),
    }


def single_state_dict(folder):
    from diffusers.models.model_loading_utils import load_state_dict

    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    return harness.describe(load_state_dict(str(path)))


def mismatched(folder):
    try:
        load(folder / "unet", cross_attention_dim=12)
    except Exception as error:
        return [type(error).__name__, str(error).replace(str(folder), "")]
    return "loaded"


SCENARIOS = {
    function.__name__: function
    for function in (
        one_file,
        sharded,
        into_real_memory,
        cast,
        without_mmap,
        with_a_device_map,
        loaded_in_parallel,
        autoencoder,
        pipeline,
        single_state_dict,
        mismatched,
    )
}

if __name__ == "__main__":
    harness.main(sys.modules[__name__])
