"""The eight teachers' networks without their files: configurations, random weights and
conditions."""

import inspect
import tempfile
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import sid_fm

SD3, FLUX, SANA = "StableDiffusion3Pipeline", "FluxPipeline", "SanaPipeline"
CLASSES = {SD3: "SD3Transformer2DModel", FLUX: "FluxTransformer2DModel", SANA: "SanaTransformer2DModel"}
SD35_MEDIUM = {"qk_norm": "rms_norm", "pos_embed_max_size": 384, "dual_attention_layers": list(range(13))}
SD35_LARGE = {"qk_norm": "rms_norm", "num_layers": 38, "num_attention_heads": 38}
SANA_06B = {"num_layers": 28, "num_attention_heads": 36, "num_cross_attention_heads": 16}
SPRINT = {"qk_norm": "rms_norm_across_heads", "timestep_scale": 0.001, "sample_size": 32}
TEACHERS = {  # the pipeline of each name, and what its network changes of the defaults
    "sd3-medium": (SD3, {}),
    "sd3.5-medium": (SD3, SD35_MEDIUM),
    "sd3.5-large": (SD3, SD35_LARGE),
    "flux-dev": (FLUX, {"guidance_embeds": True}),
    "sana-0.6b": (SANA, SANA_06B | {"sample_size": 16}),
    "sana-1.6b": (SANA, {"sample_size": 16}),
    "sana-sprint-0.6b": (SANA, SANA_06B | SPRINT),
    "sana-sprint-1.6b": (SANA, SPRINT),
}


def network_config(pipeline: str, network: dict) -> dict:
    """The config.json of a network as diffusers writes it. network: the keys that differ from the
    defaults."""
    kind = sid_fm.PIPELINES[pipeline][1]
    defaults = {key: p.default for key, p in inspect.signature(kind).parameters.items()}
    config = {"_class_name": CLASSES[pipeline]} | defaults | network
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    if pipeline == SD3:
        config |= {"caption_projection_dim": dim, "out_channels": config["in_channels"]}
    elif pipeline == SANA:
        heads = config["num_cross_attention_heads"]
        config |= {"cross_attention_dim": dim, "cross_attention_head_dim": dim // heads}
    return config


def random_network(kind: type[nn.Module], config: dict, device: str, dtype: torch.dtype) -> nn.Module:
    """A network with torch's random weights, frozen. They are made on the device, in the dtype
    asked for."""
    with torch.device("meta"):
        net = sid_fm.build_network(kind, config).to(dtype)
    net = net.to_empty(device=device)
    here = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(here):
        torch.manual_seed(0)
        for x in (*net.parameters(), *net.buffers()):
            x.normal_(0, 0.02)
        for module in net.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif isinstance(module, sid_fm.RMSNorm):
                module.weight.fill_(1)
    return net.eval().requires_grad_(False)


def random_conditions(config: dict, prompts: list[str], tokens: int) -> dict[str, Tensor]:
    """What stands for the conditions of prompts: normal noise, the same for the same prompt."""
    width = config.get("caption_channels") or config["joint_attention_dim"]
    shapes = {"text": (tokens, width)}
    if "pooled_projection_dim" in config:
        shapes["pooled"] = (config["pooled_projection_dim"],)
    rows = []
    for prompt in prompts:
        rng = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        rows.append({key: torch.randn(shape, generator=rng) for key, shape in shapes.items()})
    cond = {key: torch.stack([row[key] for row in rows]) for key in shapes}
    if "caption_channels" in config:
        cond["mask"] = torch.ones(len(prompts), tokens, dtype=torch.int64)
    return cond


def saved_weights(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A network's weights with adapters merged, and its adapters, as save_student writes them. All
    processes call it, and the first gets them."""
    with tempfile.TemporaryDirectory() as folder:
        sid_fm.save_student(net, None, folder)
        files = (Path(folder, f"{name}.safetensors") for name in ("diffusion_pytorch_model", "pytorch_lora_weights"))
        weights, adapters = (load_file(file) if file.exists() else {} for file in files)
        return weights, adapters
