"""The autoencoders against diffusers': names, shapes, encode, decode and gradients, in float32,
float64 and bfloat16."""

import copy

import diffusers
import pytest
import torch
from oracle import error, vae_decode, vae_encode

from sid_fm import AutoencoderDC, AutoencoderKL

KL = {
    "block_out_channels": [8, 16, 16],
    "layers_per_block": 2,
    "latent_channels": 3,
    "norm_num_groups": 4,
}
DC = {  # encoder and decoder differ, so that neither can be built from the other's keys
    "latent_channels": 4,
    "attention_head_dim": 4,
    "encoder_block_types": ["ResBlock", "EfficientViTBlock", "EfficientViTBlock"],
    "decoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"],
    "encoder_block_out_channels": [8, 8, 16],
    "decoder_block_out_channels": [4, 8, 8],
    "encoder_layers_per_block": [1, 1, 2],
    "decoder_layers_per_block": [2, 1, 1],
    "encoder_qkv_multiscales": [[], [5], [3, 5]],
    "decoder_qkv_multiscales": [[], [], [5]],
}
SD3 = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
FLUX = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
SANA = {"scaling_factor": 0.41407}
SIZES = [(24, 40), (8, 12)]  # in the second the oracle's deepest attention is quadratic


def oracle(ours, config):
    """diffusers' module of `config`, the keys that ours holds fixed included."""
    if ours is AutoencoderDC:
        kinds = {"downsample_block_type": "Conv", "upsample_block_type": "interpolate"}
    else:
        n = len(config["block_out_channels"])
        kinds = {"down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n}
        kinds |= {"use_quant_conv": False, "use_post_quant_conv": False}
    return getattr(diffusers, ours.__name__)(**ours.FIXED | kinds | config)


def pair(ours, config, dtype=torch.float32, seed=0):
    """diffusers' and our module with the same random numbers in every parameter."""
    torch.manual_seed(seed)
    theirs = oracle(ours, config)
    for name, p in theirs.named_parameters():
        if p.ndim > 1:
            p.data = torch.randn(p.shape) / p[0].numel() ** 0.5
        else:
            p.data = 0.1 * torch.randn(p.shape) + ("norm" in name and name.endswith("weight"))
    module = ours(**config)
    module.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.to(dtype), module.to(dtype)


def with_gradients(function, module, x):
    """Output, and the gradient of a random projection of it with respect to the input and every
    parameter used."""
    x = x.clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    out = function(module, x)
    (
        out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out)
    ).sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return out.detach(), {"input": x.grad} | grads


def mean(module, images):
    return module.posterior(images)[0]


def decode(module, latents):
    return module.decoder(latents)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ours, config", [(AutoencoderKL, KL), (AutoencoderDC, DC)])
def test_parity(ours, config, dtype, size):
    bar, bar_grad = (1e-5, 1e-4) if dtype == torch.float32 else (1e-10, 1e-10)
    theirs, module = pair(ours, config, dtype)
    images = torch.rand(2, 3, *size, dtype=dtype) * 2 - 1
    latents = torch.randn(2, config["latent_channels"], *(n // module.downscale for n in size), dtype=dtype)
    used = set()
    for x, y, f, g in [(images, latents, vae_encode, mean), (latents, images, vae_decode, decode)]:
        (expected, expected_grads), (out, grads) = with_gradients(f, theirs, x), with_gradients(g, module, x)
        assert out.shape == y.shape and out.dtype == dtype
        assert error(out, expected) < bar
        assert grads.keys() == expected_grads.keys()
        for name in grads:
            if name.endswith("to_k.bias"):  # zero: it moves all logits of a softmax alike
                scale = grads[name.replace("bias", "weight")].abs().max()
                assert max(grads[name].abs().max(), expected_grads[name].abs().max()) < bar_grad * scale
            else:
                assert error(grads[name], expected_grads[name]) < bar_grad, name
        used |= grads.keys()
    assert used == {"input"} | {name for name, _ in module.named_parameters()}


@pytest.mark.parametrize("scale", [1, 1000])
def test_the_posterior_is_diffusers(scale):
    """Mean and standard deviation; variances that are too large or too small are cut as there."""
    theirs, module = pair(AutoencoderKL, KL, torch.float64)
    images = torch.rand(2, 3, 24, 40, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        for x in (theirs.encoder.conv_out.weight, module.encoder.conv_out.weight):
            x *= scale
        expected = theirs.encode(images).latent_dist
        mean, deviation = module.posterior(images)
        assert error(mean, expected.mean) < 1e-10 and error(deviation, expected.std) < 1e-10
        assert (scale == 1) == bool((0.01 < deviation).all() and (deviation < 100).all())


def test_the_posterior_of_a_dc_autoencoder_is_a_point():
    _, module = pair(AutoencoderDC, DC)
    images = torch.rand(2, 3, 24, 40) * 2 - 1
    with torch.no_grad():
        mean, deviation = module.posterior(images)
        assert torch.equal(mean, module.encoder(images)) and deviation.shape == mean.shape and not deviation.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ours, config", [(AutoencoderKL, KL), (AutoencoderDC, DC)])
def test_low_precision_is_as_exact_as_the_oracles(ours, config, dtype):
    theirs, module = pair(ours, config)
    exact = copy.deepcopy(module)
    theirs, module = theirs.to(dtype), module.to(dtype)
    images, latents = torch.rand(4, 3, 64, 96) * 2 - 1, torch.randn(4, config["latent_channels"], 16, 24)
    with torch.no_grad():
        for x, f, g in [(images, vae_encode, mean), (latents, vae_decode, decode)]:
            right, out = g(exact, x), g(module, x.to(dtype))
            assert out.dtype == dtype
            assert (out - right).square().mean() < 1.2 * (f(theirs, x.to(dtype)) - right).square().mean()


def test_linear_attention_in_float16_outgrows_it():
    """The sums over pixels pass 65504, the largest float16: they are taken in float32."""
    _, module = pair(AutoencoderDC, DC)
    attention = module.encoder.down_blocks[1][0].attn
    x = 30 * torch.randn(1, 8, 64, 64)
    with torch.no_grad():
        expected, out = attention(x), attention.half()(x.half())
    assert out.isfinite().all() and error(out.float(), expected) < 1e-2


@pytest.mark.parametrize("ours, config", [(AutoencoderKL, SD3), (AutoencoderKL, FLUX), (AutoencoderDC, SANA)])
def test_true_size(ours, config):
    """Our defaults have the names and shapes of the real checkpoints (no memory is taken)."""
    with torch.device("meta"):
        module = ours()
        theirs = oracle(ours, TRUE[ours] | config)
    shapes, expected = ({k: v.shape for k, v in m.state_dict().items()} for m in (module, theirs))
    assert shapes == expected
    assert sum(s.numel() for s in shapes.values()) == {AutoencoderKL: 83_819_683, AutoencoderDC: 312_250_275}[ours]
    assert module.downscale == {AutoencoderKL: 8, AutoencoderDC: 32}[ours]


TRUE = {
    AutoencoderKL: {
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 32,
    },
    AutoencoderDC: {
        "latent_channels": 32,
        "attention_head_dim": 32,
        "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
        "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
        "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
        "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    },
}


def test_unknown_block_type():
    with pytest.raises(ValueError, match="block type"):
        AutoencoderDC(**DC | {"encoder_block_types": ["ViT"] * 3})
