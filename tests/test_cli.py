"""The `wwwserve` command."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bundle_cases import RESULTS, WITHOUT

from wwwserve.agents.arguments import parse_args
from wwwserve.agents.policy.bundle import FORMAT, MANIFEST, SEALED, WEIGHTS, digest, seal
from wwwserve.agents.policy.network import Actor, weights_of
from wwwserve.agents.view import VIEW_VERSION
from wwwserve.serving import cli
from wwwserve.serving.http.keys import Identity
from wwwserve.train.export import export

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "policy"
    torch.manual_seed(2)
    export(weights_of(Actor(width=8)), folder, {"training": {"seed": 4}, "agent_steps": 34_000}, RESULTS)
    return folder


def test_verify_says_ok_with_figures(bundle, capsys):
    assert cli.main(["policy", "verify", str(bundle)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"ok: {bundle}\n")
    assert "golden   16 views" in out
    assert float(re.search(r"speed +([0-9.]+) µs a decision", out)[1]) > 0


def test_verify_refuses_with_the_reason(bundle, tmp_path, capsys):
    assert cli.main(["policy", "verify", str(tmp_path / "none")]) == 1
    assert f"wwwserve: {tmp_path / 'none' / MANIFEST}: cannot be read: No such file" in capsys.readouterr().err


def test_show_says_what_a_bundle_holds(bundle, capsys):
    assert cli.main(["policy", "show", str(bundle)]) == 0
    out = capsys.readouterr().out
    for part in (f"bundle format {FORMAT}", "9 markups", f"observation spec {VIEW_VERSION}", "width 8",
                 "34,000 agent steps, seed 4", "numpy ", "+0.0500 ± 0.0040", "0.8600 ± 0.0100 single"):  # fmt: skip
        assert part in out
    for name in SEALED:
        assert f"{digest((bundle / name).read_bytes())}" in out


def test_show_says_how_a_policy_sells(capsys):
    assert cli.main(["policy", "show", "cooperative"]) == 0
    out = capsys.readouterr().out
    assert "brings 0.75 of what it costs by now\n" in out and "its cost times 1 + 0.5 for the share of prompts" in out


def test_show_says_of_what_revision_a_bundle_is_in_words(capsys):
    assert cli.main(["policy", "show"]) == 0
    assert re.search(r"^git +[0-9a-f]{40}, with(out)? uncommitted changes$", capsys.readouterr().out, re.MULTILINE)


def test_show_as_json_is_the_manifest(bundle, capsys):
    assert cli.main(["policy", "show", "--json", str(bundle)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((bundle / MANIFEST).read_text())


@pytest.mark.parametrize("results", [None, [], {"policies": 3, "best_rule": {"a": []}}, {"policies": {}}, "much"])
def test_show_copes_with_what_anyone_may_write_into_a_manifest(results, bundle, tmp_path, capsys):
    manifest = json.loads((bundle / MANIFEST).read_text())
    contents = {name: (bundle / name).read_bytes() for name in SEALED}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    changed = manifest | {"results": results, "name": "\x1b[2Jmine\n", "packages": [[]], "seed": {}}
    (tmp_path / MANIFEST).write_bytes(seal(changed, contents))
    assert cli.main(["policy", "show", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "none in tabular form" in out


def test_without_a_folder_it_is_the_policy_that_is_shipped():
    bundle = parse_args(cli.PolicyVerify, "wwwserve", []).bundle
    assert cli.folder_of(bundle).samefile(ROOT / "agents" / "data" / "policies" / "competitive")


@pytest.mark.parametrize(
    "argv", [[], ["policy"], ["polish"], ["policy", "show", "--yaml"], ["policy", "verify", "a", "b"]]
)
def test_wrong_usage_exits_with_2(argv, capsys):
    assert cli.main(argv) == 2
    shown = capsys.readouterr()
    assert "wwwserve" in shown.err and not shown.out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["calibrate", "http://127.0.0.1:9", "--tokens", "2"], "wwwserve calibrate: tokens is 2, expected at least 8"),
        (["calibrate", "http://127.0.0.1:9", "--kind", "tgi"], "kind is 'tgi', expected one of vllm, sglang"),
        (["up", "--nodes", "many"], "wwwserve up: --nodes: got 'many', expected a number"),
        (["up", "--engine", "tgi"], "invalid choice 'tgi'"),
        (["up", "--speed", "0"], "wwwserve up: --speed is 0.0, expected 0.01 to 100"),
        (["compare", "paper/alternating", "--seeds", "0"], "wwwserve compare: --seeds is 0, expected at least 1"),
    ],
)
def test_a_bad_value_is_named_with_what_was_expected_in_one_line(argv, message, capsys):
    assert cli.main(argv) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_help_lists_every_command_and_each_has_help_of_its_own(capsys):
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"\n  {name} " in listed
        with pytest.raises(SystemExit) as end:
            cli.main([*name.split(), "--help"])
        assert end.value.code == 0
        assert "usage: " in capsys.readouterr().out


def test_every_program_of_a_checkout_is_a_command():
    tools = {tool.module for tool in cli.COMMANDS.values() if isinstance(tool, cli.Tool)}
    programs = {
        str(file.relative_to(ROOT).with_suffix("")).replace("/", ".")
        for package in ("envs", "eval", "train")
        for file in (ROOT / package).rglob("*.py")
        if "\ndef main(" in file.read_text()
    }
    assert programs == tools


@pytest.mark.parametrize("tool", ["train", "figures"])
def test_a_tool_that_needs_training_libraries_names_the_extra(tool):
    program = WITHOUT + "from wwwserve.serving.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, tool, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(
        rf"wwwserve {tool}: needs \w+: pip install '\.\[train\]' in a clone of the repository\n", done.stderr
    )


def test_verify_runs_where_no_training_library_can_be_imported(bundle):
    program = WITHOUT + "from wwwserve.serving.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "policy", "verify", str(bundle)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("ok: "), done.stderr


def test_a_reader_that_has_seen_enough_gets_no_traceback(bundle):
    command = f"'{sys.executable}' -m wwwserve.serving.cli policy show --json '{bundle}' | head -c 1"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "{" and "Traceback" not in done.stderr


def test_ctrl_c_while_it_is_imported_just_ends_it():
    program = """
import sys, time
class Slow:
    def find_spec(self, name, *rest):
        if name == "wwwserve.serving.cli":
            print("importing", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow())
from wwwserve.serving.start import main
sys.exit(main())
"""
    command = [sys.executable, "-c", program, "--version"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_node_that_compiles_is_ended_at_once(number: signal.Signals, tmp_path: Path) -> None:
    program = """
import sys, time
from wwwserve.serving import cli, node
def compiling(*given):
    print("compiling", flush=True)
    for _ in range(600):
        time.sleep(0.1)
node.warm_up = compiling
sys.exit(cli.main(["node", sys.argv[1]]))
"""
    Identity.generate().save(tmp_path / "n.pem")
    profile = "{kind: catalogue, gpu: rtx-4090, model: qwen3-8b}"
    file = tmp_path / "node.yaml"
    file.write_text(f"name: n\nkey: n.pem\nport: 0\nengine: {{url: http://127.0.0.1:9, profile: {profile}}}\n")
    command = [sys.executable, "-c", program, str(file)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "compiling\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (-number, "") and "Traceback" not in err


def test_weights_of_another_bundle_are_named(bundle, tmp_path, capsys):
    for name in (MANIFEST, *SEALED):
        (tmp_path / name).write_bytes((bundle / name).read_bytes())
    content = bytearray((tmp_path / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (tmp_path / WEIGHTS).write_bytes(content)
    assert cli.main(["policy", "verify", str(tmp_path)]) == 1
    assert f"{WEIGHTS}: its SHA-256 is not the one in {MANIFEST}" in capsys.readouterr().err
