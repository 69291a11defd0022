"""Kinds of trouble, by the rules that they show: no silent wrong result, nothing trained is lost,
and what can't be is refused in one line."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sid_fm

SCRIPT = Path(sid_fm.__file__)
WEIGHTS = "diffusion_pytorch_model.safetensors"
GONE = object()


def edit(file: Path, **changes) -> None:
    """Sets keys of a JSON file, or takes out those that are GONE."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: x for key, x in content.items() if x is not GONE}))


def retensor(file: Path, change) -> None:
    weights = {key: x.clone() for key, x in load_file(file).items()}
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# ----------------------------------------------------------------------------------------------------------------------
# A key of a configuration that changes the result is either read or refused
# ----------------------------------------------------------------------------------------------------------------------

# Configurations as public projects quote them.
# fmt: off
FLUX = {"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.30.0.dev0", "attention_head_dim": 128,
        "_name_or_path": "../checkpoints/flux-dev/transformer", "guidance_embeds": True, "in_channels": 64,
        "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38,
        "patch_size": 1, "pooled_projection_dim": 768}
SD3 = {"_class_name": "SD3Transformer2DModel", "_diffusers_version": "0.29.0.dev0", "attention_head_dim": 64,
       "caption_projection_dim": 1536, "in_channels": 16, "joint_attention_dim": 4096, "num_attention_heads": 24,
       "num_layers": 24, "out_channels": 16, "patch_size": 2, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
       "sample_size": 128}
MEDIUM = SD3 | {"dual_attention_layers": [*range(13)], "pos_embed_max_size": 384, "qk_norm": "rms_norm"}
LARGE = SD3 | {"caption_projection_dim": 2432, "dual_attention_layers": [], "num_attention_heads": 38,
               "num_layers": 38, "qk_norm": "rms_norm"}
SANA = {"_class_name": "SanaTransformer2DModel", "attention_bias": False, "attention_head_dim": 32,
        "caption_channels": 2304, "cross_attention_dim": 1152, "cross_attention_head_dim": 72, "dropout": 0.0,
        "in_channels": 32, "mlp_ratio": 2.5, "norm_elementwise_affine": False, "norm_eps": 1e-06,
        "num_attention_heads": 36, "num_cross_attention_heads": 16, "num_layers": 28, "out_channels": 32,
        "patch_size": 1, "sample_size": 32}
SANA_15 = SANA | {"cross_attention_dim": 2240, "cross_attention_head_dim": 112, "guidance_embeds": False,
                  "guidance_embeds_scale": 0.1, "interpolation_scale": None, "num_attention_heads": 70,
                  "num_cross_attention_heads": 20, "num_layers": 20, "qk_norm": "rms_norm_across_heads",
                  "timestep_scale": 1.0}
KL = {"_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
      "down_block_types": ["DownEncoderBlock2D"] * 4, "force_upcast": True, "in_channels": 3, "latent_channels": 16,
      "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 1024, "scaling_factor": 1.5305,
      "shift_factor": 0.0609, "up_block_types": ["UpDecoderBlock2D"] * 4, "use_post_quant_conv": False,
      "use_quant_conv": False}
DC_BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
DC = {"_class_name": "AutoencoderDC", "attention_head_dim": 32, "decoder_act_fns": "silu",
      "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024], "decoder_block_types": DC_BLOCKS,
      "decoder_layers_per_block": [3] * 6, "decoder_norm_types": "rms_norm",
      "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]], "downsample_block_type": "Conv",
      "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024], "encoder_block_types": DC_BLOCKS,
      "encoder_layers_per_block": [2, 2, 2, 3, 3, 3], "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
      "in_channels": 3, "latent_channels": 32, "scaling_factor": 0.41407, "upsample_block_type": "interpolate"}
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
DYNAMIC = EULER | {"base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15,
                   "use_dynamic_shifting": True}
DPM = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "beta_end": 0.02,
       "beta_schedule": "linear", "beta_start": 0.0001, "dynamic_thresholding_ratio": 0.995, "euler_at_final": False,
       "final_sigmas_type": "zero", "flow_shift": 3.0, "lambda_min_clipped": "-Infinity", "lower_order_final": True,
       "num_train_timesteps": 1000, "prediction_type": "flow_prediction", "rescale_betas_zero_snr": False,
       "sample_max_value": 1.0, "solver_order": 2, "solver_type": "midpoint", "steps_offset": 0,
       "thresholding": False, "timestep_spacing": "linspace", "trained_betas": None, "use_beta_sigmas": False,
       "use_exponential_sigmas": False, "use_flow_sigmas": True, "use_karras_sigmas": False, "use_lu_lambdas": False,
       "variance_type": None}
# fmt: on
NETWORKS = {
    "FLUX": (sid_fm.FLUX, FLUX),
    "FLUX, a later writing": (sid_fm.FLUX, FLUX | {"axes_dims_rope": [16, 56, 56], "out_channels": None}),
    "SD3": (sid_fm.MMDiT, SD3),
    "SD3.5 medium": (sid_fm.MMDiT, MEDIUM),
    "SD3.5 large": (sid_fm.MMDiT, LARGE),
    "SANA": (sid_fm.SanaDiT, SANA),
    "SANA 1.5": (sid_fm.SanaDiT, SANA_15),
    "SD3's autoencoder": (sid_fm.AutoencoderKL, KL),
    "FLUX's autoencoder": (
        sid_fm.AutoencoderKL,
        KL
        | {"scaling_factor": 0.3611, "shift_factor": 0.1159, "mid_block_add_attention": True}
        | {"latents_mean": None, "latents_std": None},
    ),
    "SANA's autoencoder": (sid_fm.AutoencoderDC, DC),
}


def built(kind, config):
    with torch.device("meta"):
        return sid_fm.build_network(kind, config)


@pytest.mark.parametrize("name", NETWORKS)
def test_published_networks_are_understood(name):
    """And an unknown key that is null or false changes nothing."""
    kind, config = NETWORKS[name]
    expected = [(key, x.shape) for key, x in built(kind, config).state_dict().items()]
    net = built(kind, config | {"unknown": None, "unheard_of": False})
    assert expected == [(key, x.shape) for key, x in net.state_dict().items()]


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("SD3's autoencoder", "use_quant_conv", True),
        ("SD3's autoencoder", "use_post_quant_conv", True),
        ("SD3's autoencoder", "latents_mean", [0.5] * 16),
        ("SD3's autoencoder", "mid_block_add_attention", False),
        ("SD3's autoencoder", "act_fn", "relu"),
        ("SANA", "interpolation_scale", 2.0),
        ("SANA", "norm_eps", 1e-5),
        ("SANA", "quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("SD3", "quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("FLUX", "unknown", 2),
    ],
)
def test_a_network_that_has_no_code_here_is_refused(name, key, value):
    kind, config = NETWORKS[name]
    with pytest.raises(sid_fm.BadInput, match=rf"\b{key}\b"):
        built(kind, config | {key: value})


@pytest.fixture(scope="module")
def oracle(pipeline):
    """oracle(family) -> diffusers' own pipeline of it."""
    pipelines = {}

    def oracle(family):
        if family not in pipelines:
            pipelines[family] = diffusers.DiffusionPipeline.from_pretrained(pipeline(family))
            pipelines[family].set_progress_bar_config(disable=True)
        return pipelines[family]

    return oracle


@pytest.fixture
def scheduled(copied):
    """scheduled(family, scheduler) -> the teacher of a folder with this scheduler_config.json."""

    def scheduled(family, scheduler):
        folder = copied(family)
        content = {key: value for key, value in scheduler.items() if value is not GONE}
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(content))
        return sid_fm.load_teacher(folder)

    return scheduled


@pytest.mark.parametrize(
    "family, scheduler",
    [
        ("sd3-medium", EULER),
        ("sd3-medium", EULER | {"shift": 1.0}),
        ("sd3-medium", EULER | {"shift": GONE, "unknown": None, "use_karras_sigmas": None, "shift_terminal": None}),
        ("sd3-medium", DYNAMIC),
        ("flux-dev", DYNAMIC),
        ("flux-dev", DYNAMIC | {"base_shift": 0.3, "max_shift": 1.5, "base_image_seq_len": 4}),
        ("flux-dev", EULER),
        ("sana", EULER),
        ("sana", DPM | {"flow_shift": 2.0}),
    ],
)
def test_what_is_understood_samples_as_its_pipeline(scheduled, oracle, family, scheduler):
    """Latents after four steps; DPM-Solver++ as Euler's times with its shift."""
    teacher, theirs = scheduled(family, scheduler), oracle(family)
    if scheduler["_class_name"] == DPM["_class_name"]:
        theirs.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=scheduler["flow_shift"])
    else:
        known = {key: value for key, value in scheduler.items() if key != "unknown" and value not in (None, GONE)}
        theirs.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(known)
    height, width = 4 * teacher.vae.downscale, 6 * teacher.vae.downscale
    z = torch.randn(2, *teacher.latent_shape((height, width)), generator=torch.Generator().manual_seed(3))
    prompts = ["a red fox in the snow", "two ships"]
    cond, uncond = teacher.encode_prompts(prompts), teacher.encode_prompts([""])
    options = {"height": height, "width": width, "num_inference_steps": 4, "output_type": "latent", "latents": z}
    if family == "flux-dev":
        options |= {"guidance_scale": 3.5, "latents": theirs._pack_latents(z, *z.shape)}
        packed = theirs(prompts, **options).images
        expected = theirs._unpack_latents(packed, height, width, theirs.vae_scale_factor)
        found = teacher.sample(z, cond, steps=4)
    else:
        binning = {"use_resolution_binning": False} if family == "sana" else {}
        expected = theirs(prompts, guidance_scale=4.5, **options, **binning).images
        found = teacher.sample(z, cond, uncond, 4, guidance=4.5)
    assert error(found, expected) < 1e-3


@pytest.mark.parametrize(
    "family, scheduler, key",
    [
        ("sd3-medium", EULER | {key: value}, key)
        for key, value in {
            "shift_terminal": 0.02,
            "use_karras_sigmas": True,
            "use_beta_sigmas": True,
            "use_exponential_sigmas": True,
            "invert_sigmas": True,
            "stochastic_sampling": True,
            "num_train_timesteps": 500,
            "unknown": 2,
        }.items()
    ]
    + [("flux-dev", DYNAMIC | {"time_shift_type": "linear"}, "time_shift_type")]
    + [
        ("sana", DPM | {key: value}, key)
        for key, value in {
            "prediction_type": "epsilon",
            "algorithm_type": "sde-dpmsolver++",
            "final_sigmas_type": "sigma_min",
            "use_karras_sigmas": True,
            "thresholding": True,
            "num_train_timesteps": 500,
        }.items()
    ]
    + [("sana", DPM | {"use_flow_sigmas": value}, "use_flow_sigmas") for value in (False, GONE)]
    + [
        ("sd3-medium", EULER | {"_class_name": f"FlowMatch{kind}"}, f"FlowMatch{kind}")
        for kind in ("HeunDiscreteScheduler", "LCMScheduler")
    ]
    + [(family, DPM, DPM["_class_name"]) for family in ("sd3-medium", "flux-dev")],
)
def test_a_scheduler_whose_times_are_others_is_refused(scheduled, family, scheduler, key):
    with pytest.raises(sid_fm.BadInput, match=rf"\b{key}\b") as raised:
        scheduled(family, scheduler)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("family", ["sd3-medium", "sana"])
def test_a_missing_scaling_factor_is_diffusers_default(copied, family):
    folder = copied(family)
    edit(folder / "vae" / "config.json", scaling_factor=GONE)
    kind = diffusers.AutoencoderDC if family == "sana" else diffusers.AutoencoderKL
    theirs, images = kind.from_pretrained(folder / "vae"), torch.rand(2, 3, 64, 96) * 2 - 1
    assert theirs.config.scaling_factor == (1.0 if family == "sana" else 0.18215)
    with torch.no_grad():
        out = theirs.encode(images)
    z = out.latent if family == "sana" else out.latent_dist.mode()
    expected = (z - (theirs.config.get("shift_factor") or 0)) * theirs.config.scaling_factor
    assert error(sid_fm.load_teacher(folder).encode(images), expected) < 1e-5


def test_flux_without_a_guidance_embedding_is_not_guided(copied, run, tmp_path):
    folder = copied("flux-dev")
    edit(folder / "transformer" / "config.json", guidance_embeds=False)

    def without(weights):
        for key in [key for key in weights if "guidance_embedder" in key]:
            del weights[key]

    retensor(folder / "transformer" / WEIGHTS, without)
    run(folder, "--iters", 1)
    assert json.loads((tmp_path / "out" / "args.json").read_text())["guidance"] == [1.0] * 3


def test_a_sprint_pipeline_has_its_own_number_of_steps(pipeline):
    assert sid_fm.load_teacher(pipeline("sana-sprint", guidance_embeds=True)).steps == 2
    assert sid_fm.load_teacher(pipeline("sana-sprint")).steps == 20


def test_sampling_says_that_dpm_solver_is_taken_for_euler(pipeline, run, capsys, tmp_path):
    for family, said in (("sana", 1), ("sd3-medium", 0)):
        run(pipeline(family), "--sample", "a fox", "--out", tmp_path / f"{family}.png")
        lines = [line for line in capsys.readouterr().err.splitlines() if "DPM" in line and "Euler" in line]
        assert len(lines) == said and (tmp_path / f"{family}.png").exists()


# ----------------------------------------------------------------------------------------------------------------------
# What is not finite crosses no exit
# ----------------------------------------------------------------------------------------------------------------------

PARTS = {  # where a weight of each is
    "transformer": (WEIGHTS, "transformer_blocks.1.attn.to_q.weight"),
    "vae": (WEIGHTS, "decoder.conv_in.weight"),
    "text_encoder": ("model.safetensors", "layers.0.mlp.fc1.weight"),
    "text_encoder_2": ("model.safetensors", "layers.0.mlp.fc1.weight"),
}


def poison(file: Path, name: str) -> None:
    """One number of the weight whose name ends so is NaN."""

    def change(weights):
        next(x for key, x in weights.items() if key.endswith(name)).view(-1)[0] = math.nan

    retensor(file, change)


def left(folder: Path) -> set[str]:
    """What a run that was refused must not leave: pictures, scores, weights, measurements."""
    files = [f for f in folder.rglob("*") if f.suffix in (".png", ".safetensors") or f.name == "metrics.json"]
    return {f.name for f in files} | {f.name for f in folder.rglob("log.jsonl") if f.read_text()}


@pytest.mark.parametrize("mode", ["sample", "train", "evaluate"])
@pytest.mark.parametrize("part", PARTS)
def test_a_teacher_that_is_not_finite_is_found_by_its_part(copied, pipeline, clip_folder, ended, tmp_path, part, mode):
    """Before a picture, an iteration or a score, and no learning rate is to blame."""
    folder, out = copied("sd3-medium"), tmp_path / "results"
    file, name = PARTS[part]
    poison(folder / part / file, name)
    arguments = {
        "sample": ["--sample", "a fox", "--out", out / "fox.png"],
        "train": ["--out", out],
        "evaluate": ["--evaluate", "--num", 12, "--clip", clip_folder, "--out", out],
    }[mode]
    if mode == "evaluate":
        arguments += ["--student", pipeline("sd3-medium")]
    line = ended(folder, *arguments, status=None)
    assert re.search(rf"\b{part}\b", line) and "--lr" not in line
    assert not left(out)


@pytest.mark.parametrize("mode", ["--evaluate", "--evaluate-every"])
@pytest.mark.parametrize("tower", ["text", "vision"])
def test_a_clip_that_is_not_finite_gives_no_score(pipeline, clip_folder, ended, tmp_path, mode, tower):
    clip, out = shutil.copytree(clip_folder, tmp_path / "nan-clip"), tmp_path / "results"
    poison(clip / "model.safetensors", f"{tower}_model.encoder.layers.0.mlp.fc1.weight")
    how = ["--evaluate", "--student", pipeline("sana")] if mode == "--evaluate" else ["--evaluate-every", 1]
    assert str(clip) in ended(pipeline("sana"), *how, "--clip", clip, "--num", 12, "--out", out, status=None)
    assert not left(out)


def test_an_autoencoder_whose_deviation_is_not_finite_gives_no_real_sample(copied, ended, tmp_path):
    """The mode is finite, and training takes samples."""
    folder, out = copied("sd3-medium"), tmp_path / "results"
    picture(tmp_path / "data" / "0.png", "a red square")

    def change(weights):
        weights["encoder.conv_out.bias"][-1] = math.nan  # of a log variance

    retensor(folder / "vae" / WEIGHTS, change)
    assert re.search(r"\bvae\b", ended(folder, "--data", tmp_path / "data", "--out", out, status=None))
    assert not left(out)


def test_a_student_that_is_not_finite_is_not_sampled(copied, pipeline, ended, tmp_path):
    student = copied("sana") / "transformer"
    poison(student / WEIGHTS, "proj_out.weight")
    arguments = ["--student", student, "--sample", "a fox", "--out", tmp_path / "results" / "fox.png"]
    assert "student" in ended(pipeline("sana"), *arguments, status=None)
    assert not left(tmp_path / "results")


def test_a_student_that_is_not_finite_replaces_no_other(pipeline, tmp_path):
    teacher = sid_fm.load_teacher(pipeline("sana"))
    sid_fm.save_student(teacher.dit, teacher, tmp_path / "student")
    before = {file.name: file.read_bytes() for file in (tmp_path / "student").iterdir()}
    with torch.no_grad():
        teacher.dit.proj_out.weight.view(-1)[0] = math.nan
    with pytest.raises(FloatingPointError):
        sid_fm.save_student(teacher.dit, teacher, tmp_path / "student")
    assert {file.name: file.read_bytes() for file in (tmp_path / "student").iterdir()} == before


# ----------------------------------------------------------------------------------------------------------------------
# What is derived does not outlive its source
# ----------------------------------------------------------------------------------------------------------------------


def left_by(out: Path) -> dict:
    """The student of a run, its log and its settings."""
    return {file: file.read_bytes() for file in (out / "student" / WEIGHTS, out / "log.jsonl", out / "args.json")}


@pytest.mark.parametrize("source", ["student", "teacher", "prompts"])
def test_a_run_goes_on_over_the_weights_that_it_began_with(copied, run, ended, tmp_path, source):
    """Adapters are nothing without them. Prompts may change."""
    teacher, rng = copied(), torch.Generator().manual_seed(0)
    student = Path(shutil.copytree(teacher / "transformer", tmp_path / "S"))

    def train_on(weights):  # as another run does
        for x in weights.values():
            x += 1e-3 * torch.randn(x.shape, generator=rng)

    def touch(weights):
        weights["patch_embed.proj.weight"].view(-1)[0] *= 1.001

    retensor(student / WEIGHTS, train_on)
    run(teacher, "--student", student, "--lora", 2, "--iters", 2)
    before = left_by(tmp_path / "out")
    if source == "prompts":
        (tmp_path / "prompts.txt").write_text("a bowl of ripe fruit\na village\n")
        run(teacher, "--resume", "--iters", 4)
        assert [row["iteration"] for row in read_log(tmp_path / "out")] == [0, 1, 2, 3]
    else:
        folder, change = {"student": (student, train_on), "teacher": (teacher / "transformer", touch)}[source]
        retensor(folder / WEIGHTS, change)
        line = ended(teacher, "--resume", "--iters", 4)
        assert "--resume" in line and source in line
        assert left_by(tmp_path / "out") == before


# ----------------------------------------------------------------------------------------------------------------------
# What is taken in equals what was given, or a line says what was left out
# ----------------------------------------------------------------------------------------------------------------------


def test_a_prompt_ends_where_its_line_ends(tmp_path):
    """At the ends of lines of the three systems, and at no other character that Unicode counts as
    one."""
    text = "\ufeffa fox\u2028in the snow\ntwo\u0085ships\r\na\x0bsmall\x0crobot\ra\x1cbowl\x1dof\x1efruit\u2029\n\n"
    (tmp_path / "prompts.txt").write_bytes(text.encode())
    expected = ["a fox\u2028in the snow", "two\u0085ships", "a\x0bsmall\x0crobot", "a\x1cbowl\x1dof\x1efruit"]
    assert sid_fm.read_prompts(tmp_path / "prompts.txt") == expected


@pytest.mark.parametrize("kind", ["RGBA.png", "LA.png", "RGBA.webp", "P.png", "RGB.png"])
def test_what_is_transparent_is_white(tmp_path, kind):
    """Wholly or by half. Of P and RGB one colour is transparent."""
    mode, suffix = kind.split(".")
    file, greys = tmp_path / f"image.{suffix}", Image.fromarray(np.array([[0, 0, 90, 200]] * 4, np.uint8))
    if mode in ("P", "RGB"):
        image, second = greys.convert(mode), 255
        image.save(file, transparency=image.getpixel((0, 0)))
    else:
        image, second = greys.convert(mode), 127
        image.putalpha(Image.fromarray(np.array([[0, 128, 255, 255]] * 4, np.uint8)))
        image.save(file, lossless=True, exact=True)
    with Image.open(file) as image:
        assert image.mode == mode
    row = sid_fm.read_pixels(file)[0].astype(int)
    assert abs(row - np.array([255, second, 90, 200])[:, None]).max() <= 1, row


def test_an_opaque_picture_is_its_colours(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    for mode in ("RGB", "RGBA"):
        image.convert(mode).save(tmp_path / f"{mode}.png")
    for size in (None, 16):
        assert np.array_equal(*(sid_fm.read_pixels(tmp_path / f"{mode}.png", size) for mode in ("RGB", "RGBA")))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_keep_their_greys(tmp_path, suffix):
    greys = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(greys).save(tmp_path / f"grey.{suffix}")
    found = sid_fm.read_pixels(tmp_path / f"grey.{suffix}")
    assert found.shape == (8, 8, 3) and abs(found.astype(int) - (greys / 257)[..., None]).max() <= 1


BLOCKS = {  # of EXIF: orientation 6, and a tag whose value has another type than the tag
    "a width that is no number": (0x100, b"AA\0\0"),
    "a resolution that is no number": (0x11A, b"ab\0\0"),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_a_picture_whose_exif_is_broken_is_read_or_named(tmp_path, block):
    tag, value = BLOCKS[block]
    entries = struct.pack("<HHII", 0x112, 3, 1, 6) + struct.pack("<HHI4s", tag, 2, 3, value)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    Image.new("RGB", (16, 8), (200, 30, 30)).save(tmp_path / "broken.jpg", exif=exif)
    try:
        assert sid_fm.read_pixels(tmp_path / "broken.jpg").shape in ((8, 16, 3), (16, 8, 3))
    except sid_fm.BadInput as said:
        assert str(tmp_path / "broken.jpg") in str(said) and "\n" not in str(said)


def picture(file: Path, caption: str | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (200, 30, 30)).save(file)
    if caption:
        file.with_suffix(".txt").write_text(caption)


@pytest.mark.parametrize("kind", ["captions", "metadata"])
def test_what_is_left_out_of_a_folder_is_counted(pipeline, run, asked, capsys, tmp_path, kind):
    """Hidden files and folders, other kinds of files, images without a caption."""
    data = tmp_path / "data"
    for i in range(4):
        picture(data / "some" / f"{i}.png", None if kind == "metadata" else f"picture {i}")
    picture(data / "bare.png")
    picture(data / ".ipynb_checkpoints" / "0-checkpoint.png", "a checkpoint")
    (data / "some" / "._0.png").write_bytes(b"a fork")
    for name in ("notes.md", "film.mp4"):
        (data / name).write_bytes(b"something else")
    if kind == "metadata":
        rows = [{"file_name": f"some/{i}.png", "text": f"picture {i}"} for i in range(4)]
        (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(pipeline("sana"), "--data", data)
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(lines) == 1, lines
    assert re.search(r"\b4 images.*left out.*\b1 uncaptioned.*\b2 of other", lines[0]), lines
    assert {*asked} == {"", *(f"picture {i}" for i in range(4))}


def test_every_line_of_metadata_is_an_item(pipeline, run, asked, tmp_path):
    """An image may have several captions."""
    picture(tmp_path / "data" / "0.png")
    captions = ["a red fox", "a fox in the snow", "an animal"]
    rows = [json.dumps({"file_name": "0.png", "text": text}) + "\n" for text in captions]
    (tmp_path / "data" / "metadata.jsonl").write_text("".join(rows))
    run(pipeline("sana"), "--data", tmp_path / "data")
    assert {*asked} == {"", *captions}


def test_pictures_of_every_kind_are_taken_in(pipeline, run, asked, tmp_path):
    kinds = ["png", "JPG", "jfif", "webp", "bmp", "gif", "tif", "tiff", "ppm"]
    for kind in kinds:
        picture(tmp_path / "data" / f"{kind}-file.{kind}", f"a {kind}")
    run(pipeline("sana"), "--data", tmp_path / "data")
    assert {*asked} == {"", *(f"a {kind}" for kind in kinds)}


# ----------------------------------------------------------------------------------------------------------------------
# The launch is not always torchrun, and terminals go away
# ----------------------------------------------------------------------------------------------------------------------


def test_a_rank_alone_is_a_plain_run(pipeline, run, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "3")
    run(pipeline("sana"))
    assert read_log(tmp_path / "out")[-1]["images"] == 6
    assert (tmp_path / "out" / "student" / WEIGHTS).exists()


@pytest.mark.slow
def test_processes_that_are_started_without_torchrun_join(pipeline, settings, tmp_path):
    """As pods start them: with the four variables that torch.distributed reads."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    command = [sys.executable, SCRIPT, *settings(pipeline("sana"))]
    environments = [os.environ | common | {"RANK": str(rank)} for rank in range(2)]
    processes = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for env in environments]
    try:
        said = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    assert [row["images"] for row in read_log(tmp_path / "out")] == [4, 8, 12]
    assert json.loads((tmp_path / "out" / "state" / "state.json").read_text())["number of processes"] == 2


@pytest.fixture
def hangs_up(monkeypatch):
    """hangs_up(handler): the terminal closes after iteration 1, in a process that began with this
    handler of SIGHUP."""
    former, distill = signal.getsignal(signal.SIGHUP), sid_fm.distill

    def loop(*args, **options):
        for measured in distill(*args, **options):
            if measured["iteration"] == 1:
                os.kill(os.getpid(), signal.SIGHUP)
            yield measured

    monkeypatch.setattr(sid_fm, "distill", loop)
    yield lambda handler: signal.signal(signal.SIGHUP, handler)
    signal.signal(signal.SIGHUP, former)


def test_a_terminal_that_closes_saves_the_run(pipeline, ended, hangs_up, tmp_path):
    hangs_up(lambda *_: None)  # by default it would end pytest too
    line = ended(pipeline("sana"), "--iters", 8, status=128 + signal.SIGHUP)
    assert "--resume" in line
    assert json.loads((tmp_path / "out" / "state" / "state.json").read_text())["iteration"] == 2


def test_a_run_under_nohup_goes_on(pipeline, run, hangs_up, tmp_path):
    hangs_up(signal.SIG_IGN)
    run(pipeline("sana"), "--iters", 4)
    assert len(read_log(tmp_path / "out")) == 4 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.fixture
def unread():
    """A pipe whose reader has gone."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


@pytest.mark.slow
def test_a_run_outlives_the_reader_of_its_errors(pipeline, settings, unread, tmp_path):
    command = [sys.executable, SCRIPT, *settings(pipeline("sana"))]
    done = subprocess.run(command, stderr=unread, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0 and "--sample" in done.stdout
    assert len(read_log(tmp_path / "out")) == 3 and (tmp_path / "out" / "student" / WEIGHTS).exists()


@pytest.mark.slow
def test_a_closed_output_loses_no_picture(pipeline, settings, unread, tmp_path):
    arguments = settings(pipeline("sana"), "--sample", "a fox", "--sample", "two ships", "--out", tmp_path / "x.png")
    done = subprocess.run([sys.executable, SCRIPT, *arguments], stdout=unread, stderr=subprocess.PIPE, check=False)
    assert {file.name for file in tmp_path.glob("*.png")} == {"x-1.png", "x-2.png", "x.png"}, done.stderr


def test_a_tilde_is_the_home(pipeline, clip_folder, run, monkeypatch, tmp_path):
    """In every path: "--out=~/x" is what a shell leaves as it is."""
    home = tmp_path / "home"
    home.mkdir(), monkeypatch.setenv("HOME", str(home)), monkeypatch.chdir(tmp_path)
    (home / "teacher").symlink_to(pipeline("sana"))
    for name in ("prompts.txt", "instruction.txt"):
        shutil.copy(tmp_path / name, home / name)
    run(
        "~/teacher",
        "--prompts=~/prompts.txt",
        "--prompts",
        "~/prompts.txt",
        "--instruction=~/instruction.txt",
        "--out=~/run",
    )
    assert (home / "run" / "student" / WEIGHTS).exists()
    run("~/teacher", "--student=~/run/student", "--sample", "a fox", "--out=~/fox.png")
    assert (home / "fox.png").exists() and not (tmp_path / "~").exists()


# ----------------------------------------------------------------------------------------------------------------------
# What can't be is refused in one line
# ----------------------------------------------------------------------------------------------------------------------


def null(part):
    return lambda folder: edit(folder / "model_index.json", **{part: [None, None]})


def quantised(folder):
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    edit(folder / "text_encoder_3" / "config.json", quantization_config=quantization)


def causal(folder):
    edit(folder / "model_index.json", text_encoder=["transformers", "Gemma2ForCausalLM"])


def sentencepiece_alone(folder):
    (folder / "tokenizer_3" / "tokenizer.json").unlink()
    (folder / "tokenizer_3" / "spiece.model").write_bytes(b"\n\x0e\n\x05<pad>\x15\0\0\0\0\x18\x03")


def without(name):
    return lambda folder: (folder / name).unlink()


NO_SENTENCEPIECE = pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is there")
REFUSED = {
    "T5 without its tokenizer": ("sd3-medium", null("tokenizer_3"), r"\btokenizer_3\b"),
    "SD3 without a CLIP": ("sd3-medium", null("text_encoder"), r"\btext_encoder\b"),
    "FLUX without T5": ("flux-dev", null("text_encoder_2"), r"\btext_encoder_2\b"),
    "SANA without Gemma": ("sana", null("text_encoder"), r"\btext_encoder\b"),
    "SANA without its tokenizer": ("sana", null("tokenizer"), r"\btokenizer\b"),
    "a Gemma that generates": ("sana", causal, "Gemma2ForCausalLM"),
    "a quantised T5": ("sd3-medium", quantised, r"\btext_encoder_3\b.*(quanti[sz]|bitsandbytes)"),
    "a CLIP tokenizer's configuration": (
        "sd3-medium",
        without("tokenizer_2/tokenizer_config.json"),
        r"\btokenizer_2\b.*tokenizer_config\.json",
    ),
    "a Gemma tokenizer's configuration": (
        "sana",
        without("tokenizer/tokenizer_config.json"),
        r"\btokenizer\b.*tokenizer_config\.json",
    ),
}


@pytest.mark.parametrize("kind", [*REFUSED, pytest.param("T5's spiece.model alone", marks=NO_SENTENCEPIECE)])
def test_a_pipeline_that_lacks_what_it_needs(copied, ended, tmp_path, kind):
    alone = ("sd3-medium", sentencepiece_alone, r"\btokenizer_3\b.*\bsentencepiece\b")
    family, harm, says = {**REFUSED, "T5's spiece.model alone": alone}[kind]
    folder = copied(family)
    harm(folder)
    line = ended(folder, "--sample", "a fox", "--out", tmp_path / "results" / "fox.png")
    assert re.search(says, line), line
    assert not left(tmp_path / "results")


@contextlib.contextmanager
def unprivileged():
    """As a user who may not read everything, where tests run as root too."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs users")
@pytest.mark.parametrize("part", ["transformer", "scheduler", "tokenizer", "text_encoder"])
@pytest.mark.parametrize("kind", ["a file", "unreadable"])
def test_a_part_that_is_there_but_no_folder_to_read_is_not_missing(pipeline, kind, part):
    sid_fm.load_teacher(pipeline("sana")).encode_prompts(["a fox"], 16)  # what is imported once
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are its user's alone
        os.chmod(place, 0o755)
        folder = Path(shutil.copytree(pipeline("sana"), Path(place) / "teacher"))
        for file in folder.glob("*/*"):
            file.chmod(0o644)
        if kind == "a file":
            shutil.rmtree(folder / part), (folder / part).write_text("no folder")
        else:
            (folder / part).chmod(0)
        with unprivileged(), pytest.raises(sid_fm.BadInput, match=rf"\b{part}\b") as raised:
            sid_fm.load_teacher(folder).encode_prompts(["a fox"], 16)
        (folder / part).chmod(0o755)
    assert not re.search(r"missing|lacks|\n", str(raised.value)), raised.value


def student_of(folder: Path, **changes) -> Path:
    """A student's folder: random weights of an SD3 network with these keys changed."""
    config = json.loads((folder / "transformer" / "config.json").read_text())
    net = diffusers.SD3Transformer2DModel.from_config(config | changes)
    shutil.rmtree(folder)
    net.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"joint_attention_dim": 48}, "joint_attention_dim"),
        ({"pooled_projection_dim": 48}, "pooled_projection_dim"),
        ({"in_channels": 8, "out_channels": 8}, "in_channels"),
        ({"pos_embed_max_size": 8}, "pos_embed_max_size"),
        ({"pos_embed_max_size": 16}, "pos_embed_max_size"),
        ({"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}, "qk_norm|dual_attention_layers"),
    ],
)
def test_a_student_of_another_teacher_is_refused(copied, pipeline, changes, key):
    teacher = sid_fm.load_teacher(pipeline("sd3-medium"), mapped=True)
    with pytest.raises(sid_fm.BadInput, match=rf"\b({key})\b") as raised:
        sid_fm.load_student(student_of(copied("sd3-medium"), **changes), teacher)
    assert "\n" not in str(raised.value)


def test_a_student_whose_config_names_no_class_is_refused(copied, pipeline):
    folder = copied("sd3-medium") / "transformer"
    edit(folder / "config.json", _class_name=None)
    with pytest.raises(sid_fm.BadInput, match="_class_name is None"):
        sid_fm.load_student(folder, sid_fm.load_teacher(pipeline("sd3-medium"), mapped=True))


def test_a_student_whose_defaults_are_spelt_out_is_the_same(copied, pipeline):
    """Published files leave out keys that diffusers writes; the size that a student was drawn at
    is its own."""
    folder = copied("sd3-medium")
    edit(folder / "transformer" / "config.json", qk_norm=GONE, dual_attention_layers=GONE, out_channels=GONE)
    teacher = sid_fm.load_teacher(folder)
    assert sid_fm.load_student(pipeline("sd3-medium"), teacher).config["qk_norm"] is None
    teacher = sid_fm.load_teacher(copied("sana"))
    edit(teacher.folder / "transformer" / "config.json", sample_size=8)
    assert sid_fm.load_student(teacher.folder, teacher).config["sample_size"] == 8
