"""Iterations of a model's shape: what they compute, and how they are compared; no CUDA device is needed."""

import numpy as np
import pytest
import torch

from agents.hardware import MODELS, predict_s, profile
from eval.gpu_iterations import SHAPES, Layers, Shape, errors, main, measure

SMALL = Shape(layers=2, hidden=32, intermediate=48, heads=4, kv_heads=2, head_dim=8, vocabulary=50)
CPU = torch.device("cpu")


def test_shapes_are_those_of_the_catalogue() -> None:
    for name, shape in SHAPES.items():
        known = MODELS[name]
        assert (shape.layers, shape.kv_heads, shape.head_dim) == (known.layers, known.kv_heads, known.head_dim)
        tied = shape.vocabulary * shape.hidden if name == "qwen3-4b" else 0
        assert shape.parameters - tied == pytest.approx(known.parameters, rel=2e-4)  # norms apart


def test_a_prompt_beside_decoding_sequences_is_computed_as_alone() -> None:
    torch.manual_seed(0)
    layers = Layers(SMALL, CPU, 64, torch.float32)
    layers.cache.normal_()
    tokens = torch.randint(0, 50, (3 + 5,))
    together = layers.iteration(tokens, 3, 16)
    assert together.shape == (4,)  # a token for each sequence, and the prompt's first
    assert together[:3].tolist() == layers.iteration(tokens[:3], 3, 16).tolist()
    assert together[3:].tolist() == layers.iteration(tokens[3:], 0, 0).tolist()
    # Attention is causal, and reads the cache.
    longer = torch.cat([tokens[3:], tokens[:1]])
    assert layers.iteration(longer[:-1], 0, 0).tolist() == together[3:].tolist()
    logits = [layers.iteration(tokens[:3], 3, 16).tolist()]
    layers.cache.normal_()
    logits.append(layers.iteration(tokens[:3], 3, 16).tolist())
    assert logits[0] != logits[1]


def test_loads_that_the_cache_holds_are_timed_and_compared() -> None:
    layers = Layers(SMALL, CPU, 64, torch.float32)
    rows = measure(layers, [(2, 16, 0), (8, 16, 0), (0, 0, 16), (2, 16, 8)], 64)
    np.testing.assert_array_equal(rows[:, :3], [(2, 32, 0), (0, 0, 16), (2, 32, 8)])
    assert (rows[:, 3] > 0).all()
    predicted_s = predict_s(profile("h100", "llama-3-8b").row(), rows)
    rows[:, 3] = predicted_s / [1.1, 0.8, 1.0]
    found = errors(rows, predicted_s)
    assert found["decode"] == {"loads": 1, **dict.fromkeys(("bias", "mean", "largest"), pytest.approx(0.1))}
    assert found["prefill"]["bias"] == pytest.approx(-0.2) and found["mixed"]["mean"] == pytest.approx(0.0)


def test_without_a_cuda_device_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
