"""Tiny pipelines in the checkpoints' real layout, random in every parameter, for the tests:
diffusers builds and saves.

The wiring is the real one (layers of each kind, activations, scalings, schedulers, token ids); only
the widths are tiny. The tokenizers know the words of a few sentences, so nothing is downloaded.
`python tests/pipelines.py sd3-medium tiny` writes one into the folder tiny.
"""

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn

FAMILIES = ("sd3-medium", "sd3.5-medium", "sd3.5-large", "flux-dev", "sana", "sana-sprint")

SENTENCES = [
    "A photograph of a red fox sitting in the snow under a pale winter sun.",
    "An oil painting of two ships on a stormy sea, dramatic light, by an old master.",
    "a small robot reading a book in a library full of plants, soft morning light, 35mm",
    "The portrait of an astronaut with a cat on her shoulder, studio lighting, highly detailed!",
    "A bowl of ripe fruit on a wooden table: apples, pears, plums and grapes; still life.",
    "watercolour of a mountain village at dusk, lanterns in the streets, mist in the valley",
]


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Sets every parameter at random: norm weights 1 + 0.1 n, weights n / sqrt(fan-in), embeddings
    n / 2, all others 0.3 n."""
    rng = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, p in module.named_parameters():
            n = torch.randn(p.shape, generator=rng)
            if id(p) in embeddings:
                n = n / 2
            elif p.ndim == 1 and name.endswith("weight"):
                n = 1 + 0.1 * n
            elif p.ndim <= 1 or name.endswith("table"):
                n = 0.3 * n
            else:
                n = n / math.sqrt(p[0].numel())
            p.copy_(n)
    return module.eval()


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers: the files that the Hub's repositories hold
# ----------------------------------------------------------------------------------------------------------------------


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def learned(words: list[str], letters: Callable[[str], list[str]] = list) -> list[tuple[str, str]]:
    """Byte-pair merges that build each word from its letters, left to right: learning by heart."""
    merges = {}
    for word in words:
        head, *tail = letters(word)
        for letter in tail:
            merges[head, letter] = None
            head += letter
    return list(merges)


def write_clip(folder: Path, pad: str) -> int:
    """vocab.json, merges.txt; "!" is token 0, the last two are start and end of text. Returns the
    vocabulary's size."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = learned(re.findall("[a-z]+", " ".join(SENTENCES).lower()), lambda word: [*word[:-1], word[-1] + "</w>"])
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, pairs), start, end]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    write_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, pairs), ""]), encoding="utf-8")
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
    added = {
        token: {"content": token, "lstrip": False, "normalized": token == start, "rstrip": False, "single_word": False}
        for token in dict.fromkeys(special.values())
    }
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(vocab[token]): {**entry, "special": True} for token, entry in added.items()},
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
        **special,
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)
    return len(vocab)


def write_fast(folder: Path, tokenizer: Tokenizer, special: dict, config: dict) -> int:
    """tokenizer.json of an assembled tokenizer with its special tokens. Returns the vocabulary's
    size."""
    tokenizer.add_special_tokens(list(special.values()))
    content = json.loads(tokenizer.to_str())
    if "merges" in content["model"]:  # as one string each, which older releases of tokenizers need
        content["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    write_json(folder / "tokenizer.json", content)
    write_json(folder / "tokenizer_config.json", {"clean_up_tokenization_spaces": False, **config, **special})
    write_json(folder / "special_tokens_map.json", special)
    return tokenizer.get_vocab_size()


def write_t5(folder: Path) -> int:
    """Unigram: pad 0, end 1, unknown 2, and no start of text; letters that it has not seen are
    unknown."""
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = dict.fromkeys(" ".join(SENTENCES).split())
    letters = sorted(set("".join(words)))
    extra = [f"<extra_id_{i}>" for i in range(100)]
    scores = dict.fromkeys(special.values(), 0.0) | {"▁": -2.0} | dict.fromkeys(letters, -8.0)
    scores |= {"▁" + word: -9.0 for word in words} | dict.fromkeys(reversed(extra), 0.0)
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(extra)
    config = {"additional_special_tokens": extra, "extra_ids": 100, "legacy": True, "model_max_length": 512}
    config |= {"add_prefix_space": True, "tokenizer_class": "T5Tokenizer"}
    return write_fast(folder, tokenizer, special, config)


def write_gemma(folder: Path) -> int:
    """BPE that falls back to bytes: pad 0, end 1, start 2, unknown 3; the class pads on the left
    unless told."""
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    text = " ".join(SENTENCES).replace(" ", "▁")
    merges = learned(re.findall("▁[A-Za-z]+", text))
    tokens = [*special.values(), "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(set(text))]
    vocab = {token: i for i, token in enumerate([*tokens, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    config = {"add_bos_token": True, "add_eos_token": False, "model_max_length": int(1e30)}
    return write_fast(folder, tokenizer, special, {**config, "tokenizer_class": "GemmaTokenizer"})


# ----------------------------------------------------------------------------------------------------------------------
# Text encoders and autoencoders
# ----------------------------------------------------------------------------------------------------------------------


def clip(vocab: int, width: int, act: str, projection: int) -> transformers.CLIPTextConfig:
    # The token ids are those of the real files, which are wrong; with eos_token_id 2 the pooled
    # state is the one at the largest id, which is the first end of text.
    return transformers.CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=projection,
        num_hidden_layers=3,
        num_attention_heads=2,
        hidden_act=act,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )


def t5(vocab: int) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=vocab, d_model=40, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config)


def gemma(vocab: int) -> nn.Module:
    config = transformers.Gemma2Config(
        vocab_size=vocab,
        hidden_size=24,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
    )
    return transformers.Gemma2Model(config)


def autoencoder_kl(scaling_factor: float, shift_factor: float) -> nn.Module:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 24, 24),
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def autoencoder_dc() -> nn.Module:
    widths, blocks, scales = (
        (8, 16, 32, 32, 64, 64),
        ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        ((),) * 3 + ((5,),) * 3,
    )
    return diffusers.AutoencoderDC(
        latent_channels=32,
        attention_head_dim=8,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1, 1, 1, 2, 1, 1),
        decoder_layers_per_block=(1, 2, 1, 1, 1, 1),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )


def clip_model(folder: Path, seed: int = 0) -> Path:
    """Saves a tiny CLIP of both towers, with its tokenizer and image processor, as the Hub's
    repositories have it."""
    text = clip(write_clip(folder, pad="<|endoftext|>"), 16, "quick_gelu", 24)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    randomise(transformers.CLIPModel(config), seed).save_pretrained(folder)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    options = {"do_resize": True, "do_center_crop": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3}
    options |= {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    options |= {"image_mean": mean, "image_std": std, "image_processor_type": "CLIPImageProcessor"}
    write_json(folder / "preprocessor_config.json", options)
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# Pipelines
# ----------------------------------------------------------------------------------------------------------------------


def sd3(family: str, folder: Path) -> dict:
    vocab = write_clip(folder / "tokenizer", pad="<|endoftext|>")
    write_clip(folder / "tokenizer_2", pad="!")
    medium, large = family == "sd3.5-medium", family == "sd3.5-large"
    heads = 3 if large else 2
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=40,
        caption_projection_dim=16 * heads,
        pooled_projection_dim=32,
        pos_embed_max_size=12,
        dual_attention_layers=(0, 1) if medium else (),
        qk_norm="rms_norm" if medium or large else None,
    )
    return {
        "transformer": transformer,
        "vae": autoencoder_kl(1.5305, 0.0609),
        "text_encoder": transformers.CLIPTextModelWithProjection(clip(vocab, 16, "quick_gelu", 12)),
        "text_encoder_2": transformers.CLIPTextModelWithProjection(clip(vocab, 20, "gelu", 20)),
        "text_encoder_3": t5(write_t5(folder / "tokenizer_3")),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def flux(family: str, folder: Path) -> dict:
    vocab = write_clip(folder / "tokenizer", pad="<|endoftext|>")
    transformer = diffusers.FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=40,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    return {
        "transformer": transformer,
        "vae": autoencoder_kl(0.3611, 0.1159),
        "text_encoder": transformers.CLIPTextModel(clip(vocab, 16, "quick_gelu", 16)),
        "text_encoder_2": t5(write_t5(folder / "tokenizer_2")),
        "scheduler": scheduler,
    }


def sana(family: str, folder: Path, guidance_embeds: bool = False) -> dict:
    sprint = family == "sana-sprint"
    transformer = diffusers.SanaTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=8,
        num_layers=3,
        num_cross_attention_heads=4,
        cross_attention_head_dim=12,
        cross_attention_dim=48,
        caption_channels=24,
        sample_size=4,
        guidance_embeds=guidance_embeds,
        qk_norm="rms_norm_across_heads" if sprint else None,
        timestep_scale=0.001 if sprint and not guidance_embeds else 1.0,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return {
        "transformer": transformer,
        "vae": autoencoder_dc(),
        "text_encoder": gemma(write_gemma(folder / "tokenizer")),
        "scheduler": diffusers.SCMScheduler() if guidance_embeds else scheduler,
    }


def build(family: str, folder: Path, seed: int = 0, guidance_embeds: bool = False) -> Path:
    """Saves the tiny pipeline of `family` into `folder`, in the diffusers layout. Returns the
    folder.

    guidance_embeds, of "sana-sprint" alone: False is a Sprint teacher, which the Hub keeps as a
    SanaPipeline with timestep_scale 0.001; True is a Sprint student, a SanaSprintPipeline, whose
    timestep_scale says 1 though it is fed t.
    """
    folder = Path(folder)
    if family.startswith("sd3"):
        pipeline, parts = diffusers.StableDiffusion3Pipeline, sd3(family, folder)
        tokenizers = {"tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer", "tokenizer_3": "T5TokenizerFast"}
    elif family.startswith("flux"):
        pipeline, parts = diffusers.FluxPipeline, flux(family, folder)
        tokenizers = {"tokenizer": "CLIPTokenizer", "tokenizer_2": "T5TokenizerFast"}
    else:
        pipeline, parts = diffusers.SanaPipeline, sana(family, folder, guidance_embeds)
        tokenizers = {"tokenizer": "GemmaTokenizerFast"}
        if guidance_embeds:
            pipeline = diffusers.SanaSprintPipeline
    for i, part in enumerate(parts.values()):
        if isinstance(part, nn.Module):
            randomise(part, seed + 1000 * i)
    index = {"_class_name": pipeline.__name__, "_diffusers_version": diffusers.__version__}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        # transformers 5 drops a prefix that the Hub's files have.
        if isinstance(part, transformers.CLIPTextModel):
            file = folder / name / "model.safetensors"
            weights = {f"text_model.{key.removeprefix('text_model.')}": w for key, w in load_file(file).items()}
            save_file(weights, file, metadata={"format": "pt"})
        library = "transformers" if isinstance(part, transformers.PreTrainedModel) else "diffusers"
        index[name] = [library, type(part).__name__]
    index |= {name: ["transformers", kind] for name, kind in tokenizers.items()}
    write_json(folder / "model_index.json", index)
    return folder


if __name__ == "__main__":
    print(build(sys.argv[1], Path(sys.argv[2])))
