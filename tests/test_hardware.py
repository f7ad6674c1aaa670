"""Iteration times against data the fit has not seen, the catalogue, and the kernel against plain Python."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest

from wwwserve.agents import hardware
from wwwserve.agents.hardware import (
    BLOCK_TOKENS,
    FITTED,
    GPUS,
    MODELS,
    QUANTIZATIONS,
    Profile,
    iteration_s,
    off_line_s,
    profile,
)
from wwwserve.eval import hardware_fit

PAIRS = [(gpu, model) for gpu in GPUS for model in MODELS]
TOO_LARGE = {("rtx-4090", "qwen3-14b"), ("rtx-3090", "qwen3-14b")}
plain_iteration_s = getattr(iteration_s, "py_func", iteration_s)


@pytest.fixture
def llama() -> Profile:
    return profile("a100-80g", "llama-3-8b")


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("pair", FITTED, ids=" ".join)
def test_a_fit_to_half_of_the_sizes_predicts_the_other_half(pair: tuple[str, str], half: int) -> None:
    errors = hardware_fit.held_out_errors(hardware_fit.iteration_times()[pair], half)
    assert errors["decode"] <= 0.04
    assert errors["mixed"] <= 0.08
    assert errors["all"] <= 0.08
    assert errors["prefill"] <= 0.11  # few rows, each one or two sizes away from a fitted one


@pytest.mark.parametrize("pair", FITTED, ids=" ".join)
def test_stored_coefficients_are_the_fit_to_all_rows(pair: tuple[str, str]) -> None:
    np.testing.assert_allclose(hardware_fit.fit(hardware_fit.iteration_times()[pair]), FITTED[pair], rtol=0.01)


def test_every_table_of_iteration_times_is_in_the_catalogue() -> None:
    tables = hardware_fit.iteration_times()
    assert set(tables) == set(FITTED)
    assert {pair: len(rows) for pair, rows in tables.items()} == {
        ("a100-80g", "llama-3-8b"): 154,
        ("a100-80g", "llama-2-7b"): 123,
        ("a40", "llama-2-7b"): 104,
    }


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_fit_recovers_known_coefficients(scale: float) -> None:
    truth = scale * np.array([8e-3, 6e-5, 2e-7, 2e-3, 9e-5])
    decode = [(b, b * c, 0) for b in (1, 4, 16, 64) for c in (100, 2000)]
    prefill = [(0, 0, p) for p in (32, 256, 1024, 2048)]
    rows = np.array([(*row, iteration_s(truth, *map(float, row))) for row in decode + prefill])
    np.testing.assert_allclose(hardware_fit.fit(rows), truth, rtol=1e-3)
    beyond_one_chunk = np.vstack([rows, [0, 0, 4096, 99.0]])
    np.testing.assert_allclose(hardware_fit.fit(beyond_one_chunk), truth, rtol=1e-3)


def test_fit_refuses_what_it_cannot_identify() -> None:
    rows = hardware_fit.iteration_times()["a40", "llama-2-7b"]
    with pytest.raises(ValueError, match="two prefill sizes"):
        hardware_fit.fit(rows[rows[:, hardware_fit.PREFILL_TOKENS] == 0])
    with pytest.raises(ValueError, match="two decode batch sizes"):
        hardware_fit.fit(rows[rows[:, hardware_fit.DECODING] <= 1])
    with pytest.raises(ValueError, match="positive times"):
        hardware_fit.fit(rows * [1, 1, 1, -1])


@pytest.mark.parametrize(("gpu", "model"), PAIRS)
def test_each_pair_is_a_profile_or_says_that_it_does_not_fit(gpu: str, model: str) -> None:
    if (gpu, model) in TOO_LARGE:
        with pytest.raises(ValueError, match=f"{model} does not fit on {gpu}"):
            profile(gpu, model)
        return
    made = profile(gpu, model, max_num_seqs=48)
    assert made.source.startswith("fitted: " if (gpu, model) in FITTED else "roofline: ")
    assert made.max_num_seqs == 48
    assert made.max_batched_tokens == 2048
    assert made.kv_tokens == made.kv_blocks * BLOCK_TOKENS >= 2048
    assert made.max_model_len == min(MODELS[model].max_model_len, made.kv_tokens)
    in_use = made.kv_tokens * MODELS[model].kv_bytes_per_token + MODELS[model].weight_bytes
    assert in_use < 0.9 * 2**30 * GPUS[gpu].memory_gib
    # No faster than the published peaks allow.
    assert made.weight_s > MODELS[model].weight_bytes / (GPUS[gpu].bandwidth_gbs * 1e9)
    assert made.per_kv_token_s > MODELS[model].kv_bytes_per_token / (GPUS[gpu].bandwidth_gbs * 1e9)
    assert made.per_token_s > 2 * MODELS[model].parameters / (GPUS[gpu].bf16_tflops * 1e12)


@pytest.mark.parametrize("pair", FITTED, ids=" ".join)
def test_roofline_is_near_the_fit_where_both_exist(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = profile(*pair).row()
    monkeypatch.delitem(FITTED, pair)
    guessed = profile(*pair)
    assert guessed.source.startswith("roofline: ")
    for state in [(1.0, 500.0, 0.0), (32.0, 30_000.0, 0.0), (0.0, 0.0, 2048.0), (32.0, 30_000.0, 512.0)]:
        assert iteration_s(guessed.row(), *state) == pytest.approx(iteration_s(fitted, *state), rel=0.2)


@pytest.mark.parametrize("gpu", ["rtx-4090", "rtx-3090"])
def test_an_8b_model_fits_a_24_gb_card(gpu: str) -> None:
    assert 20_000 <= profile(gpu, "qwen3-8b").kv_tokens <= 35_000


def test_kv_cache_follows_memory_utilization() -> None:
    assert profile("a40", "qwen3-8b", memory_utilization=0.6).kv_tokens < profile("a40", "qwen3-8b").kv_tokens
    with pytest.raises(ValueError, match="qwen3-8b does not fit on a40"):
        profile("a40", "qwen3-8b", memory_utilization=0.37)
    for bad in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="memory_utilization"):
            profile("a40", "qwen3-8b", memory_utilization=bad)


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown gpu 'tpu', known: a100-80g, .*a40"):
        profile("tpu", "qwen3-8b")
    with pytest.raises(ValueError, match=r"unknown model 'gpt', known: qwen3-0.6b, .*llama-2-7b"):
        profile("a40", "gpt")


def test_kv_bytes_per_token() -> None:
    sizes = {
        "qwen3-0.6b": 112,
        "qwen3-4b": 144,
        "qwen3-8b": 144,
        "qwen3-14b": 160,
        "llama-3-8b": 128,
        "llama-2-7b": 512,
    }
    assert {name: model.kv_bytes_per_token / 1024 for name, model in MODELS.items()} == sizes


def test_weight_only_quantization_shrinks_the_weights_and_leaves_the_compute() -> None:
    plain = profile("rtx-4090", "qwen3-8b")
    made = {name: profile("rtx-4090", "qwen3-8b", quantization=name) for name in QUANTIZATIONS}
    assert made["bf16"] == plain
    assert made["fp8wo"].weight_s > made["int4wo-32"].weight_s > made["int4wo-128"].weight_s
    assert made["fp8wo"].kv_blocks < made["int4wo-32"].kv_blocks < made["int4wo-128"].kv_blocks
    for name, each in made.items():
        assert (each.per_seq_s, each.per_token_s) == (plain.per_seq_s, plain.per_token_s)
        assert ("; " + name in each.source) == (name != "bf16")
    # 1.24 of 8.19 billion parameters stay in bf16: half of the rest's bytes is 0.576 of all.
    assert made["fp8wo"].weight_s == pytest.approx(0.576 * plain.weight_s, rel=1e-3)
    with pytest.raises(ValueError, match="unknown quantization 'int3', known: bf16, fp8wo"):
        profile("a40", "qwen3-8b", quantization="int3")


def test_a_larger_model_fits_when_it_is_quantized() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        profile("rtx-4090", "qwen3-14b")
    assert profile("rtx-4090", "qwen3-14b", quantization="int4wo-128").kv_tokens > 50_000


def test_an_attention_backend_changes_what_sequences_and_context_cost() -> None:
    plain = profile("a100-80g", "qwen3-8b")
    triton, sdpa = (profile("a100-80g", "qwen3-8b", attention=name) for name in ("triton", "sdpa"))
    assert (triton.row() == plain.row()).all()
    assert sdpa.per_kv_token_s == pytest.approx(3 * plain.per_kv_token_s)
    assert sdpa.per_seq_s - plain.per_seq_s == pytest.approx(36 * 5 * 5e-6)  # 36 layers, 5 launches
    assert (sdpa.weight_s, sdpa.kv_blocks) == (plain.weight_s, plain.kv_blocks)
    with pytest.raises(ValueError, match="unknown attention 'magic', known: flashinfer"):
        profile("a40", "qwen3-8b", attention="magic")


def test_row_has_the_fields_in_the_named_columns(llama: Profile) -> None:
    row = llama.row()
    assert row.shape == (hardware.PROFILE_SIZE,)
    assert row.dtype == np.float64
    names = [field.name for field in fields(llama) if field.name not in ("source", "batch_s")]
    assert {name: row[getattr(hardware, name.upper())] for name in names} == {n: getattr(llama, n) for n in names}
    assert row[hardware.BATCH_S :].tolist() == [0.0] * hardware.KNOTS


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("weight_s", 0.0, "weight_s must be positive"),
        ("per_seq_s", -1e-6, "per_seq_s must be positive"),
        ("per_token_s", math.nan, "per_token_s must be positive and finite"),
        ("prefill_base_s", math.inf, "prefill_base_s must be positive and finite"),
        ("seq_tokens", -0.1, "seq_tokens must be finite and not negative"),
        ("batch_s", (0.1, math.inf), "batch_s must be at most 9 finite numbers"),
        ("batch_s", (0.0,) * 10, "batch_s must be at most 9 finite numbers"),
        ("per_pair_s", math.nan, "per_pair_s must be finite and not negative"),
        ("kv_blocks", 0, "kv_blocks must be positive"),
        ("max_num_seqs", 1.5, "max_num_seqs must be an integer"),
    ],
)
def test_profile_refuses_impossible_values(llama: Profile, field: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(llama, **{field: value})


def test_known_iteration_times(llama: Profile) -> None:
    c = FITTED["a100-80g", "llama-3-8b"]
    assert iteration_s(llama.row(), 1.0, 128.0, 0.0) == pytest.approx(10.25e-3, rel=0.02)  # first row of the data
    assert iteration_s(llama.row(), 7.0, 3000.0, 0.0) == pytest.approx(c[0] + 7 * c[1] + 3000 * c[2])
    assert iteration_s(llama.row(), 7.0, 3000.0, 500.0) == pytest.approx(c[3] + 507 * c[4] + 7 * c[1] + 3000 * c[2])


def test_kernel_agrees_with_plain_python() -> None:
    rng = np.random.default_rng(3)
    for pair in FITTED:
        row = profile(*pair).row()
        for _ in range(100):
            state = rng.integers(0, 256), rng.integers(0, 100_000), rng.integers(0, 2048) * rng.integers(0, 2)
            expected = plain_iteration_s(row, *map(float, state))
            assert iteration_s(row, *map(float, state)) == pytest.approx(expected, rel=1e-15)
            assert iteration_s(row, *map(int, state)) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("gpu", GPUS)
def test_time_grows_with_each_argument(gpu: str) -> None:
    row = profile(gpu, "qwen3-8b").row()
    rng = np.random.default_rng(4)
    for _ in range(200):
        state = rng.uniform(0, [256, 100_000, 2048]) * [1, 1, rng.integers(0, 2)]
        for argument, step in enumerate((1.0, 16.0, 1.0)):
            more = state.copy()
            more[argument] += step
            if argument == 2:
                assert iteration_s(row, *more) >= iteration_s(row, *state)
            else:
                assert iteration_s(row, *more) > iteration_s(row, *state)


def test_beyond_the_line_a_batch_takes_what_was_measured(llama: Profile) -> None:
    row = replace(llama, batch_s=(0.001, -0.002, 0.004)).row()
    expected = {1: 0.001, 2: -0.002, 3: 0.001, 4: 0.004, 6: 0.004, 256: 0.004, 1024: 0.004}
    assert {batch: off_line_s(row, batch) for batch in expected} == pytest.approx(expected)
    assert off_line_s(replace(llama, batch_s=tuple(range(9))).row(), 192) == pytest.approx(7.5)
    assert off_line_s(replace(llama, batch_s=tuple(range(9))).row(), 1024) == 8.0  # as at the last knot
    assert {off_line_s(llama.row(), batch) for batch in range(1, 257)} == {0.0}


def test_a_small_prefill_hides_under_the_weight_read(llama: Profile) -> None:
    row = llama.row()
    hidden = (llama.weight_s - llama.prefill_base_s) / llama.per_token_s
    assert 50 < hidden < 130
    decode_only = iteration_s(row, 8.0, 4000.0, 0.0)
    assert iteration_s(row, 8.0, 4000.0, math.floor(hidden) - 8.0) == decode_only
    assert iteration_s(row, 8.0, 4000.0, math.ceil(hidden) - 7.0) > decode_only
