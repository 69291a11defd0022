"""diffusers as the tests' oracle: its networks and pipelines with this project's face, and how the
two are compared."""

import gc
import inspect
import re
from collections import Counter
from pathlib import Path

import diffusers
import torch
from networks import CLASSES, SANA, SD3
from safetensors import safe_open
from torch import Tensor, nn

import sid_fm

NETWORKS = {  # of each family
    "sd3": diffusers.SD3Transformer2DModel,
    "flux": diffusers.FluxTransformer2DModel,
    "sana": diffusers.SanaTransformer2DModel,
}
VARIANT = r"\b(fp16|bf16)\b"  # in a file's name


def error(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value of b, which is the oracle's."""
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def parts_of(folder: Path) -> dict[str, str]:
    """The classes of a pipeline's parts, by the names of their folders."""
    index = sid_fm.read_json(folder / "model_index.json")
    return {name: kind[1] for name, kind in index.items() if isinstance(kind, list) and kind[0]}


def has_weights(part: str) -> bool:
    """Whether a part is a network."""
    return part.startswith(("text_encoder", "transformer", "vae"))


def weights_of(folder: Path) -> list[Path]:
    """The safetensors of a part that are read."""
    return sid_fm.weight_files(folder, "model" if folder.name.startswith("text") else "diffusion_pytorch_model")


def tensors_of(folder: Path) -> Counter:
    """(name, shape) of the tensors in these files, and how often each is there. No number is read."""
    found: Counter = Counter()
    for file in weights_of(folder):
        with safe_open(file, "pt") as opened:
            found.update((name, tuple(opened.get_slice(name).get_shape())) for name in opened.keys())  # noqa: SIM118
    return found


def not_used_once(folder: Path, part: str, oracle: Path) -> int:
    """How many of a part's tensors are not exactly once in its files, here, and in diffusers (for
    the text encoders: in transformers). Raises for a configuration that is not understood."""
    pipeline = sid_fm.read_json(folder / "model_index.json")["_class_name"]
    family, network, autoencoder, _ = sid_fm.PIPELINES[pipeline]
    if part == "scheduler":
        sid_fm.read_scheduler(folder, pipeline)
    if part.startswith(("tokenizer", "text_encoder")):
        sid_fm.check_text(folder, family)
    if not has_weights(part):
        return 0
    counts, kind = [tensors_of(folder / part)], parts_of(oracle)[part]
    if part.startswith("text_encoder"):
        variant = re.search(VARIANT, weights_of(folder / part)[0].name)
        options = {"use_safetensors": True, "output_loading_info": True, "device_map": "meta"}
        _, report = sid_fm.from_pretrained(kind, folder / part, variant=variant and variant[0], **options)
        differing = report["missing_keys"] | report["unexpected_keys"] | report["mismatched_keys"]
        return len(differing) + sum(times > 1 for times in counts[0].values())
    with torch.device("meta"):
        config = sid_fm.read_json(folder / part / "config.json")
        ours = sid_fm.build_network(network if part == "transformer" else autoencoder, config)
        its = getattr(diffusers, kind).from_config(sid_fm.read_json(oracle / part / "config.json"))
    counts += [Counter((name, tuple(x.shape)) for name, x in net.state_dict().items()) for net in (ours, its)]
    return sum(any(count[tensor] != 1 for count in counts) for tensor in set().union(*counts))


# ----------------------------------------------------------------------------------------------------------------------
# Parts of a pipeline
# ----------------------------------------------------------------------------------------------------------------------


class OnDiffusers(nn.Module):
    """A network of diffusers with the face v = net(x_t, t, cond): what its pipeline does around
    it."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x_t: Tensor, t: Tensor, cond: dict, features: bool = False):
        seen = []
        if features:
            hook = self.net.proj_out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        kind, config, dtype = type(self.net).__name__, self.net.config, self.net.proj_out.weight.dtype
        x, text = x_t.to(dtype), cond["text"].to(dtype)
        if kind == CLASSES[SD3]:
            v = self.net(x, text, cond["pooled"].to(dtype), 1000 * t).sample
        elif kind == CLASSES[SANA]:
            time, guidance = 1000 * config.timestep_scale * t, None
            if config.guidance_embeds:  # a student of Sprint
                time, guidance = t, config.guidance_embeds_scale * cond["guidance"]
            v = self.net(x, text, time, guidance=guidance, encoder_attention_mask=cond["mask"]).sample
        else:
            (b, c, h, w), pipeline = x.shape, diffusers.FluxPipeline
            ids = pipeline._prepare_latent_image_ids(b, h // 2, w // 2, x.device, x.dtype)
            packed, text_ids = pipeline._pack_latents(x, b, c, h, w), x.new_zeros(text.shape[1], 3)
            v = self.net(packed, text, cond["pooled"].to(dtype), t, ids, text_ids, cond["guidance"]).sample
            v = pipeline._unpack_latents(v, 8 * h, 8 * w, 8)
        v = v.to(x_t.dtype)
        if not features:
            return v
        hook.remove()
        return v, sid_fm.widen(seen[0]).mean(1)


@torch.no_grad()
def encode_prompt(
    pipeline, prompts: list[str], instruction: list[str] | None = None, **options: object
) -> dict[str, Tensor]:
    """What the pipeline itself encodes, as this project's cond. SANA's takes the empty prompt as a
    negative one, which goes bare. instruction: the lines before SANA's prompts."""
    if isinstance(pipeline, diffusers.StableDiffusion3Pipeline):
        text, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False, **options)
        return {"text": text, "pooled": pooled}
    if isinstance(pipeline, diffusers.FluxPipeline):
        text, pooled, _ = pipeline.encode_prompt(prompts, **options)
        return {"text": text, "pooled": pooled}
    if isinstance(pipeline, diffusers.SanaSprintPipeline):
        text, mask = pipeline.encode_prompt(prompts, complex_human_instruction=instruction, **options)
        return {"text": text, "mask": mask}
    text, mask, bare, bare_mask = pipeline.encode_prompt(prompts, complex_human_instruction=instruction, **options)
    empty = torch.tensor([not prompt.strip() for prompt in prompts], device=mask.device)
    text, mask = torch.where(empty[:, None, None], bare, text), torch.where(empty[:, None], bare_mask, mask)
    return {"text": text, "mask": mask}


def vae_encode(vae: nn.Module, images: Tensor) -> Tensor:
    """The mode of the latents, before shift and scale."""
    out = vae.encode(images)
    return out.latent if hasattr(out, "latent") else out.latent_dist.mode()


def vae_decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """Images of latents as the autoencoder has them."""
    return vae.decode(latents).sample


def to_latents(vae: nn.Module, z: Tensor) -> Tensor:
    """The autoencoder's latents as the losses see them: shifted and scaled."""
    return (z - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor


def from_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    """The inverse of to_latents."""
    return latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------------------------


def as_euler(scheduler):
    """The scheduler that this project's sampler is held against: for SANA's DPM-Solver++ it is
    Euler's method with the same shift."""
    if isinstance(scheduler, diffusers.DPMSolverMultistepScheduler):
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=scheduler.config.flow_shift)
    return scheduler


def sampling_options(pipeline, z: Tensor, steps: int, rng: torch.Generator | None = None) -> dict:
    """The options with which a pipeline samples from the noise z, [B, C, h, w]."""
    height, width = (pipeline.vae_scale_factor * n for n in z.shape[-2:])
    options = {"height": height, "width": width, "num_inference_steps": steps, "latents": z}
    if isinstance(pipeline, diffusers.FluxPipeline):
        options["latents"] = pipeline._pack_latents(z, *z.shape)
    elif isinstance(pipeline, diffusers.SanaSprintPipeline):
        options |= {"intermediate_timesteps": 1.3 if steps == 2 else None, "generator": rng}
    if "Sana" in type(pipeline).__name__:
        options["use_resolution_binning"] = False
    return options


def scheduler_times(scheduler, steps: int, tokens: int) -> Tensor:
    """The times at which a pipeline's scheduler steps, on the Rectified Flow path, with the final
    0. tokens: of the image, for dynamic shifting."""
    if isinstance(scheduler, diffusers.SCMScheduler):
        scheduler.set_timesteps(steps, max_timesteps=1.5708, intermediate_timesteps=1.3 if steps == 2 else None)
        u = scheduler.timesteps
        return u.sin() / (u.sin() + u.cos())
    config = scheduler.config
    if config.use_dynamic_shifting:  # FLUX
        limits = config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        mu = diffusers.pipelines.flux.pipeline_flux.calculate_shift(tokens, *limits)
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=mu)
    else:
        scheduler.set_timesteps(steps)
    return scheduler.sigmas


class Oracle:
    """A pipeline's folder with the face of sid_fm.Teacher, by diffusers. It holds the text
    encoders, or a network, or the autoencoder: what is used next takes the others' place."""

    def __init__(self, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32):
        diffusers.logging.set_verbosity_error(), diffusers.logging.disable_progress_bar()
        self.folder, self.device, self.dtype, self.parts = folder, device, dtype, parts_of(folder)
        scheduler = getattr(diffusers, self.parts["scheduler"])
        self.scheduler = as_euler(scheduler.from_pretrained(folder, subfolder="scheduler"))
        self.pipeline = self.held = None

    def forget(self) -> None:
        """Frees the memory of what is held."""
        self.pipeline = self.held = None
        gc.collect()
        torch.cuda.empty_cache()

    forget_text = forget

    def hold(self, *names: str):
        """The pipeline with its scheduler and the parts whose names begin so, and no others."""
        if self.held != names:
            if self.held:
                self.forget()
            others = {part: None for part in self.parts if not part.startswith((*names, "scheduler"))}
            loaded = [part for part in self.parts if has_weights(part) and part not in others]
            variant = re.search(VARIANT, " ".join(weights_of(self.folder / part)[0].name for part in loaded))
            options = {"dtype": self.dtype, "variant": variant and variant[0], **others}
            pipeline = diffusers.DiffusionPipeline.from_pretrained(self.folder, **options).to(self.device)
            pipeline.set_progress_bar_config(disable=True)
            pipeline.scheduler = self.scheduler
            self.pipeline, self.held = pipeline, names
        return self.pipeline

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Prompts to cond."""
        pipeline = self.hold("text_encoder", "tokenizer")
        call = inspect.signature(type(pipeline).__call__).parameters
        instruction = call["complex_human_instruction"].default if "complex_human_instruction" in call else None
        return encode_prompt(pipeline, prompts, instruction, device=self.device)

    @property
    def dit(self) -> nn.Module:
        """v = net(x_t, t, cond)"""
        return OnDiffusers(self.hold("transformer").transformer)

    def student(self, folder_or_hub_id: str) -> nn.Module:
        """A network of the same class from another folder or repository, with the same face."""
        self.forget()
        folder = sid_fm.resolve(folder_or_hub_id, sid_fm.NETWORK)
        folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
        kind = getattr(diffusers, self.parts["transformer"])
        return OnDiffusers(kind.from_pretrained(folder, dtype=self.dtype).to(self.device))

    def times(self, steps: int, size: tuple[int, int]) -> Tensor:
        """The scheduler's times, for images of this (height, width)."""
        return scheduler_times(self.scheduler, steps, size[0] // 16 * (size[1] // 16))

    def sample(self, z: Tensor, cond: dict, uncond: dict | None, steps: int, guidance: float, rng=None) -> Tensor:
        """The pipeline's own sampling, from conditions to latents. Without uncond, the guidance is
        embedded, and the pipeline's default."""
        pipeline, options = self.hold("transformer"), {}
        names = {"text": "prompt_embeds", "pooled": "pooled_prompt_embeds", "mask": "prompt_attention_mask"}
        for start, c in (("", cond), ("negative_", uncond or {})):
            options |= {start + names[key]: x.expand(len(z), *x.shape[1:]) for key, x in c.items()}
        if uncond:
            options |= {"guidance_scale": guidance, "negative_prompt": None}
        options |= sampling_options(pipeline, z, steps, rng)
        x = pipeline(**options, output_type="latent").images
        if isinstance(pipeline, diffusers.FluxPipeline):
            x = pipeline._unpack_latents(x, options["height"], options["width"], pipeline.vae_scale_factor)
        return x

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] to latents as the losses see them."""
        vae = self.hold("vae").vae
        return sid_fm.widen(to_latents(vae, vae_encode(vae, images.to(vae.device, vae.dtype))))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images in about [-1, 1], one at a time."""
        vae = self.hold("vae").vae
        z = from_latents(vae, latents).to(vae.dtype)
        return torch.cat([sid_fm.widen(vae_decode(vae, one)) for one in z.split(1)])
