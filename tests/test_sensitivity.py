"""Errors of rounded experts, as a calibrated conversion measures them: against float64 by hand."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moert.convert import harm
from moert.convert.calibration import FEW_TOKENS, SENSITIVITY_TOKENS, WINDOW, CalibrationText
from moert.convert.convert import convert
from moert.errors import StoreError
from moert.models.stored_model import StoredModel
from moert.store.meta import parse

from .checkpoints import stored_matrices

TEXT = CalibrationText(
    "text", tuple(torch.randint(3, 320, (1500,), generator=torch.Generator().manual_seed(0)).tolist())
)
SETTINGS = {"widths": (2, 3, 4), "dense_bits": 16, "calibration": TEXT}
NORM = "model.layers.{}.post_attention_layernorm.weight"


@pytest.fixture(scope="module", autouse=True)
def not_in_nats():
    """What was measured of the layers, not scaled by what the whole model loses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harm, "in_nats", lambda measured, kl: dict(measured))
        yield


@pytest.fixture(scope="module")
def calibrated(tiny_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("s") / "out"
    return convert(tiny_checkpoint("qwen3_moe"), out, **SETTINGS)


def seen_by_experts(model, layer):
    """Record what enters the experts of a layer and what leaves the layer, by transformers: [T, D] each."""
    inputs, outputs = [], []
    block = model.model.layers[layer]
    hooks = [
        block.mlp.register_forward_hook(lambda module, args, out: inputs.append(args[0][0])),
        block.register_forward_hook(
            lambda module, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        ),
    ]
    with torch.inference_mode():
        for start in range(0, len(TEXT.tokens), WINDOW):
            model(torch.tensor([TEXT.tokens[start : start + WINDOW]]))
    for hook in hooks:
        hook.remove()
    return torch.cat(inputs).double(), torch.cat([out.view(-1, out.shape[-1]) for out in outputs]).double()


def test_it_is_the_error_of_the_outputs(calibrated, tiny_checkpoint, reference_model):
    source, dense = load_file(tiny_checkpoint("qwen3_moe") / "model.safetensors"), calibrated.load_dense()
    model = reference_model(tiny_checkpoint("qwen3_moe"))
    exactly = sampled = 0
    for layer in (0, 1):
        x, left = seen_by_experts(model, layer)
        prefix = f"model.layers.{layer}.mlp."
        scores = (x @ source[prefix + "gate.weight"].double().T).softmax(-1)
        chosen = scores.topk(3).indices
        weights = torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen))
        weights /= weights.sum(1, keepdim=True)
        shifted = x * dense[NORM.format(layer)].double() / source[NORM.format(layer)].double()
        for expert, found in enumerate(calibrated.meta.sensitivity[layer]):
            tokens = (chosen == expert).any(-1).nonzero()[:, 0]
            if len(tokens) < FEW_TOKENS:
                continue  # it borrowed at random
            gate, up, down = (
                source[f"{prefix}experts.{expert}.{n}_proj.weight"].double() for n in ("gate", "up", "down")
            )
            y = (torch.nn.functional.silu(x[tokens] @ gate.T) * (x[tokens] @ up.T)) @ down.T
            for count in (1, 2, 3):
                gate, up, down = stored_matrices(calibrated, layer, expert, count)
                inner = torch.nn.functional.silu(shifted[tokens] @ gate.T) * (shifted[tokens] @ up.T)
                squares = (inner @ down.T - y).square().sum(-1) / left[tokens].square().sum(-1)
                shares = weights[tokens, expert].square()
                true = float((squares * shares).sum() / shares.sum())
                few = len(tokens) <= SENSITIVITY_TOKENS
                assert found[count - 1] == pytest.approx(true, rel=1e-3 if few else 0.2)
                exactly, sampled = exactly + few, sampled + (not few)
            assert found == sorted(found, reverse=True)
    assert exactly > 10
    assert sampled > 10


def test_a_resumed_conversion_measures_the_same(calibrated, tiny_checkpoint, tmp_path):
    def stop(progress):
        if "experts of layer 2" in progress.stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tiny_checkpoint("qwen3_moe"), tmp_path / "out", **SETTINGS, progress=stop)
    resumed = convert(tiny_checkpoint("qwen3_moe"), tmp_path / "out", **SETTINGS, resume=True)
    assert resumed.meta.sensitivity == calibrated.meta.sensitivity


def test_experts_that_see_few_tokens_are_measured_on_what_they_borrow(tiny_checkpoint, tmp_path):
    few = CalibrationText("few", TEXT.tokens[:100])
    meta = convert(tiny_checkpoint("qwen3_moe"), tmp_path / "out", calibration=few).meta
    assert all(0 < error < 1 for layer in (0, 1) for row in meta.sensitivity[layer] for error in row)


def test_a_rounded_store_has_the_errors_of_its_weights(store, tiny_checkpoint):
    rounded = StoredModel.open(store(widths=(2, 4)))
    source = load_file(tiny_checkpoint("qwen3_moe") / "model.safetensors")
    for layer, expert in ((0, 3), (1, 7)):
        prefix = f"model.layers.{layer}.mlp.experts.{expert}."
        right = [source[f"{prefix}{n}_proj.weight"].double() for n in ("gate", "up", "down")]
        for count in (1, 2):
            pairs = zip(stored_matrices(rounded, layer, expert, count), right, strict=True)
            shares = [float((q - w).square().sum() / w.square().sum()) for q, w in pairs]
            assert rounded.meta.sensitivity[layer][expert][count - 1] == pytest.approx(sum(shares) / 3, rel=1e-4)
    # Of normal inputs; the weights of 3 of 8 add up to 1.
    count, *quantiles = rounded.meta.router_weights[0][0]
    assert count > 1000
    assert quantiles == sorted(quantiles)
    assert sum(quantiles) / len(quantiles) == pytest.approx(1 / 3, rel=0.1)
    assert rounded.bit_router() is not None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, r"sensitivity\.0 is missing"),
        ([], "sensitivity is not an object"),
        ({"0": 3}, r"sensitivity\.0 is not a list of 8 experts"),
        ({"0": [[0.5, 0.1, 0.0]] * 7}, r"sensitivity\.0 is not a list of 8 experts"),
        ({"0": [[0.5, 0.1]] * 8}, r"sensitivity\.0 does not have 3 numbers for each expert"),
        ({"0": [[0.5, 0.1, -0.1]] * 8}, r"sensitivity\.0 has an error that is not a number from 0 on"),
        ({"0": [[0.5, 0.1, float("nan")]] * 8}, r"sensitivity\.0 has an error that is not a number from 0 on"),
        ({"0": [[0.5, 0.1, "1"]] * 8}, r"sensitivity\.0 has an error that is not a number from 0 on"),
    ],
)
def test_a_damaged_one_is_named(calibrated, wrong, message):
    value = json.loads((calibrated.path / "moert.json").read_text())
    assert parse(value, Path("moert.json")) == calibrated.meta
    value["sensitivity"] = wrong
    with pytest.raises(StoreError, match=message):
        parse(value, Path("moert.json"))
