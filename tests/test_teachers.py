"""Chapter 7 against the oracle: teachers sample as their diffusers pipelines do, and load, save and fail as they should."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from pipelines import FAMILIES, randomise
from safetensors.torch import load_file, save_file

import sid_fm
from sid_fm import BadInput, load_student, load_teacher, save_student

SPRINT_STUDENT = "sana-sprint student"
PROMPTS = ["a red fox in the snow", "two ships"]
CLASSES = {
    "sd3": diffusers.SD3Transformer2DModel,
    "flux": diffusers.FluxTransformer2DModel,
    "sana": diffusers.SanaTransformer2DModel,
}


def folder_of(pipeline, family):
    return pipeline("sana-sprint", guidance_embeds=True) if family == SPRINT_STUDENT else pipeline(family)


def teacher_and_oracle(pipeline, family, dtype=torch.float32):
    folder = folder_of(pipeline, family)
    oracle = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    oracle.set_progress_bar_config(disable=True)
    if family in ("sana", "sana-sprint"):
        oracle.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return load_teacher(folder, dtype=dtype), oracle


def error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# ----------------------------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------------------------


def draw(teacher, height, width, dtype):
    shape = (2, teacher.vae.latent_channels, height // teacher.vae.downscale, width // teacher.vae.downscale)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("steps", [4, 28])
@pytest.mark.parametrize("family", [*FAMILIES, SPRINT_STUDENT])
def test_sampling(pipeline, family, steps):
    """The decoded image is the pipeline's, from the same noise, with guidance."""
    teacher, oracle = teacher_and_oracle(pipeline, family)
    height, width = 4 * teacher.vae.downscale, 6 * teacher.vae.downscale
    z = draw(teacher, height, width, torch.float32)
    cond, uncond = teacher.encode_prompts(PROMPTS), teacher.encode_prompts([""])
    options = {
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "output_type": "pt",
        "guidance_scale": 4.5,
    }
    if family.startswith("sana"):
        options["use_resolution_binning"] = False
    rng = torch.Generator().manual_seed(5)
    if family == "flux-dev":
        options |= {"guidance_scale": 3.5, "latents": oracle._pack_latents(z, *z.shape)}
        x = teacher.sample(z, cond, steps=steps)
    elif family == SPRINT_STUDENT:
        options |= {"latents": z, "intermediate_timesteps": None, "generator": torch.Generator().manual_seed(5)}
        x = teacher.sample(z, cond, steps=steps, rng=rng)
    else:
        options["latents"] = z
        x = teacher.sample(z, cond, uncond, steps, guidance=4.5)
    expected = torch.as_tensor(oracle(PROMPTS, **options).images)
    images = teacher.decode(x)
    assert images.shape == (2, 3, height, width)
    assert expected.std() > 0.1  # a picture, not a flat field at a bound
    assert error((images / 2 + 0.5).clamp(0, 1), expected) < 1e-4


@pytest.mark.parametrize("family", ["sd3-medium", "flux-dev", "sana"])
def test_a_student_samples_in_diffusers_as_here(pipeline, family, monkeypatch):
    """As the README says: its pipeline with a scheduler that draws fresh noise between steps."""
    folder = pipeline(family)
    teacher, oracle = teacher_and_oracle(pipeline, family)
    oracle.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    student = load_student(folder, teacher)
    side = 4 * teacher.vae.downscale
    z = draw(teacher, side, side, torch.float32)
    options = {"height": side, "width": side, "output_type": "pt", "guidance_scale": 1.0, "num_inference_steps": 4}
    options |= {"sigmas": [1.0, 0.75, 0.5, 0.25], "latents": z}
    if family == "sana":
        options["use_resolution_binning"] = False
    if family == "flux-dev":  # its latents are packed, and so is the noise that it draws
        options["latents"] = oracle._pack_latents(z, *z.shape)

        def packed_noise(x, rng):
            return oracle._unpack_latents(torch.randn(options["latents"].shape), side, side, oracle.vae_scale_factor)

        monkeypatch.setattr(sid_fm, "noise_like", packed_noise)
    cond = teacher.encode_prompts(PROMPTS)
    torch.manual_seed(5)
    with torch.no_grad():
        x = sid_fm.generate(student, z, cond)
    torch.manual_seed(5)
    expected = torch.as_tensor(oracle(PROMPTS, **options).images)
    assert error((teacher.decode(x) / 2 + 0.5).clamp(0, 1), expected) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_in_float64(pipeline, family):
    """The pipelines step in float32, so here the oracle's networks are stepped by hand, at its scheduler's times."""
    folder = pipeline(family)
    teacher = load_teacher(folder, dtype=torch.float64)
    kind = CLASSES[teacher.family.kind]
    net = kind.from_pretrained(folder / "transformer").double()
    vae = {"sana": diffusers.AutoencoderDC}.get(teacher.family.kind, diffusers.AutoencoderKL)
    vae = vae.from_pretrained(folder / "vae").double()
    height, width = 4 * teacher.vae.downscale, 6 * teacher.vae.downscale
    z = draw(teacher, height, width, torch.float64)
    cond, uncond = teacher.encode_prompts(PROMPTS), teacher.encode_prompts(["", ""])
    times = teacher.times(4, (height, width)).double()

    def velocity(x, t, cond):
        t = torch.full((2,), t, dtype=torch.float64)
        if teacher.family.kind == "sana":
            time = 1000 * net.config.timestep_scale * t
            return net(x, cond["text"], time, encoder_attention_mask=cond["mask"]).sample
        if teacher.family.kind == "sd3":
            return net(x, cond["text"], cond["pooled"], 1000 * t).sample
        ids = diffusers.FluxPipeline._prepare_latent_image_ids(2, 2, 3, x.device, x.dtype)
        packed = diffusers.FluxPipeline._pack_latents(x, *x.shape)
        guidance, text_ids = torch.full_like(t, 3.5), torch.zeros(cond["text"].shape[1], 3, dtype=x.dtype)
        v = net(packed, cond["text"], cond["pooled"], t, ids, text_ids, guidance).sample
        return diffusers.FluxPipeline._unpack_latents(v, height, width, 8)

    x, guidance = z, 1.0 if family == "flux-dev" else 4.5
    with torch.no_grad():
        for t, t_next in zip(times[:-1].tolist(), times[1:].tolist()):
            v = velocity(x, t, cond)
            if guidance != 1:
                v_uncond = velocity(x, t, uncond)
                v = v_uncond + guidance * (v - v_uncond)
            x = x + (t_next - t) * v
        expected = vae.decode(x / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)).sample
    images = teacher.decode(teacher.sample(z, cond, uncond, 4, guidance))
    assert images.dtype == torch.float64
    assert error(images, expected) < 1e-10


@pytest.mark.parametrize("steps", [1, 2, 4, 20, 28])
@pytest.mark.parametrize("family", [*FAMILIES, SPRINT_STUDENT])
def test_times_are_the_scheduler_s(pipeline, family, steps):
    teacher, oracle = teacher_and_oracle(pipeline, family)
    times, scheduler = teacher.times(steps, (64, 96)), oracle.scheduler
    if family == SPRINT_STUDENT:
        scheduler.set_timesteps(steps, max_timesteps=1.5708, intermediate_timesteps=1.3 if steps == 2 else None)
        u = scheduler.timesteps
        expected = u.sin() / (u.sin() + u.cos())
    elif family == "flux-dev":
        tokens = (64 // 16) * (96 // 16)
        mu = diffusers.pipelines.flux.pipeline_flux.calculate_shift(tokens)
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=mu)
        expected = scheduler.sigmas
    else:
        scheduler.set_timesteps(steps)
        expected = scheduler.sigmas
    assert times.shape == (steps + 1,)
    assert times[-1] == 0
    assert (times - expected).abs().max() < 1e-6  # float32


def test_sd3_times_end_at_the_same_time_at_every_number_of_steps(pipeline):
    teacher = load_teacher(pipeline("sd3-medium"))
    assert [round(teacher.times(n, 64)[-2].item(), 4) for n in (4, 28, 40)] == [0.0089] * 3


def test_sprint_s_step_is_the_equal_snr_map(pipeline):
    """From the plain Rectified Flow velocity to what SanaSprintPipeline hands its scheduler: chapter 1 alone."""
    u = torch.linspace(0.05, 1.55, 7, dtype=torch.float64)
    x_trig, v = torch.randn(2, 7, 4, 3, 3, dtype=torch.float64)
    t = u.sin() / (u.cos() + u.sin())
    tt = t.reshape(-1, 1, 1, 1)
    x_rf, t_rf = sid_fm.equal_snr(x_trig, u, "trig", "rf")
    norm = (tt**2 + (1 - tt) ** 2).sqrt()
    torch.testing.assert_close(t_rf, t)
    torch.testing.assert_close(x_rf, x_trig * norm)
    d = sid_fm.convert(v, x_rf, t, "rf", "v", "x0")
    pipeline_s = ((1 - 2 * tt) * x_rf + (1 - 2 * tt + 2 * tt**2) * v) / norm
    torch.testing.assert_close(sid_fm.convert(d, x_trig, u, "trig", "x0", "v"), pipeline_s)


@pytest.mark.parametrize("family", FAMILIES)
def test_encode(pipeline, family):
    """Latents as the losses see them: the mode, shifted and scaled; decode is encode's inverse in those units."""
    teacher, oracle = teacher_and_oracle(pipeline, family)
    images = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        out, config = oracle.vae.encode(images), oracle.vae.config
        z = out.latent if hasattr(out, "latent") else out.latent_dist.mode()
        expected = (z - (config.get("shift_factor") or 0)) * config.scaling_factor
        latents = teacher.encode(images)
        assert latents.shape == (2, *teacher.latent_shape((64, 96)))
        assert error(latents, expected) < 1e-5
        assert error(teacher.decode(latents), oracle.vae.decode(z).sample) < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# True sizes
# ----------------------------------------------------------------------------------------------------------------------

BILLIONS = {"sd3-medium": 2.03, "sd3.5-medium": 2.24, "sd3.5-large": 8.06, "flux-dev": 11.90, "sana-0.6b": 0.59}
BILLIONS |= {"sana-1.6b": 1.60, "sana-sprint-0.6b": 0.59, "sana-sprint-1.6b": 1.60}


@pytest.mark.parametrize("name", sid_fm.NAMES)
def test_true_size(name):
    """For every name, the names and shapes of diffusers' network, built from the same config.json."""
    known = sid_fm.NAMES[name]
    family = sid_fm.PIPELINES[known.pipeline]
    config = sid_fm.network_config(family, known.network)
    with torch.device("meta"):
        net = sid_fm.build(family.backbone, config)
        oracle = CLASSES[family.kind].from_config(config)
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    assert shapes == {key: value.shape for key, value in oracle.state_dict().items()}
    assert round(sum(p.numel() for p in net.parameters()) / 1e9, 2) == BILLIONS[name]
    described = sid_fm.describe(name)
    assert (described.family, described.dit.config) == (family, config)
    ignored = {"_class_name", "_diffusers_version", "_use_default_values", "_name_or_path"}
    written = {key: value for key, value in oracle.config.items() if key not in ignored and key in config}
    assert {key: config[key] for key in written} == written


@pytest.mark.parametrize("name", sid_fm.NAMES)
def test_random_weights(name, monkeypatch):
    """The same code on a few layers: weights drawn, a velocity of order one, pictures, conditions by prompt."""
    small = {"num_layers": 2, "num_attention_heads": 2}
    if name.startswith("sana"):
        small |= {"num_cross_attention_heads": 2}
    elif name.startswith("flux"):
        small |= {"num_single_layers": 2}
    else:
        small |= {"pos_embed_max_size": 8, "dual_attention_layers": [0] if name == "sd3.5-medium" else []}
    known = sid_fm.NAMES[name]
    monkeypatch.setitem(sid_fm.NAMES, name, known._replace(network=known.network | small))
    teacher = load_teacher(name, dtype=torch.bfloat16, random_weights=True)
    unit = teacher.vae.downscale * teacher.dit.patch_size
    z = torch.randn(2, *teacher.latent_shape((unit, 2 * unit)))
    a, b, again = teacher.encode_prompts(["a", "b"]), teacher.encode_prompts(["b"]), teacher.encode_prompts(["a"])
    assert torch.equal(a["text"][0], again["text"][0])
    assert torch.equal(a["text"][1], b["text"][0])
    v = teacher.dit(z, torch.tensor([0.9, 0.1]), a)
    assert v.dtype == torch.float32
    assert 0.05 < v.std() < 20
    assert teacher.dit.proj_out.weight.dtype == torch.bfloat16
    assert teacher.decode(z).isfinite().all()
    assert not any(p.requires_grad for p in teacher.dit.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Loading and saving
# ----------------------------------------------------------------------------------------------------------------------


def copy_of(pipeline, family, tmp_path):
    return Path(shutil.copytree(pipeline(family), tmp_path / family))


def velocity(teacher):
    z = draw(teacher, 4 * teacher.vae.downscale, 4 * teacher.vae.downscale, torch.float32)
    with torch.no_grad():
        return teacher.dit(z, torch.tensor([0.9, 0.2]), teacher.encode_prompts(PROMPTS))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["sharded", "fp16"])
def test_layouts(pipeline, family, layout, tmp_path):
    """Shards with an index and fp16 variants give the weights of the single file."""
    folder = copy_of(pipeline, family, tmp_path)
    expected = velocity(load_teacher(pipeline(family)))
    oracle = diffusers.DiffusionPipeline.from_pretrained(folder)
    for part in (folder / "transformer", folder / "vae"):
        shutil.rmtree(part)
    if layout == "sharded":
        oracle.transformer.save_pretrained(folder / "transformer", max_shard_size="50KB")
        oracle.vae.save_pretrained(folder / "vae", max_shard_size="100KB")
        assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
        assert torch.equal(velocity(load_teacher(folder)), expected)
    else:
        for name in ("transformer", "vae"):
            getattr(oracle, name).half().save_pretrained(folder / name, variant="fp16")
        for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            for file in folder.glob(f"{part}/model.safetensors"):
                save_file({key: x.half() for key, x in load_file(file).items()}, file, metadata={"format": "pt"})
                file.rename(file.with_name("model.fp16.safetensors"))
        teacher = load_teacher(folder)
        assert teacher.dit.proj_out.weight.dtype == torch.float32  # as asked, whatever the file has
        assert 0 < error(velocity(teacher), expected) < 0.05


def test_dtype_and_what_is_trainable(pipeline):
    teacher = load_teacher(pipeline("sana"), dtype=torch.bfloat16)
    for net in (teacher.dit, teacher.vae):
        assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
        assert not net.training
        assert not any(p.requires_grad for p in net.parameters())
    cond = teacher.encode_prompts(PROMPTS)
    assert cond["text"].dtype == torch.bfloat16
    assert teacher.text is not None
    teacher.forget_text()
    assert teacher.text is None


def edit_weights(folder, change):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def rename(weights):
    weights["proj_in.weight"] = weights.pop("proj_out.weight")


def reshape(weights):
    weights["proj_out.bias"] = torch.zeros(3)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: edit_weights(f, rename), r"missing proj_out.weight \(1 in all\); unexpected proj_in.weight"),
        (lambda f: edit_weights(f, lambda w: w.pop("proj_out.bias")), r"missing proj_out.bias \(1 in all\)$"),
        (lambda f: edit_weights(f, reshape), r"proj_out.bias has shape \[3\], its config.json asks for \[64\]"),
        (lambda f: (f / "transformer" / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "transformer" / "config.json").write_text("{"), "holds no valid JSON object"),
        (lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "read from safetensors only"),
        (lambda f: (f / "model_index.json").unlink(), "model_index.json is missing"),
        (lambda f: shutil.rmtree(f / "text_encoder_3"), "lacks text_encoder_3"),
        (lambda f: shutil.rmtree(f / "scheduler"), "lacks scheduler"),
    ],
)
def test_damaged_folders(pipeline, tmp_path, damage, message):
    folder = copy_of(pipeline, "sd3-medium", tmp_path)
    damage(folder)
    with pytest.raises(BadInput, match=message):
        load_teacher(folder)


@pytest.mark.parametrize("bytes_left", [4, 1000, -100])
def test_truncated_weights(pipeline, tmp_path, bytes_left):
    folder = copy_of(pipeline, "sd3-medium", tmp_path)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:bytes_left])
    with pytest.raises(BadInput, match="truncated"):
        load_teacher(folder)


def test_a_missing_shard(pipeline, tmp_path):
    folder = copy_of(pipeline, "sana", tmp_path)
    oracle = diffusers.SanaTransformer2DModel.from_pretrained(folder / "transformer")
    shutil.rmtree(folder / "transformer")
    oracle.save_pretrained(folder / "transformer", max_shard_size="50KB")
    shard = sorted((folder / "transformer").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(BadInput, match=f"{shard.name}, which the index names, is missing"):
        load_teacher(folder)


def test_a_configuration_that_has_no_code_here(pipeline, tmp_path):
    folder = copy_of(pipeline, "sana", tmp_path)
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"interpolation_scale": 2.0}))
    with pytest.raises(BadInput, match=r"SanaDiT knows interpolation_scale = None only, and the configuration has 2.0"):
        load_teacher(folder)


def test_resolutions(pipeline):
    teacher = load_teacher(pipeline("sd3-medium"))
    assert teacher.latent_shape(64) == (16, 8, 8)
    assert teacher.latent_shape((64, 192)) == (16, 8, 24)
    for bad, message in ((40, "multiples of 16 up to 192"), (0, "multiples of 16"), (208, "up to 192")):
        with pytest.raises(BadInput, match=message):
            teacher.latent_shape(bad)
    with pytest.raises(BadInput, match="multiples of 32$"):
        load_teacher(pipeline("sana")).latent_shape((64, 80))


@pytest.mark.parametrize("family", [*FAMILIES, SPRINT_STUDENT])
def test_a_saved_student_opens_in_diffusers_and_here(pipeline, family, tmp_path):
    teacher = load_teacher(folder_of(pipeline, family))
    student = sid_fm.as_student(sid_fm.copy.deepcopy(teacher.dit))
    randomise(student, 7)
    save_student(student, teacher, tmp_path / "student")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student"]
    oracle = CLASSES[teacher.family.kind].from_pretrained(tmp_path / "student")
    assert {k: v for k, v in oracle.config.items() if k in teacher.dit.config and k[0] != "_"} == {
        k: tuple(v) if isinstance(oracle.config[k], tuple) else v
        for k, v in teacher.dit.config.items()
        if k in oracle.config and k[0] != "_"
    }
    for (name, theirs), (mine, ours) in zip(
        sorted(oracle.state_dict().items()), sorted(student.state_dict().items()), strict=True
    ):
        assert name == mine
        assert torch.equal(theirs, ours)
    again = load_student(tmp_path / "student", teacher)
    assert again.guidance == student.guidance == {"flux-dev": 1.0}.get(family, teacher.dit.guidance)
    z = draw(teacher, 4 * teacher.vae.downscale, 4 * teacher.vae.downscale, torch.float32)
    t, cond = torch.tensor([0.9, 0.2]), teacher.encode_prompts(PROMPTS)
    with torch.no_grad():
        v = again(z, t, cond)
        assert torch.equal(v, student(z, t, cond))
        if teacher.family.kind == "sd3":
            assert error(v, oracle(z, cond["text"], cond["pooled"], 1000 * t).sample) < 1e-5
        elif teacher.family.kind == "flux":
            ids = diffusers.FluxPipeline._prepare_latent_image_ids(2, 2, 2, "cpu", torch.float32)
            packed, text_ids = diffusers.FluxPipeline._pack_latents(z, *z.shape), torch.zeros(cond["text"].shape[1], 3)
            out = oracle(packed, cond["text"], cond["pooled"], t, ids, text_ids, torch.ones(2)).sample
            assert error(v, diffusers.FluxPipeline._unpack_latents(out, 32, 32, 8)) < 1e-5
        else:
            scale = 1 if family == SPRINT_STUDENT else 1000 * oracle.config.timestep_scale
            guidance = torch.full((2,), 0.45) if family == SPRINT_STUDENT else None
            out = oracle(z, cond["text"], scale * t, guidance=guidance, encoder_attention_mask=cond["mask"]).sample
            assert error(v, out) < 1e-5


def test_saving_replaces_and_leaves_nothing_beside(pipeline, tmp_path):
    teacher = load_teacher(pipeline("sana"))
    for seed in (1, 2):
        student = randomise(sid_fm.copy.deepcopy(teacher.dit), seed)
        save_student(student, teacher, tmp_path / "runs" / "student")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["student"]
    assert torch.equal(load_student(tmp_path / "runs" / "student", teacher).proj_out.weight, student.proj_out.weight)


def test_a_student_from_a_whole_pipeline_and_one_of_another_class(pipeline):
    teacher = load_teacher(pipeline("sd3-medium"))
    student = load_student(pipeline("sd3-medium"), teacher)
    assert torch.equal(student.proj_out.weight, teacher.dit.proj_out.weight)
    with pytest.raises(BadInput, match="is a FluxTransformer2DModel, and .* a SD3Transformer2DModel"):
        load_student(pipeline("flux-dev"), teacher)


def test_a_sprint_student_of_a_sprint_teacher_is_fed_t(pipeline):
    """Whatever timestep_scale says: the teacher's goes for its students, and a guidance embedding means t."""
    teacher = load_teacher(pipeline("sana-sprint"))
    assert teacher.dit.time_scale == 1.0
    assert load_teacher(pipeline("sana")).dit.time_scale == 1000.0
    student = load_student(pipeline("sana-sprint", guidance_embeds=True), teacher)
    assert student.time_scale == 1.0
    assert student.guidance == 4.5


@pytest.mark.slow
def test_memory_while_loading(tmp_path):
    """Private memory while a checkpoint of two billion weights loads: its bytes once, and no second copy."""
    if shutil.disk_usage(tmp_path).free < 6e9:
        pytest.skip("needs 6 GB of disk")
    teacher = load_teacher("sd3-medium", dtype=torch.bfloat16, random_weights=True)
    save_student(teacher.dit, teacher, tmp_path / "transformer")
    size = sum(x.nbytes for x in teacher.dit.state_dict().values())
    del teacher
    script = """
import re, sys, threading, time
import torch
import sid_fm
from safetensors import safe_open
def private():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
before, peak, done = private(), [0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], private())
        time.sleep(0.005)
thread = threading.Thread(target=watch)
thread.start()
net = sid_fm.fill_part(*sid_fm.open_part(sid_fm.MMDiT, sid_fm.Path(sys.argv[1])), "cpu", getattr(torch, sys.argv[2]))
done.set(), thread.join()
print(max(peak[0], private()) - before)
"""
    for dtype in ("bfloat16", "float32"):
        loaded = size * {"bfloat16": 1, "float32": 2}[dtype]
        command = [sys.executable, "-c", script, str(tmp_path / "transformer"), dtype]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(sid_fm.__file__).parent)
        peak = int(re.search(r"\d+", result.stdout)[0])
        print(f"{dtype}: {loaded / 1e9:.2f} GB of weights, {peak / 1e9:.2f} GB of private memory, {peak / loaded:.3f}")
        assert 0.9 * loaded < peak < 1.2 * loaded
