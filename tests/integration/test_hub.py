"""huggingface_hub's real client against a hub on loopback."""

import os
import subprocess
import sys

import pytest

from tests.fake_hub import fake_hub
from tests.runs import learn, project, prompt

TOKEN = "hf_" + "x" * 34


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run."""
    stream = learn(project(tmp_path_factory.mktemp("project")))
    stream.result()
    return stream.folder


def gainlora(*arguments, home, endpoint):
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(home)}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-m", "gainlora", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_run_goes_to_the_hub_and_comes_back(run, tmp_path):
    """Nothing but the adapter, the run and the card goes there, no token is shown, and the answers are the same."""
    with fake_hub() as hub:
        pushed = gainlora("push", run, "me/tiny", home=tmp_path / "mine", endpoint=hub.url)
        assert pushed.returncode == 0, pushed.stderr
        assert pushed.stdout.startswith(f"{hub.url}/me/tiny/commit/")
        files = hub.repos["me/tiny"]
        assert set(files) - {".gitattributes"} == {
            "README.md", "adapter_config.json", "adapter_model.safetensors", "gate.safetensors", "run.json",
            "subspace.safetensors",
        }  # fmt: skip
        assert files["gate.safetensors"] == (run / "task_03_task3" / "gate.safetensors").read_bytes()
        assert b'from_pretrained("me/tiny")' in files["README.md"]
        assert hub.tokens <= {f"Bearer {TOKEN}", None} and f"Bearer {TOKEN}" in hub.tokens
        text = prompt(run, "task2")
        here = gainlora("predict", run, text, "--explain", home=tmp_path / "mine", endpoint=hub.url)
        there = gainlora("predict", "me/tiny", text, "--explain", home=tmp_path / "theirs", endpoint=hub.url)
        assert there.returncode == 0, there.stderr
        assert here.stdout == there.stdout and here.stdout.count("█") > 3
        nothing = gainlora("predict", "me/nothing", text, home=tmp_path / "theirs", endpoint=hub.url)
        assert nothing.returncode == 1 and "me/nothing: no such folder, and not on the hub" in nothing.stderr
    gone = gainlora("push", run, "me/tiny", home=tmp_path / "mine", endpoint=hub.url)
    assert gone.returncode == 1 and gone.stderr.startswith("error: me/tiny: not pushed (")
    for said in (pushed, here, there, nothing, gone):
        assert TOKEN not in said.stdout + said.stderr
