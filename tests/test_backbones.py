"""Chapter 4 against the oracle: every backbone equals diffusers' on weights that are random in
every parameter."""

import re

import diffusers
import pytest
import torch
from oracle import NETWORKS, OnDiffusers, error
from pipelines import FAMILIES

import sid_fm

STUDENT = "sana-sprint student"  # a SANA-Sprint network with a guidance embedding


def pair(pipeline, family, dtype):
    """Our network and diffusers', with the same face and the same weights."""
    folder = pipeline("sana-sprint", guidance_embeds=True) if family == STUDENT else pipeline(family)
    name = family.split("-")[0].replace(".5", "")
    ours = {"sd3": sid_fm.MMDiT, "flux": sid_fm.FLUX, "sana": sid_fm.SanaDiT}[name]
    oracle = NETWORKS[name].from_pretrained(folder / "transformer").to(dtype)
    net = sid_fm.build_network(ours, dict(oracle.config)).to(dtype)
    net.load_state_dict(oracle.state_dict())
    return net, OnDiffusers(oracle)


def inputs(family, dtype, batch=2, size=(6, 8)):
    """x_t, t, cond: non-square latents, another t in each row, captions of different lengths."""
    rng = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    t = torch.tensor([0.93, 0.31, 1.0], dtype=torch.float64)[:batch].to(dtype)
    if family.startswith("sana"):
        mask = torch.arange(9) < torch.tensor([[5], [9], [1]])[:batch]
        cond = {"text": normal(batch, 9, 24), "mask": mask.to(torch.int64)}
        if family == STUDENT:
            cond["guidance"] = torch.tensor([4.5, 2.0, 7.0])[:batch].to(dtype)
        return normal(batch, 32, *size), t, cond
    cond = {"text": normal(batch, 7, 40), "pooled": normal(batch, 16 if family == "flux-dev" else 32)}
    if family == "flux-dev":
        cond["guidance"] = torch.tensor([3.5, 1.0, 7.0])[:batch].to(dtype)
    return normal(batch, 16, *size), t, cond


@pytest.mark.parametrize("family", [*FAMILIES, STUDENT])
@pytest.mark.parametrize(
    "dtype, bar, gradient_bar, batch",
    [
        (torch.float32, 1e-5, 1e-4, 1),
        (torch.float32, 1e-5, 1e-4, 3),
        (torch.float64, 1e-10, 1e-10, 1),
        (torch.float64, 1e-10, 1e-10, 3),
    ],
)
def test_output_and_gradients(pipeline, family, batch, dtype, bar, gradient_bar):
    net, oracle = pair(pipeline, family, dtype)
    x_t, t, cond = inputs(family, dtype, batch)
    mine, his = x_t.clone().requires_grad_(), x_t.clone().requires_grad_()
    v, v_oracle = net(mine, t, cond), oracle(his, t, cond)
    assert v.shape == v_oracle.shape == x_t.shape
    assert v.dtype == dtype
    assert error(v, v_oracle) < bar
    e = torch.randn(v.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    (v * e).sum().backward()
    (v_oracle * e).sum().backward()
    assert error(mine.grad, his.grad) < gradient_bar
    theirs = dict(oracle.net.named_parameters())
    assert set(theirs) == {name for name, _ in net.named_parameters()}
    for name, p in net.named_parameters():
        grad = theirs[name].grad
        if family.startswith("sd3") and re.match(r"transformer_blocks\.2\.attn\.(add_q|norm_added_q)", name):
            assert grad.abs().max() == p.grad.abs().max() == 0  # its text output is not read
        elif family == "sana" and name.endswith(
            "attn2.to_k.bias"
        ):  # adds a constant to all scores: no gradient but rounding
            weight = theirs[name.replace("bias", "weight")].grad.abs().max()
            assert max(p.grad.abs().max(), grad.abs().max()) < gradient_bar * weight
        else:
            assert error(p.grad, grad) < gradient_bar, name


@pytest.mark.parametrize("family", [*FAMILIES, STUDENT])
def test_bf16(pipeline, family):
    """bf16 is no further from the float64 truth than 1.5 times the oracle's own."""
    net, oracle = pair(pipeline, family, torch.bfloat16)
    with torch.no_grad():
        x_t, t, cond = inputs(family, torch.bfloat16, 3, (12, 16))
        _, exact = pair(pipeline, family, torch.float64)
        exact.load_state_dict({key: value.double() for key, value in oracle.state_dict().items()})
        wide = {key: value if value.dtype == torch.int64 else value.double() for key, value in cond.items()}
        truth = exact(x_t.double(), t.double(), wide)
        ours = (net(x_t, t.float(), cond).double() - truth).norm() / truth.norm()
        theirs = (oracle(x_t, t.float(), cond).double() - truth).norm() / truth.norm()
    assert 1e-4 < ours < 1.5 * theirs


@pytest.mark.parametrize("family", [*FAMILIES, STUDENT])
def test_features_are_the_mean_of_what_the_output_projection_reads(pipeline, family):
    net, oracle = pair(pipeline, family, torch.float64)
    x_t, t, cond = inputs(family, torch.float64)
    (v, hidden), (_, expected) = net(x_t, t, cond, features=True), oracle(x_t, t, cond, features=True)
    assert torch.equal(v, net(x_t, t, cond))
    assert hidden.shape == (2, net.proj_out.in_features)
    assert error(hidden, expected) < 1e-10


def test_masked_words_do_not_matter_and_unmasked_do(pipeline):
    net, _ = pair(pipeline, "sana", torch.float64)
    x_t, t, cond = inputs("sana", torch.float64)
    other = {**cond, "text": cond["text"] + 5.0 * (1 - cond["mask"][..., None])}
    torch.testing.assert_close(net(x_t, t, other), net(x_t, t, cond))
    assert error(net(x_t, t, {"text": cond["text"]}), net(x_t, t, cond)) > 1e-3


@pytest.mark.parametrize("family", ["flux-dev", STUDENT])
def test_guidance_embedding_defaults_to_the_network_s_own(pipeline, family):
    net, _ = pair(pipeline, family, torch.float64)
    x_t, t, cond = inputs(family, torch.float64)
    cond["guidance"] = torch.full((2,), net.guidance, dtype=torch.float64)
    expected = net(x_t, t, cond)
    del cond["guidance"]
    torch.testing.assert_close(net(x_t, t, cond), expected, rtol=0, atol=0)
    net.guidance = 1.0
    assert error(net(x_t, t, cond), expected) > 1e-4


def test_positions_beyond_the_table_are_refused(pipeline):
    net, _ = pair(pipeline, "sd3-medium", torch.float32)
    x_t, t, cond = inputs("sd3-medium", torch.float32, size=(26, 8))
    with pytest.raises(ValueError, match="13 x 4 patches: the table of positions has 12 x 12"):
        net(x_t, t, cond)


@pytest.mark.parametrize("sample_size, max_size", [(128, 192), (128, 384), (8, 12)])
def test_table_of_positions(sample_size, max_size):
    """The table that a network without a checkpoint starts with: within float32's rounding of
    angles up to sample_size."""
    ours = sid_fm.PatchEmbed(4, 32, 2, max_size, sample_size // 2).pos_embed
    theirs = diffusers.models.embeddings.PatchEmbed(
        sample_size, sample_size, 2, 4, 32, pos_embed_max_size=max_size
    ).pos_embed
    assert (ours - theirs).abs().max() < sample_size * 2**-24
