"""Chapter 7 against the oracle: teachers sample as their diffusers pipelines do, and load, save and
fail as they should."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import networks
import pytest
import torch
from oracle import (
    NETWORKS,
    OnDiffusers,
    as_euler,
    error,
    from_latents,
    sampling_options,
    scheduler_times,
    to_latents,
    vae_decode,
    vae_encode,
)
from pipelines import FAMILIES, randomise
from safetensors.torch import load_file, save_file

import sid_fm
from sid_fm import BadInput, load_student, load_teacher, save_student

SPRINT_STUDENT = "sana-sprint student"
PROMPTS = ["a red fox in the snow", "two ships"]


def folder_of(pipeline, family):
    return pipeline("sana-sprint", guidance_embeds=True) if family == SPRINT_STUDENT else pipeline(family)


@pytest.fixture(scope="module")
def loaded(pipeline):
    """loaded(family) -> a teacher and its diffusers pipeline, in float32. To be used, not
    changed."""
    pairs = {}

    def get(family):
        if family not in pairs:
            folder = folder_of(pipeline, family)
            oracle = diffusers.DiffusionPipeline.from_pretrained(folder)
            oracle.set_progress_bar_config(disable=True)
            oracle.scheduler = as_euler(oracle.scheduler)
            pairs[family] = load_teacher(folder), oracle
        return pairs[family]

    return get


# ----------------------------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------------------------


def noise(teacher, height, width, dtype=torch.float32):
    shape = (2, *teacher.latent_shape((height, width)))
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("family, steps", [*((family, 4) for family in (*FAMILIES, SPRINT_STUDENT)), ("flux-dev", 28)])
def test_sampling(loaded, family, steps):
    """The decoded image is the pipeline's, from the same noise, with guidance."""
    teacher, oracle = loaded(family)
    height, width = 4 * teacher.vae.downscale, 6 * teacher.vae.downscale
    z = noise(teacher, height, width)
    cond, uncond = teacher.encode_prompts(PROMPTS), teacher.encode_prompts([""])
    options = sampling_options(oracle, z, steps, torch.Generator().manual_seed(5))
    options |= {"output_type": "pt", "guidance_scale": 3.5 if family == "flux-dev" else 4.5}
    if family == "flux-dev":
        x = teacher.sample(z, cond, steps=steps)
    elif family == SPRINT_STUDENT:
        x = teacher.sample(z, cond, steps=steps, rng=torch.Generator().manual_seed(5))
    else:
        x = teacher.sample(z, cond, uncond, steps, guidance=4.5)
    expected = torch.as_tensor(oracle(PROMPTS, **options).images)
    images = teacher.decode(x)
    assert images.shape == (2, 3, height, width)
    assert expected.std() > 0.1  # a picture, not a flat field at a bound
    assert error((images / 2 + 0.5).clamp(0, 1), expected) < 1e-4


@pytest.mark.parametrize("family", ["sd3-medium", "flux-dev", "sana"])
def test_a_student_samples_in_diffusers_as_here(pipeline, loaded, family, monkeypatch):
    """As the README says: its pipeline with a scheduler that adds fresh noise between steps."""
    teacher, oracle = loaded(family)
    monkeypatch.setattr(oracle, "scheduler", diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))
    student = load_student(pipeline(family), teacher)
    side = 4 * teacher.vae.downscale
    z = noise(teacher, side, side)
    options = sampling_options(oracle, z, 4) | {"output_type": "pt", "guidance_scale": 1.0}
    options["sigmas"] = [1.0, 0.75, 0.5, 0.25]
    if family == "flux-dev":  # its latents are packed, and so is its fresh noise

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
    """The pipelines step in float32, so here the oracle's networks are stepped by hand, at its
    scheduler's times."""
    folder = pipeline(family)
    teacher = load_teacher(folder, dtype=torch.float64)
    teacher.instruction = ""
    net = OnDiffusers(NETWORKS[teacher.family].from_pretrained(folder / "transformer").double())
    vae = diffusers.AutoencoderDC if teacher.family == "sana" else diffusers.AutoencoderKL
    vae = vae.from_pretrained(folder / "vae").double()
    height, width = 4 * teacher.vae.downscale, 6 * teacher.vae.downscale
    z = noise(teacher, height, width, torch.float64)
    cond, uncond = teacher.encode_prompts(PROMPTS), teacher.encode_prompts(["", ""])
    times = teacher.times(4, (height, width)).double()
    if family == "flux-dev":
        cond["guidance"] = torch.full((2,), 3.5, dtype=torch.float64)
    x, guidance = z, 1.0 if family == "flux-dev" else 4.5
    with torch.no_grad():
        for t, t_next in zip(times[:-1].tolist(), times[1:].tolist()):
            v = net(x, x.new_full((2,), t), cond)
            if guidance != 1:
                v_uncond = net(x, x.new_full((2,), t), uncond)
                v = v_uncond + guidance * (v - v_uncond)
            x = x + (t_next - t) * v
        expected = vae_decode(vae, from_latents(vae, x))
    cond.pop("guidance", None)
    images = teacher.decode(teacher.sample(z, cond, uncond, 4, guidance))
    assert images.dtype == torch.float64
    assert error(images, expected) < 1e-10


@pytest.mark.parametrize("family", [*FAMILIES, SPRINT_STUDENT])
def test_times_are_the_scheduler_s(loaded, family):
    teacher, oracle = loaded(family)
    for steps in (1, 2, 4, 20, 28):
        times = teacher.times(steps, (64, 96))
        expected = scheduler_times(oracle.scheduler, steps, (64 // 16) * (96 // 16))
        assert times.shape == (steps + 1,)
        assert times[-1] == 0
        assert (times - expected).abs().max() < 1e-6, steps  # float32


def test_sd3_times_end_at_the_same_time_at_every_number_of_steps(loaded):
    teacher, _ = loaded("sd3-medium")
    assert [round(teacher.times(n, 64)[-2].item(), 4) for n in (4, 28, 40)] == [0.0089] * 3


def test_sprint_s_step_is_the_equal_snr_map():
    """From the plain Rectified Flow velocity to what SanaSprintPipeline hands its scheduler:
    chapter 1 alone."""
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
def test_encode(loaded, family):
    """Latents as the losses see them: the mode, shifted and scaled; decode is encode's inverse in
    those units."""
    teacher, oracle = loaded(family)
    images = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        z = vae_encode(oracle.vae, images)
        expected = to_latents(oracle.vae, z)
        latents = teacher.encode(images)
        assert latents.shape == (2, *teacher.latent_shape((64, 96)))
        assert error(latents, expected) < 1e-5
        assert error(teacher.decode(latents), vae_decode(oracle.vae, z)) < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# True sizes
# ----------------------------------------------------------------------------------------------------------------------

BILLIONS = {"sd3-medium": 2.03, "sd3.5-medium": 2.24, "sd3.5-large": 8.06, "flux-dev": 11.90, "sana-0.6b": 0.59}
BILLIONS |= {"sana-1.6b": 1.60, "sana-sprint-0.6b": 0.59, "sana-sprint-1.6b": 1.60}


@pytest.mark.parametrize("name", sid_fm.NAMES)
def test_true_size(name):
    """For every name, the names and shapes of diffusers' network, built from the same
    config.json."""
    pipeline, changes = networks.TEACHERS[name]
    (family, kind, *_), config = sid_fm.PIPELINES[pipeline], networks.network_config(pipeline, changes)
    with torch.device("meta"):
        net = sid_fm.build_network(kind, config)
        oracle = NETWORKS[family].from_config(config)
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    assert shapes == {key: value.shape for key, value in oracle.state_dict().items()}
    assert round(sum(p.numel() for p in net.parameters()) / 1e9, 2) == BILLIONS[name]
    ignored = {"_class_name", "_diffusers_version", "_use_default_values", "_name_or_path"}
    written = {key: value for key, value in oracle.config.items() if key not in ignored and key in config}
    assert {key: config[key] for key in written} == written


# ----------------------------------------------------------------------------------------------------------------------
# Loading and saving
# ----------------------------------------------------------------------------------------------------------------------


def copy_of(pipeline, family, tmp_path):
    return Path(shutil.copytree(pipeline(family), tmp_path / family))


def velocity(teacher):
    z = noise(teacher, 4 * teacher.vae.downscale, 4 * teacher.vae.downscale)
    with torch.no_grad():
        return teacher.dit(z, torch.tensor([0.9, 0.2]), teacher.encode_prompts(PROMPTS))


@pytest.mark.parametrize("family", ["sd3-medium", "flux-dev", "sana"])
@pytest.mark.parametrize("layout", ["sharded", "fp16"])
def test_layouts(pipeline, loaded, family, layout, tmp_path):
    """Shards with an index and fp16 variants give the weights of the single file."""
    folder = copy_of(pipeline, family, tmp_path)
    teacher, oracle = loaded(family)
    expected = velocity(teacher)
    for part in (folder / "transformer", folder / "vae"):
        shutil.rmtree(part)
    if layout == "sharded":
        oracle.transformer.save_pretrained(folder / "transformer", max_shard_size="50KB")
        oracle.vae.save_pretrained(folder / "vae", max_shard_size="100KB")
        assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
        assert torch.equal(velocity(load_teacher(folder)), expected)
    else:
        for name in ("transformer", "vae"):
            copy.deepcopy(getattr(oracle, name)).half().save_pretrained(folder / name, variant="fp16")
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


def weights_of(folder, part="transformer"):
    return folder / part / "diffusion_pytorch_model.safetensors"


def edit_weights(folder, change):
    weights = load_file(weights_of(folder))
    change(weights)
    save_file(weights, weights_of(folder), metadata={"format": "pt"})


def rename(weights):
    weights["proj_in.weight"] = weights.pop("proj_out.weight")


def reshape(weights):
    weights["proj_out.bias"] = torch.zeros(3)


def truncate(bytes_left):
    return lambda file: file.write_bytes(file.read_bytes()[:bytes_left])


MISSING, UNEXPECTED = (rf"{what} key\(s\) in state_dict: " for what in ("Missing", "Unexpected"))
UNREADABLE = "diffusion_pytorch_model.safetensors can't be read .*: download it again"
DAMAGES = {
    "renamed": (lambda f: edit_weights(f, rename), f'{MISSING}"proj_out.weight". {UNEXPECTED}"proj_in.weight"'),
    "lost": (
        lambda f: edit_weights(f, lambda w: w.pop("proj_out.bias")),
        f'its config.json: {MISSING}"proj_out.bias".$',
    ),
    "reshaped": (lambda f: edit_weights(f, reshape), r"size mismatch for proj_out.bias: .*\[3\].*\[64\]"),
    "no header": (lambda f: truncate(4)(weights_of(f)), UNREADABLE),
    "half a header": (lambda f: truncate(1000)(weights_of(f)), UNREADABLE),
    "cut off": (lambda f: truncate(-100)(weights_of(f)), UNREADABLE),
    "no configuration": (lambda f: (f / "transformer" / "config.json").unlink(), "config.json is missing"),
    "no JSON": (
        lambda f: (f / "transformer" / "config.json").write_text("{"),
        "config.json can't be read .*: download it again",
    ),
    "no weights": (lambda f: weights_of(f, "vae").unlink(), "vae holds no .* read from safetensors only"),
    "no index": (lambda f: (f / "model_index.json").unlink(), "model_index.json is missing"),
    "no T5": (lambda f: shutil.rmtree(f / "text_encoder_3"), "text_encoder_3/config.json is missing"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler_config.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(pipeline, tmp_path, damage):
    """Each is found when the teacher is loaded, and said in one line."""
    folder = copy_of(pipeline, "sd3-medium", tmp_path)
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(BadInput, match=message) as raised:
        load_teacher(folder, mapped=True)
    assert "\n" not in str(raised.value)


def test_a_missing_shard(pipeline, loaded, tmp_path):
    folder = copy_of(pipeline, "sana", tmp_path)
    shutil.rmtree(folder / "transformer")
    loaded("sana")[1].transformer.save_pretrained(folder / "transformer", max_shard_size="50KB")
    shard = sorted((folder / "transformer").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(BadInput, match=rf"{shard.name} is missing: download it again"):
        load_teacher(folder)


def test_a_configuration_that_has_no_code_here(pipeline, tmp_path):
    folder = copy_of(pipeline, "sana", tmp_path)
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"interpolation_scale": 2.0}))
    with pytest.raises(BadInput, match=r"SanaDiT knows interpolation_scale = None only, and the configuration has 2.0"):
        load_teacher(folder)


def test_resolutions(loaded):
    teacher, _ = loaded("sd3-medium")
    assert teacher.latent_shape(64) == (16, 8, 8)
    assert teacher.latent_shape((64, 192)) == (16, 8, 24)
    for bad, message in ((40, "multiples of 16 up to 192"), (0, "multiples of 16"), (208, "up to 192")):
        with pytest.raises(BadInput, match=message):
            teacher.latent_shape(bad)
    with pytest.raises(BadInput, match="multiples of 32$"):
        loaded("sana")[0].latent_shape((64, 80))


@pytest.mark.parametrize("family", [*FAMILIES, SPRINT_STUDENT])
def test_a_saved_student_opens_in_diffusers_and_here(loaded, family, tmp_path):
    teacher, _ = loaded(family)
    student = randomise(copy.deepcopy(teacher.dit), 7)
    save_student(student, teacher, tmp_path / "student")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student"]
    oracle = NETWORKS[teacher.family].from_pretrained(tmp_path / "student")
    written = {key: value for key, value in teacher.dit.config.items() if key in oracle.config and key[0] != "_"}
    assert {key: list(x) if isinstance(x := oracle.config[key], tuple) else x for key in written} == written
    mine, theirs = student.state_dict(), oracle.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(x, theirs[key]) for key, x in mine.items())
    again = load_student(tmp_path / "student", teacher)
    assert again.guidance == (1.0 if family == "flux-dev" else teacher.dit.guidance)
    student.guidance = again.guidance
    z = noise(teacher, 4 * teacher.vae.downscale, 4 * teacher.vae.downscale)
    t, cond = torch.tensor([0.9, 0.2]), teacher.encode_prompts(PROMPTS)
    with torch.no_grad():
        v = again(z, t, cond)
        assert torch.equal(v, student(z, t, cond))
        cond["guidance"] = torch.full((2,), again.guidance)
        assert error(v, OnDiffusers(oracle)(z, t, cond)) < 1e-5


def test_saving_replaces_and_leaves_nothing_beside(loaded, tmp_path):
    teacher, _ = loaded("sana")
    for seed in (1, 2):
        student = randomise(copy.deepcopy(teacher.dit), seed)
        save_student(student, teacher, tmp_path / "runs" / "student")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["student"]
    assert torch.equal(load_student(tmp_path / "runs" / "student", teacher).proj_out.weight, student.proj_out.weight)


def test_a_student_from_a_whole_pipeline_and_one_of_another_class(pipeline, loaded):
    teacher, _ = loaded("sd3-medium")
    student = load_student(pipeline("sd3-medium"), teacher)
    assert torch.equal(student.proj_out.weight, teacher.dit.proj_out.weight)
    with pytest.raises(BadInput, match="_class_name is FluxTransformer2DModel, and .*'s SD3Transformer2DModel"):
        load_student(pipeline("flux-dev"), teacher)


def test_a_sprint_student_of_a_sprint_teacher_is_fed_t(pipeline, loaded):
    """Whatever timestep_scale says: the teacher's goes for its students, and a guidance embedding
    means t."""
    teacher, _ = loaded("sana-sprint")
    assert teacher.dit.time_scale == 1.0
    assert loaded("sana")[0].dit.time_scale == 1000.0
    student = load_student(pipeline("sana-sprint", guidance_embeds=True), teacher)
    assert student.time_scale == 1.0
    assert student.guidance == 4.5


@pytest.mark.parametrize("family", ["sd3-medium", "flux-dev", "sana", "sana-sprint"])
def test_a_teacher_on_a_device_takes_nothing_from_the_host(pipeline, monkeypatch, family):
    """Text, samples, pictures and posteriors in bf16, on torch's meta device: it computes nothing,
    and refuses tensors of the CPU as a GPU does."""
    monkeypatch.setattr(sid_fm, "check_finite", lambda x, *_: x)  # there are no numbers
    teacher = load_teacher(pipeline(family))
    teacher.instruction, teacher.tokens = "", 16
    teacher.encode_prompts([""])
    for net in (teacher.dit, teacher.vae):
        sid_fm.to_device(net, "meta", torch.bfloat16)
    for _, net in teacher.text.parts.values():
        net.to("meta", torch.bfloat16)
    teacher.device = teacher.text.device = torch.device("meta")
    teacher.dtype = torch.bfloat16
    cond, uncond = teacher.encode_prompts(PROMPTS), teacher.encode_prompts([""])
    z = sid_fm.noise_like(torch.empty(len(PROMPTS), *teacher.latent_shape(128), device="meta"), torch.Generator())
    x = teacher.sample(z, cond, uncond, steps=2, guidance=3.0)
    images = teacher.decode(x)
    mean, deviation = teacher.posterior(images)
    for part in (*cond.values(), x, images, mean, deviation):
        assert part.device.type == "meta"
    assert x.dtype == images.dtype == mean.dtype == torch.float32 and cond["text"].dtype == torch.bfloat16


def test_weights_are_copied_from_their_files(pipeline, tmp_path):
    """A loaded network keeps its weights when its file is written again. A mapped one, whose
    weights are still in the file, does not; to_device copies them."""
    folder = copy_of(pipeline, "sd3-medium", tmp_path)
    bf16 = load_teacher(folder, dtype=torch.bfloat16, mapped=True)
    assert (bf16.dtype, bf16.dit.proj_out.weight.dtype) == (torch.bfloat16, torch.float32)  # the file's
    mapped, copied, loaded = (load_teacher(folder, mapped=mapped) for mapped in (True, True, False))
    student = load_student(folder, mapped, mapped=True)
    for net, dtype in ((copied.dit, torch.float32), (bf16.dit, torch.bfloat16), (student, torch.float32)):
        assert sid_fm.to_device(net, "cpu", dtype) is net
    before = {key: x.clone() for key, x in loaded.dit.state_dict().items()}
    latents = torch.randn(1, 16, 4, 4)
    picture = loaded.decode(latents)
    for part in ("transformer", "vae"):
        with open(weights_of(folder, part), "r+b") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
            file.seek(header)
            file.write(bytes(weights_of(folder, part).stat().st_size - header))
    for net in (loaded.dit, copied.dit, student):
        assert all(torch.equal(x, before[key]) for key, x in net.state_dict().items())
    assert all(torch.equal(x, before[key].bfloat16()) for key, x in bf16.dit.state_dict().items())
    assert torch.equal(loaded.decode(latents), picture)
    assert torch.equal(mapped.decode(latents), picture)  # of a teacher the network alone is mapped
    assert not any(x.any() for x in mapped.dit.state_dict().values())


def test_memory_while_loading(tmp_path):
    """Before to_device a network of 0.4 GB takes next to nothing. Then private memory is its bytes
    once."""
    config = networks.network_config(networks.SD3, {"num_layers": 2})
    with torch.device("meta"):
        net = sid_fm.build_network(sid_fm.MMDiT, config).to(torch.bfloat16)
    net = net.to_empty(device="cpu")
    for x in net.state_dict().values():
        x.fill_(1)
    save_student(net, None, tmp_path / "transformer")
    size = sum(x.nbytes for x in net.state_dict().values())
    script = """
import re, sys, threading, time
import torch
import safetensors.torch
import sid_fm
with torch.device("meta"):
    sid_fm.MMDiT(num_layers=1)  # what is imported at the first time
def memory(kind):
    return 1024 * int(re.search(kind + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
start, peak, done = memory("VmRSS"), [0], threading.Event()
net = sid_fm.load_network(sid_fm.Path(sys.argv[1]), sid_fm.MMDiT, mapped=True)
mapped, before = memory("VmRSS") - start, memory("RssAnon")
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], memory("RssAnon"))
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
sid_fm.to_device(net, "cpu", getattr(torch, sys.argv[2]))
done.set(), thread.join()
print(mapped, max(peak[0], memory("RssAnon")) - before)
"""
    for dtype in ("bfloat16", "float32"):
        loaded = size * {"bfloat16": 1, "float32": 2}[dtype]
        command = [sys.executable, "-c", script, str(tmp_path / "transformer"), dtype]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(sid_fm.__file__).parent)
        mapped, peak = map(int, result.stdout.split())
        print(f"{dtype}: weights {loaded / 1e6:.0f} MB, mapped {mapped / 1e6:.0f}, peak {peak / loaded:.3f} of them")
        assert mapped < 0.04 * size
        assert 0.9 * loaded < peak < 1.2 * loaded
