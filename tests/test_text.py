"""Chapter 6 of sid_fm.py: TextEncoders against the diffusers pipelines' own encode_prompt."""

import inspect
import json
import shutil
import warnings

import diffusers
import pytest
import torch
import transformers
from oracle import encode_prompt, error
from pipelines import FAMILIES
from safetensors.torch import load_file, save_file

from sid_fm import TEXT_LENGTH, BadInput, TextEncoders, load_teacher

LONG = "a red fox in the snow, " * 60
PROMPTS = ["", "A red fox sitting in the snow!", "  Ünïcode: 狐狸 🦊 лиса  ", "an oil painting of two ships, " * 5]
INSTRUCTION = ["Given a prompt, describe a picture.", "- A photograph of a red fox.", "User Prompt: "]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def short(family):
    return "sd3" if family.startswith("sd3") else family.split("-")[0]


@pytest.fixture(scope="module")
def load(pipeline):
    """(family, dtype) -> the stock pipeline and ours."""
    loaded = {}

    def get(family, dtype=torch.float32):
        if (family, dtype) not in loaded:
            oracle = diffusers.DiffusionPipeline.from_pretrained(pipeline(family), torch_dtype=dtype)
            ours = TextEncoders(pipeline(family), short(family), dtype=dtype, instruction="\n".join(INSTRUCTION))
            loaded[family, dtype] = oracle, ours
        return loaded[family, dtype]

    return get


def assert_equal(ours, oracle, dtype=torch.float32):
    assert ours.keys() == oracle.keys()
    for key in ours:
        assert not ours[key].requires_grad
        assert ours[key].dtype == oracle[key].dtype
        assert error(ours[key], oracle[key]) <= TOLERANCE[dtype], key


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_encode_prompt(load, family, dtype):
    oracle, ours = load(family, dtype)
    cond = ours(PROMPTS)
    assert_equal(cond, encode_prompt(oracle, PROMPTS, INSTRUCTION), dtype)
    length = TEXT_LENGTH[short(family)] + (77 if short(family) == "sd3" else 0)
    assert cond["text"].shape[:2] == (len(PROMPTS), length) and cond["text"].dtype == dtype
    for i, prompt in enumerate(PROMPTS):  # a prompt's condition does not depend on its company
        assert_equal(ours([prompt]), {key: value[i : i + 1] for key, value in cond.items()}, dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_cuts_and_warns_once_for_each_encoder(load, family):
    oracle, ours = load(family)
    with pytest.warns(UserWarning, match="prompts are cut") as caught:
        cond = ours(["a fox", LONG])
    assert_equal(cond, encode_prompt(oracle, ["a fox", LONG], INSTRUCTION))
    length = TEXT_LENGTH[short(family)]
    limits = {  # encoder: tokens it reads
        "sd3": {"text_encoder": 77, "text_encoder_2": 77, "text_encoder_3": length},
        "flux": {"text_encoder": 77, "text_encoder_2": length},
        "sana": {"text_encoder": length},
    }[short(family)]
    expected = []
    for name, limit in limits.items():
        tokenizer = getattr(oracle, name.replace("text_encoder", "tokenizer"))
        prefix = "\n".join(INSTRUCTION) if short(family) == "sana" else ""
        if prefix:
            limit += len(tokenizer(prefix).input_ids) - 2
        over = len(tokenizer(prefix + LONG.strip()).input_ids) - limit
        expected += [f"prompts are cut: {name} reads {limit} tokens, {over} too many"] * (over > 0)
    assert [str(warning.message) for warning in caught] == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(["a fox", LONG])


@pytest.mark.parametrize("family", FAMILIES)
def test_length(load, family):
    oracle, ours = load(family)
    prompts = ["a red fox", "the portrait of a cat"]
    cond = ours(prompts, max_length=77)
    assert_equal(cond, encode_prompt(oracle, prompts, INSTRUCTION, max_sequence_length=77))
    assert cond["text"].shape[1] == 77 + 77 * (short(family) == "sd3")


@pytest.mark.parametrize("pipeline_class", [diffusers.SanaPipeline, diffusers.SanaSprintPipeline])
def test_instruction_of_diffusers_and_none(pipeline, load, pipeline_class):
    oracle = pipeline_class(**load("sana")[0].components)
    lines = inspect.signature(pipeline_class.__call__).parameters["complex_human_instruction"].default
    assert load_teacher(pipeline("sana")).instruction == "\n".join(lines)
    for instruction in (lines, None):
        ours = TextEncoders(pipeline("sana"), "sana", instruction="\n".join(instruction or []))
        assert_equal(ours(PROMPTS[1:2]), encode_prompt(oracle, PROMPTS[1:2], instruction))


def test_sd3_without_t5(pipeline, load, tmp_path):
    folder = shutil.copytree(pipeline("sd3-medium"), tmp_path / "pipeline")
    shutil.rmtree(folder / "text_encoder_3"), shutil.rmtree(folder / "tokenizer_3")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps({**index, "text_encoder_3": [None, None], "tokenizer_3": [None, None]})
    )
    oracle = diffusers.DiffusionPipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    cond = TextEncoders(folder, "sd3")(PROMPTS)
    assert_equal(cond, encode_prompt(oracle, PROMPTS, INSTRUCTION))
    assert cond["text"][:, 77:].eq(0).all() and cond["text"].shape[1] == 77 + 256


def test_reads_a_variant_and_never_a_pickle(pipeline, load, tmp_path):
    oracle, _ = load("flux-dev")
    folder = shutil.copytree(pipeline("flux-dev"), tmp_path / "pipeline")
    for name in ("text_encoder", "text_encoder_2"):
        weights = folder / name / "model.safetensors"
        weights.rename(weights.with_name("model.fp16.safetensors"))
    assert_equal(TextEncoders(folder, "flux")(PROMPTS), encode_prompt(oracle, PROMPTS, INSTRUCTION))
    for name in ("pytorch_model.bin", "pytorch_model.fp16.bin"):
        torch.save(oracle.text_encoder.state_dict(), folder / "text_encoder" / name)
    (folder / "text_encoder" / "model.fp16.safetensors").unlink()
    with pytest.raises(BadInput, match="read from safetensors only"):
        TextEncoders(folder, "flux")


def test_quiet(pipeline, capfd, caplog):
    transformers.logging.enable_propagation()  # else caplog does not see them
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for family in FAMILIES:
            encoders = TextEncoders(pipeline(family), short(family), instruction="A fox: ")
            encoders(["a fox", ""])
            with pytest.warns(UserWarning, match="cut"):
                encoders([LONG])
    transformers.logging.disable_propagation()
    out, err = capfd.readouterr()
    assert out == err == "" and not caplog.records


def test_broken_encoders(pipeline, tmp_path):
    """No missing weight is made up at random, and each fault is one line."""

    def broken(name, damage):
        folder = tmp_path / name
        shutil.copytree(pipeline("flux-dev"), folder)
        damage(folder)
        return folder

    def forget(folder):
        file = folder / "text_encoder" / "model.safetensors"
        weights = load_file(file)
        weights.pop(next(key for key in weights if key.endswith("final_layer_norm.bias")))
        save_file(weights, file, metadata={"format": "pt"})

    def truncate(folder):
        file = folder / "text_encoder" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-10])

    for name, damage, message in [
        ("forget", forget, "missing .*final_layer_norm.bias"),
        ("truncate", truncate, "text_encoder can't be read .*: it should hold .* CLIPTextModel"),
        ("config", lambda folder: (folder / "text_encoder_2" / "config.json").unlink(), "config.json is missing"),
        (
            "vocabulary",
            lambda folder: (folder / "tokenizer_2" / "tokenizer.json").unlink(),
            "holds none of tokenizer.json",
        ),
    ]:
        with pytest.raises(BadInput, match=message):
            TextEncoders(broken(name, damage), "flux")
